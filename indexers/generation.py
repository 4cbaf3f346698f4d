"""One generation of a collection: its store, its derived parts, and how they become a snapshot.

    COLLECTION/
      current                   which generation is the published one
      shards/                   vectors, shared by the generations that name them
      blobs/                    rendered pictures of uploads
      generations/000001/
        store.sqlite  writes    the durable truth
        manifest-*.json         names and checksums of the derived parts of one publish
        rows-*  columns-*       what filters, ids and findings need, without parsing
        lexical-*/  vectors-*/  tantivy, FAISS

A derived part that is missing, damaged or behind is replaced by reading the store, until a writer mends it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from indexers import lexical, shards
from indexers.columns import Columns
from indexers.records import Shard, State
from indexers.rows import Base, Rows
from indexers.scan import Stored
from indexers.shards import Damaged
from indexers.snapshot import OK, VERIFYING, EmbeddedSnapshot, Key, Stretch
from indexers.store import Reader, Store
from indexers.vectors import SideIndex, parse_spec
from retrieval.errors import BackendError
from retrieval.types import SpaceInfo

Manifest = dict[str, Any]
T = TypeVar("T")
BACKGROUND_BYTES = 1 << 30  # derived parts from this size on are verified while they are used already
RETRIES = 5
REMEMBERED = 10_000  # names of files that were verified
HASHING_THREADS = 4
FLAT = parse_spec("flat")


def quiet(phase: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def as_spaces(about: Mapping[str, Any]) -> dict[str, SpaceInfo]:
    return {name: SpaceInfo(name, dim, digests) for name, (dim, digests) in about["spaces"].items()}


class Generation:
    """The files of one generation, and how they are loaded. Takes no lock; see `indexers.publish` for changes."""

    def __init__(self, home: Path, number: int, folder: Path | None = None) -> None:
        self.home = home
        self.number = number
        self.folder = folder or home / "generations" / f"{number:06d}"
        self.store = Store(self.folder / "store.sqlite")
        self.shards = home / "shards"
        self._verified: dict[Path, str] = {}  # what was found, or that it is still being looked at
        self._intact: set[tuple[int, str]] = set()  # (inode, sha256): segment files are linked from state to state
        # What snapshots in use have opened; names stand for content.
        self._opened: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self.verified = 0  # files whose state was found out in the background

    def close(self) -> None:
        self.store.close()

    # --- loading ---------------------------------------------------------------------------------

    def load(self, previous: EmbeddedSnapshot | None = None, ahead: bool = False) -> EmbeddedSnapshot:
        """The published state; what `previous` (of this generation) already holds is not read again.

        ahead: the state that the next publish will show.
        """
        for _ in range(RETRIES):
            found = self._load(previous, ahead)
            with self.store.reading() as reader:
                overtaken = reader.state().sequence != found.sequence
            if found.sound or not overtaken or ahead:
                break  # else a writer may have deleted files while they were opened
        return found

    def _load(self, previous: EmbeddedSnapshot | None, ahead: bool) -> EmbeddedSnapshot:
        with self.store.reading() as reader:
            state = reader.state()
            if ahead:
                state = state._replace(sequence=state.sequence + 1, rows=state.next, documents=state.living)
            if previous is not None and previous.sequence == state.sequence and previous.settled:
                return previous
            about = reader.about()
            if len(self._verified) > REMEMBERED:  # a server may live through very many publishes
                self._verified.clear()
                self._intact.clear()
            manifest = self.manifest(state)
            parts = {"manifest": OK if manifest else "missing or damaged"}
            rows = self._rows(reader, state, manifest, previous, parts)
            if rows.documents != state.documents:
                raise Damaged(f"the store holds {rows.documents} of {state.documents} documents; "
                              "roll back, or index the source again")  # fmt: skip
            held = [shard for shard in reader.shards() if _published(shard.rows, rows)]
            self._verify_shards([self.shards / shard.name for shard in held])
            stretches = {
                (space, side): self._stretches(reader, (space, side), held, rows, manifest, parts)
                for space, (_, digests) in about["spaces"].items()
                for side in digests
            }
        return EmbeddedSnapshot(
            generation=self.number,
            sequence=state.sequence,
            spaces=as_spaces(about),
            sides={key: _living(found) for key, found in stretches.items()},
            config=about["config"],
            rows=rows,
            stretches=stretches,
            words=self._words(manifest, parts),
            store=self.store,
            blobs=self.home / "blobs",
            parts=parts,
            vector_index=about["vector_index"],
            base=manifest["rows"]["name"] if manifest else None,
        )

    def manifest(self, state: State) -> Manifest:
        """What names the derived parts; empty where it cannot be trusted."""
        if state.manifest is None:
            return {}
        try:
            self._verify(self.folder / state.manifest)
            return dict(json.loads((self.folder / state.manifest).read_text()))
        except (Damaged, OSError, ValueError):
            return {}

    def _rows(
        self,
        reader: Reader,
        state: State,
        manifest: Manifest,
        previous: EmbeddedSnapshot | None,
        parts: dict[str, str],
    ) -> Rows:
        entry = manifest.get("rows")
        if previous is not None and previous.parts["rows"] == OK and entry and previous.base == entry["name"]:
            rows, sequence, parts["rows"] = previous.rows, previous.sequence, OK
        else:
            rows, sequence, parts["rows"] = self._based(entry)
        fresh = reader.records(len(rows), state.rows)
        return rows.extended(fresh, state.rows, reader.deaths(sequence, state.sequence))

    def _based(self, entry: Mapping[str, Any] | None) -> tuple[Rows, int, str]:
        if entry is None:
            return Rows.empty(), 0, "missing"
        try:
            return self._base(entry), entry["sequence"], OK
        except BackendError as error:
            return Rows.empty(), 0, str(error)

    def _base(self, entry: Mapping[str, Any]) -> Rows:
        self._verify(self.folder / entry["columns"])
        self._verify(self.folder / entry["name"])
        base = Base(shards.read(self.folder / entry["name"], check=False))
        columns = Columns.load(self.folder / entry["columns"])
        if len(columns) != base.count:
            raise Damaged("the columns and the table of rows differ in length")
        return Rows.over(base, columns)

    def _stretches(
        self, reader: Reader, key: Key, shards: Sequence[Shard], rows: Rows, manifest: Manifest, parts: dict[str, str]
    ) -> tuple[Stretch, ...]:
        """The vectors of a side: those that an index covers, then those that are searched exactly."""
        held = [shard for shard in shards if (shard.space, shard.side) == key]
        chunks: list[NDArray[Any]] = [self.matrix(shard.name) for shard in held]
        owners = [shard.rows for shard in held]
        covered, index = len(held), None
        if reader.about()["vector_index"] != "flat":
            covered, index = self._indexed(key, chunks, manifest, parts)
        tail_rows, tail = reader.tail(*key, stop=len(rows))
        rest = [*chunks[covered:], np.stack(tail)] if tail else chunks[covered:]
        found = []
        if covered:
            index = index or SideIndex.build(chunks[:covered], FLAT, quiet)
            found.append(_stretch(index, chunks[:covered], owners[:covered], rows))
        if rest:
            found.append(_stretch(SideIndex.build(rest, FLAT, quiet), rest, [*owners[covered:], tail_rows], rows))
        return tuple(found)

    def _indexed(
        self, key: Key, chunks: Sequence[NDArray[Any]], manifest: Manifest, parts: dict[str, str]
    ) -> tuple[int, SideIndex | None]:
        """How many chunks an index covers, and the index."""
        name = "vectors " + "/".join(key)
        entry = manifest.get("vectors", {}).get("/".join(key))
        if entry is None:
            if chunks:
                parts[name] = "missing"
            return 0, None
        try:
            state = self._verify(self.folder / entry["folder"], entry["files"])
            folder = self.folder / entry["folder"]
            index = self._once(folder.name, lambda: SideIndex.load(folder, chunks[: entry["shards"]], verify=False))
        except BackendError as error:
            parts[name] = str(error)
            return 0, None
        parts[name] = state
        return entry["shards"], index

    def matrix(self, name: str) -> NDArray[np.float32]:
        """The vectors of a shard, mapped into memory."""
        try:
            self._verify(self.shards / name)
            return self._once(name, lambda: shards.read(self.shards / name, check=False)["matrix"])
        except Damaged as error:
            raise Damaged(f"vectors are lost: {error}; roll back, or index the source again") from error

    def _words(self, manifest: Manifest, parts: dict[str, str]) -> lexical.Lexical | None:
        entry = manifest.get("lexical")
        parts["lexical"] = "missing"
        if entry is None:
            return None
        try:
            state = self._verify(self.folder / entry["folder"], entry["files"])
            folder = self.folder / entry["folder"]
            found = self._once(folder.name, lambda: lexical.Lexical(folder))
        except BackendError as error:
            parts["lexical"] = str(error)
            return None
        parts["lexical"] = state
        return found

    def _verify_shards(self, paths: Sequence[Path]) -> None:
        """Several at once, since hashing lets go of the interpreter; `matrix` says what was wrong."""

        def attempt(path: Path) -> None:
            with suppress(Damaged):
                self._verify(path)

        fresh = [path for path in paths if path not in self._verified]
        if len(fresh) > 1:
            with ThreadPoolExecutor(HASHING_THREADS) as pool:
                list(pool.map(attempt, fresh))

    def _verify(self, path: Path, files: shards.Checksums | None = None) -> str:
        """`OK`, or `VERIFYING` for what is so large that it is looked at in the background; Damaged otherwise.

        Done once in the life of this object for every name, since names stand for content.
        """
        state = self._verified.get(path)
        if state is None:
            size = sum(size for size, _ in files.values()) if files is not None else 0
            if size >= BACKGROUND_BYTES:
                self._verified[path] = state = VERIFYING
                threading.Thread(target=self._verify_later, args=(path, files), daemon=True).start()
            else:
                self._check(path, files)
                self._verified[path] = state = OK
        if state not in (OK, VERIFYING):
            raise Damaged(state)
        return state

    def _verify_later(self, path: Path, files: shards.Checksums | None) -> None:
        try:
            self._check(path, files)
            self._verified[path] = OK
        except Damaged as error:
            self._verified[path] = str(error)
        self.verified += 1  # who holds a snapshot loads it again

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """What was opened under a name before, or `make()`."""
        found: T | None = self._opened.get(name)
        if found is None:
            self._opened[name] = found = make()
        return found

    def _check(self, path: Path, files: shards.Checksums | None) -> None:
        if files is None:
            shards.verify(path)
        else:
            shards.verify_folder(path, files, self._intact)


def _published(held: NDArray[np.int32], rows: Rows) -> bool:
    return not len(held) or int(held[-1]) < len(rows)


def _stretch(
    index: SideIndex, chunks: Sequence[NDArray[Any]], owners: Sequence[NDArray[np.int32]], rows: Rows
) -> Stretch:
    held = np.concatenate(owners)
    alive = rows.alive[held]
    straight = bool(np.array_equal(held, np.arange(len(held))))
    return Stretch(index, held, Stored(chunks).gather, straight, None if alive.all() else alive)


def _living(stretches: Sequence[Stretch]) -> int:
    return sum(len(s.rows) if s.alive is None else int(s.alive.sum()) for s in stretches)
