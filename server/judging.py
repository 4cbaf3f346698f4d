"""What judgments are for: to measure a collection's retrievers, to gate a new generation, to learn fusion weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from retrieval import tune
from retrieval.engine import Engine
from retrieval.errors import Conflict, InputError, Invalid
from retrieval.evaluate import Evaluation, evaluate, parse_measures
from retrieval.fusion import Weights
from retrieval.retrievers import DEPTH, Fused, Ontological, query_kind
from retrieval.types import Index, Progress, Qrels, Query, Ranking, Run, Snapshot

MEASURES = ("nDCG@10", "R@100", "RR@10")
LEAST = "nDCG@10>=0"  # that a gate asks for where nothing is said


class Judgments(NamedTuple):
    """Queries of a source that somebody judged."""

    source: str
    split: str
    queries: list[Query]
    qrels: Qrels


class Measured(NamedTuple):
    """An evaluation of several retrievers over the same queries, by retriever."""

    collection: str
    judgments: Judgments
    runs: dict[str, Run]
    evaluations: dict[str, Evaluation]

    def json(self) -> dict[str, Any]:
        """The object that `lightbox evaluate --json` prints."""
        return {
            "collection": self.collection,
            "split": self.judgments.split,
            "queries": len(self.judgments.qrels),
            "depth": DEPTH,
            "results": {name: e.means for name, e in self.evaluations.items()},
            "intervals": {name: {m: list(i) for m, i in e.intervals.items()} for name, e in self.evaluations.items()},
            "unjudged": {name: e.unjudged for name, e in self.evaluations.items()},
        }


def judgments(path: Path, split: str = "test") -> Judgments:
    """The judged queries of a source. Raises InputError where it has no such split or no query."""
    from retrieval.files import read_source

    source = read_source(path)
    qrels = source.qrels(split)
    queries = [query for query in source.queries() if query.id in qrels]
    if not queries:
        raise InputError(
            f"{path.name}: none of the {len(qrels)} judged queries of split '{split}' is in queries.jsonl"
        )
    return Judgments(source.name, split, queries, qrels)


def measure(
    engine: Engine,
    judged: Judgments,
    retrievers: Sequence[str] = ("hybrid",),
    measures: Sequence[str] = MEASURES,
    *,
    weights: Mapping[str, float] | None = None,
    drop_identical_ids: bool = False,
    progress: Progress,
) -> Measured:
    """Runs every retriever over the judged queries to depth 1,000 and measures it."""
    parse_measures(measures)  # refuses a wrong one before the work, not after
    snapshot = engine.snapshot()
    for name in retrievers:
        engine.retriever(name, snapshot, weights=weights)
    runs, evaluations = {}, {}
    for name in retrievers:
        told = _told(progress, f"evaluate {name}", len(judged.queries))
        runs[name] = engine.run(judged.queries, name, DEPTH, weights, told)
        evaluations[name] = evaluate(runs[name], judged.qrels, measures, drop_identical_ids=drop_identical_ids)
    return Measured(engine.name, judged, runs, evaluations)


def gate(engine: Engine, path: Path, condition: str, progress: Progress) -> Callable[[Snapshot], None]:
    """A check of a new generation before it is published: hybrid must reach `condition` on the judgments of a source.

    condition: a measure and its least value, like ``nDCG@10>=0.70``. The check raises Conflict where it is missed.
    """
    name, least = _condition(condition)
    judged = judgments(path)

    def check(snapshot: Snapshot) -> None:
        pinned = replace(engine, index=cast(Index, _Pinned(snapshot)))
        value = measure(pinned, judged, ("hybrid",), (name,), progress=progress).evaluations["hybrid"].means[name]
        if value < least:
            raise Conflict(
                f"gate: {name} is {value:.4f} on {judged.source}, expected at least {least}; "
                "the new generation was not published"
            )

    return check


class _Pinned:
    """The part of an index that searching needs, held at one snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def snapshot(self) -> Snapshot:
        return self._snapshot


def learn(engine: Engine, judged: Judgments, progress: Progress) -> tuple[dict[str, Weights], dict[str, Any]]:
    """Fusion weights by kind of query, and what they reached; kinds that the source does not ask are left out."""
    weights: dict[str, Weights] = {}
    reached: dict[str, float] = {}
    for kind in sorted({query_kind(query) for query in judged.queries}):
        queries = [query for query in judged.queries if query_kind(query) == kind]
        legs, rows = candidates(engine, judged._replace(queries=queries), progress)
        if rows:
            weights[kind], value = tune.learn_weights(legs, [rows])
            reached[kind] = round(value, 4)
    if not weights:
        raise InputError(f"{judged.source}: no leg found a relevant document for any judged query of '{judged.split}'")
    return weights, {"source": judged.source, "split": judged.split, "nDCG@10": reached}


def candidates(
    engine: Engine, judged: Judgments, progress: Progress, *, drop_identical_ids: bool = False
) -> tuple[list[str], list[tune.Judged]]:
    """The legs of `hybrid`, and what each gives the candidates of every judged query."""
    hybrid, queries = engine.retriever("hybrid", engine.snapshot()), judged.queries
    if not isinstance(hybrid, Fused):
        raise TypeError(type(hybrid))
    runs = {leg: engine.run(queries, leg, DEPTH, None, _told(progress, leg, len(queries))) for leg in hybrid.legs}
    if drop_identical_ids:
        runs = {
            leg: {q: Ranking(h for h in hits if h.id != q) for q, hits in run.items()} for leg, run in runs.items()
        }
    understood = {
        name: dict(zip((query.id for query in queries), leg.understood(queries), strict=True))
        for name, leg in hybrid.legs.items()
        if isinstance(leg, Ontological)
    }
    return list(runs), tune.judged(runs, {query.id: judged.qrels[query.id] for query in queries}, understood)


def _others(ranking: Ranking, id: str) -> Ranking:
    return Ranking((hit for hit in ranking if hit.id != id), ranking.exact, ranking.recall)


def _told(progress: Progress, phase: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(phase, done, total)


def _condition(text: str) -> tuple[str, float]:
    measure, sign, least = text.partition(">=")
    try:
        value = float(least)
    except ValueError:
        sign = ""
    if not sign:
        raise Invalid(f"--gate-min: got '{text}', expected a measure and its least value such as 'nDCG@10>=0.70'")
    return next(iter(parse_measures([measure.strip()]))), value
