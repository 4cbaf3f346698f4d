"""Queries to rankings, as values that compose: ``Reranked(Fused({"lexical": Lexical(s), ...}), ...)``.

A query may have several parts. Within a leg a document scores the weighted sum of what the parts
give it; only then are the legs fused. The repr of a retriever names it in reports.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from retrieval import analysis
from retrieval.filters import Filter
from retrieval.fusion import Method, Weights, fuse
from retrieval.types import (
    Encoder,
    Finding,
    FindingsScore,
    Hit,
    Item,
    Linker,
    Matrix,
    Part,
    Query,
    Ranking,
    Retriever,
    Scorer,
    Share,
    Side,
    Snapshot,
    Vector,
)

DEPTH = 1000  # each leg is fused to this depth, never a function of k, so that pages agree
RERANK_DEPTH = 100
TIE_WEIGHT = 1e-4  # what a cosine adds to a concept score: orders ties, reaches no real difference

stages: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Adds the milliseconds spent inside to the caller's `stages`, where it asked for them."""
    spent = stages.get()
    start = time.perf_counter()
    try:
        yield
    finally:
        if spent is not None:
            spent[stage] = spent.get(stage, 0.0) + (time.perf_counter() - start) * 1000


@dataclass(frozen=True)
class Lexical:
    """BM25 over title and text."""

    snapshot: Snapshot = field(repr=False)

    def __call__(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[Ranking]:
        parts = [part for query in queries for part in query.parts]
        with timed("search"):
            rankings = iter(self.snapshot.search_text([part.text for part in parts], k, where))
            return [_weighted_sum(query, [next(rankings) for _ in query.parts], k) for query in queries]


@dataclass(frozen=True)
class Dense:
    """Nearest vectors in one space: of texts only (`dense`), or of texts and pictures (`image`)."""

    snapshot: Snapshot = field(repr=False)
    encoder: Encoder = field(repr=False)
    sides: tuple[Side, ...] = ("text",)
    exact: bool = False

    def __call__(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[Ranking]:
        vectors = self.part_vectors(queries)
        simple = [i for i, found in enumerate(vectors) if _is_linear(found, self.sides)]
        out = [Ranking()] * len(queries)
        for i, ranking in zip(simple, self._search_sums([vectors[i] for i in simple], k, where), strict=True):
            out[i] = ranking
        for i in set(range(len(queries))) - set(simple):
            out[i] = self._search_parts(vectors[i], k, where)
        return out

    def part_vectors(self, queries: Sequence[Query]) -> list[list[tuple[float, Vector]]]:
        """Per query the (weight, vector) of every part that has or can be given one; one encoder call for all."""
        found: list[list[tuple[float, Vector | None]]] = []
        missing: list[Item] = []
        for query in queries:
            row: list[tuple[float, Vector | None]] = []
            for part in query.parts:
                vector = self._stored_vector(part)
                if vector is not None or not self._encodable(part):
                    row += [(part.weight, vector)] if vector is not None else []
                else:
                    row.append((part.weight, None))
                    missing.append(part)
            found.append(row)
        with timed("encode"):
            fresh = iter(self.encoder.encode_queries(missing)) if missing else iter(())
        return [[(weight, next(fresh) if vector is None else vector) for weight, vector in row] for row in found]

    def scores(self, query: Query, ids: Sequence[str]) -> dict[str, float]:
        """What this leg gives the documents named, whatever their rank."""
        totals = dict.fromkeys(ids, 0.0)
        for weight, vector in self.part_vectors([query])[0]:
            for id, score in self._best(vector, ids).items():
                totals[id] += weight * score
        return totals

    def _encodable(self, part: Part) -> bool:
        return not part.vectors and self.encoder.handles(part)

    def _stored_vector(self, part: Part) -> Vector | None:
        for side in reversed(self.sides):  # `image` prefers a stored document's picture to its text
            if (self.encoder.space, side) in part.vectors:
                return part.vectors[self.encoder.space, side]
        return next((v for (space, _), v in part.vectors.items() if space == self.encoder.space), None)

    def _search(self, vectors: Matrix, k: int, where: Filter | None) -> list[Ranking]:
        with timed("search"):
            return self.snapshot.search_vectors(self.encoder.space, vectors, k, where, self.sides, self.exact)

    def _search_sums(self, parts: list[list[tuple[float, Vector]]], k: int, where: Filter | None) -> list[Ranking]:
        """One side has one vector a document, so the weighted sum of parts is one inner product."""
        sums = [np.sum([w * v for w, v in row], axis=0, dtype=np.float32) if row else np.zeros(1) for row in parts]
        lengths = [float(np.linalg.norm(total)) for total in sums]
        asked = [i for i, length in enumerate(lengths) if length > 1e-6]
        out = [Ranking()] * len(parts)
        if asked:
            units = np.stack([sums[i] / lengths[i] for i in asked]).astype(np.float32)
            for i, ranking in zip(asked, self._search(units, k, where), strict=True):
                out[i] = ranking if abs(lengths[i] - 1) < 1e-6 else _scaled(ranking, lengths[i])
        return out

    def _search_parts(self, parts: list[tuple[float, Vector]], k: int, where: Filter | None) -> Ranking:
        """Documents with two vectors score each part by the better one: gather per part, then rescore.

        A document that no part returned scores at most what the last of each part allows; the
        answer is exact where the k-th hit is above that bound (Fagin's threshold).
        """
        signed = np.stack([v if w > 0 else -v for w, v in parts])
        rankings = self._search(signed, max(k, DEPTH), where)
        ids = sorted({hit.id for ranking in rankings for hit in ranking})
        totals = dict.fromkeys(ids, 0.0)
        for weight, vector in parts:
            for id, score in self._best(vector, ids).items():
                totals[id] += weight * score
        hits = [Hit(id, score) for id, score in sorted(totals.items(), key=lambda x: (-round(x[1], 6), x[0]))][:k]
        ends = [r[-1].score if len(r) >= max(k, DEPTH) else None for r in rankings]
        bound = sum(abs(w) * end if w > 0 else abs(w) for (w, _), end in zip(parts, ends, strict=True) if end)
        complete = not any(end is not None for end in ends)
        exact = all(r.exact for r in rankings) and (complete or (len(hits) == k and hits[-1].score >= bound))
        return Ranking(hits, exact, 1.0 if exact else min(r.recall for r in rankings))

    def _best(self, vector: Vector, ids: Sequence[str]) -> dict[str, float]:
        """Inner product with each document's better vector; documents without one are left out."""
        best: dict[str, float] = {}
        for side in self.sides:
            rows, matrix = self.snapshot.vectors(self.encoder.space, side, ids)
            for row, score in zip(rows.tolist(), (matrix @ vector).tolist(), strict=True):
                best[ids[row]] = max(score, best.get(ids[row], -np.inf))
        return best


@runtime_checkable
class Understanding(Protocol):
    """What a linker may tell besides: the share of a query that its findings make out."""

    def understood(self, text: str, findings: Sequence[Finding]) -> float: ...


@dataclass(frozen=True)
class Ontological:
    """Documents that say what the query says, by concept and assertion.

    Many documents share a concept score; a cosine of `ties` (where there is one) orders them,
    weighted so low that it never overturns a concept score.
    """

    snapshot: Snapshot = field(repr=False)
    linker: Linker = field(repr=False)
    score: FindingsScore = field(repr=False)
    ties: Dense | None = field(default=None, repr=False)

    def __call__(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[Ranking]:
        linked = self.linked(queries)
        depth = k if self.ties is None else max(k, DEPTH) * 4  # so that ties at the cut are ordered, too
        parts = [part for query in linked for part in query.parts]
        with timed("search"):
            rankings = iter(self.snapshot.search_findings(parts, depth, where, self.score))
        combined = [_weighted_sum(query, [next(rankings) for _ in query.parts], depth) for query in linked]
        return [self._ordered(query, ranking, k) for query, ranking in zip(linked, combined, strict=True)]

    def linked(self, queries: Sequence[Query]) -> list[Query]:
        """The queries with findings in every part that has text; a stored document keeps its own."""
        texts = [p.text for q in queries for p in q.parts if p.text and p.findings is None]
        with timed("encode"):
            found = iter(self.linker.link_queries(texts) if texts else ())

        def link(part: Part) -> Part:
            return replace(part, findings=next(found)) if part.text and part.findings is None else part

        return [replace(query, parts=tuple(link(part) for part in query.parts)) for query in queries]

    def understood(self, queries: Sequence[Query]) -> list[float]:
        """How far each query is understood, in [0, 1]: a power of the share, so that half of one counts little.

        Least of a few words, where a single one may be understood by chance; a report has prose besides its findings.
        """
        share = self.linker.understood if isinstance(self.linker, Understanding) else _covered

        def told(query: Query) -> float:
            power = 2 if query_kind(query) == "report" else 3
            return _mean([share(part.text, part.findings or ()) for part in query.parts if part.text]) ** power

        return [told(query) for query in self.linked(queries)]

    def _ordered(self, query: Query, ranking: Ranking, k: int) -> Ranking:
        if self.ties is None or len(ranking) < 2:
            return Ranking(ranking[:k], ranking.exact, ranking.recall)
        cosines = self.ties.scores(query, [hit.id for hit in ranking])
        hits = [Hit(hit.id, hit.score + TIE_WEIGHT * cosines[hit.id]) for hit in ranking]
        hits.sort(key=lambda hit: (-round(hit.score, 6), hit.id))
        return Ranking(hits[:k], ranking.exact, ranking.recall)


@dataclass(frozen=True)
class Fused:
    """Several legs, each to the same fixed depth, fused with weights that depend on the kind of query.

    weights: kind of query (`text`, `report`, `picture`) -> leg -> weight.
    """

    legs: Mapping[str, Retriever]
    weights: Mapping[str, Weights] = field(repr=False)
    method: Method = "minmax"
    depth: int = DEPTH

    def __call__(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[Ranking]:
        for retrieve in self.legs.values():
            if isinstance(retrieve, Ontological):
                queries = retrieve.linked(queries)  # once for all that follows
        rankings = {leg: retrieve(queries, self.depth, where) for leg, retrieve in self.legs.items()}
        understood = {leg: r.understood(queries) for leg, r in self.legs.items() if isinstance(r, Ontological)}
        with timed("fuse"):
            out = []
            for i, query in enumerate(queries):
                weights = dict(self.weights[query_kind(query)])
                for leg, shares in understood.items():
                    weights[leg] = weights.get(leg, 0.0) * shares[i]
                out.append(fuse({leg: rankings[leg][i] for leg in self.legs}, weights, k, self.method))
            return out


@dataclass(frozen=True)
class Reranked:
    """The best hits read again together with the query, by a cross-encoder.

    The first ranking keeps ``1 - weight`` of the score; documents below `depth` keep that alone.
    """

    first: Retriever
    scorer: Scorer = field(repr=False)
    snapshot: Snapshot = field(repr=False)
    leg: str = "first"  # what the first ranking is called in the parts, where it is a single leg
    weight: float = 0.5
    depth: int = RERANK_DEPTH

    def __call__(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[Ranking]:
        rankings = self.first(queries, max(k, self.depth), where)
        with timed("rerank"):
            return [self._rerank(query, ranking, k) for query, ranking in zip(queries, rankings, strict=True)]

    def _rerank(self, query: Query, ranking: Ranking, k: int) -> Ranking:
        text = " ".join(part.text for part in query.parts if part.text and part.weight > 0)
        if not text or not ranking:
            return Ranking(ranking[:k], ranking.exact, ranking.recall)
        documents = [d for d in self.snapshot.fetch([hit.id for hit in ranking[: self.depth]]) if d is not None]
        scores = self.scorer.score(Item(text=text), documents)
        read = Ranking(sorted((Hit(d.id, float(s)) for d, s in zip(documents, scores, strict=True)), key=_best_first))
        legs = {self.leg: ranking, "rerank": read}
        fused = fuse(legs, {self.leg: 1 - self.weight, "rerank": self.weight}, k)
        parts = {hit.id: hit.parts for hit in ranking}
        hits = (_opened(hit, self.leg, parts[hit.id]) for hit in fused)
        return Ranking(hits, ranking.exact, ranking.recall)


def query_kind(query: Query) -> str:
    """`picture` where a part has one or is a vector, else `report` where a part is one, else `text`."""
    if any(part.image is not None or (part.vectors and not part.text) for part in query.parts):
        return "picture"
    return "report" if any(part.kind == "report" for part in query.parts) else "text"


def _is_linear(parts: Sequence[tuple[float, Vector]], sides: Sequence[Side]) -> bool:
    return len(sides) == 1 or (len(parts) < 2 and all(weight > 0 for weight, _ in parts))


def _best_first(hit: Hit) -> tuple[float, str]:
    return -round(hit.score, 6), hit.id


def _scaled(ranking: Ranking, factor: float) -> Ranking:
    return Ranking((Hit(hit.id, hit.score * factor) for hit in ranking), ranking.exact, ranking.recall)


def _weighted_sum(query: Query, rankings: Sequence[Ranking], k: int) -> Ranking:
    """One leg's ranking of a query from its parts'; a document that a part did not return gets 0 from it."""
    if len(rankings) == 1 and query.parts[0].weight == 1:
        return rankings[0]
    totals: dict[str, float] = {}
    for part, ranking in zip(query.parts, rankings, strict=True):
        for hit in ranking:
            totals[hit.id] = totals.get(hit.id, 0.0) + part.weight * hit.score
    hits = sorted((Hit(id, score) for id, score in totals.items()), key=_best_first)[:k]
    complete = all(len(ranking) < k for ranking in rankings)  # nothing was cut, so no sum lacks a term
    exact = complete and all(ranking.exact for ranking in rankings)
    return Ranking(hits, exact, min((ranking.recall for ranking in rankings), default=1.0))


def _covered(text: str, findings: Sequence[Finding]) -> float:
    """Share of the words that lie inside mentions; a negation belongs to the mention that it denies."""
    words = [(start, end) for token, start, end in analysis.spans(text) if token not in analysis.NEGATIONS]
    return _mean([any(f.span[0] <= start and end <= f.span[1] for f in findings) for start, end in words])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0


def _opened(hit: Hit, leg: str, first: Mapping[str, Share]) -> Hit:
    """The first stage's share, told as the shares of its legs, so that all parts still add up to the score."""
    if not first:
        return hit
    shares = dict(hit.parts)
    whole = shares.pop(leg)
    total = sum(share.weight * share.normalised for share in first.values())
    scale = whole.weight * whole.normalised / total if total else 0.0
    opened = {leg: share._replace(weight=share.weight * scale) for leg, share in first.items()}
    return hit._replace(parts=opened | shares)
