"""Text to the words that names are matched by: folded, stemmed, with their places and the breaks between them."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import Stemmer

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_PLAIN = re.compile(r"\s*(?:[-/’':]\s?)?|\s*\n\s*(?=[a-z])")  # what may lie between two words of one mention
_MAX_LETTERS = 60
# British spelling, read as American: oedema, haemothorax; visualised, hepatisation.
_DIGRAPH = re.compile(r"(?<=[a-z])(?:ae|oe)|^oe")
_ISE = re.compile(r"(?<=[a-z]{3})is(?=(?:e[ds]?|ing|ations?)$)")


class Word(NamedTuple):
    """A stem, the word as written in lower case, its place, and whether a new clause begins before it."""

    stem: str
    surface: str
    start: int
    end: int
    breaks: bool
    comma: bool


@dataclass(frozen=True)
class Vocabulary:
    """Words by what they do in a mention: `words.json` of an ontology's folder, or of the shipped one.

    stop: never part of a name. modifiers: may stand inside a mention without being part of the name.
    coordinated: may stand between the parts of a coordination, "heart size and mediastinal contours are normal".
    """

    irregular: dict[str, str] = field(default_factory=dict)
    stop: frozenset[str] = frozenset()
    modifiers: frozenset[str] = frozenset()
    coordinated: frozenset[str] = frozenset()
    _stems: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        return cls.of(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def of(cls, content: dict[str, Any]) -> Vocabulary:
        """From the content of a `words.json`."""
        bare = cls(irregular=content["irregular"], stop=frozenset(content["stop"].split()))
        return cls(
            content["irregular"],
            bare.stop,
            frozenset(map(bare.stem, content["modifiers"].split())),
            frozenset(map(bare.stem, content["coordinated"].split())),
        )

    @cached_property
    def _stemmer(self) -> Stemmer.Stemmer:
        return Stemmer.Stemmer("english")

    def stem(self, word: str) -> str:
        """The stem of a word in lower case."""
        known = self._stems.get(word)
        if known is None:
            plain = _ISE.sub("iz", _DIGRAPH.sub("e", self.irregular.get(word, word)[:_MAX_LETTERS]))
            known = self._stemmer.stemWord(plain)
            if len(self._stems) < 200_000:
                self._stems[word] = known
        return known

    def words(self, text: str) -> list[Word]:
        """The words of a text that are no stop words.

        >>> [w.stem for w in Vocabulary(stop=frozenset(["the", "of"])).words("Blunting of the costophrenic angles")]
        ['blunt', 'costophren', 'angl']
        """
        found: list[Word] = []
        last, breaks, comma = 0, True, False
        for match in _WORD.finditer(text):
            start, end = match.span()
            gap = text[last:start]
            if gap != " " and not _PLAIN.fullmatch(gap):
                comma = comma or gap.strip() == ","
                breaks = breaks or gap.strip() != ","
            last = end
            surface = folded(match[0])
            if surface in self.stop:
                continue
            found.append(Word(self.stem(surface), surface, start, end, breaks, comma))
            breaks = comma = False
        return found

    def key(self, name: str) -> tuple[str, ...]:
        """The stems that a name is matched by; empty where it has none."""
        return tuple(word.stem for word in self.words(name))


def folded(word: str) -> str:
    """Lower case without accents and possessive."""
    word = word.lower()
    if not word.isascii():
        word = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c)).replace(
            "’", "'"
        )
    return word.removesuffix("'s")
