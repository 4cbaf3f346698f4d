"""What the store holds, as plain values, and the digest that goes with each of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.types import Assertion, Document, Finding, Picture, Side

Rows = NDArray[np.int32]


class State(NamedTuple):
    """What is published, and what comes next."""

    sequence: int = 0  # publish number
    rows: int = 0  # rows below this one are published
    next: int = 0  # the first row that is free
    writes: int = 0  # transactions so far
    living: int = 0  # documents that the next publish shows
    documents: int = 0  # documents that are published
    manifest: str | None = None  # the file that names the derived parts


class Record(NamedTuple):
    """A document as it is stored. meta and findings are JSON."""

    row: int
    id: str
    title: str
    text: str
    meta: str
    findings: str
    picture: str | None = None  # digest of the bytes
    path: str | None = None
    blob: str | None = None  # rendered picture of an upload
    source: str | None = None  # digest of what the source held and of the encoders

    @property
    def content(self) -> str:
        """Title and text as one string, as `Document.content` has it."""
        return Document(title=self.title, text=self.text).content

    def document(self) -> Document:
        """The document; its picture comes without pixels and thumbnail."""
        findings = tuple(Finding(c, Assertion(a), (s, e)) for c, a, s, e in json.loads(self.findings))
        image = Picture(self.picture, b"", None, self.path) if self.picture is not None else None
        meta = json.loads(self.meta)
        return Document(id=self.id, title=self.title, text=self.text, image=image, meta=meta, findings=findings)

    @classmethod
    def of(cls, row: int, document: Document, blob: str | None = None, source: str | None = None) -> Record:
        picture = document.image if isinstance(document.image, Picture) else None
        findings = [(f.concept, str(f.assertion), *f.span) for f in document.findings]
        return cls(
            row, document.id, document.title, document.text,
            json.dumps(document.meta), json.dumps(findings),
            picture.digest if picture else None, picture.path if picture else None, blob, source,
        )  # fmt: skip


class Shard(NamedTuple):
    """Which vectors a sealed file holds: `rows[i]` is the document of its i-th vector."""

    number: int
    space: str
    side: Side
    name: str
    rows: Rows


def digest_of(values: Sequence[Any], content: bytes = b"") -> bytes:
    """Digest of an entry; equal to no stored one where damage has changed a type."""
    try:
        return hashlib.blake2b(json.dumps(values).encode() + content, digest_size=16).digest()
    except TypeError:
        return b""
