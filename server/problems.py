"""Errors as application/problem+json (RFC 9457): never a trace, never a path, never what was sent."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

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

log = logging.getLogger("lightbox")

STATUS: Mapping[type[RetrievalError], int] = {
    NotFound: 404,
    Conflict: 409,
    Gone: 410,
    TooLarge: 413,
    NotAnImage: 415,
    InputError: 422,
    BackendError: 503,
}


class Refused(Exception):
    """A request that is turned away before it reaches the engine."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


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


def install(app: FastAPI) -> None:
    """Every error of every route ends here."""

    @app.exception_handler(RetrievalError)
    async def ours(request: Request, error: RetrievalError) -> JSONResponse:
        status = status_of(error)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:  # what the machine says may name its folders
            log.error("backend error", exc_info=error, extra={"request_id": request_id(request)})
            return problem(status, "the collection cannot be served at the moment; see the server's log",
                           request_id(request), headers={"Retry-After": "5"})  # fmt: skip
        return problem(status, str(error), request_id(request), getattr(error, "field", None))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return problem(error.status, error.detail, request_id(request), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        status, detail, field = first_fault(error.errors())
        return problem(status, detail, request_id(request), field)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), request_id(request), headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("unforeseen error", exc_info=error, extra={"request_id": request_id(request)})
        return problem(500, "an error of ours; see the server's log", request_id(request))


def first_fault(errors: Any) -> tuple[int, str, str | None]:
    """Status, words and field of the first thing that a schema holds against a body; what was sent stays out."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return 400, "the body is not JSON", None
    path = field_path(first["loc"])
    return 422, f"{path or 'body'}: {first['msg']}", path or None


def field_path(loc: Any) -> str:
    """("body", "query", 0, "text") -> "query[0].text"."""
    out = ""
    for step in loc[1:] if loc and loc[0] in ("body", "query", "path", "header") else loc:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else str(step)
    return out


def request_id(request: Request) -> str:
    return str(request.scope.get("request_id", ""))
