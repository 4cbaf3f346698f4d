"""Pages that neither repeat nor skip: opaque cursors, pinned to a published snapshot and a query."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import threading
import time
from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

from retrieval.errors import Gone, Invalid
from retrieval.types import Snapshot

Searcher = TypeVar("Searcher")

KEPT_SNAPSHOTS = 8
KEPT_S = 600.0


class Cursor(NamedTuple):
    """Where the next page starts: `offset` counts places in the pinned ranking."""

    generation: int
    sequence: int
    learned: str  # fingerprint of the searcher: weights and calibrations may be learned anew
    query: str  # fingerprint of everything in the request that decides the ranking
    offset: int

    def encode(self) -> str:
        return base64.urlsafe_b64encode(json.dumps(self).encode()).decode()

    @classmethod
    def decode(cls, text: str, query: str) -> Cursor:
        """Refuses what is not a cursor, and a cursor of another query."""
        try:
            cursor = cls(*json.loads(base64.urlsafe_b64decode(text.encode())))
            valid = all(type(value) is int for value in (cursor.generation, cursor.sequence, cursor.offset))
        except (ValueError, TypeError, binascii.Error, RecursionError):
            valid = False
        if not valid or cursor.offset < 0:
            raise Invalid("cursor: not one that this collection gave out; leave it out for the first page", "cursor")
        if cursor.query != query or not isinstance(cursor.learned, str):
            raise Invalid("cursor: it belongs to another query; send the query that it came from", "cursor")
        return cursor


class Kept(NamedTuple, Generic[Searcher]):
    """A published snapshot, and who searched it: what was learned since then must not change later pages."""

    snapshot: Snapshot
    searcher: Searcher


class Shelf(Generic[Searcher]):
    """The last published snapshots that cursors may still point to, each with its searcher."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int, str], tuple[float, Kept[Searcher]]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, snapshot: Snapshot, searcher: Searcher, learned: str) -> None:
        now = time.monotonic()
        key = (snapshot.generation, snapshot.sequence, learned)
        with self._lock:
            self._kept[key] = (now, Kept(snapshot, searcher))
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT_SNAPSHOTS or now - next(iter(self._kept.values()))[0] > KEPT_S:
                self._kept.popitem(last=False)

    def find(self, cursor: Cursor) -> Kept[Searcher]:
        with self._lock:
            kept_at, kept = self._kept.get((cursor.generation, cursor.sequence, cursor.learned), (0.0, None))
        if kept is None or time.monotonic() - kept_at > KEPT_S:
            raise Gone(
                "cursor: the state of the collection that it points to is no longer kept; search again", "cursor"
            )
        return kept


def fingerprint(*parts: object) -> str:
    """A short digest of plain values, equal where they are equal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
