"""One vector engine in one process: `python -m benchmarks.engines.vectors ENGINE build|search DATA STORE`.

DATA holds vectors.npy (N, D), price.npy (N,), queries.npy (Q, D), windows.npy (Q, 2); STORE is the engine's folder.
Prints one JSON object. Imports nothing but numpy and the engine, so that its memory is the engine's.
"""

# ruff: noqa: ARG002 - engines share one signature and not each needs all of it
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
K = 10
EFS = (16, 32, 64, 128, 256, 512)
LINKS, EF_BUILD, THREADS = 32, 100, 2
LONGEST = 60.0  # seconds that one setting is asked, a quarter more to warm up


class Engine:
    """Settings are tried in order; None means that the engine chooses by itself."""

    settings: Sequence[int | None] = EFS
    filters = True

    def __init__(self, store: Path, kind: str) -> None:
        self.store = store
        self.kind = kind

    def build(self, vectors: Array, price: Array) -> None:
        raise NotImplementedError

    def open(self, data: Path) -> None:
        raise NotImplementedError

    def search(self, queries: Array, setting: int | None, window: Array | None) -> Any:
        """(Q, K) numbers. window: the price must lie in [low, high)."""
        raise NotImplementedError


class _Given:
    """The half of ingest that computes, where the vectors are there already: documents are named by their rows."""

    digest = "given"

    def __init__(self, vectors: Array) -> None:
        self.vectors = vectors

    def __call__(self, documents: Any) -> Any:
        from retrieval.types import Encoded, Prepared

        rows = np.array([int(document.id) for document in documents])
        encoded = Encoded(np.arange(len(rows)), np.ascontiguousarray(self.vectors[rows]))
        return Prepared(list(documents), {("text", "text"): encoded}, [])


def collection(folder: Path, vectors: Array, metas: Iterable[dict[str, Any]], kind: str) -> None:
    """A whole collection of ours, store and all, with `vectors` as they are."""
    from indexers.rebuild import build
    from retrieval.types import Document, SpaceInfo

    build(
        folder,
        (Document(id=f"{row:08d}", meta=meta) for row, meta in enumerate(metas)),
        _Given(vectors),
        config={},
        spaces={"text": SpaceInfo("text", vectors.shape[1], {"text": "given"})},
        vector_index=kind,
        progress=lambda *_: None,
    )


class Lightbox(Engine):
    settings = (None,)

    def build(self, vectors: Array, price: Array) -> None:
        collection(self.store, vectors, ({"price": float(value)} for value in price), self.kind)

    def open(self, data: Path) -> None:
        from indexers.embedded import open_index
        from retrieval.filters import parse

        self.snapshot, self.parse = open_index(self.store).snapshot(), parse

    def search(self, queries: Array, setting: int | None, window: Array | None) -> Any:
        where = None
        if window is not None:
            where = self.parse({"price": {"$gte": float(window[0]), "$lt": float(window[1])}})
        rankings = self.snapshot.search_vectors("text", queries, K, where, ("text",))
        return [[int(hit.id) for hit in ranking] for ranking in rankings]


class Faiss(Engine):
    def build(self, vectors: Array, price: Array) -> None:
        import faiss

        bits = {"hnsw-sq8": faiss.ScalarQuantizer.QT_8bit, "hnsw-sq4": faiss.ScalarQuantizer.QT_4bit}
        ip, dim = faiss.METRIC_INNER_PRODUCT, vectors.shape[1]
        faiss.omp_set_num_threads(THREADS)
        if self.kind == "flat":
            index = faiss.IndexFlatIP(dim)
        elif self.kind == "ivfpq":
            index = faiss.index_factory(dim, "OPQ48,IVF256,PQ48", ip)
        elif self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, LINKS, ip)
        elif self.kind == "hnsw-bin":
            index = faiss.IndexHNSWRaBitQ(dim, LINKS)
        else:
            index = faiss.IndexHNSWSQ(dim, bits[self.kind], LINKS, ip)
        if self.kind.startswith("hnsw"):
            index.hnsw.efConstruction = EF_BUILD
        index.train(vectors[:32_768])
        index.add(vectors)
        faiss.write_index(index, str(self.store / "index"))

    def open(self, data: Path) -> None:
        import faiss

        self.faiss, self.index = faiss, faiss.read_index(str(self.store / "index"))
        self.price = np.load(data / "price.npy")
        if self.kind == "flat":
            self.settings = (None,)
        elif self.kind == "ivfpq":
            self.settings = (8, 16, 32, 64, 128)

    def search(self, queries: Array, setting: int | None, window: Array | None) -> Any:
        self.faiss.omp_set_num_threads(1 if len(queries) == 1 else THREADS)
        selector = None
        if window is not None:
            selector = self.faiss.IDSelectorBatch(np.flatnonzero((self.price >= window[0]) & (self.price < window[1])))
        if setting is None:
            return self.index.search(queries, K, params=self.faiss.SearchParameters(sel=selector))[1]
        if self.kind == "ivfpq":
            lists = self.faiss.SearchParametersIVF(nprobe=setting, sel=selector)
            params = self.faiss.SearchParametersPreTransform(index_params=lists)
        else:
            params = self.faiss.SearchParametersHNSW(efSearch=setting, sel=selector)
        return self.index.search(queries, K, params=params)[1]


class Hnswlib(Engine):
    filters = False  # a Python function for every candidate

    def build(self, vectors: Array, price: Array) -> None:
        import hnswlib

        index = hnswlib.Index(space="ip", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), ef_construction=EF_BUILD, M=LINKS)
        index.add_items(vectors, num_threads=THREADS)
        index.save_index(str(self.store / "index"))

    def open(self, data: Path) -> None:
        import hnswlib

        self.index = hnswlib.Index(space="ip", dim=np.load(data / "queries.npy").shape[1])
        self.index.load_index(str(self.store / "index"))

    def search(self, queries: Array, setting: int | None, window: Array | None) -> Any:
        self.index.set_ef(setting)
        return self.index.knn_query(queries, K, num_threads=1 if len(queries) == 1 else THREADS)[0].astype(np.int64)


class Usearch(Engine):
    filters = False  # none in Python

    def _index(self, dim: int) -> Any:
        from usearch.index import Index

        return Index(ndim=dim, metric="ip", dtype=self.kind, connectivity=LINKS, expansion_add=EF_BUILD)

    def build(self, vectors: Array, price: Array) -> None:
        index = self._index(vectors.shape[1])
        index.add(np.arange(len(vectors)), vectors, threads=THREADS)
        index.save(str(self.store / "index"))

    def open(self, data: Path) -> None:
        self.index = self._index(np.load(data / "queries.npy").shape[1])
        self.index.load(str(self.store / "index"))

    def search(self, queries: Array, setting: int | None, window: Array | None) -> Any:
        self.index.expansion_search = setting
        found = self.index.search(queries, K, threads=1 if len(queries) == 1 else THREADS)
        return np.asarray(found.keys, np.int64).reshape(len(queries), -1)


class Lancedb(Engine):
    settings = (32, 64, 128, 256)  # it wants at least refine_factor * k

    def build(self, vectors: Array, price: Array) -> None:
        import lancedb
        import pyarrow as pa

        rows = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), vectors.shape[1])
        table = pa.table({"id": np.arange(len(vectors)), "vector": rows, "price": price})
        made = lancedb.connect(str(self.store)).create_table("vectors", table)
        made.create_index(metric="dot", index_type="IVF_HNSW_SQ", vector_column_name="vector")
        made.create_scalar_index("price")

    def open(self, data: Path) -> None:
        import lancedb

        self.table = lancedb.connect(str(self.store)).open_table("vectors")

    def search(self, queries: Array, setting: int | None, window: Array | None) -> Any:
        out = []
        for query in queries:
            asked = self.table.search(query).select(["id"]).limit(K).ef(setting).nprobes(20).refine_factor(2)
            if window is not None:
                asked = asked.where(f"price >= {window[0]} AND price < {window[1]}", prefilter=True)
            out.append(asked.to_arrow()["id"].to_pylist())
        return out


class Chroma(Engine):
    def _client(self) -> Any:
        import chromadb
        from chromadb.config import Settings

        return chromadb.PersistentClient(str(self.store), Settings(anonymized_telemetry=False))

    def build(self, vectors: Array, price: Array) -> None:
        hnsw = {"space": "ip", "ef_construction": EF_BUILD, "max_neighbors": LINKS, "num_threads": THREADS}
        made = self._client().create_collection("vectors", configuration={"hnsw": hnsw}, embedding_function=None)
        for at in range(0, len(vectors), 5_000):
            some = range(at, min(at + 5_000, len(vectors)))
            made.add([str(i) for i in some], vectors[at : at + 5_000], [{"price": float(price[i])} for i in some])

    def open(self, data: Path) -> None:
        self._open()
        self.ef: int | None = None

    def _open(self) -> None:
        self.made = self._client().get_collection("vectors", embedding_function=None)

    def search(self, queries: Array, setting: int | None, window: Array | None) -> Any:
        if setting != self.ef:  # read when a collection is opened
            from chromadb.api.shared_system_client import SharedSystemClient

            self.made.modify(configuration={"hnsw": {"ef_search": setting}})
            self.made._client._system.stop()  # or it keeps a graph for every setting
            SharedSystemClient.clear_system_cache()
            self._open()
            self.ef = setting
        low, high = (0.0, 0.0) if window is None else map(float, window)
        between = {"$and": [{"price": {"$gte": low}}, {"price": {"$lt": high}}]}
        found = self.made.query(queries, n_results=K, where=None if window is None else between, include=[])
        return [[int(id) for id in row] for row in found["ids"]]


class QdrantEdge(Engine):
    def build(self, vectors: Array, price: Array) -> None:
        import qdrant_edge as edge

        graph = edge.HnswIndexConfig(LINKS, EF_BUILD, 10_000, THREADS)
        params = edge.EdgeVectorParams(vectors.shape[1], edge.Distance.Dot, hnsw_config=graph)
        shard = edge.EdgeShard.create(str(self.store), edge.EdgeConfig(vectors=params, hnsw_config=graph))
        float_index = edge.UpdateOperation.create_field_index("price", edge.PayloadSchemaType.Float)
        shard.update(float_index)
        for at in range(0, len(vectors), 1_000):
            some = range(at, min(at + 1_000, len(vectors)))
            points = [edge.Point(i, vectors[i].tolist(), {"price": float(price[i])}) for i in some]
            shard.update(edge.UpdateOperation.upsert_points(points))
        shard.optimize()
        shard.close()

    def open(self, data: Path) -> None:
        import qdrant_edge as edge

        self.edge, self.shard = edge, edge.EdgeShard.load(str(self.store))

    def search(self, queries: Array, setting: int | None, window: Array | None) -> Any:
        edge, only = self.edge, None
        if window is not None:
            between = edge.RangeFloat(gte=float(window[0]), lt=float(window[1]))
            only = edge.Filter(must=[edge.FieldCondition("price", range=between)])
        params = edge.SearchParams(hnsw_ef=setting)
        return [
            [p.id for p in self.shard.search(edge.SearchRequest(edge.Query.Nearest(q.tolist()), K, filter=only,
                                                                params=params))]
            for q in queries
        ]  # fmt: skip


ENGINES: dict[str, Callable[[Path, str], Engine]] = {
    "lightbox": Lightbox, "faiss": Faiss, "hnswlib": Hnswlib, "usearch": Usearch, "lancedb": Lancedb,
    "chromadb": Chroma, "qdrant-edge": QdrantEdge,
}  # fmt: skip


def _built(engine: Engine, data: Path) -> dict[str, Any]:
    engine.store.mkdir(parents=True, exist_ok=True)
    vectors, price = np.load(data / "vectors.npy", mmap_mode="r"), np.load(data / "price.npy")
    start, busy = time.perf_counter(), time.process_time()
    engine.build(np.asarray(vectors), price)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    size = sum(path.stat().st_size for path in engine.store.rglob("*") if path.is_file())
    return {"build_s": seconds, "build_cpu_s": busy, "disk_bytes_per_vector": size / len(vectors)}


def _searched(engine: Engine, data: Path) -> dict[str, Any]:
    queries, windows = np.load(data / "queries.npy"), np.load(data / "windows.npy")
    before = _memory()
    start = time.perf_counter()
    engine.open(data)
    out: dict[str, Any] = {"open_s": time.perf_counter() - start, "points": [], "filtered": []}
    opened = _memory()
    out["opened_mb"] = sum(opened.values()) - sum(before.values())
    for setting in engine.settings:
        point = _timed(partial(_one, engine, setting, queries, None), len(queries))
        start, busy = time.perf_counter(), time.process_time()
        for at in range(0, len(queries) - 63, 64):
            engine.search(queries[at : at + 64], setting, None)
        each = 1e3 / (len(queries) // 64 * 64)
        point["batch_ms_per_query"] = (time.perf_counter() - start) * each
        point["batch_cpu_ms_per_query"] = (time.process_time() - busy) * each
        out["points"].append({"setting": setting, **point})
    for setting in engine.settings if engine.filters else ():
        point = _timed(partial(_one, engine, setting, queries, windows), len(queries))
        out["filtered"].append({"setting": setting, **point})
    after = _memory()
    return out | {f"{name}_mb": after[name] - before[name] for name in after}


def _one(engine: Engine, setting: int | None, queries: Array, windows: Array | None, number: int) -> Any:
    return engine.search(queries[number : number + 1], setting, None if windows is None else windows[number])


def _within(count: int, seconds: float) -> Iterator[int]:
    """0 to `count` - 1, as far as the time goes."""
    until = time.perf_counter() + seconds
    for i in range(count):
        if time.perf_counter() > until:
            return
        yield i


def _timed(search: Callable[[int], Any], count: int) -> dict[str, Any]:
    for i in _within(20, LONGEST / 4):
        search(i)
    taken, spent, found = [], [], []
    for i in _within(count, LONGEST):
        start, busy = time.perf_counter(), time.process_time()
        numbers = search(i)
        spent.append(time.process_time() - busy)
        taken.append(time.perf_counter() - start)
        found.append([int(number) for number in numbers[0]])
    p50, p99 = np.percentile(np.array(taken) * 1e3, [50, 99]).tolist()
    return {"p50_ms": p50, "p99_ms": p99, "cpu_ms": float(np.median(spent)) * 1e3, "found": found}


def _memory() -> dict[str, float]:
    """MB of this process: its own, and of files that it has mapped and touched."""
    status = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in status if line.startswith("Rss")}
    return {"own": values["RssAnon"], "mapped": values["RssFile"]}


def main() -> None:
    name, phase, data, store = sys.argv[1:]
    engine_name, _, kind = name.partition("/")
    engine = ENGINES[engine_name](Path(store), kind)
    print(json.dumps((_built if phase == "build" else _searched)(engine, Path(data))))


if __name__ == "__main__":
    main()
