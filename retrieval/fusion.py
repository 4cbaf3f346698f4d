"""Rankings in, ranking out: weighted min-max, and reciprocal rank fusion.

A document that a leg did not return gets that leg's 0. A leg with an empty ranking has nothing to
say and gives its weight to the others, so the effective weights always sum to 1. Every hit carries
its parts, and ``sum(weight * normalised)`` over them is its score.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from retrieval.types import Hit, Ranking, Share

Method = Literal["minmax", "rrf"]
RRF_K = 60  # Cormack, Clarke and Buettcher, SIGIR 2009

Weights = Mapping[str, float]  # leg -> weight


def fuse(legs: Mapping[str, Ranking], weights: Weights, k: int, method: Method = "minmax") -> Ranking:
    """The best `k` of several rankings.

    >>> legs = {"a": Ranking([Hit("x", 4.0), Hit("y", 2.0)]), "b": Ranking([Hit("y", 0.9)])}
    >>> [(hit.id, hit.score) for hit in fuse(legs, {"a": 0.25, "b": 0.75}, k=10)]
    [('y', 0.75), ('x', 0.25)]
    """
    spoken = effective_weights(legs, weights)
    normalised = {leg: _NORMALISE[method](legs[leg]) for leg in spoken}
    totals: dict[str, float] = {}
    for leg, weight in spoken.items():
        for id, value in normalised[leg].items():
            totals[id] = totals.get(id, 0.0) + weight * value
    # Rounding groups what is equal within 1e-6, so that the smaller id wins among the tied.
    best = heapq.nsmallest(k, totals, key=lambda id: (-round(totals[id], 6), id))
    ranks = {leg: {hit.id: (rank, hit.score) for rank, hit in enumerate(legs[leg], 1)} for leg in spoken}
    hits = (Hit(id, totals[id], _Shares(id, spoken, ranks, normalised)) for id in best)
    return Ranking(
        hits,
        exact=all(ranking.exact for ranking in legs.values()),
        recall=min((ranking.recall for ranking in legs.values()), default=1.0),
    )


def effective_weights(legs: Mapping[str, Ranking], weights: Weights) -> dict[str, float]:
    """The weights of the legs that have something to say, summing to 1; equal ones where all are 0."""
    spoken = {leg: max(weights.get(leg, 0.0), 0.0) for leg, ranking in legs.items() if ranking}
    total = sum(spoken.values())
    if total == 0:
        return dict.fromkeys(spoken, 1 / len(spoken)) if spoken else {}
    return {leg: weight / total for leg, weight in spoken.items() if weight > 0}


def minmax(ranking: Ranking) -> dict[str, float]:
    """Scores to [0, 1] within one ranking; a ranking of one score is all 1."""
    low, high = ranking[-1].score, ranking[0].score
    if high - low <= 0:
        return {hit.id: 1.0 for hit in ranking}
    return {hit.id: (hit.score - low) / (high - low) for hit in ranking}


def reciprocal_ranks(ranking: Ranking) -> dict[str, float]:
    """1 / (60 + rank), ranks from 1."""
    return {hit.id: 1 / (RRF_K + rank) for rank, hit in enumerate(ranking, 1)}


_NORMALISE: dict[Method, Callable[[Ranking], dict[str, float]]] = {"minmax": minmax, "rrf": reciprocal_ranks}


class _Shares(Mapping[str, Share]):
    """A hit's parts, made when they are looked at: most hits of a deep ranking are never shown."""

    __slots__ = ("_id", "_normalised", "_ranks", "_weights")

    def __init__(
        self,
        id: str,
        weights: Weights,
        ranks: Mapping[str, Mapping[str, tuple[int, float]]],
        normalised: Mapping[str, Mapping[str, float]],
    ) -> None:
        self._id = id
        self._weights = weights
        self._ranks = ranks
        self._normalised = normalised

    def __getitem__(self, leg: str) -> Share:
        weight = self._weights[leg]
        rank, raw = self._ranks[leg].get(self._id, (None, 0.0))
        return Share(rank, raw, self._normalised[leg].get(self._id, 0.0), weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return repr(dict(self))
