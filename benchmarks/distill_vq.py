"""Distill-VQ beside what else compresses vectors, at equal bytes and equal nprobe.

``python -m benchmarks.distill_vq [--spaces scifact] [--bytes 24] [--seeds 0,1,2]`` adds what is missing to
docs/distill_vq.json, and draws docs/distill_vq.md and the plots from it; with ``--draw`` it only draws, and with
``--lists`` it measures what visiting more lists gives at 96 bytes.
What was measured once is not measured again, so a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.vq_data import MILLION, OVERLAP, SENTENCES, SPACES, Asked, Space, space
from indexers.distill_vq import Lesson, Recipe, distill, lesson
from indexers.kinds import SAMPLE_ROWS
from indexers.product import Quantizers, empty_index, face, fitted, spread
from indexers.scan import Stored, nearest

faiss: Any = untyped_faiss

OUT = Path("docs/distill_vq.json")
K = 10
SHAPES = {SENTENCES: (256, 32), MILLION: (1024, 64)}  # lists and how many are visited
SHAPE = (64, 16)  # of the others
BYTES = (24, 16, 32, 48, 96)
FITTED = ("opq+ivfpq", "rabitq", "sq4", "sq8", "ivfpq")  # to the documents alone
LEARNED = ("distill", "turned", "distill, log", "distill, labels", "contrastive, labels", "contrastive, few labels",
           "distill, plain", "distill, 4 bits")  # fmt: skip
FEW = 64
WINDOWS = ("plain", "4 bits")  # learn from the windows, as "" does
START = {"labels": "log", "few labels": "", "4 bits": ""}  # whose start they share: the same queries, or those of all
METHODS = (*FITTED, *LEARNED)
JUDGED = ("scifact", "roco_captions")
RECIPE = Recipe()
_IP = untyped_faiss.METRIC_INNER_PRODUCT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", default=",".join(SPACES))
    parser.add_argument("--bytes", default=",".join(map(str, BYTES)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="|".join(METHODS))
    parser.add_argument("--draw", action="store_true", help="only draw what has been measured")
    parser.add_argument("--lists", action="store_true", help="measure other numbers of visited lists instead")
    given = parser.parse_args()
    if given.lists:
        for name, method, seed in product(JUDGED, ("opq+ivfpq", "distill, log"), map(int, given.seeds.split(","))):
            if (key := f"lists|{name}|{method}|{seed}") not in known():
                record(key, visited(space_of(name), method, seed))
    elif not given.draw:
        for name, size, seed in _runs(given.spaces, given.bytes, given.seeds):
            for method in given.methods.split("|"):
                key = f"{name}|{size}|{method}|{seed}"
                if key not in known() and (row := measured(space_of(name), method, size, seed)) is not None:
                    record(key, row)
    from benchmarks.vq_report import write

    results = known()
    write(results, {name: exact(name) for name in SPACES if any(key.startswith(f"{name}|") for key in results)})


def known() -> dict[str, Any]:
    """What has been measured so far, by this or another process."""
    return dict(json.loads(OUT.read_text())) if OUT.exists() else {}


def record(key: str, row: dict[str, Any]) -> None:
    OUT.write_text(json.dumps(known() | {key: row}, indent=1, sort_keys=True) + "\n")
    print(key, row, flush=True)


def _runs(spaces: str, sizes: str, seeds: str) -> Iterable[tuple[str, int, int]]:
    """Every space once with every size before the next seed."""
    for seed in map(int, seeds.split(",")):
        for size in map(int, sizes.split(",")):
            for name in spaces.split(","):
                yield name, size, seed


@cache
def space_of(name: str) -> Space:
    return space(name)


@cache
def exact(name: str) -> dict[str, Any]:
    """What exact search reaches, the ceiling of all."""
    held = space_of(name)
    asked = held.asked["test"]
    score = 1.0 if held.measure == OVERLAP else _quality(_truth(name, "test"), asked, held.measure)
    lists, visited = shape(name)
    return {"measure": held.measure, "documents": len(held.documents), "queries": len(asked.qrels), "score": score,
            "lists": lists, "visited": visited}  # fmt: skip


def measured(held: Space, method: str, size: int, seed: int, part: str = "test") -> dict[str, float] | None:
    """Quality and overlap with exact search of one method; None where it has nothing to learn from."""
    start = time.process_time()
    index = made(held, method, size, seed)
    if index is None:
        return None
    seconds = time.process_time() - start
    _add(index, held, method)
    score, overlap = _reached(index, held, part, shape(held.name)[1])
    return {"score": score, "overlap": overlap, "bytes": code_bytes(index), "cpu_s": round(seconds, 1)}


def visited(held: Space, method: str, seed: int) -> dict[str, float]:
    """Quality at 96 bytes by how many lists are visited: from there on codes alone are what loses."""
    index = made(held, method, max(BYTES), seed)
    _add(index, held, method)
    lists, fewest = shape(held.name)
    each = (fewest << n for n in range((lists // fewest).bit_length()))
    return {str(count): _reached(index, held, "test", count)[0] for count in each}


def _add(index: Any, held: Space, method: str) -> None:
    index.add(held.documents)
    if method in LEARNED:
        face(index)


def _reached(index: Any, held: Space, part: str, nprobe: int) -> tuple[float, float]:
    """(quality, overlap with exact search) of what is found in `nprobe` lists."""
    asked = held.asked[part]
    found = searched(index, asked.vectors, nprobe)
    overlap = _overlap(found, _truth(held.name, part), asked)
    quality = overlap if held.measure == OVERLAP else _quality(found, asked, held.measure)
    return round(quality, 5), round(overlap, 5)


def code_bytes(index: Any) -> int:
    """Of one vector, as FAISS holds it; its number takes eight more in every kind."""
    return int(faiss.downcast_index(index.index).code_size)


def shape(name: str) -> tuple[int, int]:
    """How many lists an index of this space has, and how many are visited."""
    return SHAPES.get(name, SHAPE)


def searched(index: Any, queries: NDArray[np.float32], nprobe: int) -> NDArray[np.int64]:
    """(Q, K + 1): one more, since a query may be a document."""
    inner = faiss.SearchParametersIVF(nprobe=nprobe)
    if isinstance(faiss.downcast_index(index.index), faiss.IndexIVFRaBitQ):
        inner = faiss.IVFRaBitQSearchParameters()
        inner.nprobe, inner.qb = nprobe, 8
    numbers: NDArray[np.int64] = index.search(
        queries, K + 1, params=faiss.SearchParametersPreTransform(index_params=inner)
    )[1]
    return numbers


# --- the methods -----------------------------------------------------------------------------------


def made(held: Space, method: str, size: int, seed: int) -> Any:
    """A trained index of `size` bytes a vector, without vectors."""
    documents = held.documents
    dim, lists = documents.shape[1], shape(held.name)[0]
    if method in ("ivfpq", "opq+ivfpq"):
        turn = _opq(dim, size) if method == "opq+ivfpq" else _identity(dim)
        return _trained(turn, faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, size, 8, _IP), documents, seed)
    if method == "rabitq":
        return _best_of(rabitqs(size, dim), held, seed)
    if method in ("sq8", "sq4"):
        kept = min(dim, size if method == "sq8" else 2 * size)
        bits = untyped_faiss.ScalarQuantizer.QT_8bit if method == "sq8" else untyped_faiss.ScalarQuantizer.QT_4bit
        coded = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(kept), kept, lists, bits, _IP)
        return _trained(faiss.PCAMatrix(dim, kept), coded, documents, seed)
    source = method.partition(", ")[2]
    taught = lesson_of(held.name, "" if source in WINDOWS else source)
    if taught is None:
        return None
    codes, bits = (2 * size, 4) if source == "4 bits" else (size, 8)
    start = started(held.name, codes, seed, START.get(source, source), bits)
    if method == "turned":
        return empty_index(start)
    arm = "contrastive" if method.startswith("contrastive") else "listnet"
    return empty_index(distill(start, Stored([documents]), taught, _quiet, replace(RECIPE, arm=arm, seed=seed)))


def _opq(dim: int, size: int) -> Any:
    """FAISS's, with a fifth of its rounds: they take minutes, and the last of them change nothing here."""
    turn = faiss.OPQMatrix(dim, size)
    turn.niter, turn.niter_pq, turn.niter_pq_0 = 10, 4, 10
    turn.pq = faiss.ProductQuantizer(dim, size, 8)
    turn.pq.cp.min_points_per_centroid = 1
    turn.pq.cp.max_points_per_centroid = 256
    turn.own_pq = turn.pq  # FAISS holds a bare pointer
    return turn


def _identity(dim: int) -> Any:
    turn = faiss.LinearTransform(dim, dim, False)
    faiss.copy_array_to_vector(np.eye(dim, dtype=np.float32).ravel(), turn.A)
    turn.is_trained = True
    return turn


def rabitqs(size: int, dim: int) -> list[tuple[int, int]]:
    """(dimensions, bits) that fill `size` bytes: RaBitQ keeps factors beside the bits of a code."""
    found = []
    for bits in (1, 2, 4):
        fitting = [
            kept
            for kept in range(8, dim + 1, 8)
            if faiss.IndexIVFRaBitQ(faiss.IndexFlatIP(kept), kept, 1, _IP, True, bits).code_size <= size
        ]
        if fitting:
            found.append((max(fitting), bits))
    return found


def _best_of(shapes: list[tuple[int, int]], held: Space, seed: int) -> Any:
    """The one of (dimensions, bits) that finds most neighbours of the documents' own: what a user would choose."""
    documents, (lists, nprobe) = held.documents, shape(held.name)
    asked = np.ascontiguousarray(documents[:: max(1, len(documents) // 500)])
    truth = nearest(Stored([documents]), asked, K + 1)[1][:, : K + 1]
    best: tuple[float, Any] = (-1.0, None)
    for kept, bits in shapes:
        dim = documents.shape[1]
        turn = faiss.PCAMatrix(dim, kept, 0, True)
        coded = faiss.IndexIVFRaBitQ(faiss.IndexFlatIP(kept), kept, lists, _IP, True, bits)
        index = _trained(turn, coded, documents, seed)
        index.add(documents)
        same = np.mean([len(set(a) & set(b)) for a, b in zip(searched(index, asked, nprobe), truth, strict=True)])
        best = max(best, (float(same), index), key=lambda pair: pair[0])
    best[1].reset()
    return best[1]


def _trained(turn: Any, inverted: Any, documents: NDArray[np.float32], seed: int) -> Any:
    inverted.cp.seed += seed
    inverted.cp.min_points_per_centroid = 1
    if hasattr(inverted, "pq"):
        inverted.pq.cp.seed += seed
        inverted.pq.cp.min_points_per_centroid = 1
    index = faiss.IndexPreTransform(turn, inverted)
    if seed:  # OPQ and PCA draw nothing: another order of the documents is another start
        documents = documents[np.random.default_rng(seed).permutation(len(documents))]
    index.train(documents)
    return index


@cache
def started(name: str, codes: int, seed: int, source: str, bits: int) -> Quantizers:
    """Where all that learn from these queries start."""
    taught = None if source == "plain" else lesson_of(name, source)
    documents = space_of(name).documents
    sample = documents[spread(len(documents), SAMPLE_ROWS)]
    return fitted(sample, codes, shape(name)[0], seed, None if taught is None else taught.queries, bits)


@cache
def lesson_of(name: str, source: str) -> Lesson | None:
    """Train queries with the documents they are labelled with, or as a log without labels; else windows."""
    held = space_of(name)
    if not source:
        return lesson(Stored([held.documents]), held.windows, RECIPE.best, _quiet)
    asked = held.asked.get("train")
    if asked is None:
        return None
    if source == "log":
        return lesson(Stored([held.documents]), asked.vectors, RECIPE.best, _quiet)
    judged = [max(q, key=lambda d: q[d]) if q else -1 for q in asked.qrels]
    known = np.flatnonzero(np.array(judged) >= 0)[: FEW if source == "few labels" else None]
    queries, positives = asked.vectors[known], np.array(judged, np.int64)[known]
    return lesson(Stored([held.documents]), queries, RECIPE.best, _quiet, positives)


def _quiet(phase: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


# --- the measures ----------------------------------------------------------------------------------


@cache
def _truth(name: str, part: str) -> NDArray[np.int64]:
    held = space_of(name)
    return nearest(Stored([held.documents]), held.asked[part].vectors, K + 1)[1][:, : K + 1]


def _others(found: NDArray[np.int64], own: int) -> list[int]:
    """The first K that are not the query itself."""
    return [int(d) for d in found if d != own and d >= 0][:K]


def _overlap(found: NDArray[np.int64], truth: NDArray[np.int64], asked: Asked) -> float:
    """Share of the exact ten best that are found."""
    pairs = zip(found, truth, asked.own, strict=True)
    return float(np.mean([len(set(_others(f, own)) & set(_others(t, own))) / K for f, t, own in pairs]))


def _quality(found: NDArray[np.int64], asked: Asked, measure: str) -> float:
    score: Callable[[list[int], dict[int, int]], float] = _ndcg if measure == "nDCG@10" else _recall
    rows = zip(found, asked.qrels, asked.own, strict=True)
    return float(np.mean([score(_others(f, own), judged) for f, judged, own in rows if judged]))


def _ndcg(found: list[int], judged: dict[int, int]) -> float:
    gains = [judged.get(d, 0) / np.log2(rank + 2) for rank, d in enumerate(found)]
    best = sorted(judged.values(), reverse=True)[:K]
    return float(sum(gains) / sum(grade / np.log2(rank + 2) for rank, grade in enumerate(best)))


def _recall(found: list[int], judged: dict[int, int]) -> float:
    return sum(d in judged for d in found) / len(judged)


if __name__ == "__main__":
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
