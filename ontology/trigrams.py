"""Names by their character 3-grams: the exact counterpart of scispaCy's approximate candidate generator.

Both see the same vectors: TF-IDF over the 3-grams inside blank-padded words, rows of unit length (scikit-learn's
``char_wb`` analyzer, smooth idf). Here they are plain arrays that load without scikit-learn and nmslib.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Candidate = tuple[str, float]  # a name and its cosine


@dataclass(frozen=True)
class Trigrams:
    """An inverted table: the postings of gram g are ``rows[starts[g]:starts[g + 1]]`` with their `weights`."""

    names: Sequence[str]
    grams: Mapping[str, int]
    idf: NDArray[np.float32]
    starts: NDArray[np.int64]
    rows: NDArray[np.int32]
    weights: NDArray[np.float32]

    def __call__(self, texts: Sequence[str], k: int) -> list[list[Candidate]]:
        """The k nearest names of each text with their cosines, best first; none for a text without a known gram."""
        return [self._nearest(text, k) for text in texts]

    def _nearest(self, text: str, k: int) -> list[Candidate]:
        vector = self.vector(text)
        if not vector:
            return []
        held = [slice(self.starts[gram], self.starts[gram + 1]) for gram in vector]
        rows = np.concatenate([self.rows[gram] for gram in held])
        weights = np.concatenate([self.weights[gram] * w for gram, w in zip(held, vector.values(), strict=True)])
        scores = np.bincount(rows, weights, len(self.names))
        like = np.flatnonzero(scores > 0)
        if len(like) > k:
            like = like[np.argpartition(-scores[like], k)[:k]]
        found = [(self.names[row], float(scores[row])) for row in like.tolist()]
        return sorted(found, key=lambda candidate: (-round(candidate[1], 5), candidate[0]))

    def vector(self, text: str) -> dict[int, float]:
        """Gram number -> weight, of unit length."""
        counts = Counter(number for gram in split(text) if (number := self.grams.get(gram)) is not None)
        weighted = {number: count * float(self.idf[number]) for number, count in counts.items()}
        length = math.sqrt(sum(value * value for value in weighted.values())) or 1.0
        return {number: value / length for number, value in weighted.items()}

    def matrix(self) -> Any:
        """(names, grams) scipy CSR matrix, the rows that a nearest-neighbour index is built from."""
        from scipy.sparse import csc_matrix

        shape = (len(self.names), len(self.idf))
        return csc_matrix((self.weights, self.rows, self.starts), shape=shape).tocsr()


def split(text: str) -> list[str]:
    """The 3-grams of the words of a text.

    >>> split("Big toe")
    [' bi', 'big', 'ig ', ' to', 'toe', 'oe ']
    """
    grams = []
    for word in text.lower().split():
        padded = f" {word} "
        grams += [padded[at : at + 3] for at in range(max(1, len(padded) - 2))]
    return grams


def fitted(names: Sequence[str]) -> Trigrams:
    """The table of `names`, one row each."""
    counts = [Counter(split(name)) for name in names]
    frequency = Counter(gram for found in counts for gram in found)
    grams = {gram: number for number, gram in enumerate(sorted(frequency))}
    idf = np.array([math.log((1 + len(names)) / (1 + frequency[gram])) + 1 for gram in grams], np.float32)
    postings: list[list[tuple[int, float]]] = [[] for _ in grams]
    for row, found in enumerate(counts):
        weighted = [(grams[gram], count * float(idf[grams[gram]])) for gram, count in found.items()]
        length = math.sqrt(sum(value * value for _, value in weighted)) or 1.0
        for number, value in weighted:
            postings[number].append((row, value / length))
    flat = [pair for held in postings for pair in held]
    return Trigrams(
        names,
        grams,
        idf,
        np.cumsum([0, *map(len, postings)]).astype(np.int64),
        np.array([row for row, _ in flat], np.int32),
        np.array([weight for _, weight in flat], np.float32),
    )
