"""A search as interface.md words it, and what is wrong with one before any collection looks at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrieval import pages
from retrieval.errors import Invalid, TooLarge
from retrieval.filters import Filter
from retrieval.fusion import Method
from retrieval.retrievers import DEPTH
from retrieval.types import ImageSource, Picture

FIELDS = ("title", "text", "metadata")


@dataclass(frozen=True, kw_only=True)
class RequestPart:
    """One part of what a user sends; exactly one of text, report, image, id and vector."""

    text: str | None = None
    report: str | None = None
    image: ImageSource | None = None
    id: str | None = None
    vector: Sequence[float] | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A search as interface.md §4 words it."""

    query: Sequence[RequestPart]
    retriever: str = "hybrid"
    k: int = 10
    cursor: str | None = None
    where: Mapping[str, Any] | None = None
    method: Method = "minmax"
    weights: Mapping[str, float] | None = None
    group_by: str | None = None
    facets: Sequence[str] = ()
    min_confidence: float | None = None
    exact: bool = False
    explain: bool = False
    highlight: bool = True
    fields: Sequence[str] = FIELDS


Answer = dict[str, Any]  # the JSON object of interface.md §4


def check(request: Request) -> None:
    """Refuses what no collection could answer."""
    if not request.query:
        raise Invalid("query: got no part, expected at least one", "query")
    if request.k < 1:
        raise Invalid(f"k: got {request.k}, expected 1 to {DEPTH}", "k")
    if request.k > DEPTH:
        raise TooLarge(f"k: got {request.k}, the limit is {DEPTH}; use the cursor for more", "k")
    if request.min_confidence is not None and not 0 <= request.min_confidence <= 1:
        raise Invalid(f"min_confidence: got {request.min_confidence}, expected 0 to 1", "min_confidence")
    if request.weights and not any(weight > 0 for weight in request.weights.values()):
        raise Invalid("fusion.weights: expected at least one above 0", "fusion.weights")
    if unknown := set(request.fields) - set(FIELDS):
        raise Invalid(f"fields: got '{min(unknown)}', expected some of {', '.join(FIELDS)}", "fields")


def fingerprint(request: Request, where: Filter | None) -> str:
    """Equal for requests with the same ranking, whatever page, facets and fields they ask for."""
    query = [(p.text, p.report, p.id, p.vector and tuple(p.vector), _digest(p.image), p.weight) for p in request.query]
    fusion = (request.method, sorted((request.weights or {}).items()))
    cut = (request.group_by, request.min_confidence, request.exact)
    return pages.fingerprint(query, request.retriever, where, fusion, cut)


def _digest(image: ImageSource | None) -> str | None:
    return image.digest if isinstance(image, Picture) else pages.fingerprint(image)
