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
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from indexers import lexical, shards
from indexers.columns import Columns
from indexers.rows import Base, Rows
from indexers.scan import Stored
from indexers.shards import Damaged
from indexers.snapshot import OK, SOUND, VERIFYING, EmbeddedSnapshot, Key, Stretch
from indexers.store import Reader, State, Store
from indexers.vectors import SideIndex, parse_spec
from retrieval.errors import BackendError
from retrieval.types import Progress, SpaceInfo

Manifest = dict[str, Any]
T = TypeVar("T")
BACKGROUND_BYTES = 1 << 30  # derived parts from this size on are verified while they are used already
RETRIES = 5
FLAT = parse_spec("flat")
SEALED_AT = 2_048  # fresh vectors of a side; more than this are no tail any more
REWRITTEN_AT = 0.1  # share of rows that are new or dead since a derived part was made whole


def quiet(phase: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def as_spaces(about: Mapping[str, Any]) -> dict[str, SpaceInfo]:
    return {name: SpaceInfo(name, dim, digests) for name, (dim, digests) in about["spaces"].items()}


class Generation:
    """The files of one generation. Loading takes no lock; publishing is for the holder of the writer lock."""

    def __init__(self, home: Path, number: int, folder: Path | None = None) -> None:
        self.home = home
        self.number = number
        self.folder = folder or home / "generations" / f"{number:06d}"
        self.store = Store(self.folder / "store.sqlite")
        self.shards = home / "shards"
        self._verified: dict[Path, str] = {}  # what was found, or that it is still being looked at
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
            manifest = self.manifest(state)
            parts = {"manifest": OK if manifest else "missing or damaged"}
            rows = self._rows(reader, state, manifest, previous, parts)
            if rows.documents != state.documents:
                raise Damaged(f"the store holds {rows.documents} of {state.documents} documents; "
                              "roll back, or index the source again")  # fmt: skip
            stretches = {
                (space, side): self._stretches(reader, (space, side), rows, manifest, about, parts)
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
        self, reader: Reader, key: Key, rows: Rows, manifest: Manifest, about: Mapping[str, Any], parts: dict[str, str]
    ) -> tuple[Stretch, ...]:
        """The vectors of a side: those that an index covers, then those that are searched exactly."""
        held = [
            shard for shard in reader.shards() if (shard.space, shard.side) == key and _published(shard.rows, rows)
        ]
        chunks: list[NDArray[Any]] = [self._matrix(shard.name) for shard in held]
        owners = [shard.rows for shard in held]
        covered = len(held)
        index = None
        if about["vector_index"] != "flat":
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

    def _matrix(self, name: str) -> NDArray[np.float32]:
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
        shards.verify(path) if files is None else shards.verify_folder(path, files)

    # --- publishing ------------------------------------------------------------------------------

    def publish(self, now: EmbeddedSnapshot, progress: Progress = quiet) -> None:
        """Shows all that was written, and mends derived parts. `now` is what is published at present."""
        with self.store.reading() as reader:
            state = reader.state()
            deaths = reader.deaths(state.sequence, state.sequence + 1)
        if state.next == state.rows and not len(deaths) and now.sound:
            return
        with self.store.reading() as reader:
            rows = now.rows.extended(reader.records(state.rows, state.next), state.next, deaths)
        old = self.manifest(state)
        manifest: Manifest = {"format": 1, "sequence": state.sequence + 1}
        manifest["rows"] = self._publish_rows(rows, now, old, state.sequence + 1)
        manifest["lexical"] = self._publish_words(rows, now, old, deaths)
        sealed = self._seal_tails(rows, now)
        manifest["vectors"] = self._publish_vectors(now, old, sealed, progress)
        name = shards.write_bytes(self.folder, "manifest", json.dumps(manifest).encode(), "json")
        with self.store.writing() as writer:
            for (space, side), (shard, held) in sealed.items():
                writer.add_shard(space, side, shard, held)
            writer.publish(name)
        self.store.checkpoint()
        self._sweep({name, state.manifest or name}, [old, manifest])

    def _publish_rows(self, rows: Rows, now: EmbeddedSnapshot, old: Manifest, sequence: int) -> Manifest:
        entry = old.get("rows")
        if entry and now.parts["rows"] == OK and not _much(len(rows) - entry["rows"], len(rows), 1_000):
            return dict(entry)
        name = shards.write(self.folder, "rows", rows.arrays())
        file = shards.temporary(self.folder)
        try:
            rows.columns.save(file)
            columns = shards.seal(file, self.folder, "columns", "columns")
        finally:
            file.unlink(missing_ok=True)
        return {"name": name, "columns": columns, "rows": len(rows), "sequence": sequence}

    def _publish_words(self, rows: Rows, now: EmbeddedSnapshot, old: Manifest, deaths: NDArray[np.int32]) -> Manifest:
        entry = old.get("lexical") if now.parts["lexical"] in SOUND else None
        if entry and len(rows) == len(now.rows) and not len(deaths):
            return dict(entry)
        # Deleted documents stay in tantivy's averages until their segment is written anew.
        deleted = 0 if entry is None else entry["deleted"] + len(deaths)
        target = self.folder / f"lexical-{uuid.uuid4().hex}"
        if entry is None or _much(deleted, rows.documents, 10):
            files, deleted = lexical.grow(None, target, self._texts(rows, 0), ()), 0
        else:
            fresh = self._texts(rows, len(now.rows))
            files = lexical.grow(self.folder / entry["folder"], target, fresh, deaths.tolist())
        return {"folder": target.name, "files": files, "deleted": deleted}

    def _texts(self, rows: Rows, start: int) -> Iterator[tuple[int, str]]:
        with self.store.reading() as reader:
            for record in reader.records(start, len(rows)):
                if rows.alive[record.row]:
                    yield record.row, record.content

    def _seal_tails(self, rows: Rows, now: EmbeddedSnapshot) -> dict[Key, tuple[str, NDArray[np.int32]]]:
        """Writes long tails as shards: (space, side) -> (name, rows)."""
        sealed: dict[Key, tuple[str, NDArray[np.int32]]] = {}
        with self.store.reading() as reader:
            for key in now.sides:
                held, vectors = reader.tail(*key, stop=len(rows))
                alive = rows.alive[held]
                if int(alive.sum()) >= SEALED_AT:
                    matrix = np.stack(vectors)[alive]
                    sealed[key] = shards.write(self.shards, "vectors", {"matrix": matrix}), held[alive]
                    shards.sync_folder(self.shards)
        return sealed

    def _publish_vectors(
        self,
        now: EmbeddedSnapshot,
        old: Manifest,
        sealed: Mapping[Key, tuple[str, NDArray[np.int32]]],
        progress: Progress,
    ) -> Manifest:
        if now.vector_index == "flat":
            return {}
        with self.store.reading() as reader:
            held = reader.shards()
        out: Manifest = {}
        for space, side in now.sides:
            name = f"{space}/{side}"
            names = [shard.name for shard in held if (shard.space, shard.side) == (space, side)]
            names += [sealed[space, side][0]] if (space, side) in sealed else []
            entry = old.get("vectors", {}).get(name) if now.parts.get(f"vectors {name}") in SOUND else None
            chunks = [self._matrix(shard) for shard in names]
            if entry and not _much(sum(map(len, chunks[entry["shards"] :])), sum(map(len, chunks)), 10_000):
                out[name] = entry
            elif chunks:
                out[name] = self._index_vectors(chunks, now.vector_index, progress)
        return out

    def _index_vectors(self, chunks: Sequence[NDArray[Any]], spec: str, progress: Progress) -> Manifest:
        target = self.folder / f"vectors-{uuid.uuid4().hex}"
        SideIndex.build(chunks, parse_spec(spec), progress).save(target)
        return {"folder": target.name, "files": shards.checksums(target), "shards": len(chunks)}

    def _sweep(self, names: set[str], manifests: Sequence[Manifest]) -> None:
        """Deletes what neither this publish nor the one before it names: a reader may be opening the latter."""
        keep = names | {"store.sqlite", "store.sqlite-wal", "store.sqlite-shm", "writes", "withdrawn"}
        for manifest in manifests:
            keep |= set(_named(manifest))
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _named(manifest: Manifest) -> Iterator[str]:
    if manifest:
        yield from (manifest["rows"]["name"], manifest["rows"]["columns"], manifest["lexical"]["folder"])
        yield from (entry["folder"] for entry in manifest["vectors"].values())


def _much(changed: int, total: int, least: int) -> bool:
    return changed > max(least, REWRITTEN_AT * total)


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
