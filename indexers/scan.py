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
_FEW_LEFT_OUT = 256  # a batch reads these few too and drops them, which saves a copy of all the others
_BATCH = 8  # from here on one copy of the allowed rows and BLAS beat reading them once per query


class Stored:
    """The chunks of a side, seen as one matrix."""

    def __init__(self, chunks: Chunks) -> None:
        dims = {chunk.shape[1] for chunk in chunks}
        if len(dims) > 1:
            raise Conflict(f"chunks of different dimensions {sorted(dims)}; one side has one dimension")
        self.chunks = [np.asarray(chunk) for chunk in chunks if len(chunk)]
        self.dim = dims.pop() if dims else 0
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)]).astype(np.int64)
        self._narrow = any(chunk.dtype != np.float32 for chunk in self.chunks)

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

    def until(self, stop: int) -> Stored:
        """The first `stop` rows."""
        return Stored(
            [chunk[: max(0, stop - int(start))] for start, chunk in zip(self.starts, self.chunks, strict=False)]
        )

    def gather(self, numbers: Numbers) -> Matrix:
        """float32 rows of `numbers`, in the order asked."""
        rows = self._rows(numbers)
        return _to_unit(rows) if self._narrow else rows

    def _rows(self, numbers: Numbers) -> Matrix:
        """The same as they are stored: those of narrow types are not of unit length."""
        out = np.empty((len(numbers), self.dim), np.float32)
        owner = np.searchsorted(self.starts, numbers, "right") - 1
        order = np.argsort(owner, kind="stable")
        ends = np.searchsorted(owner[order], np.arange(len(self.chunks) + 1))
        for at, chunk in enumerate(self.chunks):
            here = order[ends[at] : ends[at + 1]]
            if len(here):
                out[here] = chunk[numbers[here] - self.starts[at]]
        return out

    def scores(self, queries: Matrix, numbers: Numbers) -> Scores:
        """Inner products of queries (Q, D) with the rows of `numbers` (Q, K), where -1 gives -inf."""
        if len(self.chunks) == 1 and not self._narrow:
            return _inner_products(queries, self.chunks[0], numbers)
        best = np.full(numbers.shape, -np.inf, np.float32)
        if self._narrow:
            for query, some, out in zip(queries, numbers, best, strict=True):
                known = some >= 0
                out[known] = _cosines(query, self._rows(some[known]))
            return best
        for start, chunk in zip(self.starts, self.chunks, strict=False):
            here = numbers - start
            here[(here < 0) | (here >= len(chunk))] = -1
            np.maximum(best, _inner_products(queries, chunk, here), out=best)
        return best


def _cosines(query: Matrix, rows: Matrix) -> Scores:
    """(K,) of unit query (D,) and rows (K, D). By FAISS: BLAS would wake its threads for this little."""
    products: Scores
    lengths: Scores
    products, lengths = np.empty((2, len(rows)), np.float32)
    faiss.fvec_inner_products_ny(*map(faiss.swig_ptr, (products, query, rows)), *rows.shape[::-1])
    faiss.fvec_norms_L2(*map(faiss.swig_ptr, (lengths, rows)), *rows.shape[::-1])
    products /= np.maximum(lengths, np.finfo(np.float32).tiny)
    return products


def _inner_products(queries: Matrix, chunk: Matrix, numbers: Numbers) -> Scores:
    """Rows are read where they lie."""
    out = np.empty(numbers.shape, np.float32)
    pointers = map(faiss.swig_ptr, (out, queries, chunk, numbers))
    faiss.fvec_inner_products_by_idx(*pointers, chunk.shape[1], *numbers.shape)
    return out


def _unit(rows: NDArray[Any]) -> Matrix:
    return np.ascontiguousarray(rows) if rows.dtype == np.float32 else _to_unit(rows.astype(np.float32))


def _to_unit(rows: Matrix) -> Matrix:
    """In place."""
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return rows


@contextmanager
def threads(count: int) -> Iterator[None]:
    """OpenMP threads of the calling thread's FAISS calls."""
    before = faiss.omp_get_max_threads()
    if before == count:
        yield
        return
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
    if allowed is not None and len(queries) >= _BATCH and len(stored) - total <= _FEW_LEFT_OUT:
        return _without(*nearest(stored, queries, k + len(stored) - total), allowed, len(stored))
    fetch = min(total, k + _SLACK)
    if allowed is None or len(queries) >= _BATCH:
        scores, numbers = _knn(stored, queries, fetch, allowed)
    else:
        scores, numbers = _listed(stored, queries, fetch, allowed)
    if fetch <= k:
        return scores, numbers
    if not np.count_nonzero(scores[:, k] >= scores[:, k - 1] - TIE):
        return scores[:, :k], numbers[:, :k]
    tied = scores >= scores[:, k - 1 : k] - TIE
    # Where the last one fetched is still tied with the k-th there may be more: look at every score.
    spilled = np.flatnonzero(tied[:, -1]) if fetch < total else ()
    if not len(spilled):
        width = int(tied.sum(axis=1).max())
        return scores[:, :width], numbers[:, :width]
    rows = list(zip(scores, numbers, strict=True))
    among = np.arange(total) if allowed is None else allowed
    for query in spilled:
        rows[query] = _scanned(stored, queries[query : query + 1], k, among)
    return padded(rows)


def _listed(stored: Stored, queries: Matrix, k: int, numbers: Numbers) -> tuple[Scores, Numbers]:
    """The k best of each query among `numbers`, ascending. Rows are read where they lie, once for every query."""
    parts = []
    ends = np.searchsorted(numbers, stored.starts).tolist() if len(stored.chunks) > 1 else (0, len(numbers))
    for at, chunk in enumerate(stored.chunks):
        here = numbers[ends[at] : ends[at + 1]]
        if not len(here):
            continue
        shape = len(queries), min(k, len(here))
        if chunk.dtype == np.float32:
            start = int(stored.starts[at])
            scores, found = np.empty(shape, np.float32), np.empty(shape, np.int64)
            places = here - start if start else here  # FAISS is given bare pointers: what they name stays named
            pointers = map(faiss.swig_ptr, (queries, chunk, places))
            sizes = (chunk.shape[1], len(queries), len(chunk), len(here), shape[1])
            faiss.knn_inner_products_by_idx(*pointers, *sizes, *map(faiss.swig_ptr, (scores, found)), 0)
            parts.append((scores, found + start if start else found))
        else:
            scores, places = faiss.knn(queries, stored.gather(here), shape[1], faiss.METRIC_INNER_PRODUCT)
            parts.append((scores, here[places]))
        if len(parts) == 2:
            parts = [_best(parts[0], parts[1], k)]
    return parts[0]


def _scanned(stored: Stored, query: Matrix, k: int, numbers: Numbers) -> tuple[Scores, Numbers]:
    """The k best among `numbers` for one query (1, D), and what is tied with the last of them."""
    scores = stored.scores(query, numbers[None])[0]
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k] - TIE
        kept = np.flatnonzero(scores >= least)
        scores, numbers = scores[kept], numbers[kept]
    order = np.argsort(-scores, kind="stable")
    return scores[order], numbers[order]


def _without(scores: Scores, numbers: Numbers, allowed: Numbers, count: int) -> tuple[Scores, Numbers]:
    """Leaves out what is not allowed."""
    kept = np.zeros(count + 1, np.bool_)  # one more for the padding, -1
    kept[allowed] = True
    return padded([(s[kept[n]], n[kept[n]]) for s, n in zip(scores, numbers, strict=True)])


def _knn(stored: Stored, queries: Matrix, k: int, allowed: Numbers | None) -> tuple[Scores, Numbers]:
    parts = []
    for numbers, rows in _pieces(stored, allowed):
        scores, at = faiss.knn(queries, rows, min(k, len(rows)), faiss.METRIC_INNER_PRODUCT)
        parts.append((scores, at + numbers if isinstance(numbers, int) else numbers[at]))
        if len(parts) == 2:  # keep only the best, however many pieces there are
            parts = [_best(parts[0], parts[1], k)]
    return parts[0]


def _pieces(stored: Stored, allowed: Numbers | None) -> Iterator[tuple[int | Numbers, Matrix]]:
    if allowed is None:
        yield from stored.blocks()
        return
    for at in range(0, len(allowed), _BLOCK_ROWS):
        numbers = allowed[at : at + _BLOCK_ROWS]
        yield numbers, stored.gather(numbers)


def _best(a: tuple[Scores, Numbers], b: tuple[Scores, Numbers], k: int) -> tuple[Scores, Numbers]:
    return best_first(np.concatenate([a[0], b[0]], axis=1), np.concatenate([a[1], b[1]], axis=1), k)


def best_first(scores: Scores, numbers: Numbers, k: int) -> tuple[Scores, Numbers]:
    """The k best of each query, (Q, W) to (Q, k), equal ones in the order they had."""
    order = (-scores).argsort(axis=1, kind="stable")[:, :k]
    if len(order) == 1:  # a query alone is most of what is asked: the general form costs it more than the sort
        return scores[:, order[0]], numbers[:, order[0]]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)


def padded(rows: Sequence[tuple[Scores, Numbers]]) -> tuple[Scores, Numbers]:
    """Rows of different widths as one (Q, W) array each, filled up with -inf and -1."""
    width = max(len(numbers) for _, numbers in rows)
    scores = np.full((len(rows), width), -np.inf, np.float32)
    numbers = np.full((len(rows), width), -1, np.int64)
    for at, (some, which) in enumerate(rows):
        scores[at, : len(some)], numbers[at, : len(which)] = some, which
    return scores, numbers
