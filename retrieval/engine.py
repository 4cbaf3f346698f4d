"""The assembled parts of one collection, and its few verbs: search, run, add, remove."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar
from urllib.parse import quote

import numpy as np

from retrieval import confidence, filters, pages
from retrieval.answers import counts, distinct_words, grouped, highlights, shares
from retrieval.confidence import Calibrations
from retrieval.errors import Conflict, InputError, Invalid, NotFound, RetrievalError
from retrieval.filters import Filter
from retrieval.fusion import Method
from retrieval.pages import Cursor, Shelf
from retrieval.request import FIELDS, Answer, Request, RequestPart, check, fingerprint
from retrieval.retrievers import DEPTH, Dense, Fused, Lexical, Ontological, Reranked, query_kind, stages, timed
from retrieval.types import (
    Assertion,
    Document,
    Encoder,
    FindingsScore,
    Hit,
    ImageSource,
    Index,
    Item,
    Linker,
    Matrix,
    Part,
    Picture,
    Prepare,
    Query,
    Ranking,
    Rejected,
    Retriever,
    Run,
    Scorer,
    Side,
    Snapshot,
    Vector,
)

P = ParamSpec("P")
T = TypeVar("T")

LEGS = ("lexical", "dense", "image", "ontology")
RUN_BATCH = 64
ADD_BATCH = 256


class Parts(NamedTuple):
    """What a collection is assembled from. `encoders` are by space; `image_space` is where `image` searches."""

    encoders: Mapping[str, Encoder]
    image_space: str | None
    read_picture: Callable[[ImageSource], Picture]
    prepare: Prepare
    weights: Mapping[str, Mapping[str, float]]  # kind of query -> leg -> weight
    linker: Linker | None = None
    findings_score: FindingsScore | None = None
    scorer: Scorer | None = None
    calibrations: Calibrations = MappingProxyType({})
    wordings: Wordings | None = None  # how words ask for pictures


class Wordings(Protocol):
    """Joins the vectors of queries in words by what else they could say; see `encoders.prompts`."""

    def joined(self, items: Sequence[Item], vectors: Matrix) -> Matrix: ...


class _Plan(NamedTuple):
    """A request made ready: what to rank, by whom, on which snapshot, and where the page starts."""

    engine: Engine  # another than the one asked where a cursor is older than what was learned since
    request: Request
    query: Query
    where: Filter | None
    snapshot: Snapshot
    offset: int
    fingerprint: str


@dataclass(eq=False)
class Engine:
    """One collection, ready to answer. Thread-safe: searches share nothing but the index and the shelf."""

    name: str
    index: Index
    parts: Parts
    shelf: Shelf[Engine] = field(default_factory=Shelf, repr=False)

    # --- verbs -----------------------------------------------------------------------------------

    def search(self, request: Request) -> Answer:
        """One answer, or the error that it ends in."""
        answer = self.search_many([request])[0]
        if isinstance(answer, RetrievalError):
            raise answer
        return answer

    def search_many(self, requests: Sequence[Request]) -> list[Answer | RetrievalError]:
        """One answer or one error each. Queries are encoded together, and ranked together where they can be."""
        start = time.perf_counter()
        spent: dict[str, float] = {}
        token = stages.set(spent)
        try:
            plans = [_caught(self._plan, request) for request in requests]
            ready = self._with_vectors([plan for plan in plans if isinstance(plan, _Plan)])
            ranked = zip(ready, self._rank(ready), strict=True)
            answers = iter([plan.engine._answered(plan, result) for plan, result in ranked])
            out = [next(answers) if isinstance(plan, _Plan) else plan for plan in plans]
        finally:
            stages.reset(token)
        took = {stage: round(spent.get(stage, 0.0), 3) for stage in ("encode", "search", "fuse", "rerank", "fetch")}
        took["total"] = round((time.perf_counter() - start) * 1000, 3)
        for answer in out:
            if isinstance(answer, dict):
                answer["took_ms"] = took
        return out

    def run(
        self,
        queries: Sequence[Query],
        retriever: str,
        k: int = DEPTH,
        weights: Mapping[str, float] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Run:
        """Rankings of many queries by query id, for evaluation: the same path that a search takes."""
        snapshot = self.snapshot()
        retrieve = self.retriever(retriever, snapshot, weights=weights)
        run: Run = {}
        for start in range(0, len(queries), RUN_BATCH):
            batch = self.encoded(queries[start : start + RUN_BATCH], snapshot)
            for query, ranking in zip(batch, retrieve(batch, k), strict=True):
                run[query.id] = ranking
            if progress is not None:
                progress(len(run))
        return run

    def add(self, documents: Sequence[Document]) -> list[Rejected]:
        """Upserts and publishes; returns what was refused and why. The rest is on disk."""
        rejected: list[Rejected] = []
        for start in range(0, len(documents), ADD_BATCH):
            prepared = self.parts.prepare(documents[start : start + ADD_BATCH])
            self.index.add(prepared.documents, prepared.encodings)
            rejected += prepared.rejected
        self.index.publish()
        return rejected

    def remove(self, ids: Sequence[str]) -> int:
        """Removes and publishes; returns how many there were."""
        removed = self.index.remove(ids)
        self.index.publish()
        return removed

    def close(self) -> None:
        self.index.close()

    # --- retrievers ------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The newest published state, refused where its vectors were made by other encoders than ours."""
        snapshot = self.index.snapshot()
        for space, encoder in self.parts.encoders.items():
            if space in snapshot.spaces and dict(snapshot.spaces[space].digests) != dict(encoder.digests):
                raise Conflict(
                    f"collection {self.name}: its vectors in space '{space}' were made by another encoder "
                    "(weights, prompt, pooling or resize differ); index it again, or use the encoder it was built with"
                )
        return snapshot

    def legs(self) -> tuple[str, ...]:
        """The legs that this collection can answer with."""
        can = {
            "lexical": True,
            "dense": "text" in self.parts.encoders,
            "image": self.parts.image_space is not None,
            "ontology": self.parts.linker is not None and self.parts.findings_score is not None,
        }
        return tuple(leg for leg in LEGS if can[leg])

    def retriever(
        self,
        name: str,
        snapshot: Snapshot,
        method: Method = "minmax",
        weights: Mapping[str, float] | None = None,
        exact: bool = False,
    ) -> Retriever:
        """`lexical`, `dense`, `image`, `ontology`, `hybrid`, and any of them with `+rerank`."""
        base, plus, rerank = name.partition("+")
        have = self.legs()
        if (base != "hybrid" and base not in have) or (plus and rerank != "rerank"):
            names = ", ".join((*have, "hybrid"))
            raise Invalid(f"retriever: got '{name}', this collection has {names}, each also with +rerank", "retriever")
        if unknown := set(weights or ()) - set(have):
            raise Invalid(
                f"fusion.weights: no leg '{min(unknown)}', this collection has {', '.join(have)}", "fusion.weights"
            )
        if base == "hybrid":
            legs = [leg for leg in have if leg != "image" or self.has_pictures(snapshot)]
            by_kind = dict.fromkeys(self.parts.weights, weights) if weights else self.parts.weights
            first: Retriever = Fused({leg: self._leg(leg, snapshot, exact) for leg in legs}, by_kind, method)
        else:
            first = self._leg(base, snapshot, exact)
        if not plus:
            return first
        if self.parts.scorer is None:
            raise Invalid(
                f"retriever: '{name}' needs a reranker and this collection has none; index it with --reranker",
                "retriever",
            )
        return Reranked(first, self.parts.scorer, snapshot, leg=base)

    def _leg(self, leg: str, snapshot: Snapshot, exact: bool) -> Retriever:
        encoders = self.parts.encoders
        if leg == "lexical":
            return Lexical(snapshot)
        if leg == "dense":
            return Dense(snapshot, encoders["text"], ("text",), exact)
        if leg == "image":
            return Dense(snapshot, encoders[self.parts.image_space or ""], ("text", "image"), exact)
        if self.parts.linker is None or self.parts.findings_score is None:
            raise ValueError(leg)  # `retriever` lets only the legs through that there are
        ties = Dense(snapshot, encoders["text"]) if "text" in encoders else None
        return Ontological(snapshot, self.parts.linker, self.parts.findings_score, ties)

    def has_pictures(self, snapshot: Snapshot) -> bool:
        """Whether `image` would find more than `dense` does."""
        return snapshot.sides.get((self.parts.image_space or "", "image"), 0) > 0

    # --- from request to plan --------------------------------------------------------------------

    @cached_property
    def _learned(self) -> str:
        """Equal for engines that rank and judge alike."""
        parts = self.parts
        digests = [(space, sorted(encoder.digests.items())) for space, encoder in parts.encoders.items()]
        return pages.fingerprint(parts.weights, parts.calibrations, digests)

    def _plan(self, request: Request) -> _Plan:
        where = filters.parse(request.where)
        check(request)
        print_ = fingerprint(request, where)
        if request.cursor is None:
            latest = self.snapshot()
            self.shelf.keep(latest, self, self._learned)
            return self._planned(request, where, latest, 0, print_)
        cursor = Cursor.decode(request.cursor, print_)
        snapshot, engine = self.shelf.find(cursor)
        return engine._planned(request, where, snapshot, cursor.offset, print_)

    def _planned(self, request: Request, where: Filter | None, snapshot: Snapshot, offset: int, print_: str) -> _Plan:
        parts = [self._part(part, i, snapshot) for i, part in enumerate(request.query)]
        query = Query(parts=tuple(part for part in parts if part.weight))
        return _Plan(self, request, query, where, snapshot, offset, print_)

    def _part(self, part: RequestPart, position: int, snapshot: Snapshot) -> Part:
        path = f"query[{position}]"
        named = [n for n in ("text", "report", "image", "id", "vector") if getattr(part, n) is not None]
        if len(named) != 1:
            raise Invalid(
                f"{path}: got {named or 'nothing'}, expected exactly one of text, report, image, id, vector", path
            )
        if not np.isfinite(part.weight):
            raise Invalid(f"{path}.weight: got {part.weight}, expected a finite number", f"{path}.weight")
        if part.text is not None:
            return Part(text=part.text, weight=part.weight)
        if part.report is not None:
            return Part(text=part.report, kind="report", weight=part.weight)
        if part.image is not None:
            return self._picture(part, path)
        if part.vector is not None:
            return Part(vectors=self._raw(part.vector, path), weight=part.weight)
        return self._stored(part.id or "", part.weight, path, snapshot)

    def _picture(self, part: RequestPart, path: str) -> Part:
        if self.parts.image_space is None:
            raise Invalid(
                f"{path}.image: this collection has no image encoder; index it with --image-encoder", f"{path}.image"
            )
        try:
            return Part(image=self.parts.read_picture(part.image or b""), weight=part.weight)
        except InputError as error:
            error.field = f"{path}.image"
            raise

    def _raw(self, values: Sequence[float], path: str) -> dict[tuple[str, Side], Vector]:
        vector = np.asarray(values, np.float32)
        length = float(np.linalg.norm(vector))
        if vector.ndim != 1 or not np.isfinite(length) or length == 0:
            raise Invalid(f"{path}.vector: expected a list of finite numbers, not all zero", f"{path}.vector")
        fitting = [space for space, encoder in self.parts.encoders.items() if encoder.dim == len(vector)]
        if not fitting:
            dims = ", ".join(f"{space} {encoder.dim}" for space, encoder in self.parts.encoders.items())
            raise Conflict(
                f"{path}.vector: got {len(vector)} dimensions, this collection has {dims or 'no vectors'}",
                f"{path}.vector",
            )
        return {(space, "text"): vector / np.float32(length) for space in fitting}

    def _stored(self, id: str, weight: float, path: str, snapshot: Snapshot) -> Part:
        """A stored document as a query: its words, its findings and its vectors, nothing encoded again."""
        document = snapshot.fetch([id])[0]
        if document is None:
            raise NotFound(f"{path}.id: no document '{id[:80]}' in collection {self.name}", f"{path}.id")
        vectors: dict[tuple[str, Side], Vector] = {}
        for space, encoder in self.parts.encoders.items():
            for side in encoder.digests:
                rows, matrix = snapshot.vectors(space, side, [id])
                if len(rows):
                    vectors[space, side] = encoder.as_queries(side, matrix[:1])[0]
        return Part(
            id=id, text=document.content, kind="report", weight=weight, findings=document.findings, vectors=vectors
        )

    # --- from plan to answer ---------------------------------------------------------------------

    def _with_vectors(self, plans: Sequence[_Plan]) -> list[_Plan]:
        out = list(plans)
        for engine in dict.fromkeys(plan.engine for plan in plans):
            mine = [i for i, plan in enumerate(plans) if plan.engine is engine]
            made = engine.encoded([plans[i].query for i in mine], plans[mine[0]].snapshot)
            for i, query in zip(mine, made, strict=True):
                out[i] = plans[i]._replace(query=query)
        return out

    def encoded(self, queries: Sequence[Query], snapshot: Snapshot) -> list[Query]:
        """Every part encoded once per space, all queries in one call, whichever legs will use the vectors.

        Where there are pictures, words ask for them by a vector of their own: in all wordings of a finding.
        """
        parts = [part for query in queries for part in query.parts]
        vectors: list[dict[tuple[str, Side], Vector]] = [dict(part.vectors) for part in parts]
        wordings = self.parts.wordings if self.has_pictures(snapshot) else None
        with timed("encode"):
            for space, encoder in self.parts.encoders.items():
                todo = [i for i, part in enumerate(parts) if not part.vectors and encoder.handles(part)]
                if not todo:
                    continue
                items = [parts[i] for i in todo]
                fresh = encoder.encode_queries(items)
                asking = wordings.joined(items, fresh) if wordings and space == self.parts.image_space else fresh
                for i, vector, picture in zip(todo, fresh, asking, strict=True):
                    if parts[i].image is None:
                        vectors[i][space, "text"] = vector
                    if parts[i].image is not None or asking is not fresh:
                        vectors[i][space, "image"] = picture
        ready = iter(replace(part, vectors=found) for part, found in zip(parts, vectors, strict=True))
        return [replace(query, parts=tuple(next(ready) for _ in query.parts)) for query in queries]

    def _rank(self, plans: Sequence[_Plan]) -> list[Ranking | RetrievalError]:
        groups: dict[Any, list[int]] = {}
        for i, plan in enumerate(plans):
            r = plan.request
            weights = tuple(sorted((r.weights or {}).items()))
            alike = (r.retriever, plan.where, r.method, weights, r.exact, id(plan.snapshot), plan.engine)
            groups.setdefault(alike, []).append(i)
        out: list[Ranking | RetrievalError] = [Ranking()] * len(plans)
        for members in groups.values():
            plan = plans[members[0]]
            rankings = _caught(plan.engine._rank_alike, plan, [plans[i].query for i in members])
            for n, i in enumerate(members):
                out[i] = rankings if isinstance(rankings, RetrievalError) else rankings[n]
        return out

    def _rank_alike(self, plan: _Plan, queries: Sequence[Query]) -> list[Ranking]:
        r = plan.request
        retrieve = self.retriever(r.retriever, plan.snapshot, r.method, r.weights, r.exact)
        return retrieve(queries, DEPTH, plan.where)

    def _answered(self, plan: _Plan, ranking: Ranking | RetrievalError) -> Answer | RetrievalError:
        return ranking if isinstance(ranking, RetrievalError) else _caught(self._answer, plan, ranking)

    def _answer(self, plan: _Plan, ranking: Ranking) -> Answer:
        request, snapshot = plan.request, plan.snapshot
        asked = {part.id for part in request.query if part.id is not None}
        hits = list(enumerate(ranking, 1))
        if asked:
            hits = [(place, hit) for place, hit in hits if hit.id not in asked]
        if request.min_confidence is not None:
            sure = self._confidences(plan, hits)
            hits = [pair for pair, c in zip(hits, sure, strict=True) if c is not None and c >= request.min_confidence]
        groups: Mapping[str, Any] = {}
        if request.group_by:
            hits, groups = grouped(hits, snapshot.values(request.group_by, [hit.id for _, hit in hits]))
        with timed("fetch"):
            page, offset = self._page(hits, plan)
            documents = snapshot.fetch([hit.id for _, hit in page])
        gone = documents.count(None)  # removed since they were ranked, and erased
        more = bool(hits) and hits[-1][0] > offset
        here = Cursor(snapshot.generation, snapshot.sequence, self._learned, plan.fingerprint, offset)
        return {
            "hits": [
                self._hit(plan, place, hit, document) | {"confidence": sure, "group": groups.get(hit.id)}
                for (place, hit), sure, document in zip(page, self._confidences(plan, page), documents, strict=True)
                if document is not None
            ],
            "facets": {path: counts(snapshot.values(path, [hit.id for _, hit in hits])) for path in request.facets},
            "total": {"value": len(hits) - gone, "relation": "gte" if len(ranking) >= DEPTH else "eq"},
            "exact": ranking.exact,
            "recall": round(ranking.recall, 4),
            "generation": snapshot.generation,
            "cursor": here.encode() if more else None,
            **({"explanation": self._explanation(plan)} if request.explain else {}),
        }

    def _explanation(self, plan: _Plan) -> dict[str, Any]:
        """What the whole answer rests on; why a single hit is there stands in its parts."""
        r, kind = plan.request, query_kind(plan.query)
        return {
            "retriever": repr(self.retriever(r.retriever, plan.snapshot, r.method, r.weights, r.exact)),
            "kind": kind,
            "weights": dict(r.weights or self.parts.weights.get(kind, {})),
            "encoders": {space: dict(encoder.digests) for space, encoder in self.parts.encoders.items()},
            "sequence": plan.snapshot.sequence,
        }

    def _page(self, hits: list[tuple[int, Hit]], plan: _Plan) -> tuple[list[tuple[int, Hit]], int]:
        """The next k hits that still exist, and the place in the ranking of the last one looked at."""
        k, rest = plan.request.k, hits[bisect_right(hits, plan.offset, key=itemgetter(0)) :]
        page: list[tuple[int, Hit]] = []
        if plan.offset == 0:
            page = rest[:k]
        latest = self.index.snapshot()  # documents deleted since the first page vanish from later ones
        for start in range(0, len(rest) if plan.offset else 0, k):
            some = rest[start : start + k]
            there = latest.fetch([hit.id for _, hit in some])
            page += [pair for pair, document in zip(some, there, strict=True) if document is not None]
            if len(page) >= k:
                break
        page = page[:k]
        return page, page[-1][0] if page else (rest[-1][0] if rest else plan.offset)

    def _confidences(self, plan: _Plan, hits: Sequence[tuple[int, Hit]]) -> list[float | None]:
        calibrations = self.parts.calibrations.get(query_kind(plan.query), {})
        parts = [shares(plan.request, place, hit) for place, hit in hits]
        found = confidence.combined(parts, calibrations, distinct_words(plan.query))
        return [None] * len(hits) if found is None else [round(float(value), 4) for value in found]

    def _hit(self, plan: _Plan, place: int, hit: Hit, document: Document) -> dict[str, Any]:
        request = plan.request
        parts = {name: share._asdict() for name, share in shares(request, place, hit).items()}
        found = highlights(plan.query, document) if request.highlight else {}
        shown = self.shown(document, request.fields)
        return {**shown, "score": hit.score, "parts": parts, "highlights": found}

    def shown(self, document: Document, fields: Sequence[str] = FIELDS) -> dict[str, Any]:
        """A document as answers show it."""
        values = {"title": document.title, "text": document.text, "metadata": dict(document.meta)}
        return {
            "id": document.id,
            **{name: values[name] for name in FIELDS if name in fields},
            "image_url": self._image_url(document),
            "findings": self._findings(document),
        }

    def _image_url(self, document: Document) -> str | None:
        if document.image is None:
            return None
        return f"/v1/collections/{quote(self.name, safe='')}/documents/{quote(document.id, safe='')}/image"

    def _findings(self, document: Document) -> list[dict[str, Any]]:
        linker = self.parts.linker
        doubted = {(f.concept, f.span) for f in document.findings if f.assertion is Assertion.uncertain}
        shown = [  # a doubt that leans to presence is kept as both; it is shown as the doubt that it is
            f for f in document.findings if f.assertion is Assertion.uncertain or (f.concept, f.span) not in doubted
        ]
        return [
            {
                "concept": f.concept,
                "name": linker.name(f.concept) if linker else f.concept,
                "assertion": str(f.assertion),
                "start": f.span[0],
                "end": f.span[1],
            }
            for f in shown
        ]


def _caught(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | RetrievalError:
    try:
        return call(*args, **kwargs)
    except RetrievalError as error:
        return error
