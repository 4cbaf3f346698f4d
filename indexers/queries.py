"""Queries to learn an index from where nobody has asked yet: cut from the documents, or drawn around their vectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from retrieval.types import Matrix

Ask = Callable[[str, Sequence[str] | Matrix], Matrix | None]
"""(space, texts, or (Q, D) stored vectors of pictures) -> (Q, D) as queries; None where the space takes no texts."""

CUT = 4_096  # windows of a collection that are encoded
SHORTEST, LONGEST = 8, 32  # words of a window where a text has no sentence marks, and of what is cut from a sentence
MOST = 8_192  # queries to learn from; a few more than learning gets through
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_NEAR = 0.5  # length of the noise around a unit vector


def windows(text: str, rng: np.random.Generator) -> Iterator[str]:
    """The sentences of a text; of what is longer than `LONGEST` words, windows of 8 to 32 words.

    What has fewer than three words asks for nothing and is left out.
    """
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        while len(words) > LONGEST:
            length = int(rng.integers(SHORTEST, LONGEST + 1))
            yield " ".join(words[:length])
            words = words[length:]
        if len(words) >= 3:
            yield " ".join(words)


def some_windows(texts: Iterable[str], count: int = CUT, seed: int = 0) -> list[str]:
    """Up to `count` different windows, every window of `texts` with equal chance; one pass, little memory."""
    rng = np.random.default_rng(seed)
    kept: list[str] = []
    seen = 0
    for text in texts:
        for window in windows(text, rng):
            seen += 1
            if len(kept) < count:
                kept.append(window)
            elif (place := int(rng.integers(seen))) < count:
                kept[place] = window
    return list(dict.fromkeys(kept))


def perturbed(vectors: Matrix, count: int, seed: int) -> Matrix:
    """(count, D) unit vectors around rows of `vectors` (N, D), every row as often as any other.

    They lie in the directions in which the vectors themselves differ: a row is moved towards other rows.
    """
    rng = np.random.default_rng(seed)
    picked = np.resize(rng.permutation(len(vectors)), count)
    others = vectors[rng.integers(len(vectors), size=(count, 2))]
    moved: Matrix = vectors[picked] + _NEAR * (others[:, 0] - others[:, 1])
    moved /= np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return moved
