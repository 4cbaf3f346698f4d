"""How good a run is: measures by ir-measures, under rules that cannot flatter.

- A judged query without an answer counts as zero; a query without judgments does not count at all. One denominator
  for every measure.
- The order of a ranking is the order that is measured. ir-measures breaks ties by id descending, so it is handed
  strictly falling scores and never sees an id.
- Grades stay grades; a negative one is a judgment of "not relevant".
- Beside each mean stands a 95 % bootstrap interval over queries, and the share of top hits that nobody judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import Any

import ir_measures
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.types import Qrels, Ranking, Run

RESAMPLES = 10_000
SEED = 20_240_229
UNJUDGED_DEPTH = 10
MAX_CUTOFF = 1_000_000
MAX_GRADE = 1_000  # trec_eval makes a table as long as the highest grade
MAX_NAME = 100  # letters of a measure
_BLOCK = 1 << 22  # numbers drawn at once: 32 MB

Values = NDArray[np.float64]
_PROVIDERS: Any = ir_measures.DefaultPipeline


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a run reached. Measures are named as ir-measures names them and keep the order asked.

    intervals: 95 % bootstrap interval of each mean. per_query: measure -> query -> value, all judged queries.
    unjudged: share without a judgment among all hits at the first ten ranks. unanswered: judged queries
    without a hit.
    """

    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_query: dict[str, dict[str, float]]
    unjudged: float
    queries: int
    unanswered: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run B against run A on one measure, query by query.

    difference: mean of B minus mean of A, with its 95 % bootstrap `interval`. p: two-sided paired randomisation
    test (the share of sign flips that give a difference as large). wins: queries where B is better; losses: where
    A is. per_query: query -> value of B minus value of A.
    """

    measure: str
    mean_a: float
    mean_b: float
    difference: float
    interval: tuple[float, float]
    p: float
    wins: int
    losses: int
    ties: int
    per_query: dict[str, float]


def evaluate(run: Run, qrels: Qrels, measures: Sequence[str], *, drop_identical_ids: bool = False) -> Evaluation:
    """Means, intervals and single values of a run. Neither argument is changed.

    drop_identical_ids: leave out documents whose id is the query's, from the run and from the judgments.
    Raises InputError for an unknown measure, for judgments without a query, for a run none of whose queries is
    judged, and for a ranking with a document twice or a score that is not a number.

    >>> from retrieval.types import Hit, Ranking
    >>> run = {"q1": Ranking([Hit("a", 2.0), Hit("b", 2.0)])}
    >>> result = evaluate(run, {"q1": {"b": 1}, "q2": {"c": 1}}, ["RR@10", "R@1"])
    >>> result.means, result.unanswered, result.unjudged
    ({'RR@10': 0.25, 'R@1': 0.0}, 1, 0.5)
    """
    wanted = parse_measures(measures)
    judged = _judged(qrels, drop_identical_ids)
    answers = _answers(run, judged, drop_identical_ids)
    per_query = _values(wanted, judged, answers)
    table = np.array([list(values.values()) for values in per_query.values()])  # (measures, Q)
    bounds = _intervals(table)
    return Evaluation(
        means={name: float(row.mean()) for name, row in zip(per_query, table)},
        intervals={name: (float(low), float(high)) for name, (low, high) in zip(per_query, bounds)},
        per_query=per_query,
        unjudged=_unjudged(judged, answers),
        queries=len(judged),
        unanswered=sum(not answers[query] for query in judged),
    )


def compare(run_a: Run, run_b: Run, qrels: Qrels, measures: Sequence[str]) -> list[Comparison]:
    """Run B against run A, one comparison a measure. Raises as `evaluate` does."""
    a, b = (evaluate(run, qrels, measures) for run in (run_a, run_b))
    return [_compared(name, a, b) for name in a.means]


def parse_measures(measures: Sequence[str]) -> dict[str, ir_measures.Measure]:
    """Name -> measure, in the order asked, for example ``["nDCG@10", "R@100", "RR@10"]``.

    Raises InputError for what ir-measures does not know, cannot compute here, or would not average over queries.
    """
    if isinstance(measures, str):
        raise InputError(f"measures: expected a list of names, got the text {measures[:50]!r}", "measures")
    parsed = [_measure(name) for name in measures]
    if not parsed:
        raise InputError("measures: expected at least one, for example nDCG@10", "measures")
    return {str(measure): measure for measure in parsed}


def _measure(name: str) -> ir_measures.Measure:
    if not isinstance(name, str) or len(name) > MAX_NAME:  # a name is parsed as Python: no deep trees
        raise _unknown(name)
    try:
        measure = ir_measures.parse_measure(name)
        supported = _PROVIDERS.supports(measure)  # checks the parameters first
    except (AssertionError, AttributeError, KeyError, NameError, TypeError, ValueError, RecursionError) as error:
        raise _unknown(name) from error
    if not (supported and all(map(_is_sane, measure.params.items()))):
        raise _unknown(name)
    if isinstance(measure.aggregator(), ir_measures.SumAgg):
        raise InputError(f"measures: {name} is a sum over queries, not a mean", "measures")
    return measure


def _is_sane(param: tuple[str, object]) -> bool:
    """pytrec_eval ends the whole process on a cutoff of zero."""
    name, value = param
    if isinstance(value, bool):
        return name == "judged_only"
    if isinstance(value, int):
        return 1 <= value <= MAX_CUTOFF
    if isinstance(value, dict):
        return all(isinstance(n, int) and 0 <= n <= MAX_GRADE for pair in value.items() for n in pair)
    return True


def _unknown(name: object) -> InputError:
    said = name[:50] if isinstance(name, str) else type(name).__name__
    return InputError(
        f"measures: {said!r} is no measure that can be computed; expected a name of ir-measures with a cutoff from 1,"
        " for example nDCG@10, R@100, RR@10, AP, P@5",
        "measures",
    )


# --- what is handed over ---------------------------------------------------------------------------------------------


def _judged(qrels: Qrels, drop: bool) -> Qrels:
    """The queries that count, in the order of their ids, with their judgments."""
    judged: Qrels = {}
    for query in sorted(qrels):
        grades = {id: grade for id, grade in qrels[query].items() if not (drop and id == query)}
        for grade in grades.values():
            if isinstance(grade, bool) or not isinstance(grade, int) or grade > MAX_GRADE:
                raise InputError(f"qrels: query {query!r}: a grade must be a whole number up to {MAX_GRADE}", "qrels")
        if grades:
            judged[query] = grades
    if not judged:
        raise InputError("qrels: there is no judged query; expected query -> document -> grade", "qrels")
    return judged


def _answers(run: Run, judged: Qrels, drop: bool) -> dict[str, list[str]]:
    """Query -> ids in our order, for every judged query."""
    if run and not any(query in judged for query in run):
        raise InputError(f"none of the {len(run)} queries of the run is judged; do both use the same ids?", "qrels")
    return {query: _ids(query, run.get(query, Ranking()), drop) for query in judged}


def _ids(query: str, ranking: Ranking, drop: bool) -> list[str]:
    if any(math.isnan(hit.score) for hit in ranking):
        raise InputError(f"run: query {query!r} has a score that is not a number", "run")
    ids = [hit.id for hit in ranking if not (drop and hit.id == query)]
    if len(set(ids)) < len(ids):
        raise InputError(f"run: query {query!r} has a document twice", "run")
    return ids


def _values(
    measures: Mapping[str, ir_measures.Measure], judged: Qrels, answers: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Measure -> query -> value, zero where there is no answer.

    Documents are handed over by rank instead of id: an id with a blank or a NUL would be cut by some providers.
    """
    run, grades = {}, {}
    for query, ids in answers.items():
        names = {id: f"d{rank}" for rank, id in enumerate(ids)}
        grades[query] = {names.get(id, f"u{n}"): max(0, g) for n, (id, g) in enumerate(judged[query].items())}
        if ids:
            run[query] = {f"d{rank}": float(len(ids) - rank) for rank in range(len(ids))}
    values = {name: dict.fromkeys(judged, 0.0) for name in measures}
    if run:
        for metric in _calculated(list(measures.values()), grades, run):
            values[str(metric.measure)][metric.query_id] = float(metric.value)
    return values


def _calculated(
    measures: list[ir_measures.Measure], grades: Qrels, run: Mapping[str, Mapping[str, float]]
) -> Iterator[ir_measures.Metric]:
    """ir-measures, handed queries by number: gdeval, for one, takes nothing else and cuts at hyphens."""
    numbers = {query: str(n) for n, query in enumerate(grades)}
    queries = {number: query for query, number in numbers.items()}
    qrels = {numbers[query]: judgments for query, judgments in grades.items()}
    scored = {numbers[query]: scores for query, scores in run.items()}
    try:
        for metric in _PROVIDERS.iter_calc(measures, qrels, scored):
            yield metric._replace(query_id=queries[metric.query_id])
    except CalledProcessError as error:  # gdeval is a program of its own, and takes grades up to 4
        names = " ".join(map(str, measures))
        raise InputError(f"measures: {names} cannot be computed from grades above 4", "measures") from error


def _unjudged(judged: Qrels, answers: Mapping[str, list[str]]) -> float:
    top = [id in judged[query] for query, ids in answers.items() for id in ids[:UNJUDGED_DEPTH]]
    return top.count(False) / len(top) if top else 0.0


# --- chance ----------------------------------------------------------------------------------------------------------


def _intervals(table: Values) -> Values:
    """(rows, Q) values -> (rows, 2): 95 % percentile bootstrap of each row's mean; all rows see the same resamples."""
    queries = table.shape[1]
    chance = np.random.default_rng(SEED)
    means = np.empty((len(table), RESAMPLES))
    block = max(1, _BLOCK // queries)
    for start in range(0, RESAMPLES, block):
        drawn = chance.integers(0, queries, (min(block, RESAMPLES - start), queries))  # (block, Q)
        for row, values in enumerate(table):
            means[row, start : start + block] = values[drawn].mean(axis=1)
    return np.asarray(np.percentile(means, (2.5, 97.5), axis=1).T)


def _compared(name: str, a: Evaluation, b: Evaluation) -> Comparison:
    per_query = {query: value - a.per_query[name][query] for query, value in b.per_query[name].items()}
    differences = np.array(list(per_query.values()))
    differences[np.abs(differences) < 1e-12] = 0.0  # the noise of a last digit is no win
    low, high = _intervals(differences[None])[0]
    return Comparison(
        measure=name,
        mean_a=a.means[name],
        mean_b=b.means[name],
        difference=float(differences.mean()),
        interval=(float(low), float(high)),
        p=_p(differences),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
        per_query=per_query,
    )


def _p(differences: Values) -> float:
    """Two-sided paired randomisation test (Fisher 1935): how often do random signs give as large a mean?

    All sign patterns where there are at most as many as resamples, else a seeded sample, counted with the observed
    one, so that p is never 0.
    """
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    bound = abs(moved.sum()) - 1e-9
    if 2 ** len(moved) <= RESAMPLES:
        patterns = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float((np.abs((patterns * 2 - 1) @ moved) >= bound).mean())
    chance = np.random.default_rng(SEED)
    block = max(1, _BLOCK // len(moved))
    extreme = 1
    for start in range(0, RESAMPLES, block):
        signs = chance.integers(0, 2, (min(block, RESAMPLES - start), len(moved)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= bound).sum())
    return extreme / (RESAMPLES + 1)
