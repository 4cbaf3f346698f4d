"""Queries for pictures in several wordings: a phrase is asked together with what else its finding is called.

A picture tower learns few words well, so one phrase says little; the mean of many says what they share (prompt
ensembles, Radford et al., https://arxiv.org/abs/2103.00020; pruned of outliers as BiomedCoOp does,
https://arxiv.org/abs/2411.15232).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from retrieval.types import Encoder, Item, Matrix

Wordings = Callable[[str], Sequence[str]]
"""Other ways to say what a text asks for; empty where it is not one thing alone."""

OUTLYING = 1.5  # deviations below the median likeness, from which a wording is left out
_KEPT = 512  # means


class Prompts:
    """An encoder whose text queries are joined by other wordings. Implements `retrieval.types.Encoder`.

    A query with wordings is the sum of two unit vectors, its own and the mean of the wordings. Documents and pictures
    are encoded as they are.
    """

    def __init__(self, encoder: Encoder, wordings: Wordings) -> None:
        self._encoder = encoder
        self._wordings = wordings
        self._mean = lru_cache(_KEPT)(self._mean_of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_queries(self, items: Sequence[Item]) -> Matrix:
        """(Q, D)."""
        return self.joined(items, self._encoder.encode_queries(items))

    def joined(self, items: Sequence[Item], vectors: Matrix) -> Matrix:
        """(Q, D) `vectors` of these queries, those in words joined by their wordings."""
        out = np.array(vectors)
        for row, item in enumerate(items):
            others = tuple(self._wordings(item.text)) if item.image is None else ()
            if others:
                out[row] = _unit(out[row] + self._mean(others))
        return out

    def _mean_of(self, wordings: tuple[str, ...]) -> Matrix:
        """(D,) the mean of the wordings that are not outliers."""
        vectors = self._encoder.encode_queries([Item(text=text) for text in wordings])  # (P, D)
        likeness = vectors @ _unit(vectors.mean(0))  # (P,)
        below = np.median(likeness) - likeness
        spread = 1.4826 * float(np.median(np.abs(below)))  # a normal distribution's deviation, from its quartiles
        return _unit(vectors[below <= max(OUTLYING * spread, 1e-6)].mean(0))


def _unit(vector: Matrix) -> Matrix:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)
