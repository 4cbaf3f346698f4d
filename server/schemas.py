"""What HTTP takes and gives, as interface.md §4 words it. Unknown fields are refused."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from retrieval.errors import Invalid
from retrieval.request import Request, RequestPart
from server.pictures import is_url

MAX_TEXT = 100_000  # characters of one text or report
MAX_PARTS = 32
MAX_VECTOR = 8192


class Strict(BaseModel):
    """Refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True)


Fetching = Callable[[str, str], bytes]  # a URL and the field that held it, to the picture behind it


class QueryPart(Strict):
    """One part of a query: exactly one of text, report, image, id and vector."""

    text: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    report: Annotated[str, Field(max_length=MAX_TEXT)] | None = Field(None, description="a text treated as a document")
    image: str | None = Field(
        None, description="base64; in multipart the name of a file field; a URL where the server allows its host"
    )
    id: Annotated[str, Field(max_length=512)] | None = Field(None, description="a stored document")
    vector: Annotated[list[float], Field(min_length=1, max_length=MAX_VECTOR)] | None = None
    weight: float = Field(1.0, allow_inf_nan=False, ge=-1000, le=1000, description="negative: away from it")

    def part(self, position: int, files: Mapping[str, bytes], fetch: Fetching) -> RequestPart:
        """`files`: the multipart file fields that an image may name."""
        image = None
        if self.image is not None:
            image = files.get(self.image) or read_image(self.image, f"query[{position}].image", fetch)
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

    def request(self, files: Mapping[str, bytes], fetch: Fetching) -> Request:
        """The engine's words for it."""
        return Request(
            query=[part.part(i, files, fetch) for i, part in enumerate(self.query)],
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
    """A picture that travels with its document. A path is refused."""

    base64: str = Field(description="base64; a URL where the server allows its host")


class DocumentIn(Strict):
    """A document to add; it replaces the one that has its id."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"_id": "CXR12", "text": "No effusion. The heart is enlarged.", "metadata": {"year": 2011}}]
        }
    )

    id: Annotated[str, Field(alias="_id", min_length=1, max_length=512)]
    title: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    text: Annotated[str, Field(max_length=10 * MAX_TEXT)] = ""
    image: ImageUpload | None = None
    metadata: dict[str, JsonValue] = {}


class DocumentOut(BaseModel):
    """A stored document."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any]
    image_url: str | None
    findings: list[Mention]


class ItemStatus(BaseModel):
    """What became of one document of a batch."""

    id: str | None
    line: int
    status: Literal["added", "replaced", "rejected"] = Field(description="replaced: by a later line of the same id")
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
    qrels: dict[str, dict[str, Annotated[int, Field(ge=0, le=1000)]]] | None = None
    retrievers: Annotated[list[str], Field(min_length=1, max_length=16)] = ["hybrid"]
    measures: Annotated[list[str], Field(min_length=1, max_length=16)] = ["nDCG@10", "R@100", "RR@10"]


class IngestionIn(Strict):
    """Documents of a source below the configured folder."""

    source: Annotated[str, Field(max_length=256)]


class Job(BaseModel):
    """Long work, and how far it is."""

    id: str
    kind: Literal["rebuild", "ingestion", "evaluation"]
    collection: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    phase: str
    done: int
    total: int | None
    rate: float | None = Field(description="per second")
    seconds_left: float | None
    errors: list[str]
    result: dict[str, Any] | None
    created: float = Field(description="seconds since 1970")
    updated: float


class JobList(BaseModel):
    jobs: list[Job]


class Health(BaseModel):
    status: Literal["alive", "ready"]


class CollectionShort(BaseModel):
    collection: str
    documents: int
    generation: int
    spaces: dict[str, dict[str, Any]] = Field(description="space -> dimension and encoder digests")
    index: dict[str, Any] = Field(description="kinds, bytes per vector, measured recall, state of each derived part")


class CollectionList(BaseModel):
    collections: list[CollectionShort]


class CollectionInfo(CollectionShort):
    """What a collection holds and what it was made with."""

    sequence: int = Field(description="publish number within the generation")
    config: dict[str, Any]
    weights: dict[str, dict[str, float]] = Field(description="kind of query -> leg -> weight")
    tuned: list[str]
    calibrated: list[str]
    retrievers: list[str]
    facets: list[str]


class EmbeddingsIn(Strict):
    """The OpenAI embedding shape."""

    model: Annotated[str, Field(max_length=256)] = Field("default", description='"default", or a collection')
    input: (
        Annotated[str, Field(max_length=MAX_TEXT)]
        | Annotated[list[Annotated[str, Field(max_length=MAX_TEXT)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = Field(None, description="those of the model, no others")
    user: str | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: dict[str, int]


def read_image(text: str, field: str, fetch: Fetching) -> bytes:
    """A picture in a JSON text: base64, also behind a data: prefix, or a URL. Raises Invalid that names the field."""
    if is_url(text):
        return fetch(text, field)
    _, _, body = text.rpartition("base64,") if text.startswith("data:") else ("", "", text)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(f"{field}: not base64, and no file field of that name was sent", field) from None
