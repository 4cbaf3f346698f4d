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
CALLS = {1: 600, 64: 45, 256: 15}  # by the number of queries in a call


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
        out["overhead"][kind] = {str(batch): _overhead(snapshot, vectors, queries, batch) for batch in CALLS}
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
    taken, busy = [], []
    for query in queries:
        low = float(rng.random() * 0.99)
        start, begun = time.perf_counter(), time.process_time()
        where = {"price": {"$gte": low, "$lt": low + 0.01}}
        snapshot.search_vectors("text", query[None], K, filters.parse(where), ("text",))
        busy.append((time.process_time() - begun) * 1e3)
        taken.append((time.perf_counter() - start) * 1e3)
    p5, p50, p99 = np.percentile(taken, [5, 50, 99]).tolist()
    told = {"p5_ms": p5, "p50_ms": p50, "p99_ms": p99, "p50_cpu_ms": float(np.median(busy))}
    return {"filters": FILTERS, "recall": found / wanted, **told}


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
    """Milliseconds of processor time per query of bare FAISS and of the snapshot around it; medians of calls in turn.

    Each call of one is followed by the same call of the others, each of them first as often, so that what the caches
    hold speaks for none of them; processor time, since a neighbour may take the core away. Threads are the same.
    """
    bare, refined = _bare(snapshot, vectors)

    def ours(some: Array) -> Any:
        return snapshot.search_vectors("text", some, K, None, ("text",))

    searches = (bare, refined, ours)
    taken = np.empty((CALLS[batch], len(searches)))
    with threads(1 if batch == 1 else 2):
        for call in range(-len(searches), len(taken)):
            start = (call * batch) % (len(queries) - batch + 1)
            some = np.ascontiguousarray(queries[start : start + batch])
            for turn in range(len(searches)):
                which = (call + turn) % len(searches)
                begun = time.process_time()
                searches[which](some)
                taken[max(call, 0), which] = (time.process_time() - begun) * 1e3 / batch
    alone, theirs, own = np.median(taken, axis=0).tolist()
    return {"faiss_ms": alone, "refined_ms": theirs, "ours_ms": own,
            "added_ms": float(np.median(taken[:, 2] - taken[:, 1])),
            "ratio": float(np.median(taken[:, 2] / taken[:, 1]))}  # fmt: skip


def _bare(snapshot: EmbeddedSnapshot, vectors: Array) -> tuple[Callable[[Array], Any], Callable[[Array], Any]]:
    """What FAISS alone makes of the same index, effort and candidates: as they are, and refined on stored vectors."""
    side = snapshot.stretches["text", "text"][0].index
    codes = side._codes
    if codes is None:
        flat = faiss.IndexFlatIP(vectors.shape[1])
        flat.add(vectors)
        return (lambda some: flat.search(some, K),) * 2
    fetch = K * max(1, codes.kind.oversample)
    effort = max(side.measured.effort, K + K // 2) if isinstance(codes.kind, Graph) else side.measured.effort

    def alone(some: Array) -> Any:
        return codes.kind.probe(codes.index, some, fetch, effort, None)

    if not codes.kind.oversample:
        return alone, alone
    stored = faiss.IndexFlat(vectors.shape[1], codes.index.metric_type)
    stored.add(vectors)
    both = faiss.IndexRefine(codes.index, stored)
    graph = faiss.SearchParametersHNSW(efSearch=max(effort, fetch))
    params = faiss.IndexRefineSearchParameters(k_factor=codes.kind.oversample, base_index_params=graph)
    return alone, lambda some: both.search(some, K, params=params)
