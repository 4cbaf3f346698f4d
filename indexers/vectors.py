"""FAISS, one index per side of a space; everything here is derived from the stored vectors.

A *side* is the concatenation of its chunks: memory-mapped matrices of float32, float16 or int8 rows.
A vector's number is its position in that concatenation. Rows are unit vectors and scores are inner
products, so a score is the cosine. float16 and int8 rows are brought back to unit length when they are read.

The planner: a search is an exact scan of the allowed vectors where that is cheap, and a graph or an
inverted file with a selector otherwise. Every answer says which (`exact`), and what recall was
measured when the index was built: on queries where there were any, else on vectors drawn around held-out ones. Those
themselves would flatter a graph, which finds what lies among its vectors sooner than what lies between them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from indexers.kinds import Distilled, Graph, Kind, kind_of, selector
from indexers.product import face, spread
from indexers.queries import perturbed
from indexers.scan import TIE, Chunks, Numbers, Scores, Stored, best_first, nearest, padded, threads
from indexers.specs import Spec as Spec
from indexers.specs import parse_spec as parse_spec
from retrieval.errors import BackendError, Conflict, Invalid
from retrieval.types import Hit, Matrix, Progress, Ranking, Share

faiss: Any = untyped_faiss  # its stubs lack half of what it has

BUILD_THREADS = 2

Mask = NDArray[np.bool_]

_NO_PARTS: Mapping[str, Share] = {}
_as_hit: Any = partial(tuple.__new__, Hit)  # up to a thousand a query: without a Python frame for each

# What a search costs, in rows that an exact scan reads in the same time: a graph search visits
# some 15 rows for each entry of its queue, all over the memory.
_ROWS_PER_EF = 20
_SMALL = 4_096  # rows; below, an exact scan takes less than half a millisecond
_SCANNED_WHEN_FILTERED = 32_768  # rows; a filter promises the right answer, so it may cost a few milliseconds
_WIDER_WHEN_FILTERED = 2  # times the effort that the share of allowed vectors asks for
_REFINED_WHEN_FILTERED = 10  # candidates per result, where codes are searched under a filter
_RECALL_WANTED = 0.99
_OF_THE_BEST = 0.99  # of the recall that visiting every list reaches
_HELD_OUT = 256
_TIMED = 32  # queries
_MEASURED_K = 10
_WORTH_THREADS = 16_384  # rows; below, threads of a build mostly wait for each other
_ADDED_ROWS = 4_096  # at once: how often progress is told


class Found(NamedTuple):
    """Best vectors of each query.

    scores: (Q, W), best first. numbers: (Q, W) vector numbers. Padded with -inf and -1. W may exceed k
    where an exact search found ties at the cut, and be smaller where there is nothing more.
    """

    scores: Scores
    numbers: Numbers
    exact: bool
    recall: float


class Point(NamedTuple):
    """What one effort costs and finds; ms is the median for one query on one thread."""

    effort: int
    recall: float
    ms: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a build found out, kept beside the index."""

    recall: float = 1.0  # share of the true 10 best that the queries of the build found
    effort: int = 0  # of the search that reached it: queue length of a graph, lists visited
    bytes_per_vector: float = 0.0
    notes: tuple[str, ...] = ()  # what was done otherwise than asked, and why
    curve: tuple[Point, ...] = ()  # what was tried to choose the effort


class Codes(NamedTuple):
    """A FAISS index and how it is asked."""

    kind: Kind
    index: Any


class SideIndex:
    """One side of one space: its stored vectors, and what makes searching them fast."""

    def __init__(self, spec: Spec, stored: Stored, codes: Codes | None, measured: Measured) -> None:
        self.spec = spec
        self.measured = measured
        self._stored = stored
        self._codes = codes  # None where every search is an exact scan

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def recall(self) -> float:
        return self.measured.recall

    @property
    def bytes_per_vector(self) -> float:
        """Bytes of what is searched: codes and links, or the stored rows where there is nothing else."""
        return self.measured.bytes_per_vector

    @classmethod
    def build(
        cls,
        chunks: Chunks,
        spec: Spec,
        progress: Progress,
        queries: Matrix | None = None,
        like: SideIndex | None = None,
    ) -> SideIndex:
        """Train on, index and measure the rows of `chunks`, (N, D) each.

        The recall is measured before the last rows are added, around which queries are drawn: nothing has seen them.
        queries: (Q, D) like those to come, for an index that learns from them; some are kept back to measure with.
        like: an earlier index of that spec, whose quantizers are used again instead of learning others.
        Raises Invalid where the spec does not suit the dimension, or the queries do not.
        """
        stored = Stored(chunks)
        kind = kind_of(spec)
        if stored.dim:
            spec.check(stored.dim)
        if kind is None or not len(stored):
            return cls(spec, stored, None, Measured(bytes_per_vector=stored.bytes_per_row))
        seen = len(stored) - min(_HELD_OUT, len(stored) // 10)
        learning, asked = _kept_back(_checked(queries, stored)) if isinstance(kind, Distilled) else (None, None)
        progress("train", 0, None)
        with threads(BUILD_THREADS if len(stored) >= _WORTH_THREADS else 1):
            if isinstance(kind, Distilled) and like is not None and like._codes is not None:
                index, notes = kind.like(like._codes.index), like.measured.notes
            else:
                sample = stored.gather(spread(seen, kind.sample_rows))
                if isinstance(kind, Distilled):
                    index, notes = kind.teach(sample, stored.until(seen), learning, progress)
                else:
                    index, notes = kind.train(sample)
            codes = Codes(kind, index)
            side = cls(spec, stored, codes, Measured())
            side._add(codes, 0, seen, progress)
            chosen, curve = side._measure(codes, seen, asked)
            side._add(codes, seen, len(stored), progress)
            if isinstance(kind, Distilled):
                face(index)
        side.measured = Measured(chosen.recall, chosen.effort, _bytes(index) / len(stored), notes, curve)
        return side

    def _add(self, codes: Codes, start: int, stop: int, progress: Progress) -> None:
        for at, rows in self._stored.blocks(start, stop):
            for offset in range(0, len(rows), _ADDED_ROWS):
                some = rows[offset : offset + _ADDED_ROWS]
                codes.index.add(some)
                progress("vectors", at + offset + len(some), len(self))

    def _measure(self, codes: Codes, seen: int, queries: Matrix | None) -> tuple[Point, tuple[Point, ...]]:
        """The least effort that finds enough, and what was tried; over `queries`, or around the rows not added yet.

        Fewer than ten vectors hold none out: queries are drawn around those that are searched.
        """
        if queries is None:
            around = self._stored.gather(np.arange(seen, len(self)) if seen < len(self) else np.arange(seen))
            queries = perturbed(around, len(around), seed=0)
        k = min(_MEASURED_K, seen)
        truth = nearest(self._stored, queries, k, np.arange(seen))[0][:, k - 1 : k]
        curve = []
        if isinstance(codes.kind, Distilled):
            face(codes.index)
        for effort in codes.kind.efforts:
            curve.append(self._point(codes, queries, k, truth, effort))
            if curve[-1].recall >= _RECALL_WANTED:
                break
        if isinstance(codes.kind, Distilled):
            face(codes.index)
        # Codes lose some however many lists are visited; what is left of the loss is not worth visiting all.
        wanted = _RECALL_WANTED if isinstance(codes.kind, Graph) else _OF_THE_BEST * max(p.recall for p in curve)
        return next((point for point in curve if point.recall >= wanted), curve[-1]), tuple(curve)

    def _point(self, codes: Codes, queries: Matrix, k: int, truth: Scores, effort: int) -> Point:
        _, found = self._probe(codes, queries, k, None, effort, codes.kind.oversample)
        reached = self._stored.scores(queries, found)
        reached[found[:, 0] < 0] = np.inf  # a search answers them exactly
        recall = _recall(reached, truth)
        took = []
        with threads(1):
            for query in queries[:_TIMED]:
                start = time.perf_counter()
                self._probe(codes, query[None], k, None, effort, codes.kind.oversample)
                took.append(time.perf_counter() - start)
        return Point(effort, round(recall, 4), round(1_000 * float(np.median(took)), 4))

    def search(
        self,
        queries: Matrix,
        k: int,
        allowed: Mask | Numbers | None = None,
        exact: bool = False,
        filtered: bool = True,
    ) -> Found:
        """The k best vectors of each query, (Q, D) float32 and C-contiguous.

        allowed: which vectors count: a mask (N,), or ascending numbers.
        filtered: False says that `allowed` only leaves out dead vectors: codes are searched as they are without it.
        Raises Conflict where queries or mask do not fit the index, Invalid where k is below 1.
        """
        self._check(queries, k)
        numbers = _numbers(allowed, len(self))
        filtered = filtered and numbers is not None
        count = len(self) if numbers is None else len(numbers)
        codes = None if exact or self._scan_is_cheap(k, count, filtered) else self._codes
        with threads(1 if len(queries) == 1 else BUILD_THREADS):
            if codes is not None:
                scores, found = self._approximate(codes, queries, min(k, count), numbers, filtered)
                # Queries are answered exactly which a graph led to too few, from which a filter hid the content of
                # lists, and which lists gave nothing. A fast scan gives nothing where all codewords score the same,
                # and leaves out what takes the worst of each: a scan makes up for that where it costs little.
                strict = filtered or isinstance(codes.kind, Graph) or count <= _SMALL
                short = np.flatnonzero(found[:, -1 if strict else 0] < 0)
                if not len(short):
                    return Found(scores, found, False, self.recall)
                if len(short) < len(queries):
                    rows = list(zip(scores, found, strict=True))
                    exactly = nearest(self._stored, queries[short], k, numbers)
                    for query, best, which in zip(short, *exactly, strict=True):
                        rows[query] = best, which
                    return Found(*padded(rows), False, self.recall)
            return Found(*nearest(self._stored, queries, k, numbers), True, 1.0)

    def _check(self, queries: Matrix, k: int) -> None:
        if k < 1:
            raise Invalid(f"k is {k}; it must be at least 1", "k")
        if queries.ndim != 2 or (self._stored.dim and queries.shape[1] != self._stored.dim):
            raise Conflict(f"queries of shape {queries.shape}; this index takes (Q, {self._stored.dim or 'D'})")
        if queries.dtype != np.float32 or not queries.flags.c_contiguous:
            layout = "contiguous" if queries.flags.c_contiguous else "strided"
            raise Conflict(f"queries are {layout} {queries.dtype}; this index takes C-contiguous float32")

    def _scan_is_cheap(self, k: int, count: int, filtered: bool) -> bool:
        if self._codes is None or not count:
            return True
        if filtered and count <= _SCANNED_WHEN_FILTERED:
            return True
        if not isinstance(self._codes.kind, Graph):
            return False
        return count <= max(_SMALL, _ROWS_PER_EF * self._effort(self._codes, k, count, filtered))

    def _effort(self, codes: Codes, k: int, count: int, filtered: bool) -> int:
        """What it takes to find k among `count` allowed vectors."""
        effort = self.measured.effort
        if isinstance(codes.kind, Graph):
            effort = max(effort, k + k // 2)
        return math.ceil(effort * len(self) / count) * (_WIDER_WHEN_FILTERED if filtered else 1)

    def _approximate(
        self, codes: Codes, queries: Matrix, k: int, numbers: Numbers | None, filtered: bool
    ) -> tuple[Scores, Numbers]:
        count = len(self) if numbers is None else len(numbers)
        refine = codes.kind.oversample
        if filtered and not isinstance(codes.kind, Graph):
            refine = max(refine, _REFINED_WHEN_FILTERED)
        return self._probe(codes, queries, k, numbers, self._effort(codes, k, count, filtered), refine)

    def _probe(
        self, codes: Codes, queries: Matrix, k: int, numbers: Numbers | None, effort: int, refine: int
    ) -> tuple[Scores, Numbers]:
        """refine: candidates per result that are rescored on the stored vectors; 0 for none."""
        allowed = None if numbers is None else selector(numbers, len(self))
        fetch = min(k * max(1, refine), codes.index.ntotal)
        scores, found = codes.kind.probe(codes.index, queries, fetch, effort, allowed)
        if not refine:
            return scores, found
        scores = self._stored.scores(queries, found)
        return best_first(scores, found, k)

    def save(self, folder: Path) -> None:
        """Write `side.json` and, where there is one, `index.faiss` into `folder`, fsynced."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            digest = None
            if self._codes is not None:
                faiss.write_index(self._codes.index, str(folder / "index.faiss"))
                digest = _synced(folder / "index.faiss")
            card = {"spec": str(self.spec), "vectors": len(self), "dim": self._stored.dim, "sha256": digest}
            (folder / "side.json").write_text(json.dumps(card | asdict(self.measured), indent=1))
            _synced(folder / "side.json")
        except (OSError, RuntimeError) as error:
            raise BackendError("a vector index could not be written; is the disk full?") from error

    @classmethod
    def load(cls, folder: Path, chunks: Chunks, verify: bool = True) -> SideIndex:
        """Open what `save` wrote; codes and links stay on disk and are memory-mapped, but for codes of 4 bits.

        verify: hash `index.faiss` first, since FAISS reads a damaged file without a word. False where
        that has been done. Raises BackendError where a file is missing, damaged or not about these chunks.
        """
        stored = Stored(chunks)
        try:
            card = json.loads((folder / "side.json").read_text())
            spec = parse_spec(card["spec"])
            curve = tuple(Point(*point) for point in card.get("curve", ()))
            measured = Measured(card["recall"], card["effort"], card["bytes_per_vector"], tuple(card["notes"]), curve)
            if (card["vectors"], card["dim"]) != (len(stored), stored.dim):
                raise BackendError(f"a vector index is about {card['vectors']} vectors, but {len(stored)} are stored")
            kind = kind_of(spec) if len(stored) else None
            digest = card["sha256"] if verify else None
            codes = None if kind is None else Codes(kind, _read(folder / "index.faiss", digest, stored))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, Invalid) as error:
            raise BackendError("a vector index is missing or damaged; rebuild the collection") from error
        return cls(spec, stored, codes, measured)


def merge(sides: Sequence[tuple[Found, NDArray[np.integer[Any]] | None]], ids: Sequence[str], k: int) -> list[Ranking]:
    """Rankings of documents from what the sides found; a document scores as its best vector.

    sides: (found, rows) pairs over the same queries; rows[number] is the document row of a vector, which is the
    number itself where rows are None. ids: row -> id. Ties go to the smaller id.
    """
    if not sides:
        return []
    found, row_of = sides[0]
    exact, recall = found.exact, found.recall
    if len(sides) == 1:
        scores, rows = found.scores, _rows_of(found.numbers, row_of)
    else:
        exact = all(found.exact for found, _ in sides)
        recall = min(found.recall for found, _ in sides)
        scores, rows = _several_sides(sides)
    close = scores[:, :-1] <= scores[:, 1:] + TIE  # with the next one
    tied = close.any(axis=1).tolist() if np.count_nonzero(close) else [False] * len(close)
    return [
        Ranking(_hits(some, values, close[query] if tied[query] else None, ids, k), exact, recall)
        for query, (some, values) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True))
    ]


def _several_sides(
    sides: Sequence[tuple[Found, NDArray[np.integer[Any]] | None]],
) -> tuple[Scores, Numbers]:
    """(Q, W) scores, best first, and document rows of several sides together, padded as `Found` is.

    A document's best vector stays, its others become padding at the end.
    """
    scores = np.concatenate([found.scores for found, _ in sides], axis=1)
    rows = np.concatenate([_rows_of(found.numbers, row_of) for found, row_of in sides], axis=1)
    scores, rows = best_first(scores, rows, scores.shape[1])
    for query, held in enumerate(rows):
        firsts = np.sort(np.unique(held, return_index=True)[1])  # a document's first appearance is its best vector
        firsts = firsts[held[firsts] >= 0]
        best, count = (scores[query, firsts], held[firsts]), len(firsts)
        scores[query, :count], rows[query, :count] = best
        scores[query, count:], rows[query, count:] = -np.inf, -1
    return scores, rows


def _hits(rows: list[int], values: list[float], close: Mask | None, ids: Sequence[str], k: int) -> list[Hit]:
    """The first k; runs of scores within 1e-6 of their first are ordered by id."""
    if rows and rows[-1] < 0:  # padding comes last
        rows = rows[: rows.index(-1)]
    names = [ids[row] for row in rows]
    end = 0
    for start in np.flatnonzero(close[: min(k, len(names))]).tolist() if close is not None else ():
        if start < end:
            continue
        end = start + 1
        while end < len(names) and values[start] - values[end] <= TIE:
            end += 1
        tied = sorted(zip(names[start:end], values[start:end], strict=True))
        names[start:end], values[start:end] = [name for name, _ in tied], [value for _, value in tied]
    names = names[:k]
    return list(map(_as_hit, zip(names, values[: len(names)], repeat(_NO_PARTS))))


def _rows_of(numbers: Numbers, rows: NDArray[np.integer[Any]] | None) -> Numbers:
    if rows is None:
        return numbers
    if not len(rows):
        return np.full_like(numbers, -1)
    return np.where(numbers < 0, -1, rows[numbers])


def _checked(queries: Matrix | None, stored: Stored) -> Matrix | None:
    """Training queries as they can be learned from; None where there are none."""
    if queries is None or not len(queries):
        return None
    if queries.ndim != 2 or queries.shape[1] != stored.dim:
        raise Invalid(f"training queries of shape {queries.shape}, the vectors have {stored.dim} dimensions")
    if not np.isfinite(queries).all():
        raise Invalid("training queries hold numbers that are not finite; encode them again")
    return np.ascontiguousarray(queries, np.float32)


def _kept_back(queries: Matrix | None) -> tuple[Matrix | None, Matrix | None]:
    """(to learn from, to measure with): too few are for learning alone."""
    if queries is None or len(queries) < 2 * _HELD_OUT:
        return queries, None
    back = np.zeros(len(queries), np.bool_)
    back[spread(len(queries), _HELD_OUT)] = True
    return queries[~back], queries[back]


def _recall(found: Scores, least: Scores) -> float:
    """Share of found scores (Q, k) that reach the k-th true one (Q, 1): a tie at the cut is no miss."""
    return float((found >= least - TIE).mean())


def _numbers(allowed: Mask | Numbers | None, count: int) -> Numbers | None:
    if allowed is None:
        return None
    if allowed.dtype == np.bool_:
        if allowed.shape != (count,):
            raise Conflict(f"a mask of shape {allowed.shape} for {count} vectors")
        return np.flatnonzero(allowed)
    if len(allowed) and not 0 <= allowed[0] <= allowed[-1] < count:
        raise Conflict(f"vector numbers outside 0 to {count - 1}")
    return np.ascontiguousarray(allowed, np.int64)


def _bytes(index: Any) -> int:
    """Size on disk, without writing it or holding a copy."""
    total = 0

    def count(data: bytes) -> int:
        nonlocal total
        total += len(data)
        return len(data)

    faiss.write_index(index, faiss.BufferedIOWriter(faiss.PyCallbackIOWriter(count)))
    return total


def _read(path: Path, digest: str | None, stored: Stored) -> Any:
    if digest is not None and _sha256(path) != digest:
        raise BackendError("a vector index file is damaged, its checksum differs; rebuild the collection")
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if (index.ntotal, index.d) != (len(stored), stored.dim):
        raise BackendError(f"a vector index of {index.ntotal} vectors, but {len(stored)} are stored")
    return index


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced(path: Path) -> str:
    """Bring a file to the disk; its sha256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sha256(path)
