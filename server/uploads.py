"""Documents that come over HTTP: each is checked like a line of a source, and each gets a status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter

from retrieval.documents import checked_id, checked_meta
from retrieval.errors import InputError
from retrieval.rows import Bad
from retrieval.types import Document
from server import problems, schemas
from server.bodies import valid
from server.home import Home, silent
from server.problems import Refused

_DOCUMENT: TypeAdapter[schemas.DocumentIn] = TypeAdapter(schemas.DocumentIn)


def upsert(home: Home, collection: str, lines: Iterable[tuple[int, Any]], fetch: schemas.Fetching) -> dict[str, Any]:
    """What the route answers: what is told as added is on disk and visible. The last of two equal ids wins."""
    home.config(collection)
    statuses: list[dict[str, Any]] = []
    documents: dict[str, tuple[int, Document]] = {}
    for line, body in lines:
        try:
            document = _document(body, fetch)
        except (InputError, RequestValidationError, Refused, Bad) as error:
            statuses.append(_status(_id(body), line, "rejected", _reason(error)))
            continue
        if document.id in documents:
            statuses.append(_status(document.id, documents[document.id][0], "replaced"))
        documents[document.id] = (line, document)
    refused: dict[str | None, str] = {}
    if documents:
        done = home.add(collection, [document for _, document in documents.values()], silent)
        refused = {item.id: item.reason for item in done.rejected}
    for id, (line, _) in documents.items():
        statuses.append(_status(id, line, "rejected" if id in refused else "added", refused.get(id)))
    told = Counter(status["status"] for status in statuses)
    return {
        "added": told["added"],
        "rejected": told["rejected"],
        "items": sorted(statuses, key=lambda status: status["line"]),
        "documents": len(home.engine(collection).index.snapshot()),
    }


def _document(body: Any, fetch: schemas.Fetching) -> Document:
    if isinstance(body, Refused):
        raise body
    read = valid(_DOCUMENT, body)
    image = schemas.read_image(read.image.base64, "image.base64", fetch) if read.image else None
    return Document(
        id=checked_id(read.id), title=read.title, text=read.text, image=image, meta=checked_meta(read.metadata)
    )


def _status(id: str | None, line: int, status: str, reason: str | None = None) -> dict[str, Any]:
    return {"id": id, "line": line, "status": status, "reason": reason}


def _id(body: Any) -> str | None:
    id = body.get("_id") if isinstance(body, dict) else None
    return id[:512] if isinstance(id, str) else None


def _reason(error: Exception) -> str:
    if isinstance(error, RequestValidationError):
        return problems.first_fault(error.errors())[1]
    return error.detail if isinstance(error, Refused) else str(error)
