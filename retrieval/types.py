"""The nouns that cross the packages, and the protocols that the packages meet at.

Shapes: Q queries, N documents, D dimensions, K candidates. numpy crosses packages, torch never does.
A *space* is what one encoder pair makes; a document has up to two vectors in it, one per *side*:
``"text"`` and ``"image"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from retrieval.filters import Filter

Matrix = NDArray[np.float32]  # (N, D), C-contiguous, rows of unit length: the inner product is the cosine
Vector = NDArray[np.float32]  # (D,)
Side = Literal["text", "image"]
Qrels = dict[str, dict[str, int]]


class Assertion(StrEnum):
    """What a text says of a finding."""

    affirmed = "affirmed"
    negated = "negated"
    uncertain = "uncertain"


class Finding(NamedTuple):
    """A concept that a text mentions. `span` is a pair of character offsets into that text."""

    concept: str
    assertion: Assertion
    span: tuple[int, int]


class Picture(NamedTuple):
    """A decoded picture. Only `encoders.images` makes one and looks at its pixels."""

    digest: str  # sha256 of the bytes it was read from
    thumbnail: bytes  # PNG, longest side at most 512 px
    pixels: Any  # PIL.Image, mode L or RGB, upright
    path: str | None = None  # where it stays, None for uploads


ImageSource = Picture | Path | bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A text, a picture, or both. What an encoder is handed holds exactly one of them."""

    id: str = ""
    text: str = ""
    image: ImageSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Item):
    """One part of a query: a text, a report, a picture, or vectors that exist already.

    kind: "report" is text treated as a document (symmetric ontology match), "text" a phrase.
    vectors: (space, side) -> unit vector, used instead of encoding (a raw vector, or a stored document's).
    weight: negative means away from it.
    findings: what a linker found in the text; None where none has read it yet.
    """

    kind: Literal["text", "report"] = "text"
    weight: float = 1.0
    findings: tuple[Finding, ...] | None = None
    vectors: Mapping[tuple[str, Side], Vector] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One or more parts; per leg a document scores the weighted sum of what the parts give it."""

    id: str = ""
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document(Item):
    """What a collection holds. `findings` have spans in `text`; `meta` is a JSON object."""

    title: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def content(self) -> str:
        """Title and text as one string: what is encoded and searched."""
        return f"{self.title} {self.text}".strip() if self.title else self.text


class Share(NamedTuple):
    """What one leg gave a hit: weight * normalised is its share of the score."""

    rank: int | None  # from 1; None where the leg did not return the document
    raw: float
    normalised: float
    weight: float


class Hit(NamedTuple):
    """A document's place in a ranking. Higher scores are better; ties go to the smaller id."""

    id: str
    score: float
    parts: Mapping[str, Share] = {}


class Ranking(list[Hit]):
    """Hits, best first, and how far they can be trusted.

    exact: no better document was missed. recall: what was measured at build time (1.0 if exact).
    """

    __slots__ = ("exact", "recall")

    def __init__(self, hits: Iterable[Hit] = (), exact: bool = True, recall: float = 1.0) -> None:
        super().__init__(hits)
        self.exact = exact
        self.recall = recall


Run = dict[str, Ranking]


class Encoded(NamedTuple):
    """Vectors of a batch on one side of one space: `matrix[i]` belongs to the batch's document `rows[i]`."""

    rows: NDArray[np.int64]
    matrix: Matrix


Encodings = Mapping[tuple[str, Side], Encoded]  # (space, side) -> vectors of one batch of documents


class Rejected(NamedTuple):
    """A bad item of a source, as `quarantine.jsonl` keeps it: never its content."""

    line: int | None
    id: str | None
    reason: str


class Prepared(NamedTuple):
    """A batch of documents ready to be stored: pictures decoded, findings linked, vectors made."""

    documents: list[Document]
    encodings: Encodings
    rejected: list[Rejected]


class Prepare(Protocol):
    """The half of ingest that computes. `digest` names all that its output depends on besides the documents."""

    digest: str

    def __call__(self, documents: Sequence[Document]) -> Prepared: ...


class Encoder(Protocol):
    """One space: text, pictures or both to unit vectors."""

    space: str
    dim: int

    @property
    def digests(self) -> Mapping[Side, str]:
        """Side -> digest of everything that decides a vector: weights, prompt, pooling, resize."""

    def handles(self, item: Item) -> bool:
        """True where `item` holds something this encoder can encode."""

    def encode_queries(self, items: Sequence[Item]) -> Matrix:
        """(Q, D). Every item must be handled."""

    def encode_documents(self, items: Sequence[Item]) -> Matrix:
        """(N, D). Every item must be handled."""

    def as_queries(self, side: Side, vectors: Matrix) -> Matrix:
        """(N, D) what documents ask with whose stored vectors of this side are `vectors`."""


class Scorer(Protocol):
    """A cross-encoder: reads query and document together. It reranks, and it teaches."""

    digest: str

    def score(self, query: Item, documents: Sequence[Document]) -> NDArray[np.float32]:
        """(K,) scores, higher is better; comparable within one query only."""


class Linker(Protocol):
    """Text to findings."""

    digest: str

    def link(self, texts: Sequence[str]) -> list[tuple[Finding, ...]]:
        """One tuple of findings per document text."""

    def link_queries(self, texts: Sequence[str]) -> list[tuple[Finding, ...]]:
        """One tuple per free-text query, from compiled tables: no torch, no spaCy."""

    def name(self, concept: str) -> str:
        """Preferred name of a concept."""


class Postings(Protocol):
    """Which documents hold a concept: what an index lends to a findings score."""

    size: int  # N, rows run from 0 to N - 1

    def concepts(self) -> Iterable[tuple[str, Assertion]]:
        """Every (concept, assertion) that occurs."""

    def rows(self, concept: str, assertion: Assertion) -> NDArray[np.int32]:
        """Ascending rows of the documents that hold it; empty where none does."""


FindingsScore = Callable[[Part, Postings], NDArray[np.float32]]
"""(N,) scores of all rows for one query part; 0 means no match. See `ontology.tversky`."""


Likeness = Callable[[Sequence[Sequence[Finding]], Sequence[Sequence[Finding]]], NDArray[np.float32]]
"""(Q, N) how alike the findings of two lists of texts are. See `ontology.tversky`."""


class SpaceInfo(NamedTuple):
    """What a collection knows of a space. A vector made by other digests is refused."""

    name: str
    dim: int
    digests: Mapping[Side, str]


class Snapshot(Protocol):
    """One published state of a collection. Immutable; takes no lock.

    Laws (tests/test_index_contract.py holds every backend to them): at most k hits, best first; scores within
    1e-6 are tied and ordered by id; `where` is applied before the cut; empty text, or a part
    without findings, gives an empty ranking; `fetch` keeps the order asked.
    """

    generation: int
    sequence: int  # publish number
    spaces: Mapping[str, SpaceInfo]
    sides: Mapping[tuple[str, Side], int]  # (space, side) -> how many documents have a vector there

    def __len__(self) -> int: ...

    def fetch(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None for unknown ids. A picture comes without its pixels and thumbnail."""

    def image(self, id: str) -> bytes | None:
        """The rendered picture (PNG), or None."""

    def sample(self, n: int) -> list[str]:
        """Up to `n` ids, spread over the collection, the same ones for the same state."""

    def values(self, field: str, ids: Sequence[str]) -> list[Any]:
        """Metadata values at a dotted path, None where missing: for facets and grouping."""

    def count(self, where: Filter | None = None) -> int: ...

    def select(self, where: Filter) -> list[str]:
        """Ids of all documents that a filter lets through, in no particular order."""

    def vectors(self, space: str, side: Side, ids: Sequence[str]) -> Encoded:
        """Stored vectors of those `ids` that have one; `rows` index into `ids`."""

    def search_text(self, texts: Sequence[str], k: int, where: Filter | None = None) -> list[Ranking]:
        """BM25 over `retrieval.analysis` tokens of title and text."""

    def search_vectors(
        self,
        space: str,
        vectors: Matrix,
        k: int,
        where: Filter | None = None,
        sides: Sequence[Side] = ("text", "image"),
        exact: bool = False,
    ) -> list[Ranking]:
        """Inner products; a document scores as its best vector among `sides`."""

    def search_findings(
        self, parts: Sequence[Part], k: int, where: Filter | None, score: FindingsScore
    ) -> list[Ranking]: ...

    def describe(self) -> dict[str, Any]:
        """Counts, index kind, bytes per vector, measured recall, state of each derived part."""


class Index(Protocol):
    """A collection that can change. What was added is visible after `publish`, all at once."""

    def snapshot(self) -> Snapshot:
        """The newest published state, also when another process published it."""

    def add(self, documents: Sequence[Document], encodings: Encodings) -> None:
        """Upsert; on disk when it returns. `document.image` is a Picture or None."""

    def remove(self, ids: Sequence[str]) -> int:
        """How many existed. Unknown ids are no error."""

    def publish(self) -> None: ...

    def close(self) -> None: ...


class Retriever(Protocol):
    """Queries to rankings. Retrievers compose, and their repr names them in reports."""

    def __call__(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[Ranking]:
        """One ranking per query."""


class Progress(Protocol):
    """Told by long work how far it is; a bar on a terminal, plain lines elsewhere, a job's state in the server."""

    def __call__(self, phase: str, done: int, total: int | None) -> None: ...
