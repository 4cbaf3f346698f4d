"""What the arms of `benchmarks.methods` are measured by: whole matrices in, one value a query out.

Shapes: Q queries, N candidates, S seeds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
RESAMPLES = 10_000


class Difference(NamedTuple):
    """An arm against the one without a teacher. value, low, high: paired bootstrap over queries of the mean over
    seeds. spread: standard deviation of the seeds' means; wins: seeds in which the arm is better."""

    value: float
    low: float
    high: float
    spread: float
    wins: int


def ndcg(scores: NDArray[Any], grades: NDArray[Any], k: int = 10) -> Values:
    """(Q,) nDCG at k with linear gains, as trec_eval has it; a query without a graded candidate is NaN.

    >>> ndcg(np.array([[0.1, 0.9, 0.5]]), np.array([[1, 0, 2]])).round(4).tolist()  # (2/log2 3 + 1/2) / (2 + 1/log2 3)
    [0.6697]
    """
    k = min(k, scores.shape[1])
    discount = 1 / np.log2(np.arange(2, k + 2))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    got = (np.take_along_axis(grades, order, 1) * discount).sum(1)
    ideal = (-np.sort(-grades.astype(np.float64), axis=1)[:, :k] * discount).sum(1)
    return np.where(ideal > 0, got / np.where(ideal > 0, ideal, 1), np.nan)


def rank(scores: NDArray[Any], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(Q,) place from 1 of the first right answer; ties count against it.

    >>> rank(np.array([[0.1, 0.9, 0.5]]), np.array([[False, False, True]])).tolist()
    [2]
    """
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    return np.asarray(1 + ((scores >= best) & ~right).sum(1))


def difference(arm: Values, plain: Values) -> Difference:
    """arm, plain: (S, Q) values of the same seeds and queries.

    >>> difference(np.array([[1.0, 1.0]]), np.array([[0.5, 0.5]]))
    Difference(value=0.5, low=0.5, high=0.5, spread=0.0, wins=1)
    """
    gain = arm.mean(0) - plain.mean(0)  # (Q,)
    draw = np.random.default_rng(0)
    means = np.array([gain[draw.integers(len(gain), size=len(gain))].mean() for _ in range(RESAMPLES // 5)])
    low, high = np.percentile(means, (2.5, 97.5))
    seeds = arm.mean(1) - plain.mean(1)  # (S,)
    return Difference(float(gain.mean()), float(low), float(high), float(seeds.std()), int((seeds > 0).sum()))
