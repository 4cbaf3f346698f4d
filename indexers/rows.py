"""What a snapshot knows of its documents in memory: ids, who is alive, metadata columns, findings.

The base is a derived file, mapped into memory; what was published since is read from the store and laid
over it. Without a base (missing or damaged) everything is read from the store: slower, never different.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise, repeat
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexers.columns import Columns
from indexers.records import Record
from indexers.scan import TIE
from indexers.shards import Array, Damaged
from retrieval.types import Assertion, Hit, Share

Held = NDArray[np.int32]  # rows, ascending
Concept = tuple[str, Assertion]
_NO_PARTS: Mapping[str, Share] = {}
_as_hit: Any = partial(tuple.__new__, Hit)  # a thousand hits a search: without a Python frame for each
_id_of = itemgetter(0)
NO_ROWS = np.empty(0, np.int32)
LISTED_ROWS = 500_000  # up to so many, all ids are kept as a list once a search has needed them
MANY = 64  # ids that are worth a dict of all


class Base:
    """Ids and findings of the rows up to `count`, as arrays that need no parsing.

    An id is found through its sorted 64-bit hash, so that a million ids cost neither a dict nor a pass.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        try:
            self.offsets, self.text = arrays["id_offsets"], arrays["id_text"]
            self.alive, self.hashes, self.hashed = arrays["alive"], arrays["hashes"], arrays["hashed"]
            self.starts, self.holders = arrays["starts"], arrays["holders"]
            concepts = json.loads(arrays["concepts"].tobytes())
            self.concepts = {(name, Assertion(says)): at for at, (name, says) in enumerate(concepts)}
        except (KeyError, ValueError) as error:
            raise Damaged("the table of rows cannot be read") from error
        self.count = len(self.alive)
        self._names: list[str | None] = [None] * self.count  # ids that were needed so far

    def id(self, row: int) -> str:
        name = self._names[row]
        if name is None:
            start, stop = self.offsets[row : row + 2].tolist()
            name = self._names[row] = self.text[start:stop].tobytes().decode()
        return name

    @cached_property
    def names(self) -> list[str]:
        text, offsets = self.text.tobytes(), self.offsets.tolist()
        return [text[a:b].decode() for a, b in pairwise(offsets)]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {self.names[row]: row for row in self.hashed.tolist()}

    def find(self, ids: Sequence[str]) -> list[int]:
        """The row of each id that was alive when the base was made, -1 elsewhere."""
        if len(ids) > MANY and self.count <= LISTED_ROWS:
            return [self._row_of.get(id, -1) for id in ids]
        wanted = np.array([_hash(id) for id in ids], np.uint64)
        first, last = (np.searchsorted(self.hashes, wanted, side).tolist() for side in ("left", "right"))
        return [self._among(id, a, b) for id, a, b in zip(ids, first, last, strict=True)]

    def _among(self, id: str, first: int, last: int) -> int:
        """Which of the rows whose ids have the same hash is it?"""
        rows: list[int] = self.hashed[first:last].tolist() if first < last else []
        return next((row for row in rows if self.id(row) == id), -1)

    def held(self, concept: Concept) -> Held:
        at = self.concepts.get(concept)
        return NO_ROWS if at is None else self.holders[self.starts[at] : self.starts[at + 1]]


@dataclass(eq=False)
class Rows(Sequence[str]):
    """All rows of one published state, dead ones included: ids by row, and `retrieval.types.Postings`.

    Never changed; `extended` gives the next.
    """

    columns: Columns
    alive: NDArray[np.bool_]
    base: Base | None = None
    later_ids: tuple[str, ...] = ()  # of the rows behind the base
    later_rows: Mapping[str, int] = field(default_factory=dict)
    later_held: Mapping[Concept, Held] = field(default_factory=dict)
    documents: int = 0  # alive
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.alive)

    @classmethod
    def empty(cls) -> Rows:
        return cls(Columns.build([]), np.empty(0, bool))

    @classmethod
    def over(cls, base: Base, columns: Columns) -> Rows:
        return cls(columns, base.alive, base, documents=int(base.alive.sum()))

    def __len__(self) -> int:
        """Rows, dead ones included."""
        return len(self.alive)

    @property
    def start(self) -> int:
        """The first row behind the base."""
        return 0 if self.base is None else self.base.count

    def extended(self, records: Iterable[Record], stop: int, deaths: Held) -> Rows:
        """This state with the rows up to `stop` and without `deaths`. `records` are those that still exist."""
        first = len(self)
        ids = [""] * (stop - first)
        metas: list[Mapping[str, Any]] = [{}] * (stop - first)
        alive = np.concatenate([self.alive, np.zeros(stop - first, bool)])
        held: dict[Concept, list[int]] = {}
        for record in records:
            alive[record.row] = True
            ids[record.row - first] = record.id
            metas[record.row - first] = json.loads(record.meta)
            for concept in {(c, Assertion(says)) for c, says, _, _ in json.loads(record.findings)}:
                held.setdefault(concept, []).append(record.row)
        alive[deaths] = False
        fresh = {id: first + n for n, id in enumerate(ids) if alive[first + n]}
        if len(fresh) != int(alive[first:].sum()):
            raise Damaged("two documents in the store have the same id; roll back, or index the source again")
        return Rows(
            self.columns.extended(metas) if metas else self.columns,
            alive,
            self.base,
            self.later_ids + tuple(ids),
            {**self.later_rows, **fresh},
            {
                **self.later_held,
                **{c: np.append(self.later_held.get(c, NO_ROWS), np.array(r, np.int32)) for c, r in held.items()},
            },
            int(alive.sum()),
        )

    # --- ids -------------------------------------------------------------------------------------

    def __getitem__(self, row: Any) -> Any:  # int -> str; the other overload of a sequence has no use here
        """The id of a row."""
        base = self.base
        if base is not None and row < base.count:
            return base.id(row)
        return self.later_ids[row - self.start]

    @cached_property
    def names(self) -> Sequence[str]:
        """Ids by row, as a list unless there are very many."""
        if len(self) > LISTED_ROWS:
            return self
        return [*self.base.names, *self.later_ids] if self.base is not None else self.later_ids

    def find(self, ids: Sequence[str]) -> list[int]:
        """The row of each id, -1 where there is no such document."""
        rows = [self.later_rows.get(id, -1) for id in ids]
        missing = [n for n, row in enumerate(rows) if row < 0]
        if missing and self.base is not None:
            for n, row in zip(missing, self.base.find([ids[n] for n in missing]), strict=True):
                rows[n] = row
        return [row if row >= 0 and self.alive[row] else -1 for row in rows]

    # --- findings: retrieval.types.Postings ------------------------------------------------------

    def concepts(self) -> Iterator[Concept]:
        known = dict.fromkeys(self.base.concepts if self.base is not None else ()) | dict.fromkeys(self.later_held)
        return (concept for concept in known if len(self.rows(*concept)))

    def rows(self, concept: str, assertion: Assertion) -> Held:
        key = (concept, assertion)
        held = self.later_held.get(key, NO_ROWS)
        if self.base is not None:
            held = np.concatenate([self.base.held(key), held])
        return held if self.documents == len(self) else held[self.alive[held]]

    # --- the derived file ------------------------------------------------------------------------

    def arrays(self) -> dict[str, Array]:
        """Everything but the columns, as `Base` reads it."""
        ids = [id.encode() for id in [*(self.base.names if self.base is not None else ()), *self.later_ids]]
        living = np.flatnonzero(self.alive).astype(np.int32)
        hashes = np.array([_hash(ids[row]) for row in living.tolist()], np.uint64)
        order = np.argsort(hashes, kind="stable")
        concepts = sorted(self.concepts())
        held = [self.rows(*concept) for concept in concepts]
        return {
            "alive": self.alive,
            "id_offsets": np.cumsum([0, *map(len, ids)]).astype(np.int64),
            "id_text": np.frombuffer(b"".join(ids), np.uint8),
            "hashes": hashes[order],
            "hashed": living[order],
            "concepts": np.frombuffer(json.dumps(concepts).encode(), np.uint8),
            "starts": np.cumsum([0, *map(len, held)]).astype(np.int64),
            "holders": np.concatenate([NO_ROWS, *held]).astype(np.int32),
        }


def _hash(id: str | bytes) -> int:
    content = id if isinstance(id, bytes) else id.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def ranked(scores: NDArray[np.floating[Any]], rows: NDArray[np.integer[Any]], k: int, ids: Sequence[str]) -> list[Hit]:
    """The k best, ties ordered by id. `scores` hold everything that is tied with the k-th."""
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    close = scores[:-1] - scores[1:] <= TIE  # with the next one
    stop = k
    while stop < len(scores) and close[stop - 1]:
        stop += 1
    values = scores[:stop].tolist()
    names = [ids[row] for row in rows[order[:stop]].tolist()]
    hits: list[Hit] = list(map(_as_hit, zip(names, values, repeat(_NO_PARTS))))
    start = -1
    for at in np.flatnonzero(close[: stop - 1]).tolist():
        if at < start:
            continue
        start, end = at, at + 1  # a run of ties is counted from its first score
        while end < len(hits) and values[start] - values[end] <= TIE:
            end += 1
        hits[start:end] = sorted(hits[start:end], key=_id_of)
        start = end
    return hits[:k]
