"""The OpenAPI document: what FastAPI cannot see by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

from server import schemas

_PROBLEM = {"content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, **_PROBLEM}
    for status, text in {
        400: "not parseable",
        401: "no valid key",
        403: "the key's role, the host or the origin does not allow it",
        404: "no such thing",
        405: "not a method of this route",
        409: "does not fit what the collection was built with",
        410: "the cursor's snapshot is no longer kept",
        413: "over a limit",
        415: "not a picture, or not a body that is read here",
        422: "against the schema",
        429: "too much at once",
        503: "cannot be served at the moment",
    }.items()
}
PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "the picture"}}
SSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "events"}}
BATCH_ANSWER = {
    "type": "object",
    "required": ["answers"],
    "properties": {
        "answers": {
            "type": "array",
            "items": {"anyOf": [{"$ref": "#/components/schemas/Answer"}, {"$ref": "#/components/schemas/Problem"}]},
        }
    },
}
_REF = "#/components/schemas/{model}"


def body_of(model: Any, multipart: str | None = None, ndjson: type[BaseModel] | None = None) -> dict[str, Any]:
    """How the OpenAPI document describes a body that the route reads by itself."""
    schema = TypeAdapter(model).json_schema(ref_template=_REF)
    schema.pop("$defs", None)
    if isinstance(model, type) and issubclass(model, BaseModel):
        schema = {"$ref": _REF.format(model=model.__name__)}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if multipart is not None:
        content["multipart/form-data"] = {
            "schema": {
                "type": "object",
                "required": [multipart],
                "properties": {multipart: {"type": "string", "description": "the JSON query"}},
                "additionalProperties": {"type": "string", "format": "binary"},
            }
        }
    if ndjson is not None:
        content["application/x-ndjson"] = {"schema": {"type": "string"}}
    return {"requestBody": {"required": True, "content": content}}


def document(app: FastAPI) -> dict[str, Any]:
    """Made once: the routes, and the schemas of the bodies that they read by themselves."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = made.setdefault("components", {})
        known = parts.setdefault("schemas", {})
        for model in (schemas.Search, schemas.DocumentIn, schemas.Problem, schemas.Answer):
            own = model.model_json_schema(ref_template=_REF, mode="validation")
            for name, part in own.pop("$defs", {}).items():
                known.setdefault(name, part)
            known[model.__name__] = own
        parts["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        made["security"] = [{}, {"bearer": []}, {"key": []}]  # none where the server has no keys
        app.openapi_schema = made
    return app.openapi_schema
