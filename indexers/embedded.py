"""The embedded index: one collection in one folder, several processes, no server.

Readers take no lock, never repair, and follow what other processes publish. A writer holds the
collection's lock for one write, never for the life of a process.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from indexers import shards
from indexers.generation import Generation
from indexers.publish import publish
from indexers.records import Record
from indexers.shards import Damaged, disk
from indexers.snapshot import EmbeddedSnapshot
from retrieval.errors import Conflict, Invalid, NotFound
from retrieval.types import Document, Encoded, Encodings, Picture, Side, SpaceInfo

WAIT_S = 30.0  # for another writer
SHARD_AT = 1_024  # vectors in one write that get a shard of their own instead of the tail
POINTER = "current"
MOST_LEVELS = 64  # of nested metadata


def open_index(folder: Path) -> Embedded:
    """The collection in `folder`; NotFound where nothing was ever published there."""
    return Embedded(folder)


class Embedded:
    """Implements `retrieval.types.Index`. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._guard = threading.Lock()  # over what this object knows; held for moments
        self._turn = threading.Lock()  # over writes of this object
        self._pointer: tuple[int, int] | None = None
        self._version = (-1, -1)
        self._open()

    def _open(self) -> None:
        """Opens the published generation; another process may swap it at the same moment."""
        while True:
            stamp, number = _stamp(self.folder), current(self.folder)
            try:
                self._generation = Generation(self.folder, number)
                version = self._generation.store.version(), 0
                self._snapshot = self._generation.load()
            except Damaged:
                if current(self.folder) != number:
                    continue
                raise
            self._pointer, self._version = stamp, version
            return

    @property
    def config(self) -> Mapping[str, Any]:
        """What was given at build."""
        return self._snapshot.config

    # --- reading ---------------------------------------------------------------------------------

    def snapshot(self) -> EmbeddedSnapshot:
        """The newest published state, also when another process published it."""
        with self._guard:
            self._follow()
            return self._snapshot

    def _follow(self) -> None:
        if (stamp := _stamp(self.folder)) != self._pointer:
            if current(self.folder) != self._generation.number:
                self._open()  # the old generation lives on in its snapshots
                return
            self._pointer = stamp
        version = self._generation.store.version(), self._generation.verified
        if version != self._version:
            self._snapshot = self._generation.load(self._snapshot)
            self._version = version

    # --- writing ---------------------------------------------------------------------------------

    def add(self, documents: Sequence[Document], encodings: Encodings) -> None:
        """Upsert; on disk when it returns, visible after `publish`. Of equal ids the last one stays."""
        documents, encodings = _last_of_each(documents, encodings)
        if not documents:
            return
        with self._writing():
            spaces = self._snapshot.spaces
            for key, encoded in encodings.items():
                check_encoded(key, encoded, len(documents), spaces)
            blobs = [write_blob(self.folder / "blobs", document) for document in documents]
            with self._generation.store.reading() as reader:
                first = reader.state().next
            records = [
                as_record(first + at, document, blob)
                for at, (document, blob) in enumerate(zip(documents, blobs, strict=True))
            ]
            sealed = {
                key: self._sealed(encoded) for key, encoded in encodings.items() if len(encoded.rows) >= SHARD_AT
            }
            with self._generation.store.writing() as writer:
                writer.add(records, thumbnails(first, documents))
                for (space, side), encoded in encodings.items():
                    rows = (encoded.rows + first).astype(np.int32)
                    if (space, side) in sealed:
                        writer.add_shard(space, side, sealed[space, side], rows)
                    else:
                        writer.add_tail(space, side, rows, encoded.matrix)

    def _sealed(self, encoded: Encoded) -> str:
        folder = self.folder / "shards"
        name = shards.write(folder, "vectors", {"matrix": np.ascontiguousarray(encoded.matrix, "<f4")})
        shards.sync_folder(folder)
        return name

    def remove(self, ids: Sequence[str]) -> int:
        """How many existed. Unknown ids are no error."""
        wanted = list(dict.fromkeys(id for id in ids if _is_unicode(id)))
        if not wanted:
            return 0
        with self._writing(), self._generation.store.writing() as writer:
            return writer.remove(wanted)

    def publish(self) -> None:
        """Shows everything that was written, all at once, and mends what is damaged."""
        with self._writing():
            publish(self._generation, self._snapshot)
            if _pointed(self.folder) is None:
                point(self.folder, self._generation.number)
            self.snapshot()

    def close(self) -> None:
        with self._guard:
            self._generation.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The writer lock, and the newest state under it. Readers go on meanwhile."""
        with self._turn, writer_lock(self.folder):
            self.snapshot()
            yield


# --- the pointer and the lock ----------------------------------------------------------------------


def current(folder: Path) -> int:
    """The number of the published generation."""
    number = _pointed(folder)
    if number is not None:
        return number
    # The pointer is lost. A generation gets its name only when it is whole, and a rolled back one is marked.
    found = finished(folder)
    if not found:
        raise NotFound(f"no collection '{folder.name}'; index a source first")
    return found[-1]


def _pointed(folder: Path) -> int | None:
    try:
        content = json.loads((folder / POINTER).read_text())
        number = int(content["generation"])
        return number if content["check"] == _check(number) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def point(folder: Path, generation: int) -> None:
    """Makes `generation` the published one, at once."""
    content = {"generation": generation, "check": _check(generation)}
    shards.replace_file(folder / POINTER, json.dumps(content).encode())


def finished(folder: Path) -> list[int]:
    """Generations that are whole and were not rolled back, ascending."""
    try:
        names = [path.name for path in (folder / "generations").iterdir() if not (path / "withdrawn").exists()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdigit())


@contextmanager
def writer_lock(folder: Path, wait_s: float = WAIT_S, name: str = "lock") -> Iterator[None]:
    """Excludes other writers, of this and of other processes; the system lets go of it when a process dies."""
    with disk("locking the collection"):
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise Conflict(f"collection '{folder.name}' is held by another writer; try again later") from None
                time.sleep(0.005)
        yield
    finally:
        os.close(handle)


def _check(generation: int) -> int:
    return (generation * 2654435761 + 97) % 2**32


def _stamp(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder / POINTER)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


# --- what is written -------------------------------------------------------------------------------


def check_document(document: Document) -> None:
    """Invalid where a document cannot be stored, searched and given back as it is."""
    name = f"document {document.id!a:.80}"
    if not document.id:
        raise Invalid("a document has an empty id")
    path = document.image.path if isinstance(document.image, Picture) else document.image
    texts = [document.id, document.title, document.text, str(path) if isinstance(path, str | Path) else ""]
    if not all(map(_is_unicode, texts)):
        raise Invalid(f"{name} holds text that is not valid Unicode")
    if not isinstance(document.meta, Mapping) or _depth(document.meta) > MOST_LEVELS:
        raise Invalid(f"{name}: its metadata are no JSON object of at most {MOST_LEVELS} levels")
    try:
        json.dumps(document.meta)
    except (TypeError, ValueError) as error:
        raise Invalid(f"{name}: its metadata are no JSON object") from error


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion and only as far as needed."""
    level, nodes = 0, [value]
    while nodes and level <= MOST_LEVELS:
        level += 1
        below = [
            list(n.values()) if isinstance(n, Mapping) else n for n in nodes if isinstance(n, Mapping | list | tuple)
        ]
        nodes = [child for children in below for child in children]
    return level


def as_record(row: int, document: Document, blob: str | None, source: str | None = None) -> Record:
    """A document as it is stored; Invalid where it cannot be."""
    check_document(document)
    return Record.of(row, document, blob, source)


def check_encoded(key: tuple[str, Side], encoded: Encoded, documents: int, spaces: Mapping[str, SpaceInfo]) -> None:
    """Raises where vectors do not fit the collection or the documents they came with."""
    space, side = key
    info = spaces.get(space)
    if info is None or side not in info.digests:
        raise Conflict(f"got vectors for {space}/{side}, this collection has {', '.join(spaces) or 'no spaces'}")
    rows, matrix = encoded
    if matrix.ndim != 2 or matrix.shape[1] != info.dim:
        raise Conflict(f"got vectors of shape {matrix.shape}, space '{space}' has {info.dim} dimensions")
    if len(rows) != len(matrix) or len(np.unique(rows)) != len(rows):
        raise Invalid(f"got {len(matrix)} vectors for {len(np.unique(rows))} documents in {space}/{side}")
    if len(rows) and (rows.min() < 0 or rows.max() >= documents):
        raise Invalid(f"vectors in {space}/{side} belong to documents that were not sent")
    if not np.allclose(np.einsum("nd,nd->n", matrix, matrix), 1.0, atol=1e-2):
        raise Invalid(f"vectors in {space}/{side} are not of unit length")


def thumbnails(first: int, documents: Sequence[Document]) -> dict[int, bytes]:
    pictures = ((first + at, document.image) for at, document in enumerate(documents))
    return {row: image.thumbnail for row, image in pictures if isinstance(image, Picture) and image.thumbnail}


def write_blob(folder: Path, document: Document) -> str | None:
    """Keeps an upload as rendered PNG; pictures of a source stay where they are."""
    picture = document.image
    if picture is None:
        return None
    if not isinstance(picture, Picture):
        raise Invalid(f"document {document.id!a:.80}: its picture was not decoded")
    if picture.path is not None or picture.pixels is None:
        return None
    content = io.BytesIO()
    picture.pixels.save(content, "PNG")
    with disk("keeping an upload"):
        folder.mkdir(exist_ok=True)
    return shards.write_bytes(folder, "upload", content.getvalue(), "png")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _last_of_each(documents: Sequence[Document], encodings: Encodings) -> tuple[Sequence[Document], Encodings]:
    """Without documents whose id comes again later."""
    last = {document.id: at for at, document in enumerate(documents)}
    if len(last) == len(documents):
        return documents, encodings
    kept = sorted(last.values())
    place = {old: new for new, old in enumerate(kept)}
    out = {}
    for key, (rows, matrix) in encodings.items():
        held = [n for n, row in enumerate(rows.tolist()) if row in place]
        out[key] = Encoded(np.array([place[int(rows[n])] for n in held], np.int64), matrix[held])
    return [documents[at] for at in kept], out
