"""One number that means the same everywhere: could an unrelated query have scored as high?

When a collection is built, its legs answer two sets of queries: *related* ones, cut out of its own
documents, and *unrelated* ones, everyday phrases and patterns. With F the distribution of the best
score of related queries and U that of unrelated ones, the confidence of a score s is

    F(s) / (F(s) + 1 - U(s))

It rises with s from 0 to 1. At 0.5 as many unrelated queries reach s as related ones stay below it:
the equal-error point, whatever the encoder, the leg or the collection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.types import Share

HYBRID = "hybrid"
MIN_SAMPLE = 20  # fewer queries than this and the collection says nothing rather than something vague

UNRELATED = (
    "how to bake sourdough bread", "cheap flights to lisbon in june", "football results last weekend",
    "guitar chords for beginners", "best hiking boots for wet weather", "history of the roman empire",
    "replace the battery of a laptop", "tomato plants with yellow leaves", "mortgage rates next year",
    "lyrics of a love song", "how do volcanoes erupt", "train timetable to berlin", "chess opening for black",
    "recipe for vegetable curry", "used cars under five thousand", "learn to swim as an adult",
    "the tallest building in the world", "wedding invitation wording", "how to tie a bow tie",
    "planets in the solar system", "paint colours for a small kitchen", "dog training for puppies",
    "stock market crash of 1929", "write a cover letter", "football world cup winners", "knitting a simple scarf",
    "visa rules for japan", "medieval castles in france", "fix a leaking tap", "moon phases this month",
    "what is a black hole", "vegan chocolate cake", "electric bicycle range", "summer festivals in spain",
    "clean a cast iron pan", "parliament election results", "camera lens for portraits", "growing basil indoors",
    "jazz records of the fifties", "tax return deadline", "dinosaurs of the jurassic", "how to juggle three balls",
    "river cruise on the danube", "python list comprehension", "second hand furniture", "story of the titanic",
    "spanish verbs in the past tense", "birthday gift for a teenager", "museum opening hours", "wind turbines at sea",
    "lego castle instructions", "coffee grinder settings", "why is the sky blue", "capital of australia",
    "skiing in the alps", "bird songs at dawn", "novel about a detective", "rent a bicycle in amsterdam",
    "pizza dough without yeast", "board games for two players",
)  # fmt: skip


class Calibration(NamedTuple):
    """Best scores of one leg for one kind of query, each ascending."""

    related: Sequence[float] | NDArray[np.float64]
    unrelated: Sequence[float] | NDArray[np.float64]

    def confidence(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """(K,) raw scores to (K,) values in [0, 1].

        >>> Calibration([4, 5, 6, 7], [1, 2, 3, 4]).confidence(np.array([0, 4, 9], np.float32)).tolist()
        [0.0, 0.5, 1.0]
        """
        below = np.searchsorted(np.asarray(self.related), scores, side="right") / len(self.related)
        above = 1 - np.searchsorted(np.asarray(self.unrelated), scores, side="left") / len(self.unrelated)
        total = below + above
        # Between two samples that do not overlap neither counts: no evidence either way.
        return np.asarray(np.where(total > 0, below / np.where(total > 0, total, 1), 0.5))


Calibrations = Mapping[str, Mapping[str, Calibration]]  # kind of query -> leg -> calibration


def to_json(calibrations: Calibrations) -> dict[str, dict[str, list[list[float]]]]:
    """Plain lists, with scores to five digits."""
    return {
        kind: {leg: [[round(float(s), 5) for s in scores] for scores in c] for leg, c in legs.items()}
        for kind, legs in calibrations.items()
    }


def from_json(data: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Calibrations:
    return {
        kind: {leg: Calibration(*(np.asarray(some) for some in scores)) for leg, scores in legs.items()}
        for kind, legs in data.items()
    }


def cut(text: str, words: int, rng: np.random.Generator) -> str | None:
    """A run of words out of a text: a query to which that text is related. None where the text is shorter."""
    found = text.split()
    if len(found) < words:
        return None
    start = int(rng.integers(0, len(found) - words + 1))
    return " ".join(found[start : start + words])


def combined(
    shares: Sequence[Mapping[str, Share]], calibrations: Mapping[str, Calibration], words: int
) -> NDArray[np.float64] | None:
    """(K,) confidence of hits from their parts, None where no leg is calibrated.

    Each leg's own confidence, averaged with the weights that fused them, then calibrated once more
    as ``hybrid``. BM25 grows with the length of a query, so it counts per distinct word.
    """
    legs = sorted({leg for parts in shares for leg in parts} & set(calibrations) - {HYBRID})
    if not legs:
        return None
    values, weights = np.zeros(len(shares)), np.zeros(len(shares))
    for leg in legs:
        held = [parts.get(leg) for parts in shares]
        raw = np.array([share.raw if share else 0.0 for share in held], np.float32)
        weight = np.array([share.weight if share else 0.0 for share in held])
        values += weight * calibrations[leg].confidence(raw / words if leg == "lexical" else raw)
        weights += weight
    mean = np.divide(values, weights, out=np.zeros_like(values), where=weights > 0)
    fused = any(len(parts) > 1 for parts in shares) and HYBRID in calibrations
    return calibrations[HYBRID].confidence(mean.astype(np.float32)) if fused else mean
