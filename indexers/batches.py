"""What a build has encoded so far: one sealed file a batch, found again by what went into it.

The key of a batch is a digest of its documents, pictures included, and of everything that decides a
vector. So a finished batch is never encoded again, whoever finished it: this process, one that was
killed, or another machine that was given its share.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from indexers import shards
from indexers.embedded import as_record, check_encoded, thumbnails, write_blob
from indexers.records import Record
from indexers.shards import Array, Damaged
from retrieval.types import Document, Encoded, Encodings, Picture, Prepared, Rejected, Side, SpaceInfo

ABANDONED_S = 14 * 24 * 3600.0  # shards of a build that was never finished
_UNREADABLE = "unreadable"


class Batch(NamedTuple):
    """Prepared documents in the form that they are stored in; `row` counts within the batch."""

    records: list[Record]
    thumbnails: Mapping[int, bytes]
    encodings: Encodings
    rejected: list[Rejected]


def source_digest(document: Document, maker: str) -> str:
    """Digest of a document of a source and of what its vectors are made with."""
    values = [maker, document.id, document.title, document.text, document.meta, document.findings]
    held = json.dumps([*values, _picture(document)], default=list).encode()
    return hashlib.sha256(held).hexdigest()[:40]


def _picture(document: Document) -> list[str] | None:
    image = document.image
    if image is None:
        return None
    if isinstance(image, Picture):
        return [image.digest, image.path or ""]
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest(), ""]
    try:
        return [shards.sha256(image), str(image)]
    except OSError:
        return [_UNREADABLE, str(image)]


def key_of(sources: Sequence[str]) -> str:
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:40]


class Batches:
    """The folder of encoded batches."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "encoded"
        self._blobs = home / "blobs"
        with shards.disk("writing encoded batches"):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, str] = {}
        self._look()

    def _look(self) -> None:
        for path in self._folder.iterdir():
            if not path.name.endswith(shards.TEMPORARY):
                self._known[path.name.partition("-")[0]] = path.name

    def __contains__(self, key: str) -> bool:
        """True where the batch is there and intact."""
        if key not in self._known:
            self._look()  # another process may have made it
        if key not in self._known:
            return False
        try:
            shards.verify(self._folder / self._known[key])
        except Damaged:
            (self._folder / self._known.pop(key)).unlink(missing_ok=True)
            return False
        return True

    def put(self, key: str, prepared: Prepared, sources: Mapping[str, str], spaces: Mapping[str, SpaceInfo]) -> None:
        """Keeps a prepared batch; `sources` maps ids to digests. Refuses vectors that do not fit `spaces`."""
        records = []
        for at, document in enumerate(prepared.documents):
            blob = write_blob(self._blobs, document)
            records.append(as_record(at, document, blob, sources.get(document.id)))
        arrays: dict[str, Array] = {
            "records": _packed(records),
            "rejected": _packed(prepared.rejected),
            "keys": _packed(list(prepared.encodings)),
        }
        for number, (name, encoded) in enumerate(prepared.encodings.items()):
            check_encoded(name, encoded, len(records), spaces)
            arrays[f"rows {number}"] = encoded.rows.astype(np.int64)
            arrays[f"matrix {number}"] = encoded.matrix.astype(np.float32)
        arrays |= {
            f"thumbnail {at}": np.frombuffer(png, np.uint8) for at, png in thumbnails(0, prepared.documents).items()
        }
        self._known[key] = shards.write(self._folder, key, arrays, durable=False)

    def get(self, key: str) -> Batch:
        arrays = shards.read(self._folder / self._known[key])
        pictures = {
            int(name.split()[1]): png.tobytes() for name, png in arrays.items() if name.startswith("thumbnail ")
        }
        return Batch(
            [Record(*values) for values in json.loads(arrays["records"].tobytes())],
            pictures,
            dict(_encodings(arrays)),
            [Rejected(*values) for values in json.loads(arrays["rejected"].tobytes())],
        )

    def drop(self, keys: Sequence[str]) -> None:
        """Forgets batches whose documents are in a collection now, and those that nobody came back for."""
        for key in keys:
            (self._folder / self._known.pop(key)).unlink(missing_ok=True)
        for path in self._folder.iterdir():
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink(missing_ok=True)


def _packed(values: object) -> Array:
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def _encodings(arrays: Mapping[str, Array]) -> Iterator[tuple[tuple[str, Side], Encoded]]:
    for number, (space, side) in enumerate(json.loads(arrays["keys"].tobytes())):
        yield (space, side), Encoded(arrays[f"rows {number}"], arrays[f"matrix {number}"])
