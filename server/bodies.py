"""What a request carries: strict JSON, multipart, a JSON list or NDJSON."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from retrieval.errors import Invalid
from retrieval.rows import Bad, parsed
from server.problems import Refused

T = TypeVar("T")
NDJSON = "application/x-ndjson"


class StrictRoute(APIRoute):
    """A route whose JSON body is read by the letter of the standard, whoever reads it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        return json_of(await self.body())


def kind_of(request: Request) -> str:
    """The content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def json_and_files(request: Request, field: str) -> tuple[Any, Mapping[str, bytes]]:
    """The JSON body, and the file fields of a multipart one whose `field` holds the JSON."""
    if kind_of(request) != "multipart/form-data":
        return json_of(await request.body()), {}
    async with request.form(max_files=32, max_fields=32, max_part_size=2**20) as form:
        files = {name: await value.read() for name, value in form.multi_items() if isinstance(value, UploadFile)}
        text = form.get(field)
        if isinstance(text, UploadFile):
            return json_of(files.pop(field)), files
        if text is None:
            raise Invalid(f"{field}: this multipart body lacks the field that holds the JSON", field)
        return json_of(text.encode(errors="surrogateescape")), files


def json_of(body: bytes) -> Any:
    """One JSON value. Raises Refused with status 400; what was sent stays out of the message."""
    try:
        return parsed(body.decode())
    except (Bad, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, Bad) else "not UTF-8"
        raise Refused(400, f"body: {why}") from None


async def lines_of(request: Request) -> list[tuple[int, Any]]:
    """(line from 1, item) of a JSON list or of NDJSON; a line that cannot be read comes as its Refused."""
    body = await request.body()
    if kind_of(request) != NDJSON:
        items = json_of(body)
        if not isinstance(items, list):
            raise Invalid(f"body: expected a list of documents, or NDJSON with content-type {NDJSON}")
        return list(enumerate(items, 1))
    lines = enumerate(body.split(b"\n"), 1)  # not splitlines: JSON texts may hold other line ends
    return [(number, _line(line)) for number, line in lines if line.strip()]


def _line(line: bytes) -> Any:
    try:
        return json_of(line)
    except Refused as refused:
        return refused


def valid(adapter: TypeAdapter[T], body: Any) -> T:
    """`body` as the model has it. Raises RequestValidationError without quoting what was sent."""
    try:
        return adapter.validate_python(body, by_alias=True)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None
    except RecursionError:
        raise Invalid("body: nested too deeply") from None
