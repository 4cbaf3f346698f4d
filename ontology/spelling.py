"""Misspellings: how far two words are apart, and the nearest of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST = 4  # letters of a word that is corrected


def distance(a: str, b: str, limit: int) -> int:
    """Damerau-Levenshtein (optimal string alignment): letters added, dropped, replaced, or swapped with a neighbour.

    Anything above `limit` is limit + 1.

    >>> distance("pnuemonia", "pneumonia", 2), distance("efusion", "effusion", 2), distance("mass", "nodule", 2)
    (1, 1, 3)
    """
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        now = [i]
        for j, other in enumerate(b, 1):
            cost = min(row[j] + 1, now[-1] + 1, row[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            now.append(cost)
        before, row = row, now
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)


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


def nearest(word: str, vocabulary: Iterable[str]) -> str | None:
    """The closest word that is near enough and begins with the same letter, or None."""
    limit = allowance(word)
    if not limit:
        return None
    near = [
        (distance(word, other, limit), other)
        for other in vocabulary
        if other[:1] == word[:1] and len(other) >= SHORTEST
    ]
    best = min(near, default=(limit + 1, ""))
    return best[1] if best[0] <= limit else None
