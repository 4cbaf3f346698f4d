"""One published state of a collection on Elasticsearch, and the searches over it.

A point in time holds what is seen, so pages stay what they were while others write. Where the cluster lets go of
one, the same state is opened again, as long as nothing was published over it.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexers.elastic import Cluster, Lost
from indexers.elastic_documents import (
    KINDS,
    ORIGINAL,
    SLOTS,
    Json,
    Key,
    document_of,
    documents,
    filtered,
    inner_products,
    keys_of,
    known,
    spec_of,
    vector_field,
    vectors_of,
    words,
)
from indexers.rows import ranked
from indexers.scan import TIE
from retrieval import analysis
from retrieval.errors import Conflict, Gone, Invalid, NotFound
from retrieval.filters import Filter, kind, lookup
from retrieval.types import (
    Assertion,
    Document,
    Encoded,
    FindingsScore,
    Matrix,
    Part,
    Ranking,
    Side,
    SpaceInfo,
)

BM25_FACTOR = 2.2  # k1 + 1, which Elasticsearch keeps and Lucene dropped
MOST = 10_000  # hits of one request, and candidates of a nearest-neighbour search
_SLACK = 16  # fetched beyond k, so that most ties at the cut are seen at once
_EXACT_PART = 5_000  # documents that one request searches exactly; Lucene scans what is fewer than its candidates
_LOOKED_UP = 1_000  # documents of one request


@dataclass(eq=False)
class ElasticSnapshot:
    """Implements `retrieval.types.Snapshot`. Immutable and thread-safe."""

    cluster: Cluster
    index: str
    generation: int
    sequence: int
    spaces: Mapping[str, SpaceInfo]
    config: Mapping[str, Any]
    vector_index: str
    recalls: Mapping[str, float]
    pictures: Path | None  # where rendered pictures are kept on this machine
    reopened: Callable[[], bool]  # is this state still the newest of its index?
    candidates: int = 100  # of a graph search, at least: the queue that walks the graph is as long
    _pit: list[str] = field(default_factory=list, repr=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _documents: int = 0

    def __post_init__(self) -> None:
        self._spec = spec_of(self.vector_index)
        self._pit.append(self.cluster.open(self.index))
        weakref.finalize(self, _forget, self.cluster, self._pit).atexit = False
        aggregations = {vector_field(key): {"filter": {"exists": {"field": vector_field(key)}}} for key in self._keys}
        answer = self._search([self._counting(None) | {"aggs": aggregations}])[0]
        self._documents = answer["hits"]["total"]["value"]
        found = {key: int(answer["aggregations"][vector_field(key)]["doc_count"]) for key in self._keys}
        self.sides: Mapping[Key, int] = found

    @cached_property
    def _keys(self) -> list[Key]:
        return keys_of(self.spaces)

    def __len__(self) -> int:
        return self._documents

    def _search(self, bodies: Sequence[Json], global_idf: bool = False) -> list[Json]:
        if not bodies:
            return []
        pit = self._pit[0]
        try:
            return self.cluster.search(pit, bodies, global_idf)
        except Lost:
            self._open_again(pit)
        try:
            return self.cluster.search(self._pit[0], bodies, global_idf)
        except Lost as error:
            raise _gone() from error

    def _open_again(self, lost: str) -> None:
        with self._guard:
            if self._pit[0] == lost:
                if not self.reopened():
                    raise _gone()
                self._pit[0] = self.cluster.open(self.index)

    # --- looking up ------------------------------------------------------------------------------

    def fetch(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None for unknown ids."""
        found = {hit["_id"]: document_of(hit["_source"]) for hit in self._named(ids, {"_source": ORIGINAL})}
        return [found.get(id) for id in ids]

    def image(self, id: str) -> bytes | None:
        """The rendered picture (PNG), where this machine keeps it; None elsewhere."""
        for hit in self._named([id], {"_source": ["picture"]}):
            digest = hit["_source"].get("picture")
            path = picture_path(self.pictures, digest) if digest is not None and self.pictures is not None else None
            return path.read_bytes() if path is not None and path.is_file() else None
        return None

    def sample(self, n: int) -> list[str]:
        """Up to `n` ids, spread over the collection, the same ones for the same state."""
        found = self._scan({"query": documents(None)}, "slot", n)
        return [hit["sort"][1] for hit in found]

    def values(self, field: str, ids: Sequence[str]) -> list[Any]:
        """None, the value, or a list where there are several, of one kind in ascending order."""
        found = {h["_id"]: document_of(_whole(h["_source"])).meta for h in self._named(ids, {"_source": ["meta"]})}
        return [_value(lookup(found[id], field)) if id in found else None for id in ids]

    def count(self, where: Filter | None = None) -> int:
        if where is None:
            return len(self)
        return int(self._search([self._counting(where)])[0]["hits"]["total"]["value"])

    def select(self, where: Filter) -> list[str]:
        return [hit["sort"][0] for hit in self._scan({"query": documents(where)})]

    def vectors(self, space: str, side: Side, ids: Sequence[str]) -> Encoded:
        """Stored vectors of those `ids` that have one; `rows` index into `ids`."""
        info = self._space(space)
        key = (space, side)
        hits = self._named(ids, {"_source": [vector_field(key)]})
        found = {hit["_id"]: vectors_of(hit["_source"], [key]).get(key) for hit in hits}
        held = [(row, vector) for row, id in enumerate(ids) if (vector := found.get(id)) is not None]
        matrix = np.stack([vector for _, vector in held]) if held else np.zeros((0, info.dim), np.float32)
        return Encoded(np.array([row for row, _ in held], np.int64), matrix)

    def entries(self) -> Iterator[list[Json]]:
        """All entries, whole, by ascending id, a few hundred at a time."""
        asked = {"query": documents(None), "_source": True, "seq_no_primary_term": True}
        yield from self._pages(asked, "id", 256)

    def stamps(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(id, version) of all documents; a version changes whenever a document is written."""
        asked = {"query": documents(None), "_source": False, "seq_no_primary_term": True}
        return ((hit["sort"][0], stamp_of(hit)) for page in self._pages(asked, "id", MOST) for hit in page)

    def named_entries(self, ids: Sequence[str]) -> list[Json]:
        """As `entries`, for some ids."""
        return list(self._named(ids, {"_source": True}))

    def _named(self, ids: Sequence[str], asked: Json) -> Iterator[Json]:
        wanted = known(ids)
        for start in range(0, len(wanted), _LOOKED_UP):
            some = wanted[start : start + _LOOKED_UP]
            body = {"query": {"ids": {"values": some}}, "size": len(some), "track_total_hits": False, **asked}
            yield from self._search([body])[0]["hits"]["hits"]

    def _counting(self, where: Filter | None) -> Json:
        return {"query": documents(where), "size": 0, "track_total_hits": True}

    def _scan(self, asked: Json, order: str = "id", most: int | None = None) -> Iterator[Json]:
        """Hits without content, in order, over as many requests as it takes."""
        bare = {"_source": False, "stored_fields": "_none_", **asked}
        left = len(self) if most is None else most
        for page in self._pages(bare, order, min(MOST, max(1, left))):
            yield from page[:left]
            left -= len(page)
            if left <= 0:
                return

    def _pages(self, asked: Json, order: str, size: int) -> Iterator[list[Json]]:
        sort = [{"id": "asc"}] if order == "id" else [{order: "asc"}, {"id": "asc"}]
        body: Json = {"size": size, "sort": sort, "track_total_hits": False, **asked}
        while page := self._search([body])[0]["hits"]["hits"]:
            yield page
            if len(page) < size:
                return
            body = {**body, "search_after": page[-1]["sort"][: len(sort)]}

    # --- searching by words and vectors ----------------------------------------------------------

    def search_text(self, texts: Sequence[str], k: int, where: Filter | None = None) -> list[Ranking]:
        """BM25 over the tokens of title and text."""
        _check_k(k)
        counts = [Counter(analysis.tokens(text)) for text in texts]
        bodies = {n: {"query": words(found, where)} for n, found in enumerate(counts) if found}
        hits = self._best(bodies, k, lambda body, _: body, global_idf=True)
        return [
            _ranking(ids, scores / BM25_FACTOR, k) for ids, scores in (hits.get(n, _NONE) for n in range(len(texts)))
        ]

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
        _check_k(k)
        queries = self._queries(space, vectors)
        keys = [(space, side) for side in dict.fromkeys(sides) if self.sides.get((space, side))]
        plan = self._plan(keys, where, exact)
        bodies: dict[Any, Json] = {
            (n, key, part): {
                "field": vector_field(key),
                "query_vector": query.tolist(),
                "filter": [*filtered(where), *only],
            }
            for n, query in enumerate(queries)
            for key in keys
            for part, only in enumerate(plan.parts)
        }
        found = self._best(bodies, k, plan.body)
        recall = min((self.recalls.get("/".join(key), 1.0) for key in keys), default=1.0)
        return [
            _best_of([found[n, key, part] for key in keys for part in range(len(plan.parts))], k, plan.exact, recall)
            for n in range(len(queries))
        ]

    def _plan(self, keys: Sequence[Key], where: Filter | None, exact: bool) -> _Nearest:
        """How to ask: `flat` fields are always exact; others where few are let through, or part by part on request."""
        oversample = KINDS[self._spec.kind][1]
        if self._spec.kind == "flat" or not keys:
            return _Nearest(True)
        most = max(self.sides[key] for key in keys)
        few = most if where is None else self.count(where)
        if few <= _EXACT_PART:
            return _Nearest(True, few, oversample)
        if not exact:
            return _Nearest(False, self.candidates, oversample)
        count = -(-few // _EXACT_PART)
        bounds = [SLOTS * n // count for n in range(count + 1)]
        parts = [[{"range": {"slot": {"gte": a, "lt": b}}}] for a, b in pairwise(bounds)]
        return _Nearest(True, 2 * _EXACT_PART, oversample, parts)

    def _best(
        self, bodies: Mapping[Any, Json], k: int, made: Callable[[Json, int], Json], global_idf: bool = False
    ) -> dict[Any, tuple[list[str], NDArray[np.float64]]]:
        """Ids and scores of each, best first, with everything that is tied with the k-th (up to MOST hits)."""
        out: dict[Any, tuple[list[str], NDArray[np.float64]]] = {}
        todo, size = list(bodies), min(k + _SLACK, MOST)
        while todo:
            asked = [{**_BARE, "size": size, **made(bodies[name], size)} for name in todo]
            for name, answer in zip(todo, self._search(asked, global_idf), strict=True):
                hits = answer["hits"]["hits"]
                scores = np.array([hit["sort"][0] for hit in hits], np.float64)
                out[name] = [hit["sort"][1] for hit in hits], scores
            todo = [name for name in todo if _is_cut(out[name][1], k, size)]
            size = min(4 * size, MOST)
        return out

    def _queries(self, space: str, vectors: Matrix) -> Matrix:
        info = self._space(space)
        queries = np.ascontiguousarray(vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != info.dim:
            raise Conflict(f"got vectors of shape {queries.shape}, space '{space}' has (Q, {info.dim})")
        if not np.isfinite(queries).all():
            raise Invalid(f"got vectors that are not finite for space '{space}'")
        return queries

    def _space(self, space: str) -> SpaceInfo:
        if space not in self.spaces:
            raise NotFound(f"no space '{space}' in this collection, it has {', '.join(self.spaces) or 'none'}")
        return self.spaces[space]

    # --- searching by findings -------------------------------------------------------------------

    def search_findings(
        self, parts: Sequence[Part], k: int, where: Filter | None, score: FindingsScore
    ) -> list[Ranking]:
        """`score` of every document that can score at all, from its concept tokens; 0 is no hit."""
        _check_k(k)
        return [self._findings(part, k, where, score) for part in parts]

    def _findings(self, part: Part, k: int, where: Filter | None, score: FindingsScore) -> Ranking:
        wanted = self._telling(part, score)
        if not wanted:
            return Ranking()
        query = {"bool": {"filter": [{"terms": {"concepts": wanted}}, *filtered(where)]}}
        hits = list(self._scan({"query": query, "docvalue_fields": ["concepts"]}))
        scores = score(part, Held([hit["fields"]["concepts"] for hit in hits])).astype(np.float64)
        rows = np.flatnonzero(scores > 0)
        return Ranking(ranked(scores[rows], rows, k, [hit["sort"][0] for hit in hits]))

    def _telling(self, part: Part, score: FindingsScore) -> list[str]:
        """The concept tokens that can make a document score: those that do so alone, for one concept of the query.

        So nothing is fetched that cannot match, whatever the measure knows of concepts above and below.
        """
        tokens, alone = self._vocabulary
        found = np.zeros(len(tokens), bool)
        findings = part.findings or ()
        for concept in dict.fromkeys(finding.concept for finding in findings):
            these = tuple(finding for finding in findings if finding.concept == concept)
            found |= score(Part(kind=part.kind, findings=these), alone) > 0
        return [token for token, tells in zip(tokens, found.tolist(), strict=True) if tells]

    @cached_property
    def _vocabulary(self) -> tuple[list[str], Held]:
        """Every concept token that occurs, and a made-up document for each that holds only it."""
        tokens: list[str] = []
        source = [{"token": {"terms": {"field": "concepts"}}}]
        asked: Json = {"size": MOST, "sources": source}
        while True:
            body = {"size": 0, "track_total_hits": False, "aggs": {"tokens": {"composite": asked}}}
            answer = self._search([body])[0]["aggregations"]["tokens"]
            tokens += [bucket["key"]["token"] for bucket in answer["buckets"]]
            if len(answer["buckets"]) < MOST:
                return tokens, Held([[token] for token in tokens])
            asked = {**asked, "after": answer["after_key"]}

    # --- describing ------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Counts, index kind, bytes per vector, measured recall, health."""
        spaces = {
            name: {
                "dim": info.dim,
                "digests": dict(info.digests),
                "sides": {side: self._described((space, side)) for space, side in self.sides if space == name},
            }
            for name, info in self.spaces.items()
        }
        return {
            "documents": len(self),
            "generation": self.generation,
            "sequence": self.sequence,
            "vector_index": self.vector_index,
            "spaces": spaces,
            "parts": {"cluster": self.cluster.health(self.index)},
            "backend": self.cluster.url,
        }

    def _described(self, key: Key) -> dict[str, Any]:
        return {
            "vectors": self.sides[key],
            "kind": self.vector_index,
            "bytes_per_vector": round(bytes_per_vector(self._spec.kind, self.spaces[key[0]].dim), 1),
            "recall": self.recalls.get("/".join(key), 1.0),
        }


_BARE: Json = {
    "_source": False,
    "stored_fields": "_none_",
    "track_total_hits": False,
    "sort": [{"_score": "desc"}, {"id": "asc"}],
}
_NONE: tuple[list[str], NDArray[np.float64]] = ([], np.empty(0))


class _Nearest:
    """How nearest neighbours are asked for.

    candidates: at least so many; where no more vectors are let through, Lucene compares them all. oversample:
    candidates per result that are compared again on float32 vectors. parts: filters that share out the collection.
    """

    def __init__(
        self, exact: bool, candidates: int = 0, oversample: float = 0.0, parts: Sequence[Sequence[Json]] = ((),)
    ) -> None:
        self.exact, self.candidates, self.oversample, self.parts = exact, candidates, oversample, parts

    def body(self, asked: Json, size: int) -> Json:
        candidates = min(max(self.candidates + 1, size if self.exact else int(1.5 * size)), MOST)
        knn = {**asked, "k": min(size, candidates), "num_candidates": candidates}
        if self.oversample:
            rescored = self.candidates if self.exact else self.oversample * size
            most = max(1.0, min(rescored, MOST) / size)
            knn["rescore_vector"] = {"oversample": most}
        return {"knn": knn}


class Held:
    """Implements `retrieval.types.Postings` over the concept tokens of some documents."""

    def __init__(self, tokens: Sequence[Iterable[str]]) -> None:
        self.size = len(tokens)
        held: dict[tuple[str, Assertion], list[int]] = {}
        for row, some in enumerate(tokens):
            for token in some:
                says, _, concept = token.partition(":")
                held.setdefault((concept, Assertion(says)), []).append(row)
        self._rows = {key: np.array(rows, np.int32) for key, rows in held.items()}

    def concepts(self) -> Iterable[tuple[str, Assertion]]:
        return self._rows

    def rows(self, concept: str, assertion: Assertion) -> NDArray[np.int32]:
        return self._rows.get((concept, assertion), np.empty(0, np.int32))


def bytes_per_vector(kind: str, dim: int) -> float:
    """What must be in memory for fast search: the codes of the kind; links of the graph come on top."""
    return {"flat": 4.0 * dim, "hnsw": 4.0 * dim, "hnsw-sq8": dim + 4.0, "hnsw-sq4": dim / 2 + 4.0}.get(
        kind, dim / 8 + 14.0
    )


def picture_path(folder: Path, digest: str) -> Path:
    name = hashlib.sha256(digest.encode()).hexdigest()[:40]
    return folder / name[:2] / f"{name}.png"


def stamp_of(hit: Json) -> tuple[int, int]:
    return int(hit["_primary_term"]), int(hit["_seq_no"])


def _ranking(
    ids: Sequence[str], scores: NDArray[np.float64], k: int, exact: bool = True, recall: float = 1.0
) -> Ranking:
    return Ranking(ranked(scores, np.arange(len(ids)), k, ids), exact, 1.0 if exact else recall)


def _best_of(found: Sequence[tuple[list[str], NDArray[np.float64]]], k: int, exact: bool, recall: float) -> Ranking:
    """One ranking of several over the same documents: each by its best score."""
    best: dict[str, float] = {}
    for ids, scores in found:
        for id, score in zip(ids, inner_products(scores).tolist(), strict=True):
            if score > best.get(id, -np.inf):
                best[id] = score
    return _ranking(list(best), np.array(list(best.values()), np.float64), k, exact, recall)


def _is_cut(scores: NDArray[np.float64], k: int, size: int) -> bool:
    """There may be more hits that are tied with the k-th."""
    return size < MOST and len(scores) == size and bool(scores[k - 1] - scores[-1] <= 4 * TIE)


def _value(found: Sequence[Any]) -> Any:
    """The values of one field as `indexers.columns` gives them."""
    by_kind: dict[str, set[Any]] = {}
    for value in found:
        if value == value:
            by_kind.setdefault(kind(value), set()).add(value)
    joined = [value for values in by_kind.values() for value in sorted(values)]
    return joined if len(joined) > 1 else joined[0] if joined else None


def _whole(source: Json) -> Json:
    """A source of which only the metadata were asked for."""
    return {"id": "", "title": "", "text": "", "findings": "[]", "picture": None, "path": None} | source


def _forget(cluster: Cluster, pit: Sequence[str]) -> None:
    if pit:
        cluster.let_go(pit[0])


def _gone() -> Gone:
    return Gone("the state of the collection that was asked for is no longer kept; search again", "cursor")


def _check_k(k: int) -> None:
    if k < 1:
        raise Invalid(f"k: got {k}, expected at least 1", "k")
