"""Errors as application/problem+json (RFC 9457): never a trace, never a path, never what was sent."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from retrieval.errors import (
    BackendError,
    Conflict,
    Gone,
    InputError,
    NotAnImage,
    NotFound,
    RetrievalError,
    TooLarge,
)
from server.home import NotWritable

log = logging.getLogger("lightbox")

STATUS: Mapping[type[RetrievalError], int] = {
    NotFound: 404,
    Conflict: 409,
    Gone: 410,
    TooLarge: 413,
    NotAnImage: 415,
    NotWritable: 503,
    InputError: 422,
    BackendError: 503,
}


WORDS = {
    "extra_forbidden": "no such field here",
    "missing": "is missing",
    "model_type": "expected an object",  # the schema's own words name our classes
    "model_attributes_type": "expected an object",
    "dict_type": "expected an object",
    "list_type": "expected a list",
}
UNION = re.compile(r"constrained-|list\[|dict\[|function-")


class Refused(HTTPException):
    """A request that is turned away before it reaches the engine."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, dict(headers or {}))


def problem(
    status: int, detail: str, request_id: str, field: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """One problem document."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "field": field,
        "request_id": request_id,
    }
    return JSONResponse(body, status, dict(headers or {}), media_type="application/problem+json")


def status_of(error: RetrievalError) -> int:
    """The HTTP status of the nearest ancestor that has one."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def of(error: Exception, request_id: str) -> JSONResponse:
    """The problem that an error is. What is no error of anybody's in particular is ours: 500."""
    if isinstance(error, RetrievalError):
        status = status_of(error)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:  # what the machine says may name its folders
            log.error("backend error", exc_info=error, extra={"request_id": request_id})
            detail = "the collection cannot be served at the moment; see the server's log"
            return problem(status, detail, request_id, headers={"Retry-After": "5"})
        return problem(status, str(error), request_id, getattr(error, "field", None))
    if isinstance(error, RequestValidationError):
        status, detail, field = first_fault(error.errors())
        return problem(status, detail, request_id, field)
    if isinstance(error, HTTPException):
        return problem(error.status_code, str(error.detail), request_id, headers=error.headers)
    log.error("unforeseen error", exc_info=error, extra={"request_id": request_id})
    return problem(500, "an error of ours; see the server's log", request_id)


def install(app: FastAPI) -> None:
    """Every error of every route ends here."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException) and error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            error.headers = {"Allow": ", ".join(_allowed(request))}
        return of(error, request_id(request))

    for kind in (RetrievalError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _allowed(request: Request) -> list[str]:
    """Every method of the path: several routes may share it, each knows only its own."""
    there = [route for route in request.app.state.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in there for method in getattr(route, "methods", None) or ()})


def first_fault(errors: Any) -> tuple[int, str, str | None]:
    """Status, words and field of the first thing that a schema holds against a request; what was sent stays out."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return 400, "the body is not JSON", None
    path = field_path(first["loc"][1:])  # the first step says where: body, query, path
    return 422, f"{path or 'body'}: {WORDS.get(first['type'], first['msg'])}", path or None


def field_path(steps: Any) -> str:
    """A path into what was sent, as one string.

    >>> field_path(("query", 0, "text"))
    'query[0].text'
    """
    out = ""
    for step in steps:
        if isinstance(step, str) and UNION.match(step):  # which of several shapes was tried
            continue
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else str(step)
    return out


def request_id(request: Request) -> str:
    return str(request.scope.get("request_id", ""))
