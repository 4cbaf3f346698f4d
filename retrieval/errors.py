"""Every error that Lightbox raises on purpose.

RetrievalError
+-- InputError            the caller's fault: HTTP 4xx, exit status 2
|   +-- NotFound          no such collection, document or job: 404
|   +-- Conflict          wrong dimension, another encoder, held by another writer: 409
|   +-- Gone              a cursor whose snapshot is no longer kept: 410
|   +-- TooLarge          over a limit that the message names: 413
|   +-- NotAnImage        bytes that are not a readable picture: 415
|   `-- Invalid           against the schema (unknown field or operator, k = 0): 422
`-- BackendError          ours or the machine's: HTTP 503, exit status 1

A message says what was got, what was expected and what to do. It never holds report text,
picture content or a trace.
"""

from __future__ import annotations


class RetrievalError(Exception):
    """The root of the tree."""


class InputError(RetrievalError):
    """The caller's fault.

    field: the path of the offence in what the caller sent, for example ``where.$and[1].year``.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFound(InputError):
    """Something that the caller named does not exist."""


class Conflict(InputError):
    """What was sent does not fit what the collection was built with."""


class Gone(InputError):
    """A cursor outlived its snapshot."""


class TooLarge(InputError):
    """Over a limit; the message names the limit."""


class NotAnImage(InputError):
    """Bytes that are no readable picture."""


class Invalid(InputError):
    """Well-formed, but against the schema."""


class BackendError(RetrievalError):
    """Ours or the machine's fault: a full disk, a damaged store, a cluster that does not answer."""
