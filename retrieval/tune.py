"""Fusion weights learned from judgments: a grid over the simplex, scored by mean nDCG@10.

Ranking by a weighted sum does not change when all weights of a query are scaled together, so a
leg that is silent for a query needs no special case here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.fusion import Weights, minmax
from retrieval.types import Qrels, Ranking, Run

CUT = 10
STEP = 0.05  # of the grid over the simplex
NEAR_BEST = 0.002  # nDCG; the middle of all weights so near the best holds better on other queries than the best


class Judged(NamedTuple):
    """One query: what every leg gives every candidate, and what they are worth."""

    scores: NDArray[np.float32]  # (K candidates, L legs), normalised, times how much the leg understood
    gains: NDArray[np.float32]  # (K,)
    ideal: float  # DCG@10 of the best possible ranking


def judged(
    legs: Mapping[str, Run], qrels: Qrels, understood: Mapping[str, Mapping[str, float]] | None = None
) -> list[Judged]:
    """The queries of one source that have judgments. `understood`: leg -> query id -> share of the query."""
    out = []
    for query, grades in qrels.items():
        ideal = float(_dcg(np.array(sorted(grades.values(), reverse=True)[:CUT], np.float32)))
        rankings = [run.get(query, Ranking()) for run in legs.values()]
        ids = sorted({hit.id for ranking in rankings for hit in ranking})
        if not ids or ideal == 0:
            continue
        place = {id: row for row, id in enumerate(ids)}
        scores = np.zeros((len(ids), len(legs)), np.float32)
        for column, (leg, run) in enumerate(legs.items()):
            share = (understood or {}).get(leg, {}).get(query, 1.0)
            if found := run.get(query):
                rows = [place[hit.id] for hit in found]
                scores[rows, column] = minmax(np.array([hit.score for hit in found])) * share
        gains = np.array([max(grades.get(id, 0), 0) for id in ids], np.float32)
        out.append(Judged(scores, gains, ideal))
    return out


def learn_weights(legs: Sequence[str], sources: Sequence[Sequence[Judged]]) -> tuple[Weights, float]:
    """The middle one of the weights with nearly the best mean over sources of the mean nDCG@10, and that mean.

    >>> one = Judged(np.array([[1, 0], [0, 1]], np.float32), np.array([0, 1], np.float32), 1.0)
    >>> weights, ndcg = learn_weights(["bad", "good"], [[one]])
    >>> weights["good"] > weights["bad"], ndcg
    (True, 1.0)
    """
    grid = _simplex(len(legs), STEP)
    values = np.mean([np.mean([ndcg(query, grid) for query in source], axis=0) for source in sources], axis=0)
    near = np.flatnonzero(values >= values.max() - NEAR_BEST)
    chosen = near[np.square(grid[near] - grid[near].mean(axis=0)).sum(axis=1).argmin()]
    return {leg: round(float(w), 3) for leg, w in zip(legs, grid[chosen], strict=True)}, float(values[chosen])


def ndcg(query: Judged, grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C,) nDCG@10 of one query under every weighting of the grid."""
    totals = query.scores @ grid.T  # (K, C)
    cut = min(CUT, len(totals))
    top = np.argpartition(-totals, cut - 1, axis=0)[:cut]
    order = np.argsort(-np.take_along_axis(totals, top, axis=0), axis=0, kind="stable")
    gains = query.gains[np.take_along_axis(top, order, axis=0)]  # (cut, C)
    return np.asarray(_dcg(gains) / query.ideal, np.float32)


def _dcg(gains: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sum of gain / log2(rank + 1) along the first axis, as trec_eval's nDCG has it."""
    discounts = 1 / np.log2(np.arange(2, len(gains) + 2))
    return np.asarray(np.tensordot(discounts, gains, axes=1))


def _simplex(dims: int, step: float) -> NDArray[np.float32]:
    parts = round(1 / step)
    rows = [row for row in itertools.product(range(parts + 1), repeat=dims) if sum(row) == parts]
    return np.array(rows, np.float32) / parts
