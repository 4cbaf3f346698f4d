"""One published state of an embedded collection, and the searches over it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from indexers.lexical import Scan
from indexers.records import Record
from indexers.rows import Rows, ranked
from indexers.scan import Numbers
from indexers.shards import read_bytes
from indexers.store import Store
from indexers.vectors import Found, SideIndex, merge
from retrieval.errors import Conflict, Invalid, NotFound
from retrieval.filters import Filter
from retrieval.types import Document, Encoded, FindingsScore, Matrix, Part, Ranking, Side, SpaceInfo

Mask = NDArray[np.bool_]
Key = tuple[str, Side]
OK, VERIFYING = "ok", "verifying"  # states of a derived part; any other says what is wrong
SOUND = (OK, VERIFYING)


class Words(Protocol):
    """What answers a search by words: `lexical.Lexical`, or `lexical.Scan` in its stead."""

    def search(self, texts: Sequence[str], k: int, allowed: Mask | None, ids: Sequence[str]) -> list[Ranking]: ...


@dataclass(eq=False)
class Stretch:
    """Consecutive vectors of one side with one index over them: the sealed ones, or the fresh tail."""

    index: SideIndex
    rows: NDArray[np.int32]  # (vectors,) the document of each
    matrix: Callable[[NDArray[np.int64]], Matrix]  # stored vectors by number
    straight: bool  # rows are 0, 1, 2, ...
    alive: Mask | None = None  # (vectors,) None where all are

    def search(self, queries: Matrix, k: int, allowed: Mask | Numbers | None, exact: bool) -> Found:
        """allowed: what a filter leaves of the snapshot's rows, a mask or ascending numbers; None without a filter."""
        if allowed is None:
            mine: Mask | Numbers | None = self.alive
        elif allowed.dtype == np.bool_:  # where vector i is document i, a gather of all rows is saved
            mine = allowed[: len(self.rows)] if self.straight else allowed[self.rows]
        else:
            mine = self._numbers(cast(Numbers, allowed))
        return self.index.search(queries, k, mine, exact, filtered=allowed is not None)

    def _numbers(self, rows: Numbers) -> Numbers:
        """The vectors of those of `rows` that have one here, ascending like them."""
        if self.straight:
            return rows[: rows.searchsorted(len(self.rows))]
        places = self.places(rows)
        return np.sort(places[places >= 0])

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The vector number of each of `rows`, -1 where it has none here."""
        table = self._places
        inside = rows < len(table)
        return np.where(inside, table[np.where(inside, rows, 0)] if len(table) else -1, -1)

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        if self.straight:
            return np.arange(len(self.rows))
        table = np.full(int(self.rows.max()) + 1, -1, np.int64)
        table[self.rows] = np.arange(len(self.rows))
        return table


@dataclass(eq=False)
class EmbeddedSnapshot:
    """Implements `retrieval.types.Snapshot`. Immutable and thread-safe; takes no lock of the collection."""

    generation: int
    sequence: int
    spaces: Mapping[str, SpaceInfo]
    sides: Mapping[Key, int]
    config: Mapping[str, Any]
    rows: Rows
    stretches: Mapping[Key, tuple[Stretch, ...]]
    words: Words | None  # None: the lexical index cannot be trusted
    store: Store
    blobs: Path
    parts: Mapping[str, str]  # derived part -> its state
    vector_index: str
    base: str | None  # the file under `rows`
    _scan: list[Scan] = field(default_factory=list, repr=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return self.rows.documents

    @property
    def sound(self) -> bool:
        """No derived part is known to be damaged or missing."""
        return all(state in SOUND for state in self.parts.values())

    @property
    def settled(self) -> bool:
        """Nothing is being verified any more."""
        return VERIFYING not in self.parts.values()

    # --- looking up ------------------------------------------------------------------------------

    def fetch(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None for unknown ids."""
        rows = self.rows.find(ids)
        records = self._records([row for row in rows if row >= 0])
        return [records[row].document() if row in records else None for row in rows]

    def image(self, id: str) -> bytes | None:
        """The rendered picture (PNG): an upload as it was rendered, of others the thumbnail."""
        row = self.rows.find([id])[0]
        record = self._records([row]).get(row) if row >= 0 else None
        if record is None or record.picture is None:
            return None
        if record.blob is not None:
            return read_bytes(self.blobs / record.blob)
        with self.store.reading() as reader:
            return reader.thumbnail(row)

    def sample(self, n: int) -> list[str]:
        """Up to `n` ids, spread over the collection, the same ones for the same state."""
        alive = np.flatnonzero(self.rows.alive)
        picked = alive[np.linspace(0, len(alive) - 1, min(n, len(alive))).astype(np.int64)]
        return [self.rows[row] for row in picked.tolist()]

    def values(self, field: str, ids: Sequence[str]) -> list[Any]:
        rows = self.rows.find(ids)
        found = self.rows.columns.values(field, [row for row in rows if row >= 0])
        known = iter(found)
        return [next(known) if row >= 0 else None for row in rows]

    def count(self, where: Filter | None = None) -> int:
        if where is None:
            return len(self)
        selected = self.rows.columns.select(where)
        return int(np.count_nonzero(selected & self.rows.alive))

    def select(self, where: Filter) -> list[str]:
        selected = np.flatnonzero(self.rows.columns.select(where) & self.rows.alive)
        return [self.rows[row] for row in selected.tolist()]

    def vectors(self, space: str, side: Side, ids: Sequence[str]) -> Encoded:
        """Stored vectors of those `ids` that have one; `rows` index into `ids`."""
        info = self._space(space)
        found = np.array(self.rows.find(ids), np.int64)
        known = np.flatnonzero(found >= 0)
        out = np.zeros((len(ids), info.dim), np.float32)
        held = np.zeros(len(ids), bool)
        for stretch in self.stretches.get((space, side), ()):
            places = stretch.places(found[known])
            here = known[places >= 0]
            out[here] = stretch.matrix(places[places >= 0])
            held[here] = True
        return Encoded(np.flatnonzero(held), out[held])

    def _records(self, rows: Sequence[int]) -> dict[int, Record]:
        if not rows:
            return {}
        with self.store.reading() as reader:
            return reader.records_of(rows)

    # --- searching -------------------------------------------------------------------------------

    def search_text(self, texts: Sequence[str], k: int, where: Filter | None = None) -> list[Ranking]:
        """BM25 over the tokens of title and text."""
        _check_k(k)
        words = self.words or self._scanned()
        return words.search(texts, k, self._allowed(where), self.rows.names)

    def search_vectors(
        self,
        space: str,
        vectors: Matrix,
        k: int,
        where: Filter | None = None,
        sides: Sequence[Side] = ("text", "image"),
        exact: bool = False,
    ) -> list[Ranking]:
        """Inner products; a document scores as its best vector among `sides`."""
        _check_k(k)
        queries = self._queries(space, vectors)
        allowed = None if where is None else self._few(where)
        stretches = [stretch for side in dict.fromkeys(sides) for stretch in self.stretches.get((space, side), ())]
        found = [(s.search(queries, k, allowed, exact), None if s.straight else s.rows) for s in stretches]
        if not found:
            return [Ranking() for _ in queries]
        return merge(found, self.rows.names, k)

    def search_findings(
        self, parts: Sequence[Part], k: int, where: Filter | None, score: FindingsScore
    ) -> list[Ranking]:
        """`score` of every document for every part, computed from the inverted lists; 0 is no hit."""
        _check_k(k)
        allowed = self._allowed(where)
        return [self._findings(part, k, allowed, score) for part in parts]

    def _findings(self, part: Part, k: int, allowed: Mask | None, score: FindingsScore) -> Ranking:
        if not part.findings or not len(self.rows):
            return Ranking()
        scores = score(part, self.rows)
        good = scores > 0 if allowed is None else (scores > 0) & allowed
        rows = np.flatnonzero(good)
        return Ranking(ranked(scores[rows].astype(np.float64), rows, k, self.rows.names))

    def _allowed(self, where: Filter | None) -> Mask | None:
        """(rows,) who may be found; None where everyone may."""
        if where is not None:
            return self._selected(where)
        return None if self.rows.documents == len(self.rows) else self.rows.alive

    def _selected(self, where: Filter) -> Mask:
        selected = self.rows.columns.select(where)
        return selected if self.rows.documents == len(self.rows) else selected & self.rows.alive

    def _few(self, where: Filter) -> Mask | Numbers:
        """The same as ascending rows where they are few, which saves a pass over all of them."""
        few = self.rows.columns.few(where)
        if few is None:
            return self._selected(where)
        return few if self.rows.documents == len(self.rows) else few[self.rows.alive[few]]

    def _queries(self, space: str, vectors: Matrix) -> Matrix:
        info = self._space(space)
        queries = np.ascontiguousarray(vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != info.dim:
            raise Conflict(f"got vectors of shape {queries.shape}, space '{space}' has (Q, {info.dim})")
        if np.count_nonzero(np.isfinite(queries)) < queries.size:
            raise Invalid(f"got vectors that are not finite for space '{space}'")
        return queries

    def _space(self, space: str) -> SpaceInfo:
        if space not in self.spaces:
            raise NotFound(f"no space '{space}' in this collection, it has {', '.join(self.spaces) or 'none'}")
        return self.spaces[space]

    def _scanned(self) -> Scan:
        with self._guard:
            if not self._scan:
                self._scan.append(Scan(self._texts()))
            return self._scan[0]

    def _texts(self) -> Iterator[tuple[int, str]]:
        with self.store.reading() as reader:
            for record in reader.records(0, len(self.rows)):
                if self.rows.alive[record.row]:
                    yield record.row, record.content

    # --- describing ------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Counts, index kind, bytes per vector, measured recall, state of each derived part."""
        spaces = {
            name: {
                "dim": info.dim,
                "digests": dict(info.digests),
                "sides": {side: self._described((space, side)) for space, side in self.sides if space == name},
            }
            for name, info in self.spaces.items()
        }
        return {
            "documents": len(self),
            "generation": self.generation,
            "sequence": self.sequence,
            "vector_index": self.vector_index,
            "spaces": spaces,
            "parts": dict(self.parts),
        }

    def _described(self, key: Key) -> dict[str, Any]:
        stretches = self.stretches.get(key, ())
        total = max(1, sum(len(stretch.rows) for stretch in stretches))
        per_vector = sum(stretch.index.bytes_per_vector * len(stretch.rows) for stretch in stretches) / total
        described = {
            "vectors": self.sides[key],
            "kind": str(stretches[0].index.spec) if stretches else self.vector_index,
            "bytes_per_vector": round(per_vector, 1),
            "recall": min((stretch.index.recall for stretch in stretches), default=1.0),
        }
        measured = stretches[0].index.measured if stretches else None
        if measured is not None and measured.curve:
            described |= {
                "effort": measured.effort,  # nprobe of lists, ef of a graph: the one of the curve that is used
                "curve": [point._asdict() for point in measured.curve],
                "notes": list(measured.notes),
            }
        return described


def _check_k(k: int) -> None:
    if k < 1:
        raise Invalid(f"k: got {k}, expected at least 1", "k")
