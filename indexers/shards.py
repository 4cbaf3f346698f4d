"""Sealed files: immutable, content-addressed, checksummed, memory-mapped.

A sealed file is named ``<label>-<sha256 of its bytes>.<ending>``, so its name is its checksum and equal
content is stored once. It is written under a temporary name, flushed to the disk, then renamed: a name
that exists is complete. Arrays are kept in the safetensors format, which any other tool can read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import BackendError
from retrieval.types import Matrix

Array = NDArray[Any]
ALIGNMENT = 64  # bytes; a cache line, and more than any dtype needs
SHARD_ROWS = 262_144  # vectors in one file at most: 400 MB at 384 dimensions
TEMPORARY = ".writing"
_NAME = re.compile(r"(?P<label>[\w.@%+-]*)-(?P<digest>[0-9a-f]{64})\.(?P<ending>\w+)")
_DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
    "I32": "<i4",
    "I64": "<i8",
    "U64": "<u8",
}
_CODES = {np.dtype(code): name for name, code in _DTYPES.items()}


class Damaged(BackendError):
    """A file that is missing, truncated or not what its checksum says."""


@contextmanager
def disk(doing: str) -> Iterator[None]:
    """Turns what the file system refuses into a BackendError that says what was being done."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "the disk is full; free some space and try again" if full else (error.strerror or "refused")
        raise BackendError(f"{doing}: {advice}; nothing that was there before has changed") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut, as fsync does for a file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Old or new content after a crash, never a mixture."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    with disk(f"writing {path.name}"):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                _flush(file)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


# --- sealing ---------------------------------------------------------------------------------------


def temporary(folder: Path) -> Path:
    """A name that no reader looks at. What a crash leaves under one is swept by the next writer."""
    return folder / f"{uuid.uuid4().hex}{TEMPORARY}"


def seal(file: Path, folder: Path, label: str, ending: str = "safetensors") -> str:
    """Flushes a temporary file and gives it its lasting name, which is returned; see `sync_folder` for the name."""
    with disk(f"writing {label}"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        return _rename(file, folder, label, ending)


def _rename(file: Path, folder: Path, label: str, ending: str = "safetensors") -> str:
    name = f"{label}-{sha256(file)}.{ending}"
    os.replace(file, folder / name)
    return name


def write(folder: Path, label: str, arrays: Mapping[str, Array], durable: bool = True) -> str:
    """Seals arrays in one file and returns its name.

    durable: flush it to the disk; without, a power cut may leave a file that its checksum tells to be torn.
    """
    path = temporary(folder)
    with disk(f"writing {label}"):
        try:
            header, spans = _layout(arrays)
            with open(path, "wb") as file:
                file.write(header)
                for (start, _), array in zip(spans, arrays.values(), strict=True):
                    file.write(b"\0" * (len(header) + start - file.tell()))
                    file.write(np.ascontiguousarray(array).data if array.size else b"")
            return seal(path, folder, label) if durable else _rename(path, folder, label)
        finally:
            path.unlink(missing_ok=True)


def write_bytes(folder: Path, label: str, content: bytes, ending: str) -> str:
    """Seals bytes and returns the file's name."""
    name = f"{label}-{hashlib.sha256(content).hexdigest()}.{ending}"
    try:
        verify(folder / name)
    except Damaged:
        replace_file(folder / name, content)
    return name


class VectorWriter:
    """Takes vectors as they come and seals them in shards of at most `SHARD_ROWS`.

    Nothing is kept in memory: rows go to a temporary file whose header is filled in at the end.
    """

    def __init__(self, folder: Path, label: str, dim: int, rows: int = SHARD_ROWS) -> None:
        self.folder, self.label, self.dim, self.rows = folder, label, dim, rows
        self.sealed: list[tuple[str, int]] = []  # (name, vectors)
        self._path = temporary(folder)
        self._file: IO[bytes] | None = None
        self._count = 0

    def append(self, matrix: Matrix) -> None:
        with disk(f"writing {self.label}"):
            while len(matrix):
                piece, matrix = np.split(matrix, [self.rows - self._count])
                if self._file is None:
                    self._file = open(self._path, "wb")  # noqa: SIM115 (closed by _seal or close)
                    self._file.write(_layout({"matrix": np.empty((0, self.dim), np.float32)}, reserve=1024)[0])
                self._file.write(np.ascontiguousarray(piece, "<f4").data)
                self._count += len(piece)
                if self._count == self.rows:
                    self._seal()

    def finish(self) -> list[tuple[str, int]]:
        """(name, vectors) of every shard, in the order that they came in."""
        with disk(f"writing {self.label}"):
            if self._count:
                self._seal()
            sync_folder(self.folder)
        return self.sealed

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses the last bytes of what is thrown away
                self._file.close()
            self._path.unlink(missing_ok=True)

    def _seal(self) -> None:
        assert self._file is not None  # append opened it
        shape = np.broadcast_to(np.float32(0), (self._count, self.dim))
        self._file.seek(0)
        self._file.write(_layout({"matrix": shape}, reserve=1024)[0])
        self._file.close()
        self._file = None
        self.sealed.append((seal(self._path, self.folder, self.label), self._count))
        self._path, self._count = temporary(self.folder), 0


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _layout(arrays: Mapping[str, Array], reserve: int = 0) -> tuple[bytes, list[tuple[int, int]]]:
    """The header of a safetensors file, and where each array lies behind it."""
    spans, at = [], 0
    for array in arrays.values():
        start = -(-at // ALIGNMENT) * ALIGNMENT
        at = start + array.nbytes
        spans.append((start, at))
    # The format allows no holes, so padding between arrays is declared as arrays of its own.
    entries: dict[str, Any] = {}
    end = 0
    for (name, array), (start, stop) in zip(arrays.items(), spans, strict=True):
        if start > end:
            entries[f"padding{start}"] = {"dtype": "U8", "shape": [start - end], "data_offsets": [end, start]}
        dtype = _CODES[array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, stop]}
        end = stop
    text = json.dumps(entries).encode()
    size = max(reserve, -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT)
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8), spans


# --- reading ---------------------------------------------------------------------------------------


def verify(path: Path) -> None:
    """Raises Damaged where the file is missing or is not what its name says."""
    match = _NAME.fullmatch(path.name)
    try:
        if match is None or sha256(path) != match["digest"]:
            raise Damaged(f"{path.name} is damaged: its bytes do not match its checksum")
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a sealed file; Damaged where it is missing or altered."""
    verify(path)
    return path.read_bytes()


def read(path: Path, check: bool = True) -> dict[str, Array]:
    """Maps the arrays of a sealed file into memory; Damaged where it is missing, cut or (with `check`) altered."""
    if check:
        verify(path)
    try:
        with open(path, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start = 8 + int.from_bytes(view[:8], "little")
        entries = json.loads(bytes(view[8:start]))
        return {name: _array(view[start:], entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path.name} cannot be read as sealed arrays") from error


def _array(data: memoryview, entry: Mapping[str, Any]) -> Array:
    start, stop = entry["data_offsets"]
    return np.frombuffer(data[start:stop], _DTYPES[entry["dtype"]]).reshape(entry["shape"])


Checksums = Mapping[str, tuple[int, str]]  # file name -> (bytes, sha256)


def checksums(folder: Path, known: Checksums | None = None) -> dict[str, tuple[int, str]]:
    """Flushes every file of a folder and takes its size and checksum.

    known: what was found for files that are linked from another folder; they are immutable and flushed already.
    """
    found = {}
    for file in sorted(folder.iterdir()):
        linked = (known or {}).get(file.name)
        if linked is not None and file.suffix != ".json":
            found[file.name] = linked
            continue
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        found[file.name] = (file.stat().st_size, sha256(file))
    sync_folder(folder)
    sync_folder(folder.parent)
    return found


def verify_folder(folder: Path, sums: Checksums, known: set[tuple[int, str]] | None = None) -> None:
    """Raises Damaged where the folder does not hold what `checksums` found.

    known: (inode, sha256) of files that were verified before, perhaps under another name; added to.
    """
    known = known if known is not None else set()
    for name, (size, digest) in sums.items():
        file = folder / name
        try:
            found = file.stat()
            if (found.st_ino, digest) in known and found.st_size == size:
                continue
            intact = found.st_size == size and sha256(file) == digest
        except OSError:
            intact = False
        if not intact:
            raise Damaged(f"{folder.name}/{name} is missing or altered")
        known.add((found.st_ino, digest))


def sweep(folder: Path, keep: Collection[str]) -> None:
    """Deletes temporary files and sealed files that `keep` does not name. For a writer that holds the lock."""
    kept = set(keep)
    for path in folder.iterdir():
        if path.name.endswith(TEMPORARY) or (_NAME.fullmatch(path.name) and path.name not in kept):
            path.unlink(missing_ok=True)
