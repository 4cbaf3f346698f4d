"""Rankings in, ranking out: weighted min-max, and reciprocal rank fusion.

A document that a leg did not return gets that leg's 0. A leg with an empty ranking has nothing to
say and gives its weight to the others, so the effective weights always sum to 1. Every hit carries
its parts, and ``sum(weight * normalised)`` over them is its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import chain
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.types import Hit, Ranking, Share

Method = Literal["minmax", "rrf"]
RRF_K = 60  # Cormack, Clarke and Buettcher, SIGIR 2009

Weights = Mapping[str, float]  # leg -> weight

_as_hit: Any = partial(tuple.__new__, Hit)  # a thousand hits a search: without a Python frame for each
_id_of, _score_of = itemgetter(0), itemgetter(1)


def fuse(legs: Mapping[str, Ranking], weights: Weights, k: int, method: Method = "minmax") -> Ranking:
    """The best `k` of several rankings.

    >>> legs = {"a": Ranking([Hit("x", 4.0), Hit("y", 2.0)]), "b": Ranking([Hit("y", 0.9)])}
    >>> [(hit.id, hit.score) for hit in fuse(legs, {"a": 0.25, "b": 0.75}, k=10)]
    [('y', 0.75), ('x', 0.25)]
    """
    table = _Table(legs, effective_weights(legs, weights), method)
    best = table.best(k)
    shares = [_Shares(table, at) for at in best]
    hits = map(_as_hit, zip([table.ids[at] for at in best], table.totals[best].tolist(), shares, strict=True))
    return Ranking(
        hits,
        exact=all(ranking.exact for ranking in legs.values()),
        recall=min((ranking.recall for ranking in legs.values()), default=1.0),
    )


class _Told(NamedTuple):
    """What one leg gave: `rows` of the table in the leg's order, raw and normalised scores beside them."""

    rows: NDArray[np.int64]
    raw: NDArray[np.float64]
    normalised: NDArray[np.float64]


class _Table:
    """The documents of all legs, one row each. Thousands a query: whole columns at a time, no loop over rows."""

    def __init__(self, legs: Mapping[str, Ranking], weights: Weights, method: Method) -> None:
        self.weights = weights
        named = {leg: list(map(_id_of, legs[leg])) for leg in weights}
        self.ids = list(dict.fromkeys(chain.from_iterable(named.values())))
        row_of = dict(zip(self.ids, range(len(self.ids)), strict=True))
        self.totals = np.zeros(len(self.ids))
        self.told: dict[str, _Told] = {}
        for leg, names in named.items():
            rows = np.fromiter(map(row_of.__getitem__, names), np.int64, len(names))
            raw = np.fromiter(map(_score_of, legs[leg]), np.float64, len(names))
            self.told[leg] = _Told(rows, raw, _NORMALISE[method](raw))
            self.totals[rows] += weights[leg] * self.told[leg].normalised

    def best(self, k: int) -> list[int]:
        """Rows of the k best; rounding groups what is equal within 1e-6, and the smaller id wins among the tied."""
        rounded = np.rint(self.totals * -1e6)
        order = np.argsort(rounded, kind="stable")
        ordered = rounded[order]
        order = order[: np.searchsorted(ordered, ordered[k - 1], side="right")] if k < len(order) else order
        starts = np.flatnonzero(np.diff(ordered[: len(order)], prepend=np.nan, append=np.nan) != 0)
        found: list[int] = order.tolist()
        for run in np.flatnonzero(np.diff(starts) > 1).tolist():
            start, stop = int(starts[run]), int(starts[run + 1])
            found[start:stop] = sorted(found[start:stop], key=self.ids.__getitem__)
        return found[:k]

    @cached_property
    def places(self) -> dict[str, dict[int, int]]:
        """Leg -> row -> place in the leg's ranking, from 0."""
        return {leg: dict(zip(t.rows.tolist(), range(len(t.rows)), strict=True)) for leg, t in self.told.items()}


def effective_weights(legs: Mapping[str, Ranking], weights: Weights) -> dict[str, float]:
    """The weights of the legs that have something to say, summing to 1; equal ones where all are 0."""
    spoken = {leg: max(weights.get(leg, 0.0), 0.0) for leg, ranking in legs.items() if ranking}
    total = sum(spoken.values())
    if total == 0:
        return dict.fromkeys(spoken, 1 / len(spoken)) if spoken else {}
    return {leg: weight / total for leg, weight in spoken.items() if weight > 0}


def minmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of one ranking, best first, to [0, 1]; a ranking of one score is all 1."""
    low, high = scores[-1], scores[0]
    return (scores - low) / (high - low) if high - low > 0 else np.ones(len(scores))


def reciprocal_ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (60 + rank), ranks from 1."""
    return 1 / (RRF_K + np.arange(1, len(scores) + 1))


_NORMALISE: dict[Method, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "minmax": minmax,
    "rrf": reciprocal_ranks,
}


class _Shares(Mapping[str, Share]):
    """A hit's parts, made when they are looked at: most hits of a deep ranking are never shown."""

    __slots__ = ("_row", "_table")

    def __init__(self, table: _Table, row: int) -> None:
        self._table = table
        self._row = row

    def __getitem__(self, leg: str) -> Share:
        weight, told = self._table.weights[leg], self._table.told[leg]
        place = self._table.places[leg].get(self._row)
        if place is None:
            return Share(None, 0.0, 0.0, weight)
        return Share(place + 1, float(told.raw[place]), float(told.normalised[place]), weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.weights)

    def __len__(self) -> int:
        return len(self._table.weights)

    def __repr__(self) -> str:
        return repr(dict(self))
