"""Bodies that a route reads by itself: JSON or multipart, a JSON list or NDJSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from retrieval.errors import Invalid
from server.problems import Refused

T = TypeVar("T")


async def json_and_files(request: Request, field: str | None) -> tuple[Any, Mapping[str, bytes]]:
    """The JSON body, and the file fields of a multipart one whose `field` holds the JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if field is None or kind != "multipart/form-data":
        return _parsed(await request.body()), {}
    async with request.form(max_files=16, max_fields=16) as form:
        files = {name: await value.read() for name, value in form.multi_items() if isinstance(value, UploadFile)}
        text = form.get(field)
        if isinstance(text, UploadFile):
            return _parsed(files.pop(field)), files
        if text is None:
            raise Invalid(f"{field}: this multipart body lacks the field that holds the JSON", field)
        return _parsed(str(text).encode()), files


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON that can be read") from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are no JSON


async def lines_of(request: Request) -> list[tuple[int, Any]]:
    """(line from 1, parsed item) of a JSON list or of NDJSON; a broken NDJSON line parses to None."""
    body = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-ndjson":
        items = _parsed(body)
        if not isinstance(items, list):
            raise Invalid("body: expected a list of documents, or NDJSON with content-type application/x-ndjson")
        return list(enumerate(items, 1))
    out: list[tuple[int, Any]] = []
    for number, line in enumerate(body.splitlines(), 1):
        if line.strip():
            try:
                out.append((number, _parsed(line)))
            except Refused:
                out.append((number, None))
    return out


def valid(adapter: TypeAdapter[T], body: Any) -> T:
    """`body` as the model has it. Raises RequestValidationError without quoting what was sent."""
    try:
        return adapter.validate_python(body, by_alias=True)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False, include_url=False)) from None
    except RecursionError:
        raise Invalid("body: nested too deeply") from None
