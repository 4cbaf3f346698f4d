"""The assembled parts of one collection, and its few verbs: search, run, add, remove."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar
from urllib.parse import quote

import numpy as np

from retrieval import analysis, confidence, filters
from retrieval.confidence import Calibration, Calibrations
from retrieval.errors import Conflict, InputError, Invalid, NotFound, RetrievalError, TooLarge
from retrieval.filters import Filter
from retrieval.fusion import Method
from retrieval.pages import Cursor, Shelf, fingerprint
from retrieval.retrievers import DEPTH, Dense, Fused, Lexical, Ontological, Reranked, query_kind, stages, timed
from retrieval.types import (
    Document,
    Encoder,
    FindingsScore,
    Hit,
    ImageSource,
    Index,
    Linker,
    Part,
    Picture,
    Prepare,
    Query,
    Ranking,
    Rejected,
    Retriever,
    Run,
    Scorer,
    Share,
    Side,
    Snapshot,
    Vector,
)

LEGS = ("lexical", "dense", "image", "ontology")
FIELDS = ("title", "text", "metadata")
RUN_BATCH = 64
CALIBRATION_QUERIES = 200
ADD_BATCH = 256


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
    highlight: bool = True
    fields: Sequence[str] = FIELDS


P = ParamSpec("P")
T = TypeVar("T")
Answer = dict[str, Any]  # the JSON object of interface.md §4


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


class _Plan(NamedTuple):
    """A request made ready: what to rank, on which snapshot, and where the page starts."""

    request: Request
    query: Query
    where: Filter | None
    snapshot: Snapshot
    offset: int
    fingerprint: str


@dataclass
class Engine:
    """One collection, ready to answer. Thread-safe: searches share nothing but the index and the shelf."""

    name: str
    index: Index
    parts: Parts
    shelf: Shelf = field(default_factory=Shelf, repr=False)

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
            ready = self._encoded([plan for plan in plans if isinstance(plan, _Plan)])
            answers = iter(
                [self._answered(plan, result) for plan, result in zip(ready, self._rank(ready), strict=True)]
            )
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
        retrieve = self.retriever(retriever, self.snapshot(), weights=weights)
        run: Run = {}
        for start in range(0, len(queries), RUN_BATCH):
            batch = self._with_vectors(queries[start : start + RUN_BATCH])
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

    def calibrate(self, pictures: Sequence[ImageSource] = (), n: int = CALIBRATION_QUERIES) -> Calibrations:
        """What related and unrelated queries score in this collection, per kind and leg.

        pictures: unrelated ones, since pictures cannot be made here.
        """
        snapshot = self.snapshot()
        strangers = [Query(parts=(Part(text=text),)) for text in confidence.UNRELATED]
        reports = [Query(parts=(replace(query.parts[0], kind="report"),)) for query in strangers]
        samples = {
            "text": (self._cuttings(snapshot, n, 8, "text"), strangers),
            "report": (self._cuttings(snapshot, n, 40, "report"), reports),
        }
        if pictures and self._has_pictures(snapshot):
            strange = [Query(parts=(Part(image=self.parts.read_picture(picture)),)) for picture in pictures]
            samples["picture"] = (self._stored_pictures(snapshot, n), strange)
        return {kind: self._calibrated(snapshot, *both) for kind, both in samples.items()}

    def close(self) -> None:
        self.index.close()

    # --- calibration -----------------------------------------------------------------------------

    def _cuttings(self, snapshot: Snapshot, n: int, words: int, kind: Literal["text", "report"]) -> list[Query]:
        """Runs of words out of the collection's own documents."""
        rng = np.random.default_rng(0)
        documents = snapshot.fetch(snapshot.sample(n))
        texts = [confidence.cut(document.content, words, rng) for document in documents if document is not None]
        return [Query(parts=(Part(text=text, kind=kind),)) for text in texts if text is not None]

    def _stored_pictures(self, snapshot: Snapshot, n: int) -> list[Query]:
        """The collection's own pictures, each named after its document, which is not to find itself."""
        space = self.parts.image_space or ""
        ids = snapshot.sample(n)
        rows, matrix = snapshot.vectors(space, "image", ids)
        found = zip(rows.tolist(), matrix, strict=True)
        return [Query(id=ids[row], parts=(Part(vectors={(space, "image"): vector}),)) for row, vector in found]

    def _calibrated(
        self, snapshot: Snapshot, related: Sequence[Query], unrelated: Sequence[Query]
    ) -> dict[str, Calibration]:
        if min(len(related), len(unrelated)) < confidence.MIN_SAMPLE:
            return {}
        both = [self._with_vectors(related), self._with_vectors(unrelated)]
        out: dict[str, Calibration] = {}
        for leg in (*self.legs(), confidence.HYBRID):  # hybrid last: it is calibrated on what the legs are sure of
            retrieve = self.retriever(leg, snapshot)
            best = [
                [_best(leg, query, ranking, out) for query, ranking in zip(sample, retrieve(sample, 2), strict=True)]
                for sample in both
            ]
            out[leg] = Calibration(*(sorted(scores) for scores in best))
        return out

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
            legs = [leg for leg in have if leg != "image" or self._has_pictures(snapshot)]
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

    def _has_pictures(self, snapshot: Snapshot) -> bool:
        return snapshot.sides.get((self.parts.image_space or "", "image"), 0) > 0

    # --- from request to plan --------------------------------------------------------------------

    def _plan(self, request: Request) -> _Plan:
        where = filters.parse(request.where)
        _check(request)
        latest = self.snapshot()
        self.shelf.keep(latest)
        query = Query(parts=tuple(self._part(part, i, latest) for i, part in enumerate(request.query)))
        print_ = _fingerprint(request, where)
        if request.cursor is None:
            return _Plan(request, query, where, latest, 0, print_)
        cursor = Cursor.decode(request.cursor, print_)
        snapshot = self.shelf.find(cursor)
        query = Query(parts=tuple(self._part(part, i, snapshot) for i, part in enumerate(request.query)))
        return _Plan(request, query, where, snapshot, cursor.offset, print_)

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
            raise Invalid(f"{path}.image: this collection has no image encoder; index it with --image-encoder", path)
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
                f"{path}.vector: got {len(vector)} dimensions, this collection has {dims or 'no vectors'}", path
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
                    vectors[space, side] = matrix[0]
        return Part(
            id=id, text=document.content, kind="report", weight=weight, findings=document.findings, vectors=vectors
        )

    # --- from plan to answer ---------------------------------------------------------------------

    def _encoded(self, plans: Sequence[_Plan]) -> list[_Plan]:
        queries = self._with_vectors([plan.query for plan in plans])
        return [plan._replace(query=query) for plan, query in zip(plans, queries, strict=True)]

    def _with_vectors(self, queries: Sequence[Query]) -> list[Query]:
        """Every part encoded once per space, all queries in one call, whichever legs will use the vectors."""
        parts = [part for query in queries for part in query.parts]
        vectors: list[dict[tuple[str, Side], Vector]] = [dict(part.vectors) for part in parts]
        with timed("encode"):
            for space, encoder in self.parts.encoders.items():
                todo = [i for i, part in enumerate(parts) if not part.vectors and encoder.handles(part)]
                fresh = encoder.encode_queries([parts[i] for i in todo]) if todo else ()
                for i, vector in zip(todo, fresh, strict=True):
                    vectors[i][space, "text" if parts[i].image is None else "image"] = vector
        ready = iter(replace(part, vectors=found) for part, found in zip(parts, vectors, strict=True))
        return [replace(query, parts=tuple(next(ready) for _ in query.parts)) for query in queries]

    def _rank(self, plans: Sequence[_Plan]) -> list[Ranking | RetrievalError]:
        groups: dict[Any, list[int]] = {}
        for i, plan in enumerate(plans):
            r = plan.request
            weights = tuple(sorted((r.weights or {}).items()))
            groups.setdefault((r.retriever, plan.where, r.method, weights, r.exact, id(plan.snapshot)), []).append(i)
        out: list[Ranking | RetrievalError] = [Ranking()] * len(plans)
        for members in groups.values():
            plan = plans[members[0]]
            rankings = _caught(self._rank_alike, plan, [plans[i].query for i in members])
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
        hits = [(place, hit) for place, hit in enumerate(ranking, 1) if hit.id not in asked]
        if request.min_confidence is not None:
            sure = self._confidences(plan, hits)
            hits = [pair for pair, c in zip(hits, sure, strict=True) if c is not None and c >= request.min_confidence]
        groups: Mapping[str, Any] = {}
        if request.group_by:
            hits, groups = _grouped(hits, snapshot.values(request.group_by, [hit.id for _, hit in hits]))
        with timed("fetch"):
            page, offset = self._page(hits, plan)
            documents = snapshot.fetch([hit.id for _, hit in page])
        more = any(place > offset for place, _ in hits)
        cursor = Cursor(snapshot.generation, snapshot.sequence, plan.fingerprint, offset).encode() if more else None
        return {
            "hits": [
                self._hit(plan, place, hit, document) | {"confidence": sure, "group": groups.get(hit.id)}
                for (place, hit), sure, document in zip(page, self._confidences(plan, page), documents, strict=True)
                if document is not None
            ],
            "facets": {path: _counts(snapshot.values(path, [hit.id for _, hit in hits])) for path in request.facets},
            "total": {"value": len(hits), "relation": "gte" if len(ranking) >= DEPTH else "eq"},
            "exact": ranking.exact,
            "recall": round(ranking.recall, 4),
            "generation": snapshot.generation,
            "cursor": cursor,
        }

    def _page(self, hits: Sequence[tuple[int, Hit]], plan: _Plan) -> tuple[list[tuple[int, Hit]], int]:
        """The next k hits that still exist, and the place in the ranking of the last one looked at."""
        rest = [(place, hit) for place, hit in hits if place > plan.offset]
        if plan.offset == 0:
            page = rest[: plan.request.k]
        else:  # documents deleted since the first page vanish from later ones
            latest = self.index.snapshot()
            alive = {id for (_, (id, _, _)), d in zip(rest, latest.fetch([h.id for _, h in rest]), strict=True) if d}
            page = [(place, hit) for place, hit in rest if hit.id in alive][: plan.request.k]
        return page, page[-1][0] if page else (rest[-1][0] if rest else plan.offset)

    def _confidences(self, plan: _Plan, hits: Sequence[tuple[int, Hit]]) -> list[float | None]:
        calibrations = self.parts.calibrations.get(query_kind(plan.query), {})
        shares = [_shares(plan.request, place, hit) for place, hit in hits]
        found = confidence.combined(shares, calibrations, _distinct_words(plan.query))
        return [None] * len(hits) if found is None else [round(float(value), 4) for value in found]

    def _hit(self, plan: _Plan, place: int, hit: Hit, document: Document) -> dict[str, Any]:
        request = plan.request
        out: dict[str, Any] = {
            "id": hit.id,
            "score": hit.score,
            "parts": {name: share._asdict() for name, share in _shares(request, place, hit).items()},
        }
        if "title" in request.fields:
            out["title"] = document.title
        if "text" in request.fields:
            out["text"] = document.text
        if "metadata" in request.fields:
            out["metadata"] = dict(document.meta)
        out["image_url"] = self._image_url(document)
        out["findings"] = self._findings(document)
        out["highlights"] = _highlights(plan.query, document) if request.highlight else {}
        return out

    def _image_url(self, document: Document) -> str | None:
        if document.image is None:
            return None
        return f"/v1/collections/{quote(self.name, safe='')}/documents/{quote(document.id, safe='')}/image"

    def _findings(self, document: Document) -> list[dict[str, Any]]:
        linker = self.parts.linker
        return [
            {
                "concept": f.concept,
                "name": linker.name(f.concept) if linker else f.concept,
                "assertion": str(f.assertion),
                "start": f.span[0],
                "end": f.span[1],
            }
            for f in document.findings
        ]


def _caught(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | RetrievalError:
    try:
        return call(*args, **kwargs)
    except RetrievalError as error:
        return error


def _check(request: Request) -> None:
    if not request.query:
        raise Invalid("query: got no part, expected at least one", "query")
    if request.k < 1:
        raise Invalid(f"k: got {request.k}, expected 1 to {DEPTH}", "k")
    if request.k > DEPTH:
        raise TooLarge(f"k: got {request.k}, the limit is {DEPTH}; use the cursor for more", "k")
    if request.min_confidence is not None and not 0 <= request.min_confidence <= 1:
        raise Invalid(f"min_confidence: got {request.min_confidence}, expected 0 to 1", "min_confidence")
    if unknown := set(request.fields) - set(FIELDS):
        raise Invalid(f"fields: got '{min(unknown)}', expected some of {', '.join(FIELDS)}", "fields")


def _fingerprint(request: Request, where: Filter | None) -> str:
    """Equal for requests with the same ranking, whatever page, facets and fields they ask for."""
    query = [(p.text, p.report, p.id, p.vector and tuple(p.vector), _digest(p.image), p.weight) for p in request.query]
    fusion = (request.method, sorted((request.weights or {}).items()))
    cut = (request.group_by, request.min_confidence, request.exact)
    return fingerprint(query, request.retriever, where, fusion, cut)


def _digest(image: ImageSource | None) -> str | None:
    return image.digest if isinstance(image, Picture) else fingerprint(image)


def _shares(request: Request, place: int, hit: Hit) -> Mapping[str, Share]:
    """A hit's parts; a single leg is its own only part, with its raw score."""
    return hit.parts or {request.retriever.partition("+")[0]: Share(place, hit.score, hit.score, 1.0)}


def _best(leg: str, query: Query, ranking: Ranking, calibrations: Mapping[str, Calibration]) -> float:
    """What the best hit besides the query itself scores, as `confidence.combined` will look at it."""
    hit = next((hit for hit in ranking if hit.id != query.id), None)
    if hit is None:
        return 0.0
    if leg == confidence.HYBRID:
        sure = confidence.combined([hit.parts], calibrations, _distinct_words(query))
        return 0.0 if sure is None else float(sure[0])
    return hit.score / _distinct_words(query) if leg == "lexical" else hit.score


def _distinct_words(query: Query) -> int:
    return max(1, len({word for part in query.parts for word in analysis.tokens(part.text)}))


def _grouped(
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


def _counts(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Values with counts, most frequent first; the values of a list count one each."""
    flat = [v for value in values for v in (value if isinstance(value, list) else [value]) if v is not None]
    counts = Counter((type(v).__name__, v) for v in flat if isinstance(v, str | int | float | bool))
    ordered = sorted(counts.items(), key=lambda x: (-x[1], str(x[0][1])))
    return [{"value": value, "count": count} for (_, value), count in ordered]


def _highlights(query: Query, document: Document) -> dict[str, list[list[int]]]:
    wanted = " ".join(part.text for part in query.parts if part.text and part.weight > 0)
    fields = {"title": document.title, "text": document.text}
    found = {name: analysis.highlights(text, wanted) for name, text in fields.items() if text}
    return {name: [list(span) for span in spans] for name, spans in found.items() if spans}
