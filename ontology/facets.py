"""Queries in everyday words, understood by what they are about: "liquid between the lung and the ribs".

A facet is a class of words (fluid, pleura, enlarged); a definition says which facets together mean a concept. This
is how ontologies define concepts themselves (genus and differentia), with words that people type. Only queries are
read so, where no name was found, or only one that says less ("lesion", in "small round lesion in the lung").
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ontology.spelling import nearest
from ontology.words import Vocabulary, Word
from retrieval.errors import Invalid


class Meaning(NamedTuple):
    """A concept's id, and the words that together mean it, in order."""

    concept: str
    words: tuple[int, ...]

    @property
    def first(self) -> int:
        return self.words[0]

    @property
    def last(self) -> int:
        return self.words[-1]


@dataclass(frozen=True)
class Facets:
    """words: stems of a phrase -> its facets. definitions: concept and the facets that mean it, in order of trust."""

    words: Mapping[tuple[str, ...], frozenset[str]]
    definitions: Sequence[tuple[str, frozenset[str]]]

    def meaning(self, words: Sequence[Word], right: Collection[str] = ()) -> Meaning | None:
        """The concept with the largest definition that the words fulfil. Stems in `right` are no misspellings."""
        found = self._found(words, right)
        held = frozenset(facet for _, _, facets in found for facet in facets)
        fitting = [(concept, facets) for concept, facets in self.definitions if facets <= held]
        if not fitting:
            return None
        concept, facets = max(fitting, key=lambda pair: len(pair[1]))
        used = [at for first, last, carried in found if carried & facets for at in range(first, last + 1)]
        return Meaning(concept, tuple(used))

    def _found(self, words: Sequence[Word], right: Collection[str]) -> list[tuple[int, int, frozenset[str]]]:
        """Phrases of facets from left to right, the longest first, misspelled words corrected."""
        stems = [self._corrected(word.stem, right) for word in words]
        longest = max(map(len, self.words), default=0)
        found = []
        at = 0
        while at < len(stems):
            for size in range(min(longest, len(stems) - at), 0, -1):
                facets = self.words.get(tuple(stems[at : at + size]))
                if facets:
                    found.append((at, at + size - 1, facets))
                    break
            else:
                size = 1
            at += size
        return found

    def _corrected(self, stem: str, right: Collection[str]) -> str:
        like = self._known.get(stem[:1], ())  # few slips are made in a word's first letter
        return stem if stem in like or stem in right else nearest(stem, like) or stem

    @cached_property
    def _known(self) -> Mapping[str, set[str]]:
        """The words of facets by their first letter."""
        known: dict[str, set[str]] = {}
        for stem in {stem for phrase in self.words for stem in phrase}:
            known.setdefault(stem[:1], set()).add(stem)
        return known


def read_facets(folder: Path, vocabulary: Vocabulary) -> Facets:
    """`facets.tsv` (facet, words parted by bars) and `definitions.tsv` (concept, facets joined by +), if there."""
    if not (folder / "facets.tsv").is_file():
        return Facets({}, ())
    words: dict[tuple[str, ...], frozenset[str]] = {}
    for facet, phrases in _pairs(folder / "facets.tsv"):
        for phrase in phrases.split("|"):
            key = vocabulary.key(phrase)
            words[key] = words.get(key, frozenset()) | {facet}
    known = frozenset().union(*words.values())
    definitions = [(concept, frozenset(facets.split("+"))) for concept, facets in _pairs(folder / "definitions.tsv")]
    for concept, facets in definitions:
        if not facets <= known:
            raise Invalid(
                f"definitions.tsv: '{concept}' names the facets {sorted(facets - known)}, which are not there"
            )
    return Facets(words, definitions)


def _pairs(path: Path) -> list[tuple[str, str]]:
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line]
    for line in lines:
        if len(line) != 2:
            raise Invalid(f"{path.name}: got {len(line)} columns, expected 2: {line[0]!r}")
    return [(first, second) for first, second in lines]
