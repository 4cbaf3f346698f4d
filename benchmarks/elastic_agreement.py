"""The same figures through both backends: SciFact and the radiograph tasks, on a cluster and on the embedded index.

``python -m benchmarks.elastic_agreement`` writes docs/bench/agreement.md. The cluster is given the documents, findings
and vectors that the embedded collection holds (exact kinds, one shard), so that whatever differs is the backend's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.collections import TASKS, data, home, indexed, tasks
from benchmarks.retrieval import LEGS, corpus_of, measured, table
from indexers.elastic import connect
from indexers.elastic_build import build_elastic
from indexers.elastic_index import Place, open_elastic
from retrieval.engine import Engine
from retrieval.files import read_source
from retrieval.types import Document, Prepared, Snapshot
from server.home import silent
from tests.elastic_server import Cluster

OUT = Path("docs/bench/agreement.md")


class Copied:
    """What an embedded collection holds of documents, as `Prepare`."""

    digest = "copied"

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def __call__(self, documents: Sequence[Document]) -> Prepared:
        ids = [document.id for document in documents]
        held = [document for document in self.snapshot.fetch(ids) if document is not None]
        return Prepared(held, {key: self.snapshot.vectors(*key, ids) for key in self.snapshot.sides}, [])


def main() -> None:
    at, rows = home(), []
    copies: dict[str, Engine] = {}
    cluster = Cluster()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for source in (data() / "scifact", *(tasks("dev") / task for task in TASKS)):
                corpus = "scifact" if source.name == "scifact" else corpus_of(source.name)
                indexed(at, corpus, source, pictures=corpus != "scifact")
                engine = at.engine(corpus)
                if corpus not in copies:
                    place = Place(connect(cluster.url), f"agreement-{corpus}", Path(folder) / corpus)
                    copies[corpus] = copied(engine, source, place)
                rows.append(compared(engine, copies[corpus], source))
                print(rows[-1], flush=True)
                write(rows)
    finally:
        cluster.stop()


def copied(engine: Engine, source: Path, place: Place) -> Engine:
    """The same engine over a copy of its collection on the cluster. source: one that holds its documents."""
    held = engine.snapshot()
    build_elastic(
        place, read_source(source).documents(), Copied(held), config={}, spaces=dict(held.spaces),
        vector_index="flat", progress=silent,
    )  # fmt: skip
    return replace(engine, index=open_elastic(place))


def compared(engine: Engine, other: Engine, source: Path) -> list[str]:
    name, ours = measured(engine, source)
    _, theirs = measured(other, source)
    figures = {leg: (e.means[name], theirs.evaluations[leg].means[name]) for leg, e in ours.evaluations.items()}
    cells = [f"{figures[leg][0]:.4f} / {figures[leg][1]:.4f}" if leg in figures else "" for leg in LEGS]
    largest = max(abs(a - b) for a, b in figures.values())
    return [f"{source.name} ({len(ours.judgments.qrels)})", name, *cells, f"{largest:.4f}"]


def write(rows: Sequence[Sequence[str]]) -> None:
    lines = table(["collection or task (queries)", "measure", *LEGS, "largest difference"], rows)
    about = ["# Two backends, the same figures", "", (__doc__ or "").strip(), "Embedded / cluster.", ""]
    OUT.write_text("\n".join([*about, *lines, ""]))


if __name__ == "__main__":
    main()
