"""Elasticsearch beside the embedded index: how fast documents arrive, how fast vectors and words are found.

``python -m benchmarks.elastic [--sizes 10000,100000,1000000] [--home DIR]`` writes
docs/elasticsearch-speed.md and .json. What the JSON holds already is not measured again, so a long run can be made in
pieces. The server runs on the ``java`` of the PATH: 21 or newer gives it vector instructions, as the one has that
comes with Elasticsearch.

Both run on this machine, one after the other, the server as one node with 4 GB of heap. Vectors are those of
SciFact's documents through the packaged encoder; where a size needs more, the rest are mixtures of two of them
(weights 0.6 to 0.95 and the rest). Queries are SciFact's claims, one at a time, k = 10, each asked once before. The
row of an approximate index is its cheapest setting that finds 99 % of the true ten nearest, or its best one. The
filter keeps a hundredth of the documents.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.collections import data, indexed
from benchmarks.collections import home as bench_home
from indexers.elastic import connect
from indexers.elastic_build import build_elastic, delete_elastic
from indexers.elastic_index import Place, open_elastic
from indexers.embedded import open_index
from indexers.rebuild import build
from retrieval.files import read_source
from retrieval.filters import parse
from retrieval.types import Document, Encoded, Item, Matrix, Prepared, SpaceInfo
from server.home import Home, silent
from server.settings import Settings
from tests.elastic_server import Cluster, ask

OUT = Path("docs/elasticsearch-speed.md")
KINDS = ("flat", "hnsw-sq8")
CANDIDATES = (20, 50, 100, 200, 400, 800)
FILTER = parse({"part": 7})
K, QUERIES, WANTED = 10, 200, 0.99
JAVA_OPTIONS = "-Xms4g -Xmx4g -XX:ActiveProcessorCount=2"


class Made:
    """Documents with the vectors that were made for them."""

    digest = "made"

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix

    def __call__(self, documents: Sequence[Document]) -> Prepared:
        rows = np.arange(len(documents))
        return Prepared(
            list(documents), {("text", "text"): Encoded(rows, self.matrix[[int(d.id) for d in documents]])}, []
        )


class Sources:
    """Texts, vectors and queries of SciFact, grown to any size."""

    def __init__(self, at: Home) -> None:
        indexed(at, "scifact", data() / "scifact", pictures=False)
        snapshot = at.engine("scifact").snapshot()
        ids = snapshot.sample(len(snapshot))
        self.info = snapshot.spaces["text"]
        self.base = snapshot.vectors("text", "text", ids).matrix
        self.texts = [document.content for document in snapshot.fetch(ids) if document is not None]
        self.words = [query.parts[0].text for query in read_source(data() / "scifact").queries()][:QUERIES]
        self.queries = at.text_encoder("scifact").encode_queries([Item(text=text) for text in self.words])

    def vectors(self, size: int) -> Matrix:
        rng = np.random.default_rng(0)
        more = max(0, size - len(self.base))
        share = rng.uniform(0.6, 0.95, (more, 1)).astype(np.float32)
        left, right = (self.base[rng.integers(0, len(self.base), more)] for _ in range(2))
        mixed = share * left + (1 - share) * right
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        return np.ascontiguousarray(np.concatenate([self.base, mixed])[:size])

    def documents(self, size: int) -> Iterator[Document]:
        for n in range(size):
            yield Document(
                id=str(n), text=self.texts[n % len(self.texts)], meta={"part": n % 100, "year": 1990 + n % 30}
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="10000,100000")
    parser.add_argument("--home", type=Path)
    given = parser.parse_args()
    at = Home(Settings(home=given.home)) if given.home else bench_home()
    sources, rows = Sources(at), list(json.loads(OUT.with_suffix(".json").read_text())["rows"])
    known = {(row["size"], row["kind"], row["backend"]) for row in rows}
    cluster = Cluster(java_options=JAVA_OPTIONS)
    ways = {"embedded": embedded, "elasticsearch": partial(elastic, cluster.url)}
    try:
        for size, kind, backend in product(map(int, given.sizes.split(",")), KINDS, ways):
            if (size, kind, backend) not in known:
                rows.append(ways[backend](sources, size, kind))
                print(json.dumps(rows[-1]), flush=True)
                write(rows)
    finally:
        cluster.stop()


def embedded(sources: Sources, size: int, kind: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=".bench"))
    matrix = sources.vectors(size)
    spaces = {"text": SpaceInfo("text", sources.info.dim, sources.info.digests)}
    start = time.perf_counter()
    build(
        folder, sources.documents(size), Made(matrix), config={}, spaces=spaces, vector_index=kind, progress=silent
    )  # fmt: skip
    took = time.perf_counter() - start
    index = open_index(folder)
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row = measured(index.snapshot(), sources, matrix)
    index.close()
    shutil.rmtree(folder)
    return {"backend": "embedded", "kind": kind, "size": size, "per_s": size / took, "bytes": stored / size, **row}


def elastic(url: str, sources: Sources, size: int, kind: str) -> dict[str, Any]:
    place = Place(connect(url), f"bench-{size}-{kind}", Path(tempfile.mkdtemp()))
    matrix = sources.vectors(size)
    spaces = {"text": SpaceInfo("text", sources.info.dim, sources.info.digests)}
    start = time.perf_counter()
    build_elastic(
        place, sources.documents(size), Made(matrix), config={}, spaces=spaces, vector_index=kind, progress=silent
    )  # fmt: skip
    took = time.perf_counter() - start
    snapshot = open_elastic(place).snapshot()
    best: dict[str, Any] = {}
    for candidates in CANDIDATES if kind != "flat" else (1,):
        snapshot.candidates = candidates
        row = measured(snapshot, sources, matrix) | {"candidates": candidates}
        if not best or row["recall"] > best["recall"]:
            best = row
        if best["recall"] >= WANTED:
            break
    sizes = place.cluster.vector_bytes(snapshot.index)
    delete_elastic(place)
    java = next(iter(ask(url, "/_nodes/jvm")["nodes"].values()))["jvm"]["version"]
    found = {"backend": "elasticsearch", "kind": kind, "size": size, "per_s": size / took, "java": java}
    return found | {"bytes": sizes["store"] / size, "sizes": {k: v / size for k, v in sizes.items()}, **best}


def measured(snapshot: Any, sources: Sources, matrix: Matrix) -> dict[str, Any]:
    """Recall of ten against the true ten, and times of one query after another, in milliseconds.

    What was just built lies on the disk: every query is asked once before, untimed.
    """
    for words, query in zip(sources.words, sources.queries, strict=True):
        snapshot.search_vectors("text", query[None], K)
        snapshot.search_text([words], K)
    hits, found = 0, {"vectors": [], "filtered": [], "words": []}  # type: ignore[var-annotated]
    for words, query in zip(sources.words, sources.queries, strict=True):
        scores = matrix @ query
        least = np.partition(scores, -K)[-K] - 1e-6
        ranking = timed(found["vectors"], lambda q=query: snapshot.search_vectors("text", q[None], K)[0])  # type: ignore[misc]
        hits += sum(scores[int(hit.id)] >= least for hit in ranking)
        timed(found["filtered"], lambda q=query: snapshot.search_vectors("text", q[None], K, FILTER))  # type: ignore[misc]
        timed(found["words"], lambda w=words: snapshot.search_text([w], K))  # type: ignore[misc]
    times = {f"{name}_p{p}": float(np.percentile(t[10:], p)) for name, t in found.items() for p in (50, 95)}
    return {"recall": hits / (K * len(sources.words)), **times}


def timed(times: list[float], call: Any) -> Any:
    start = time.perf_counter()
    out = call()
    times.append((time.perf_counter() - start) * 1000)
    return out


def write(rows: Sequence[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: (row["size"], row["kind"], len(row["backend"])))
    OUT.with_suffix(".json").write_text(json.dumps({"machine": platform.processor(), "rows": rows}, indent=1) + "\n")
    columns = ["vectors", "filtered", "words"]
    head = ["documents", "index", "backend", "ingest, documents/s", "bytes a document", "recall@10"]
    lines = [[*head, *(f"{name}: p50 / p95, ms" for name in columns)]]
    lines.append(["---"] * len(lines[0]))
    for r in rows:
        cells = [
            f"{r['size']:,}",
            r["kind"],
            r["backend"],
            f"{r['per_s']:,.0f}",
            f"{r['bytes']:,.0f}",
            f"{r['recall']:.3f}",
        ]
        lines.append([*cells, *(f"{r[name + '_p50']:.1f} / {r[name + '_p95']:.1f}" for name in columns)])
    assert __doc__ is not None
    plot(rows)
    javas = sorted({row["java"] for row in rows if "java" in row})
    about = __doc__.split("\n\n", 1)[1].strip()
    server = f"Java of the server: {', '.join(javas)}."
    shown = f"![p50 over the number of documents]({OUT.stem}.png)"
    title = "# Elasticsearch beside the embedded index"
    OUT.write_text("\n\n".join([title, about, server, table(lines), shown, sizing(rows), ""]))


def table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: Sequence[dict[str, Any]]) -> None:
    """Milliseconds of one query over the number of documents, a line a backend and kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for panel, name in zip(panels, ("vectors", "filtered", "words"), strict=True):
        for backend, kind in sorted({(r["backend"], r["kind"]) for r in rows}):
            found = sorted((r["size"], r[f"{name}_p50"]) for r in rows if (r["backend"], r["kind"]) == (backend, kind))
            panel.loglog(*zip(*found, strict=True), "o-", label=f"{backend}, {kind}")
        panel.set(title=name, xlabel="documents")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("p50, ms")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(OUT.with_suffix(".png"), dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def sizing(rows: Sequence[dict[str, Any]]) -> str:
    """What a cluster needs, worked out from the bytes that were measured at the largest size."""
    found = max(
        (r for r in rows if r["backend"] == "elasticsearch" and r["kind"] == "hnsw-sq8"), key=_size, default=None
    )
    if found is None:
        return ""
    lines = [
        ["documents", "disk, one copy beside", "page cache for vectors", "shards", "data nodes of 64 GB"],
        ["---"] * 5,
    ]
    for power in range(5, 10):
        n = 10**power
        cached = n * (DIM + 4 + 4 * LINKS) * 2  # Elastic's own rule for int8_hnsw, for both copies
        shards = max(1, round(n / PER_SHARD))
        nodes = max(1, -(-cached // PAGE_CACHE))
        cells = [f"{n:,}", _bytes(2 * n * found["bytes"]), _bytes(cached), f"{shards:,}", f"{max(nodes, 2):,}"]
        lines.append(cells)
    return SIZING.format(bytes=found["bytes"], size=found["size"]) + "\n\n" + table(lines)


def _size(row: dict[str, Any]) -> int:
    return int(row["size"])


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count < 1e12 else f"{count / 1e12:,.1f} TB"


DIM, LINKS = 384, 16
PER_SHARD, PAGE_CACHE = 5_000_000, 32_000_000_000
SIZING = """## How large a cluster

Texts of an abstract's length, 384 dimensions, `hnsw-sq8`, one copy beside the first (at least two nodes). Disk:
{bytes:,.0f} bytes a document as measured at {size:,}, twice; while a generation is built the old one stays, so have
as much again free. Page cache: what Elasticsearch's documentation says that searching needs (dimensions + 4 + 4 · 16
links, twice), not measured here; nodes of 64 GB leave 32 GB for it. `hnsw-bin` needs a quarter of that."""


if __name__ == "__main__":
    main()
