"""The half of ingest that computes: documents -> pictures decoded -> findings linked -> vectors.

What becomes of the result is the index's business; see `indexers.rebuild`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from retrieval.errors import InputError
from retrieval.types import (
    Document,
    Encoded,
    Encoder,
    Encodings,
    ImageSource,
    Item,
    Linker,
    Picture,
    Prepared,
    Rejected,
    Side,
)

ReadPicture = Callable[[ImageSource], Picture]
DECODING_THREADS = 2  # decoders release the interpreter lock


class Ingest:
    """Implements `retrieval.types.Prepare` for one collection's encoders and linker."""

    def __init__(self, encoders: Sequence[Encoder], linker: Linker | None, read_picture: ReadPicture) -> None:
        self.encoders = encoders
        self.linker = linker
        self.read_picture = read_picture
        made_by = [[e.space, sorted(e.digests.items())] for e in encoders] + [linker.digest if linker else None]
        self.digest = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()

    def __call__(self, documents: Sequence[Document]) -> Prepared:
        """Documents whose picture cannot be read are left out and named in `rejected`."""
        good, rejected = self._decode(documents)
        if self.linker is not None:
            found = self.linker.link([document.text for document in good])
            good = [replace(d, findings=f) for d, f in zip(good, found, strict=True)]
        return Prepared(good, self._encode(good), rejected)

    def _decode(self, documents: Sequence[Document]) -> tuple[list[Document], list[Rejected]]:
        good: list[Document] = []
        rejected: list[Rejected] = []
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            for document, result in zip(documents, pool.map(self._picture, documents), strict=True):
                if isinstance(result, InputError):
                    rejected.append(Rejected(None, document.id, str(result)))
                else:
                    good.append(replace(document, image=result))
        return good, rejected

    def _picture(self, document: Document) -> Picture | InputError | None:
        if document.image is None:
            return None
        try:
            return self.read_picture(document.image)
        except InputError as error:
            return error

    def _encode(self, documents: Sequence[Document]) -> Encodings:
        encodings: dict[tuple[str, Side], Encoded] = {}
        for encoder in self.encoders:
            for side in encoder.digests:
                items = [(row, _side(document, side)) for row, document in enumerate(documents)]
                held = [(row, item) for row, item in items if item is not None and encoder.handles(item)]
                if held:
                    rows = np.array([row for row, _ in held], np.int64)
                    encodings[encoder.space, side] = Encoded(rows, encoder.encode_documents([i for _, i in held]))
        return encodings


def _side(document: Document, side: Side) -> Item | None:
    """One side of a document as an item of its own, None where the document has nothing there."""
    if side == "text":
        return Item(id=document.id, text=document.content) if document.content.strip() else None
    return Item(id=document.id, image=document.image) if document.image is not None else None
