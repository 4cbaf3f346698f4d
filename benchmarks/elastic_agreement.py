"""The same figures through both backends: SciFact and the radiograph tasks, on a cluster and on the embedded index.

``python -m benchmarks.elastic_agreement`` writes docs/bench/agreement.md. The cluster is given the documents, findings
and vectors that the embedded collection holds (exact kinds, one shard), so that whatever differs is the backend's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.collections import TASKS, data, home, indexed, tasks
from benchmarks.retrieval import MEASURES, SAME_ID
from indexers.elastic import connect
from indexers.elastic_build import build_elastic
from indexers.elastic_index import Place, open_elastic
from retrieval.engine import Engine
from retrieval.files import read_source
from retrieval.types import Document, Prepared, Rejected, Snapshot
from server.home import Home, silent
from server.judging import judgments, measure
from tests.elastic_server import Cluster

OUT = Path("docs/bench/agreement.md")
LEGS = ("lexical", "dense", "image", "ontology", "hybrid")
FILMS = ("label_images", "image_images", "report_images")


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
    cluster = Cluster()
    try:
        for collection, source, names in work(at):
            engine = at.engine(collection)
            other = copied(engine, read_source(source).documents(), cluster.url)
            for name in names:
                rows.append(compared(engine, other, source.parent / name if collection != "scifact" else source))
                print(rows[-1], flush=True)
                write(rows)
    finally:
        cluster.stop()


def work(at: Home) -> Iterator[tuple[str, Path, Sequence[str]]]:
    """Collections, a source with their documents, and what is asked of them."""
    indexed(at, "scifact", data() / "scifact", pictures=False)
    yield "scifact", data() / "scifact", ("scifact",)
    reports = [task for task in TASKS if task not in FILMS]
    for collection, names in (("dev-reports", reports), ("dev-films", FILMS)):
        source = tasks("dev") / names[0]
        indexed(at, collection, source)
        yield collection, source, names


def copied(engine: Engine, documents: Iterator[Document | Rejected], url: str) -> Engine:
    """The same engine over a copy of its collection on the cluster."""
    held = engine.snapshot()
    place = Place(connect(url), f"agreement-{engine.name}", Path(tempfile.mkdtemp()))
    build_elastic(
        place, documents, Copied(held), config={}, spaces=dict(held.spaces), vector_index="flat",
        progress=silent,
    )  # fmt: skip
    return replace(engine, index=open_elastic(place))


def compared(engine: Engine, other: Engine, source: Path) -> list[str]:
    name = MEASURES.get(source.name, "nDCG@10")
    legs = [leg for leg in LEGS if leg == "hybrid" or leg in engine.legs()]
    judged = judgments(source)
    ours, theirs = (
        measure(e, judged, legs, (name,), drop_identical_ids=source.name in SAME_ID, progress=silent).evaluations
        for e in (engine, other)
    )
    figures = {leg: (ours[leg].means[name], theirs[leg].means[name]) for leg in legs}
    cells = [f"{figures[leg][0]:.4f} / {figures[leg][1]:.4f}" if leg in figures else "" for leg in LEGS]
    return [
        f"{source.name} ({len(judged.qrels)})",
        name,
        *cells,
        f"{max(abs(a - b) for a, b in figures.values()):.4f}",
    ]


def write(rows: Sequence[Sequence[str]]) -> None:
    head = ["collection or task (queries)", "measure", *LEGS, "largest difference"]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    OUT.write_text(f"# Two backends, the same figures\n\n{(__doc__ or '').strip()}\nEmbedded / cluster.\n\n{table}\n")


if __name__ == "__main__":
    main()
