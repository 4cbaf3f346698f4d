"""FAISS, one index per side of a space; everything here is derived from the stored vectors.

A *side* is the concatenation of its chunks: memory-mapped matrices of float32, float16 or int8 rows.
A vector's number is its position in that concatenation. Rows are unit vectors and scores are inner
products, so a score is the cosine. float16 and int8 rows are brought back to unit length when they are read.

The planner: a search is an exact scan of the allowed vectors where that is cheap, and a graph or an
inverted file with a selector otherwise. Every answer says which (`exact`), and what recall was
measured on held-out vectors when the index was built.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from indexers.scan import TIE, Chunks, Numbers, Scores, Stored, nearest, threads
from retrieval.errors import BackendError, Conflict, Invalid
from retrieval.types import Hit, Matrix, Progress, Ranking

faiss: Any = untyped_faiss  # its stubs lack half of what it has

KINDS = ("flat", "hnsw", "hnsw-sq8", "hnsw-sq4", "hnsw-bin", "ivfpq")
BUILD_THREADS = 2

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed vector index spec, for example ``ivfpq:M=48,nlist=256,nprobe=16``."""

    kind: str
    keys: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ":".join(filter(None, (self.kind, ",".join(f"{key}={value}" for key, value in self.keys.items()))))

    def check(self, dim: int) -> None:
        """Raise Invalid where vectors of `dim` dimensions cannot be indexed so."""
        codes = self.keys.get("M", 1)
        if dim % codes:
            divisors = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
            raise Invalid(f"{self}: M={codes} does not divide the dimension {dim}; M can be {divisors}")


_CODE_KEYS = {"M": None, "nlist": None, "nprobe": None, "refine": 0}  # None: no default


def parse_spec(text: str) -> Spec:
    """Read a spec; Invalid, with the list of what there is, where it names nothing known.

    >>> str(parse_spec("ivfpq:M=48,nlist=256"))
    'ivfpq:M=48,nlist=256,nprobe=16,refine=0'
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise Invalid(f"no vector index {text!r}; there are {_vocabulary()}", "vector_index")
    if kind != "ivfpq":
        if rest:
            raise Invalid(f"the vector index {kind} takes no keys, got {rest!r}", "vector_index")
        return Spec(kind)
    given = dict(_pair(text, item) for item in rest.split(",") if item)
    missing = [key for key in ("M", "nlist") if key not in given]
    if missing:
        raise Invalid(f"{text!r} lacks {' and '.join(missing)}; expected {_vocabulary()}", "vector_index")
    # A sixteenth of the lists, the usual start; what it costs in recall is measured at build time.
    nprobe = min(given.get("nprobe", max(1, given["nlist"] // 16)), given["nlist"])
    keys = {"M": given["M"], "nlist": given["nlist"], "nprobe": nprobe, "refine": given.get("refine", 0)}
    return Spec(kind, keys)


def _pair(text: str, item: str) -> tuple[str, int]:
    key, _, value = item.partition("=")
    if key not in _CODE_KEYS or not value.isascii() or not value.isdigit() or len(value) > 7:
        raise Invalid(f"{item!r} in {text!r} is not one of M=, nlist=, nprobe=, refine= and a number", "vector_index")
    if int(value) == 0 and key != "refine":
        raise Invalid(f"{key} in {text!r} must be at least 1", "vector_index")
    return key, int(value)


def _vocabulary() -> str:
    return ", ".join(KINDS[:-1]) + ", ivfpq:M=..,nlist=..[,nprobe=..][,refine=..]"


# What a search costs, counted in rows that an exact scan reads in the same time (measured on 384 dimensions:
# a graph search visits about 20 rows for each entry of its queue).
_ROWS_PER_EF = 20
_SMALL = 4_096  # rows; below, an exact scan takes less than half a millisecond
_SCANNED_WHEN_FILTERED = 32_768  # rows; a filter promises the right answer, so it may cost a few milliseconds
_OVERSAMPLE = {"hnsw-sq8": 2, "hnsw-sq4": 4, "hnsw-bin": 10}  # candidates rescored on stored vectors, times k
_EF = (32, 64, 128, 256, 512)
_RECALL_WANTED = 0.99
_HELD_OUT = 256
_MEASURED_K = 10


class Found(NamedTuple):
    """Best vectors of each query.

    scores: (Q, W), best first. numbers: (Q, W) vector numbers. Padded with -inf and -1. W may exceed k
    where an exact search found ties at the cut, and be smaller where there is nothing more.
    """

    scores: Scores
    numbers: Numbers
    exact: bool
    recall: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a build found out, kept beside the index."""

    recall: float = 1.0  # share of the true 10 best that held-out vectors found
    ef: int = 0  # queue length of a graph search that reached it
    bytes_per_vector: float = 0.0
    notes: tuple[str, ...] = ()  # what was done otherwise than asked, and why


class SideIndex:
    """One side of one space: its stored vectors, and what makes searching them fast."""

    def __init__(self, spec: Spec, stored: Stored, index: Any, measured: Measured) -> None:
        self.spec = spec
        self.measured = measured
        self._stored = stored
        self._index = index

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def recall(self) -> float:
        return self.measured.recall

    @property
    def bytes_per_vector(self) -> float:
        """Bytes that a search without a filter reads from: codes and graph, or the stored rows."""
        return self.measured.bytes_per_vector

    @classmethod
    def build(cls, chunks: Chunks, spec: Spec, progress: Progress) -> SideIndex:
        """Train on, measure with and index the rows of `chunks` ((N, D) each).

        Recall is measured with the last rows as queries, before they are added: nothing has seen them.
        """
        stored = Stored(chunks)
        if stored.dim:
            spec.check(stored.dim)
        if spec.kind == "flat" or not len(stored):
            return cls(spec, stored, None, Measured(bytes_per_vector=stored.bytes_per_row))
        with threads(BUILD_THREADS):
            index, notes = _BUILDERS[spec.kind](stored, spec)
            held = min(_HELD_OUT, len(stored) // 10)
            side = cls(spec, stored, index, Measured(notes=notes))
            side._add(0, len(stored) - held, progress)
            recall, ef = side._measure(len(stored) - held)
            side._add(len(stored) - held, len(stored), progress)
            side.measured = Measured(recall, ef, len(faiss.serialize_index(index)) / len(stored), notes)
        return side

    def _add(self, start: int, stop: int, progress: Progress) -> None:
        for at, rows in self._stored.blocks(start, stop):
            for offset in range(0, len(rows), 4_096):
                _faiss(self._index).add(rows[offset : offset + 4_096])
                progress("vectors", at + min(offset + 4_096, len(rows)), len(self._stored))

    def _measure(self, count: int) -> tuple[float, int]:
        """(recall@10, ef) over the rows from `count` on, which the index does not hold yet."""
        graph = self.spec.kind.startswith("hnsw")
        queries = self._stored.gather(np.arange(count, len(self._stored)))
        if not len(queries):
            return 1.0, _EF[-1] if graph else 0
        truth, _ = nearest(self._stored, queries, _MEASURED_K, np.arange(count))
        recall, ef = 0.0, 0
        for ef in _EF if graph else (0,):
            _, numbers = self._approximate(queries, min(_MEASURED_K, count), None, ef)
            recall = _recall(self._true_scores(queries, numbers), truth)
            if recall >= _RECALL_WANTED:
                break
        return recall, ef

    def _true_scores(self, queries: Matrix, numbers: Numbers) -> Scores:
        scores: Scores = np.stack(
            [self._stored.scores(query[None], row) for query, row in zip(queries, numbers, strict=True)]
        )
        return scores

    def search(
        self,
        queries: Matrix,
        k: int,
        allowed: Mask | Numbers | None = None,
        exact: bool = False,
        filtered: bool = True,
    ) -> Found:
        """The k best vectors of each query, (Q, D) float32 and C-contiguous.

        allowed: which vectors count: a mask (N,) or ascending numbers.
        filtered: False says that `allowed` only leaves out dead vectors; codes are then searched as without it.
        Conflict where the queries do not fit the index.
        """
        self._check(queries, k)
        numbers = _numbers(allowed, len(self))
        count = len(self) if numbers is None else len(numbers)
        with threads(1 if len(queries) == 1 else BUILD_THREADS):
            if exact or self._scan_is_cheap(k, count, filtered and numbers is not None):
                return Found(*nearest(self._stored, queries, k, numbers), True, 1.0)
            ef = math.ceil(self._ef(k) * len(self) / count)
            scores, found = self._approximate(queries, min(k, count), numbers, ef)
            if numbers is not None and (found[:, : min(k, count)] < 0).any():
                # The graph did not lead to enough allowed vectors.
                return Found(*nearest(self._stored, queries, k, numbers), True, 1.0)
            return Found(scores, found, False, self.recall)

    def _check(self, queries: Matrix, k: int) -> None:
        if k < 1:
            raise Invalid(f"k is {k}; it must be at least 1", "k")
        if queries.ndim != 2 or (self._stored.dim and queries.shape[1] != self._stored.dim):
            raise Conflict(f"queries of shape {queries.shape}; this index takes (Q, {self._stored.dim or 'D'})")
        if queries.dtype != np.float32 or not queries.flags.c_contiguous:
            raise Conflict(f"queries are {queries.dtype} and maybe strided; expected C-contiguous float32")

    def _ef(self, k: int) -> int:
        return max(self.measured.ef, 2 * k)

    def _scan_is_cheap(self, k: int, count: int, filtered: bool) -> bool:
        if self._index is None or not count:
            return True
        if filtered and count <= _SCANNED_WHEN_FILTERED:
            return True
        if not self.spec.kind.startswith("hnsw"):
            return False
        return count <= max(_SMALL, _ROWS_PER_EF * self._ef(k) * len(self) // count)

    def _approximate(self, queries: Matrix, k: int, numbers: Numbers | None, ef: int) -> tuple[Scores, Numbers]:
        index = _faiss(self._index)
        selector = None if numbers is None else _selector(numbers, len(self))
        oversample = _OVERSAMPLE.get(self.spec.kind, self.spec.keys.get("refine", 0))
        fetch = min(k * max(1, oversample), index.ntotal)
        if self.spec.kind.startswith("hnsw"):
            params = faiss.SearchParametersHNSW(efSearch=max(ef, fetch), sel=selector)
        else:
            params = faiss.SearchParametersIVF(nprobe=self.spec.keys["nprobe"], sel=selector)
        scores, found = index.search(queries, fetch, params=params)
        return (scores, found) if not oversample else self._rescored(queries, k, found)

    def _rescored(self, queries: Matrix, k: int, numbers: Numbers) -> tuple[Scores, Numbers]:
        scores = self._true_scores(queries, numbers)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)

    def save(self, folder: Path) -> None:
        """Write `side.json` and, where there is one, `index.faiss` into `folder`, fsynced."""
        folder.mkdir(parents=True, exist_ok=True)
        digest = None
        try:
            if self._index is not None:
                faiss.write_index(self._index, str(folder / "index.faiss"))
                digest = _sync(folder / "index.faiss")
            card = {
                "spec": str(self.spec), "vectors": len(self), "dim": self._stored.dim, "sha256": digest,
                "recall": self.measured.recall, "ef": self.measured.ef,
                "bytes_per_vector": self.measured.bytes_per_vector, "notes": list(self.measured.notes),
            }  # fmt: skip
            (folder / "side.json").write_text(json.dumps(card, indent=1, sort_keys=True))
            _sync(folder / "side.json")
        except (OSError, RuntimeError) as error:
            raise BackendError("a vector index could not be written; is the disk full?") from error

    @classmethod
    def load(cls, folder: Path, chunks: Chunks, verify: bool = True) -> SideIndex:
        """Open what `save` wrote; graph and codes stay on disk and are memory-mapped.

        verify: hash `index.faiss` first, since FAISS reads a damaged file without a word. Pass False where
        that has been done. BackendError where a file is missing, damaged or not about these chunks.
        """
        stored = Stored(chunks)
        try:
            card = json.loads((folder / "side.json").read_text())
            spec = parse_spec(card["spec"])
            measured = Measured(card["recall"], card["ef"], card["bytes_per_vector"], tuple(card["notes"]))
            if (card["vectors"], card["dim"]) != (len(stored), stored.dim):
                raise BackendError(f"a vector index of {card['vectors']} vectors, but {len(stored)} are stored")
            index = None
            if card["sha256"] is not None:
                if verify and _sha256(folder / "index.faiss") != card["sha256"]:
                    raise BackendError("a vector index file is damaged: its checksum differs; rebuild the collection")
                index = _read(folder / "index.faiss", len(stored), stored.dim)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, Invalid) as error:
            raise BackendError("a vector index is missing or damaged; rebuild the collection") from error
        return cls(spec, stored, index, measured)


def merge(sides: Sequence[tuple[Found, NDArray[np.integer[Any]]]], ids: Sequence[str], k: int) -> list[Ranking]:
    """Rankings of documents from what the sides found; a document scores as its best vector.

    sides: (found, rows) pairs over the same queries; rows[number] is the document row of a vector.
    ids: row -> id. Ties go to the smaller id.
    """
    if not sides:
        return []
    exact = all(found.exact for found, _ in sides)
    recall = min(found.recall for found, _ in sides)
    return [Ranking(_hits(sides, query, ids, k), exact, recall) for query in range(len(sides[0][0].scores))]


def _hits(
    sides: Sequence[tuple[Found, NDArray[np.integer[Any]]]], query: int, ids: Sequence[str], k: int
) -> list[Hit]:
    scores = np.concatenate([found.scores[query] for found, _ in sides])
    rows = np.concatenate([_rows_of(found.numbers[query], rows) for found, rows in sides])
    known = rows >= 0
    scores, rows = scores[known], rows[known]
    order = np.argsort(-scores, kind="stable")
    if len(sides) > 1 and len(order):  # a document's first appearance is its best vector
        order = order[np.sort(np.unique(rows[order], return_index=True)[1])]
    values = scores[order].tolist()
    names = [ids[row] for row in rows[order].tolist()]
    return list(map(Hit, *_tied_by_id(names, values, k)))


def _rows_of(numbers: Numbers, rows: NDArray[np.integer[Any]]) -> Numbers:
    if not len(numbers):
        return numbers
    return np.where(numbers < 0, -1, rows[numbers])


def _tied_by_id(names: list[str], values: list[float], k: int) -> tuple[list[str], list[float]]:
    """The first k of both, where runs of scores within 1e-6 of their first are ordered by name."""
    start = 0
    while start < min(k, len(values)):
        stop = start + 1
        while stop < len(values) and values[start] - values[stop] <= TIE:
            stop += 1
        if stop - start > 1:
            tied = sorted(zip(names[start:stop], values[start:stop], strict=True))
            names[start:stop], values[start:stop] = [name for name, _ in tied], [value for _, value in tied]
        start = stop
    return names[:k], values[:k]


def _graph(stored: Stored, _: Spec) -> tuple[Any, tuple[str, ...]]:
    index = faiss.IndexHNSWFlat(stored.dim, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 128
    return index, ()


_BUILDERS: dict[str, Callable[[Stored, Spec], tuple[Any, tuple[str, ...]]]] = {"hnsw": _graph}


def _recall(found: Scores, truth: Scores) -> float:
    """Share of found scores as good as the k-th true one: a tie at the cut is no miss."""
    least = truth[:, min(_MEASURED_K, truth.shape[1]) - 1, None] - TIE
    return float((found >= least).sum() / found.size)


def _numbers(allowed: Mask | Numbers | None, count: int) -> Numbers | None:
    if allowed is None:
        return None
    if allowed.dtype == np.bool_:
        if allowed.shape != (count,):
            raise Conflict(f"a mask of shape {allowed.shape} for {count} vectors")
        return np.flatnonzero(allowed)
    return np.ascontiguousarray(allowed, np.int64)


def _selector(numbers: Numbers, count: int) -> faiss.IDSelector:
    mask = np.zeros(count, np.bool_)
    mask[numbers] = True
    bits = np.packbits(mask, bitorder="little")
    selector = faiss.IDSelectorBitmap(bits)
    selector.bits_kept = bits  # FAISS holds a bare pointer
    return selector


def _faiss(index: Any) -> Any:
    if index is None:
        raise BackendError("a flat side has no FAISS index")
    return index


def _read(path: Path, count: int, dim: int) -> Any:
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if (index.ntotal, index.d) != (count, dim):
        raise BackendError(f"a FAISS index of {index.ntotal} x {index.d}, but {count} x {dim} are stored")
    return index


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> str:
    """Bring a file to the disk; its sha256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
