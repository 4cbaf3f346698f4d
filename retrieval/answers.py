"""From rankings to what an answer shows: parts, groups, facets, highlights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from retrieval import analysis
from retrieval.request import Request
from retrieval.types import Document, Hit, Query, Share


def shares(request: Request, place: int, hit: Hit) -> Mapping[str, Share]:
    """A hit's parts; a single leg is its own only part, with its raw score."""
    return hit.parts or {request.retriever.partition("+")[0]: Share(place, hit.score, hit.score, 1.0)}


def distinct_words(query: Query) -> int:
    """How many different words the lexical leg sees, at least 1."""
    return max(1, len({word for part in query.parts for word in analysis.tokens(part.text)}))


def grouped(
    hits: Sequence[tuple[int, Hit]], values: Sequence[Any]
) -> tuple[list[tuple[int, Hit]], dict[str, dict[str, Any]]]:
    """The best hit of every group; a document without a value is a group of its own."""
    kept: list[tuple[int, Hit]] = []
    groups: dict[str, dict[str, Any]] = {}
    leaders: dict[str, str] = {}
    for (place, hit), value in zip(hits, values, strict=True):
        key = repr(value) if value is not None else f"id {hit.id}"
        if key in leaders:
            groups[leaders[key]]["size"] += 1
            continue
        leaders[key] = hit.id
        groups[hit.id] = {"value": value, "size": 1}
        kept.append((place, hit))
    return kept, groups


def counts(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Values with counts, most frequent first; the values of a list count one each."""
    flat = [v for value in values for v in (value if isinstance(value, list) else [value]) if v is not None]
    counts = Counter((type(v).__name__, v) for v in flat if isinstance(v, str | int | float | bool))
    ordered = sorted(counts.items(), key=lambda x: (-x[1], str(x[0][1])))
    return [{"value": value, "count": count} for (_, value), count in ordered]


def highlights(query: Query, document: Document) -> dict[str, list[list[int]]]:
    """Field -> [start, end] of the words that the query asked for."""
    wanted = {token for part in query.parts if part.weight > 0 for token in analysis.tokens(part.text)}
    fields = {"title": document.title, "text": document.text}
    found = {name: analysis.highlights(text, wanted) for name, text in fields.items() if text}
    return {name: [list(span) for span in spans] for name, spans in found.items() if spans}
