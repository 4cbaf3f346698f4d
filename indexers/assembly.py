"""A generation that grows beside the published one, under a temporary name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from indexers import shards
from indexers.embedded import point
from indexers.generation import Generation
from indexers.publish import publish
from indexers.queries import Ask
from indexers.records import Record, Rows
from indexers.shards import VectorWriter, disk
from indexers.snapshot import EmbeddedSnapshot, Key
from indexers.store import Store
from retrieval.errors import BackendError, Conflict
from retrieval.types import Encoded, Progress

PARTIAL = ".partial"


class Assembly:
    """Filled, finished (which publishes within it and checks the result), then accepted, which swaps."""

    def __init__(self, home: Path, about: Mapping[str, Any], ask: Ask | None = None) -> None:
        self.home, self.ask = home, ask
        folders = [path.name.partition(".")[0] for path in (home / "generations").iterdir()]
        self.number = max((int(name) for name in folders if name.isdigit()), default=0) + 1
        self.folder = home / "generations" / f"{self.number:06d}{PARTIAL}"
        with disk("building a generation"):
            self.folder.mkdir()
        self._filling = ExitStack()
        self._writer = self._filling.enter_context(Store.filling(self.folder / "store.sqlite", about))
        keys: list[Key] = [(space, side) for space, (_, digests) in about["spaces"].items() for side in digests]
        dims = {space: dim for space, (dim, _) in about["spaces"].items()}
        self._vectors = {key: VectorWriter(home / "shards", "vectors", dims[key[0]]) for key in keys}
        self._rows: dict[Key, list[Rows]] = {key: [] for key in keys}

    def add(
        self, records: Sequence[Record], thumbnails: Mapping[int, bytes], encodings: Mapping[Key, Encoded]
    ) -> None:
        """Documents in new rows; thumbnails and encodings name them by their place in `records`."""
        first = self._writer.now.next
        self._writer.add(*_moved(first, records, thumbnails))
        for key, encoded in encodings.items():
            self._vectors[key].append(encoded.matrix)
            self._rows[key].append((encoded.rows + first).astype(np.int32))

    def finish(self, progress: Progress) -> EmbeddedSnapshot:
        """Publishes what was added within the unfinished generation, and checks it as a reader would."""
        expected: dict[Key, int] = {}
        for key, vectors in self._vectors.items():
            held = np.concatenate([np.empty(0, np.int32), *self._rows[key]])
            expected[key] = len(held)
            for name, count in vectors.finish():
                self._writer.add_shard(*key, name, held[:count])
                held = held[count:]
        added = self._writer.now.next
        self._filling.close()
        self.publish(progress)
        built = Generation(self.home, self.number, self.folder).load()
        if len(built) != added or dict(built.sides) != expected or not built.sound:
            raise BackendError(f"what was built is not whole ({len(built)} of {added} documents); nothing was swapped")
        return built

    def publish(self, progress: Progress) -> None:
        generation = Generation(self.home, self.number, self.folder)
        publish(generation, generation.load(), progress, self.ask)
        generation.close()

    def repeat(self, before: EmbeddedSnapshot, after: EmbeddedSnapshot) -> None:
        """Writes, unpublished, what changed between two states of another generation."""
        fresh = np.arange(len(before.rows), len(after.rows))
        ids = [after.rows[row] for row in fresh[after.rows.alive[fresh]].tolist()]
        dead = np.flatnonzero(before.rows.alive & ~after.rows.alive[: len(before.rows)])
        if not ids and not len(dead):
            return
        records, thumbnails, encodings = copied(after, ids)
        store = Store(self.folder / "store.sqlite")
        with store.writing() as writer:
            writer.remove([before.rows[row] for row in dead.tolist()])
            first = writer.now.next
            writer.add(*_moved(first, records, thumbnails))
            for key, encoded in encodings.items():
                writer.add_tail(*key, (encoded.rows + first).astype(np.int32), encoded.matrix)
        store.close()

    def accept(self, built: EmbeddedSnapshot) -> None:
        """Gives the generation its lasting name and makes it the published one."""
        built.store.close()
        with disk("swapping generations"):
            whole = self.folder.with_name(f"{self.number:06d}")
            os.rename(self.folder, whole)
            shards.sync_folder(whole.parent)
        point(self.home, self.number)

    def close(self) -> None:
        """Lets go of everything; without `accept`, of the files as well."""
        with suppress(BackendError):  # the reason is on its way to the caller already
            self._filling.close()
        for vectors in self._vectors.values():
            vectors.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _moved(
    first: int, records: Sequence[Record], thumbnails: Mapping[int, bytes]
) -> tuple[list[Record], dict[int, bytes]]:
    """The same in the rows from `first` on."""
    rows = [record._replace(row=first + at) for at, record in enumerate(records)]
    return rows, {first + at: png for at, png in thumbnails.items()}


def copied(
    old: EmbeddedSnapshot, ids: Sequence[str], lenient: bool = False
) -> tuple[list[Record], dict[int, bytes], dict[Key, Encoded]]:
    """Documents as a published generation holds them. lenient: without those that were erased meanwhile."""
    rows = old.rows.find(ids)
    pictures = {}
    with old.store.reading() as reader:
        found = reader.records_of(rows)
        if len(found) != len(ids):
            if not lenient:
                raise Conflict("the collection was changed while it was indexed; give the same command again")
            ids = [id for id, row in zip(ids, rows, strict=True) if row in found]
            rows = [row for row in rows if row in found]
        for at, row in enumerate(rows):
            if found[row].picture is not None and (png := reader.thumbnail(row)) is not None:
                pictures[at] = png
    return [found[row] for row in rows], pictures, {key: old.vectors(*key, ids) for key in old.sides}
