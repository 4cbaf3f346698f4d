"""Misspellings: how far two words are apart, and the nearest of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from rapidfuzz.distance import OSA

SHORTEST = 4  # letters of a word that is corrected


def allowance(word: str) -> int:
    """How many slips a word of that length is forgiven: one per five letters, none for the short ones.

    >>> [allowance(word) for word in ("rib", "heart", "pneumonia", "cardiomegaly")]
    [0, 1, 1, 2]
    """
    return 0 if len(word) < SHORTEST else max(1, len(word) // 5)


def shortened(word: str) -> set[str]:
    """The word, and what is left of it without any one letter: words one slip apart share one of these.

    >>> sorted(shortened("rib"))
    ['ib', 'rb', 'ri', 'rib']
    """
    return {word, *(word[:at] + word[at + 1 :] for at in range(len(word)))}


def slips(word: str, other: str, limit: int) -> int:
    """Letters added, dropped, replaced, or swapped with a neighbour; anything above `limit` is limit + 1.

    >>> slips("pnuemonia", "pneumonia", 2), slips("efusion", "effusion", 2), slips("mass", "nodule", 2)
    (1, 1, 3)
    """
    return int(OSA.distance(word, other, score_cutoff=limit))


def nearest(word: str, vocabulary: Iterable[str]) -> str | None:
    """The closest word that is near enough, the first by the alphabet of several, or None.

    >>> nearest("efusion", ["diffusion", "effusion", "mass"])
    'effusion'
    """
    limit = allowance(word)
    if not limit:
        return None
    near = [(slips(word, other, limit), other) for other in vocabulary if len(other) >= SHORTEST]
    best = min(near, default=(limit + 1, ""))
    return best[1] if best[0] <= limit else None
