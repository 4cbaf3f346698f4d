"""What our own layers cost: filters beside brute force, searches beside the bare FAISS index within.

All on whole collections of 50,000 x 384, in this process, nothing fetched; `benchmarks.vectors` prints it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.vectors import K, collection
from indexers.embedded import open_index
from indexers.kinds import Graph
from indexers.scan import faiss, threads
from indexers.snapshot import EmbeddedSnapshot
from retrieval import filters

Array = NDArray[np.float32]
SIZE = 50_000
FILTERS = 200
KINDS = ("flat", "hnsw", "hnsw-sq8", "hnsw-sq4", "hnsw-bin", "ivfpq:M=48,nlist=256,nprobe=32")
BATCHES = (1, 64, 256)
ROUNDS = 7  # of ours and theirs in turn, so that a busy moment hits both


def measured(folder: Path, vectors: Array, queries: Array) -> dict[str, Any]:
    """Filtered search, and overhead by kind. Collections are kept below `folder`."""
    metas = _metas(len(vectors))
    out: dict[str, Any] = {"size": len(vectors), "overhead": {}}
    for kind in KINDS:
        place = folder / kind
        if not (place / "current").exists():
            collection(place, vectors, metas, kind)
        snapshot = open_index(place).snapshot()
        if kind in ("flat", "hnsw"):
            out[f"filtered, {kind}"] = _filtered(snapshot, vectors, queries, metas)
        out["overhead"][kind] = {str(batch): _overhead(snapshot, vectors, queries, batch) for batch in BATCHES}
    return out


# --- filters ---------------------------------------------------------------------------------------


def _metas(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    price, site, year = rng.random(count), rng.integers(100, size=count), rng.integers(50, size=count)
    return [
        {"price": float(p), "site": f"site {s}", "year": int(y)} for p, s, y in zip(price, site, year, strict=True)
    ]


def _filtered(
    snapshot: EmbeddedSnapshot, vectors: Array, queries: Array, metas: list[dict[str, Any]]
) -> dict[str, Any]:
    """Recall against brute force over random filters from 50 % to 0.1 %, and the time of one search at 1 %."""
    rng = np.random.default_rng(2)
    columns = {name: np.array([meta[name] for meta in metas]) for name in ("price", "site", "year")}
    found = wanted = 0
    for number, share in enumerate(np.geomspace(0.5, 0.001, FILTERS)):
        where, mask = _random_filter(rng, float(share), columns)
        query = queries[number % len(queries)][None]
        ranking = snapshot.search_vectors("text", query, K, filters.parse(where), ("text",))[0]
        allowed = np.flatnonzero(mask)
        scores = vectors[allowed] @ query[0]
        least = np.partition(scores, len(scores) - K)[len(scores) - K] if len(scores) > K else -1.0
        right = [hit for hit in ranking if mask[int(hit.id)] and vectors[int(hit.id)] @ query[0] >= least - 1e-5]
        found, wanted = found + len(right), wanted + min(K, len(allowed))
    taken = []
    for query in queries:
        low = float(rng.random() * 0.99)
        start = time.perf_counter()
        where = {"price": {"$gte": low, "$lt": low + 0.01}}
        snapshot.search_vectors("text", query[None], K, filters.parse(where), ("text",))
        taken.append((time.perf_counter() - start) * 1e3)
    p50, p99 = np.percentile(taken, [50, 99]).tolist()
    return {"filters": FILTERS, "recall": found / wanted, "p50_ms": p50, "p99_ms": p99}


def _random_filter(
    rng: np.random.Generator, share: float, columns: Mapping[str, NDArray[Any]]
) -> tuple[dict[str, Any], NDArray[np.bool_]]:
    """A filter that lets about `share` through, of one of three shapes, and what it lets through."""
    price, site, year = columns["price"], columns["site"], columns["year"]
    low = float(rng.random() * (1 - share))
    window, inside = {"price": {"$gte": low, "$lt": low + share}}, (price >= low) & (price < low + share)
    match rng.integers(3):
        case 0:
            return window, inside
        case 1:
            some = [f"site {n}" for n in rng.permutation(100)[: max(1, round(share * 100))].tolist()]
            late = int(rng.integers(10))
            return {"site": {"$in": some}, "year": {"$gte": late}}, np.isin(site, some) & (year >= late)
        case _:
            one = int(rng.integers(50))
            return {"$and": [window, {"$not": {"year": one}}]}, inside & (year != one)


# --- overhead --------------------------------------------------------------------------------------


def _overhead(snapshot: EmbeddedSnapshot, vectors: Array, queries: Array, batch: int) -> dict[str, float]:
    """Milliseconds per query of the bare FAISS index and of the snapshot around it, medians of rounds in turn."""
    bare = _bare(snapshot, vectors)
    starts = range(0, len(queries) - batch + 1, batch)

    def ours(some: Array) -> Any:
        return snapshot.search_vectors("text", some, K, None, ("text",))

    def round_of(search: Callable[[Array], Any]) -> float:
        taken = []
        for start in starts:
            some = queries[start : start + batch]
            begun = time.perf_counter()
            search(some)
            taken.append(time.perf_counter() - begun)
        return float(np.median(taken)) * 1e3 / batch

    rounds = [(round_of(bare), round_of(ours)) for _ in range(ROUNDS)]
    theirs, own = (float(np.median(values)) for values in zip(*rounds, strict=True))
    return {"faiss_ms": theirs, "ours_ms": own}


def _bare(snapshot: EmbeddedSnapshot, vectors: Array) -> Callable[[Array], Any]:
    """The search that the snapshot itself leads to: the same index, effort and number of candidates."""
    side = snapshot.stretches["text", "text"][0].index
    codes = side._codes
    if codes is None:
        flat = faiss.IndexFlatIP(vectors.shape[1])
        flat.add(vectors)
        return lambda some: _threaded(some, lambda: flat.search(some, K))
    fetch = K * max(1, codes.kind.oversample)
    effort = max(side.measured.effort, K + K // 2) if isinstance(codes.kind, Graph) else side.measured.effort
    return lambda some: _threaded(some, lambda: codes.kind.probe(codes.index, some, fetch, effort, None))


def _threaded(some: Array, search: Callable[[], Any]) -> Any:
    with threads(1 if len(some) == 1 else 2):
        return search()
