"""Publishing: what was written becomes visible all at once, with derived parts that fit it.

Everything new is written under names that nobody knows yet, flushed, and named by a manifest; the one
transaction that names the manifest is the publish. Whatever fails before it leaves the old state as it was.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from indexers import lexical, shards
from indexers.generation import Generation, Manifest, quiet
from indexers.product import spread
from indexers.queries import MOST, Ask, some_windows
from indexers.rows import Rows
from indexers.scan import Stored
from indexers.snapshot import OK, SOUND, EmbeddedSnapshot, Key
from indexers.vectors import SideIndex, parse_spec
from retrieval.types import Matrix, Progress, Side

T = TypeVar("T")
SEALED_AT = 2_048  # fresh vectors of a side; more than this are no tail any more
PICTURES = 4  # other queries for each picture that an index of pictures learns from
REWRITTEN_AT = 0.1  # share of rows that are new or dead since a derived part was made whole


def publish(generation: Generation, now: EmbeddedSnapshot, progress: Progress = quiet, ask: Ask | None = None) -> None:
    """Shows all that was written, and mends derived parts. `now` is what is published at present.

    For the holder of the writer lock. ask: makes queries of texts, for an index that learns from them.
    """
    store = generation.store
    with store.reading() as reader:
        state = reader.state()
        deaths = reader.deaths(state.sequence, state.sequence + 1)
        if state.next == state.rows and not len(deaths) and now.sound:
            return
        rows = now.rows.extended(reader.records(state.rows, state.next), state.next, deaths)
    step = _Step(generation, now, rows, deaths, generation.manifest(state), state.sequence + 1, ask)
    sealed = step.sealed_tails()
    manifest = {
        "format": 1,
        "rows": step.rows_part(),
        "lexical": step.lexical_part(),
        "vectors": step.vector_parts(sealed, progress),
    }
    name = shards.write_bytes(generation.folder, "manifest", json.dumps(manifest).encode(), "json")
    with store.writing() as writer:
        for (space, side), (shard, held) in sealed.items():
            writer.add_shard(space, side, shard, held)
        writer.publish(name)
    store.checkpoint()
    _sweep(generation.folder, {name, state.manifest or name}, [step.old, manifest])


class _Step:
    """From one published state to the next."""

    def __init__(
        self,
        generation: Generation,
        now: EmbeddedSnapshot,
        rows: Rows,
        deaths: NDArray[np.int32],
        old: Manifest,
        sequence: int,
        ask: Ask | None,
    ) -> None:
        self.ask = ask
        self.generation, self.folder = generation, generation.folder
        self.now, self.rows, self.deaths, self.old, self.sequence = now, rows, deaths, old, sequence

    def rows_part(self) -> Manifest:
        """Written anew once much has come since; until then readers take the rest from the store."""
        rows, entry = self.rows, self.old.get("rows")
        if entry and self.now.parts["rows"] == OK and not _much(len(rows) - entry["rows"], len(rows), 1_000):
            return dict(entry)
        name = shards.write(self.folder, "rows", rows.arrays())
        file = shards.temporary(self.folder)
        try:
            rows.columns.save(file)
            columns = shards.seal(file, self.folder, "columns", "columns")
        finally:
            file.unlink(missing_ok=True)
        return {"name": name, "columns": columns, "rows": len(rows), "sequence": self.sequence}

    def lexical_part(self) -> Manifest:
        entry = self.old.get("lexical") if self.now.parts["lexical"] in SOUND else None
        if entry and len(self.rows) == len(self.now.rows) and not len(self.deaths):
            return dict(entry)
        # Deleted documents stay in tantivy's averages until their segment is written anew.
        deleted = 0 if entry is None else entry["deleted"] + len(self.deaths)
        if entry is None or _much(deleted, self.rows.documents, 10):
            previous, first, deaths, deleted = None, 0, [], 0
        else:
            previous = lexical.Folder(self.folder / entry["folder"], entry["files"])
            first, deaths = len(self.now.rows), self.deaths.tolist()
        name, files = self._new_folder(
            "lexical", lambda target: lexical.grow(previous, target, self._texts(first), deaths)
        )
        return {"folder": name, "files": files, "deleted": deleted}

    def _texts(self, start: int) -> Iterator[tuple[int, str]]:
        with self.generation.store.reading() as reader:
            for record in reader.records(start, len(self.rows)):
                if self.rows.alive[record.row]:
                    yield record.row, record.content

    def sealed_tails(self) -> dict[Key, tuple[str, NDArray[np.int32]]]:
        """Writes long tails as shards: (space, side) -> (name, rows)."""
        sealed: dict[Key, tuple[str, NDArray[np.int32]]] = {}
        folder = self.generation.shards
        with self.generation.store.reading() as reader:
            for key in self.now.sides:
                held, vectors = reader.tail(*key, stop=len(self.rows))
                alive = self.rows.alive[held]
                if int(alive.sum()) >= SEALED_AT:
                    sealed[key] = shards.write(folder, "vectors", {"matrix": np.stack(vectors)[alive]}), held[alive]
        if sealed:
            shards.sync_folder(folder)
        return sealed

    def vector_parts(self, sealed: Mapping[Key, tuple[str, NDArray[np.int32]]], progress: Progress) -> Manifest:
        """An index for each side that has sealed vectors; flat needs none."""
        if self.now.vector_index == "flat":
            return {}
        with self.generation.store.reading() as reader:
            held = reader.shards()
        out: Manifest = {}
        for space, side in self.now.sides:
            name = f"{space}/{side}"
            names = [shard.name for shard in held if (shard.space, shard.side) == (space, side)]
            names += [sealed[space, side][0]] if (space, side) in sealed else []
            chunks = [self.generation.matrix(shard) for shard in names]
            entry = self.old.get("vectors", {}).get(name) if self.now.parts.get(f"vectors {name}") in SOUND else None
            if entry and not _much(sum(map(len, chunks[entry["shards"] :])), sum(map(len, chunks)), 10_000):
                out[name] = entry
            elif chunks:
                out[name] = self._index((space, side), chunks, progress)
        return out

    def _index(self, key: Key, chunks: Sequence[NDArray[Any]], progress: Progress) -> Manifest:
        spec, queries = parse_spec(self.now.vector_index), None
        # What was learned in this generation serves for what has come since, until it is rebuilt.
        like = next((stretch.index for stretch in self.now.stretches[key] if stretch.index.spec == spec), None)
        if spec.kind == "distillvq" and like is None:
            queries = self._queries(key, chunks)

        def make(target: Path) -> shards.Checksums:
            SideIndex.build(chunks, spec, progress, queries, like).save(target)
            return shards.checksums(target)

        name, files = self._new_folder("vectors", make)
        return {"folder": name, "files": files, "shards": len(chunks)}

    def _queries(self, key: Key, chunks: Sequence[NDArray[Any]]) -> Matrix | None:
        """What a side is asked for: pieces of the texts, vectors of the other side, and of pictures some of its own.

        None where nothing but the side itself is there.
        """
        space, side = key
        windows = some_windows(text for _, text in self._texts(0)) if self.ask is not None else []
        asked = self.ask(space, windows) if self.ask is not None and windows else None
        found = [] if asked is None else [asked]
        with self.generation.store.reading() as reader:
            others = [shard.name for shard in reader.shards() if shard.space == space and shard.side != side]
        other = Stored([self.generation.matrix(name) for name in others])
        if len(other):
            found.append(self._asking(space, "text" if side == "image" else "image", other, MOST))
        if found and side == "image":  # which pictures look for as well
            found.append(self._asking(space, side, Stored(chunks), sum(map(len, found)) // PICTURES))
        return np.concatenate(found) if found else None

    def _asking(self, space: str, side: Side, stored: Stored, most: int) -> Matrix:
        """At most `most` of the stored vectors, as their documents ask."""
        vectors = stored.gather(spread(len(stored), most))
        asked = self.ask(space, vectors) if self.ask is not None and side == "image" else None
        return vectors if asked is None else asked

    def _new_folder(self, label: str, make: Callable[[Path], T]) -> tuple[str, T]:
        """A folder with a name of its own; nothing of it stays where making it fails."""
        target = self.folder / f"{label}-{uuid.uuid4().hex}"
        try:
            return target.name, make(target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise


def _sweep(folder: Path, names: set[str], manifests: Sequence[Manifest]) -> None:
    """Deletes what neither this publish nor the one before it names: a reader may be opening the latter."""
    keep = names | {"store.sqlite", "store.sqlite-wal", "store.sqlite-shm", "writes", "withdrawn"}
    for manifest in manifests:
        keep |= set(_named(manifest))
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _named(manifest: Manifest) -> Iterator[str]:
    if manifest:
        yield from (manifest["rows"]["name"], manifest["rows"]["columns"], manifest["lexical"]["folder"])
        yield from (entry["folder"] for entry in manifest["vectors"].values())


def _much(changed: int, total: int, least: int) -> bool:
    return changed > max(least, REWRITTEN_AT * total)
