"""Stored vectors seen as one matrix, and exact search over them.

A *side* of a space is the concatenation of its chunks: memory-mapped matrices of float32, float16 or
int8 rows. A vector's number is its position in that concatenation. Rows are unit vectors, so float16
and int8 rows need no scale of their own: they are brought back to unit length when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import Conflict
from retrieval.types import Matrix

TIE = 1e-6  # scores closer than this are equal, and ordered by id

faiss: Any = untyped_faiss  # its stubs lack half of what it has

Chunks = Sequence[NDArray[Any]]
Numbers = NDArray[np.int64]
Scores = NDArray[np.float32]

_SLACK = 16  # fetched beyond k, so that most ties at the cut are seen at once
_BLOCK_ROWS = 1 << 15
_BATCH = 8  # from here on one copy of the allowed rows and BLAS beat reading them once per query


class Stored:
    """The chunks of a side, seen as one matrix."""

    def __init__(self, chunks: Chunks) -> None:
        dims = {chunk.shape[1] for chunk in chunks}
        if len(dims) > 1:
            raise Conflict(f"chunks of different dimensions {sorted(dims)}; one side has one dimension")
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.dim = dims.pop() if dims else 0
        # One float32 chunk can be read in place by FAISS.
        whole = len(self.chunks) == 1 and self.chunks[0].dtype == np.float32
        self.plain: Matrix | None = np.asarray(self.chunks[0]) if whole else None
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes_per_row(self) -> float:
        total = sum(chunk.shape[0] * chunk.shape[1] * chunk.dtype.itemsize for chunk in self.chunks)
        return total / max(1, len(self))

    def blocks(self, start: int = 0, stop: int | None = None, rows: int = 1 << 16) -> Iterator[tuple[int, Matrix]]:
        """(number of the first row, float32 rows) pieces from `start` to `stop`; float32 chunks come whole."""
        stop = len(self) if stop is None else stop
        for base, chunk in zip(self.starts, self.chunks, strict=False):
            low, high = max(0, start - int(base)), min(len(chunk), stop - int(base))
            step = len(chunk) if chunk.dtype == np.float32 else rows
            for at in range(low, high, max(1, step)):
                yield int(base) + at, _unit(chunk[at : min(at + step, high)])

    def gather(self, numbers: Numbers) -> Matrix:
        """float32 rows of `numbers`, in the order asked."""
        out = np.empty((len(numbers), self.dim), np.float32)
        owner = np.searchsorted(self.starts, numbers, "right") - 1
        for at, chunk in enumerate(self.chunks):
            here = owner == at
            if here.any():
                out[here] = _unit(chunk[numbers[here] - self.starts[at]])
        return out

    def scores(self, query: Matrix, numbers: Numbers) -> Scores:
        """Inner products of one query (1, D) with the rows of `numbers`; a number of -1 scores -inf."""
        out = np.full(len(numbers), -np.inf, np.float32)
        if self.plain is not None:
            faiss.fvec_inner_products_by_idx(
                *map(faiss.swig_ptr, (out, query, self.plain, numbers)), self.dim, 1, len(numbers)
            )
            return out
        known = numbers >= 0
        out[known] = self.gather(numbers[known]) @ query[0]
        return out


def _unit(rows: NDArray[Any]) -> Matrix:
    if rows.dtype == np.float32:
        return np.ascontiguousarray(rows)
    wide: Matrix = rows.astype(np.float32)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return wide


@contextmanager
def threads(count: int) -> Iterator[None]:
    """OpenMP threads of the calling thread's FAISS calls."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def nearest(stored: Stored, queries: Matrix, k: int, allowed: Numbers | None = None) -> tuple[Scores, Numbers]:
    """The k best of each query, exactly, and everything tied with the k-th.

    allowed: ascending numbers to search among; None for all.
    Returns (Q, W) scores, best first, and numbers; W >= k where there are ties, padded with -inf and -1.
    """
    total = len(stored) if allowed is None else len(allowed)
    if not total or not len(queries):
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    if allowed is not None and len(queries) < _BATCH:
        return _padded([_cut(stored.scores(query[None], allowed), allowed, k) for query in queries])
    fetch = min(total, k + _SLACK)
    scores, numbers = _knn(stored, queries, fetch, allowed)
    if fetch == total:
        return scores, numbers
    # Where the last one fetched is still tied with the k-th there may be more: look at every score.
    spilled = np.flatnonzero(scores[:, -1] >= scores[:, k - 1] - TIE)
    if not len(spilled):
        return scores, numbers
    rows = [(scores[i], numbers[i]) for i in range(len(queries))]
    among = np.arange(total) if allowed is None else allowed
    for i in spilled:
        rows[i] = _cut(stored.scores(queries[i : i + 1], among), among, k)
    return _padded(rows)


def _knn(stored: Stored, queries: Matrix, k: int, allowed: Numbers | None) -> tuple[Scores, Numbers]:
    best: tuple[Scores, Numbers] | None = None
    for numbers, rows in _pieces(stored, allowed):
        scores, at = faiss.knn(queries, rows, min(k, len(rows)), faiss.METRIC_INNER_PRODUCT)
        found = scores, at + numbers if isinstance(numbers, int) else numbers[at]
        best = found if best is None else _best(best, found, k)
    assert best is not None  # the caller has made sure that there is at least one row
    return best


def _pieces(stored: Stored, allowed: Numbers | None) -> Iterator[tuple[int | Numbers, Matrix]]:
    if allowed is None:
        yield from stored.blocks()
        return
    for at in range(0, len(allowed), _BLOCK_ROWS):
        numbers = allowed[at : at + _BLOCK_ROWS]
        yield numbers, stored.gather(numbers)


def _best(a: tuple[Scores, Numbers], b: tuple[Scores, Numbers], k: int) -> tuple[Scores, Numbers]:
    scores, numbers = np.concatenate([a[0], b[0]], axis=1), np.concatenate([a[1], b[1]], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)


def _cut(scores: Scores, numbers: Numbers, k: int) -> tuple[Scores, Numbers]:
    """The k best and what is tied with the last of them, best first."""
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k] - TIE
        kept = np.flatnonzero(scores >= least)
        scores, numbers = scores[kept], numbers[kept]
    order = np.argsort(-scores, kind="stable")
    return scores[order], numbers[order]


def _padded(rows: list[tuple[Scores, Numbers]]) -> tuple[Scores, Numbers]:
    width = max(len(numbers) for _, numbers in rows)
    scores = np.full((len(rows), width), -np.inf, np.float32)
    numbers = np.full((len(rows), width), -1, np.int64)
    for at, (some, which) in enumerate(rows):
        scores[at, : len(some)], numbers[at, : len(which)] = some, which
    return scores, numbers
