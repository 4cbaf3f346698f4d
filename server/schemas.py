"""What HTTP takes and gives, as interface.md §4 words it. Unknown fields are refused."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from retrieval.errors import Invalid
from retrieval.request import Request, RequestPart

MAX_TEXT = 100_000  # characters of one text or report
MAX_PARTS = 32
MAX_VECTOR = 8192


class Strict(BaseModel):
    """Refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True)


class QueryPart(Strict):
    """One part of a query: exactly one of text, report, image, id and vector."""

    text: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    report: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    image: str | None = Field(None, description="base64, or in multipart the name of a file field")
    id: Annotated[str, Field(max_length=512)] | None = None
    vector: Annotated[list[float], Field(max_length=MAX_VECTOR)] | None = None
    weight: float = Field(1.0, allow_inf_nan=False, ge=-1000, le=1000)

    def part(self, position: int, files: Mapping[str, bytes]) -> RequestPart:
        """`files`: the multipart file fields that an image may name."""
        image = (
            None if self.image is None else files.get(self.image) or decoded(self.image, f"query[{position}].image")
        )
        return RequestPart(
            text=self.text, report=self.report, image=image, id=self.id, vector=self.vector, weight=self.weight
        )


class Fusion(Strict):
    """How the legs of `hybrid` become one ranking."""

    method: Literal["minmax", "rrf"] = "minmax"
    weights: dict[str, Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]] | None = None


class Search(Strict):
    """A search."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": [{"text": "small left effusion"}], "k": 5},
                {
                    "query": [{"text": "enlarged heart"}, {"id": "CXR12", "weight": -0.3}],
                    "where": {"projection": "ap"},
                },
            ]
        }
    )

    query: Annotated[list[QueryPart], Field(min_length=1, max_length=MAX_PARTS)]
    retriever: Annotated[str, Field(max_length=64)] = "hybrid"
    k: int = Field(10, ge=1)
    cursor: Annotated[str, Field(max_length=1024)] | None = None
    where: dict[str, JsonValue] | None = None
    fusion: Fusion = Field(default_factory=Fusion)
    group_by: Annotated[str, Field(max_length=256)] | None = None
    facets: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=16)] = []
    min_confidence: float | None = Field(None, ge=0, le=1)
    exact: bool = False
    explain: bool = False
    highlight: bool = True
    fields: list[Literal["title", "text", "metadata"]] = ["title", "text", "metadata"]

    def request(self, files: Mapping[str, bytes] | None = None) -> Request:
        """The engine's words for it."""
        return Request(
            query=[part.part(i, files or {}) for i, part in enumerate(self.query)],
            retriever=self.retriever,
            k=self.k,
            cursor=self.cursor,
            where=self.where,
            method=self.fusion.method,
            weights=self.fusion.weights,
            group_by=self.group_by,
            facets=self.facets,
            min_confidence=self.min_confidence,
            exact=self.exact,
            explain=self.explain,
            highlight=self.highlight,
            fields=self.fields,
        )


class SharePart(BaseModel):
    """What one leg gave a hit; weight times normalised is its share of the score."""

    rank: int | None
    raw: float
    normalised: float
    weight: float


class Mention(BaseModel):
    """A finding in a hit's text, with character offsets."""

    concept: str
    name: str
    assertion: Literal["affirmed", "negated", "uncertain"]
    start: int
    end: int


class AnswerHit(BaseModel):
    """One document found, and why."""

    id: str
    score: float
    confidence: float | None
    parts: dict[str, SharePart]
    title: str | None = None
    text: str | None = None
    image_url: str | None
    metadata: dict[str, Any] | None = None
    findings: list[Mention]
    highlights: dict[str, list[tuple[int, int]]]
    group: dict[str, Any] | None


class FacetValue(BaseModel):
    value: str | float | bool
    count: int


class Total(BaseModel):
    value: int
    relation: Literal["eq", "gte"]


class Answer(BaseModel):
    """The hits of one page, and how far they can be trusted."""

    hits: list[AnswerHit]
    facets: dict[str, list[FacetValue]]
    total: Total
    exact: bool
    recall: float
    generation: int
    cursor: str | None
    took_ms: dict[str, float]
    explanation: dict[str, Any] | None = Field(None, description="with `explain`: encoders, weights, retriever")


class Problem(BaseModel):
    """An error, as application/problem+json (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | None = None
    request_id: str


class ImageUpload(Strict):
    base64: str


class DocumentIn(Strict):
    """A document to add. A path is refused: pictures travel with it."""

    id: Annotated[str, Field(alias="_id", min_length=1, max_length=512)]
    title: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    text: Annotated[str, Field(max_length=10 * MAX_TEXT)] = ""
    image: ImageUpload | None = None
    metadata: dict[str, JsonValue] = {}


class ItemStatus(BaseModel):
    """What became of one document of a batch."""

    id: str | None
    line: int
    status: Literal["added", "rejected"]
    reason: str | None = None


class Ingested(BaseModel):
    added: int
    rejected: int
    items: list[ItemStatus]
    documents: int


class DeleteByFilter(Strict):
    where: dict[str, JsonValue]


class Deleted(BaseModel):
    deleted: int


class CollectionIn(Strict):
    """What a new, empty collection is made with; null means what Lightbox ships, "none" leaves it out."""

    text_encoder: Annotated[str, Field(max_length=256)] | None = None
    image_encoder: Annotated[str, Field(max_length=256)] | None = None
    reranker: Annotated[str, Field(max_length=256)] | None = None
    ontology: Annotated[str, Field(max_length=256)] | None = None
    vector_index: Annotated[str, Field(max_length=128)] = "flat"


class RebuildIn(Strict):
    vector_index: Annotated[str, Field(max_length=128)] | None = None


class EvaluationQuery(Strict):
    id: Annotated[str, Field(alias="_id", min_length=1, max_length=512)]
    text: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    kind: Literal["text", "report"] = "text"


class EvaluationIn(Strict):
    """Queries and judgments in the body, or the name of a source below the configured folder."""

    source: Annotated[str, Field(max_length=256)] | None = None
    split: Annotated[str, Field(max_length=64)] = "test"
    queries: Annotated[list[EvaluationQuery], Field(max_length=100_000)] | None = None
    qrels: dict[str, dict[str, int]] | None = None
    retrievers: Annotated[list[str], Field(min_length=1, max_length=16)] = ["hybrid"]
    measures: Annotated[list[str], Field(min_length=1, max_length=16)] = ["nDCG@10", "R@100", "RR@10"]


class Job(BaseModel):
    """Long work, and how far it is."""

    id: str
    kind: Literal["rebuild", "evaluation"]
    collection: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    phase: str
    done: int
    total: int | None
    rate: float | None = Field(description="per second")
    seconds_left: float | None
    errors: list[str]
    result: dict[str, Any] | None
    created: float
    updated: float


class EmbeddingsIn(Strict):
    """The OpenAI embedding shape."""

    model: Annotated[str, Field(max_length=256)] = "default"
    input: str | Annotated[list[Annotated[str, Field(max_length=MAX_TEXT)]], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


def decoded(text: str, field: str) -> bytes:
    """base64 to bytes, with or without a data: prefix. Raises Invalid that names the field."""
    _, _, body = text.rpartition("base64,") if text.startswith("data:") else ("", "", text)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(f"{field}: not base64, and no file field of that name was sent", field) from None
