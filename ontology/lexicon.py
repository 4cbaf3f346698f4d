"""Names of concepts found in texts: a dictionary over stems that lets modifiers stand inside a name.

"mildly enlarged heart", "the heart is mildly enlarged" and "heart size: enlarged" are one name, "enlarged heart";
the names of the first source are taken in any order of their words. The longest name wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from ontology.graph import Ontology
from ontology.words import Vocabulary, Word

ANATOMY = frozenset(["T017", "T023", "T024", "T029", "T030", "T082"])
_SCOPES = {"NAME": 0, "EXACT": 1, "NARROW": 2, "RELATED": 3, "BROAD": 4, "LAY": 5}
_SKIPPED = 5  # modifiers in a row inside a name
_REORDERED = 3  # words of a name that are taken in any order
_LONGEST = 8  # words of a name that are matched at all
PREFIX = -1
NEGATIVES = frozenset(["not", "no", "without"])


class Mention(NamedTuple):
    """Words `first` to `last` (inclusive) name a concept.

    denies: they state the normal that denies it. whole: a "not" among them is part of the name.
    size: words of the name itself, without the modifiers inside it.
    """

    first: int
    last: int
    concept: int
    denies: bool = False
    whole: bool = False
    size: int = 1

    @property
    def width(self) -> int:
        """Words that it reaches over."""
        return self.last - self.first


@dataclass(frozen=True)
class Lexicon:
    """Names by their stems, joined by blanks, in one mapping each: a concept's number, or PREFIX.

    names: in all texts. lay: everyday names, in short queries only. normal: phrases that deny a concept.
    """

    vocabulary: Vocabulary
    concepts: Sequence[str]
    anatomy: frozenset[int]
    names: Mapping[str, int]
    lay: Mapping[str, int]
    normal: Mapping[str, int]

    def mentions(self, words: Sequence[Word], everyday: bool = False) -> list[Mention]:
        """Names from left to right, without overlap; everyday ones too where asked."""
        tables = (self.normal, self.lay, self.names) if everyday else (self.normal, self.names)
        starting = [self._best(tables, words, at) for at in range(len(words))]
        found: list[Mention] = []
        at = 0
        while at < len(words):
            best = starting[at]
            if best is None or self._is_overtaken(best, starting):
                at += 1
                continue
            found.append(best)
            found += self._coordinated(words, best)
            at = found[-1].last + 1
        return found

    def _best(self, tables: Sequence[Mapping[str, int]], words: Sequence[Word], at: int) -> Mention | None:
        best: tuple[int, int, int, str] | None = None
        denies = False
        for table in tables:
            match = self._longest(table, words, at)
            if match and (best is None or match[:2] > best[:2]):
                best, denies = match, table is self.normal
        if best is None:
            return None
        size, last, concept, key = best
        return Mention(at, -last, concept, denies, not NEGATIVES.isdisjoint(key.split()), size)

    def _is_overtaken(self, mention: Mention, starting: Sequence[Mention | None]) -> bool:
        """ "changes from cystic fibrosis": a name as long that starts inside this one and reaches beyond it.

        Of two that are as long, the tighter one: "heart failure with a large heart" is no "failure … heart".
        """
        inside = (starting[at] for at in range(mention.first + 1, mention.last + 1))
        return any(
            other and other.last > mention.last and (other.size, -other.width) >= (mention.size, -mention.width)
            for other in inside
        )

    def _longest(self, table: Mapping[str, int], words: Sequence[Word], at: int) -> tuple[int, int, int, str] | None:
        """(words of the name, -last word, concept, key) of the longest, tightest name from word `at`."""
        first = table.get(words[at].stem)
        exact = table.get(f"={_singular(words[at].surface)}", PREFIX)
        if first is None and exact == PREFIX:
            return None
        alone = exact if first in (None, PREFIX) else first
        best = None if alone == PREFIX or alone is None else (1, -at, alone, words[at].stem)
        waiting = [(words[at].stem, at, 1, 0, False)]
        while waiting:
            key, last, size, skipped, joining = waiting.pop()
            nxt = last + skipped + 1
            if nxt >= len(words) or words[nxt].breaks:
                continue
            word = words[nxt]
            joins = joining or word.comma or word.surface in ("and", "or")
            if not joins or (table is self.normal):
                longer = f"{key} {word.stem}"
                concept = table.get(longer)
                if concept is not None:
                    if concept != PREFIX and (best is None or (size + 1, -nxt) > best[:2]):
                        best = (size + 1, -nxt, concept, longer)
                    waiting.append((longer, nxt, size + 1, 0, False))
            skippable = table is self.normal and word.stem in self.vocabulary.coordinated
            skippable |= not joins and word.stem in self.vocabulary.modifiers
            if skippable and skipped < (2 * _SKIPPED if joins else _SKIPPED):
                waiting.append((key, last, size, skipped + 1, joins))
        return best

    def _coordinated(self, words: Sequence[Word], mention: Mention) -> Iterator[Mention]:
        """ "pleural effusion or thickening": the second name shares the first word of the first."""
        if mention.denies or mention.last == mention.first:
            return
        at = mention.last + 1
        if at + 1 >= len(words) or words[at].breaks or words[at].surface not in ("and", "or") or words[at + 1].breaks:
            return
        at += 1
        while at < len(words) - 1 and words[at].stem in self.vocabulary.modifiers and not words[at + 1].breaks:
            at += 1
        shared = f"{words[mention.first].stem} {words[at].stem}"
        concept = self.names.get(shared, PREFIX)
        if concept != PREFIX and concept != mention.concept and words[at].stem not in self.names:
            yield Mention(at, at, concept)


def compiled(ontology: Ontology, vocabulary: Vocabulary) -> Lexicon:
    """The dictionary of an ontology.

    Where concepts share a name, the most trusted source decides, then preferred names beat synonyms, and exact ones
    related ones. In phrases an everyday name beats another one of its source, or of a less trusted one.
    """
    ids = list(ontology.concepts)
    ranked: dict[tuple[str, ...], tuple[int, int, int]] = {}
    lay: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for number, concept in enumerate(ontology.concepts.values()):
        for text, scope, source in concept.synonyms:
            ours = source == 0
            key = vocabulary.key(text)
            if not 0 < len(key) <= _LONGEST or (not ours and _too_plain(key, vocabulary)):
                continue
            target = lay if scope == "LAY" else ranked
            if len(key) == 1 and not ours:
                key = (f"={_singular(text.strip().lower())}",)  # a stem alone is too loose: "cervical", "cervicitis"
            for n, order in enumerate(permutations(key) if ours and len(key) <= _REORDERED else (key,)):
                rank = (source, _SCOPES[scope] + (10 if n else 0), number)
                target[order] = min(target.get(order, rank), rank)
    for key in [key for key, rank in lay.items() if key in ranked and ranked[key][0] < rank[0]]:
        del lay[key]  # HPO's "collapsed lung" is a pneumothorax, ours is not
    numbers = {id: number for number, id in enumerate(ids)}
    normal = {
        order: (0, 0, numbers[id])
        for phrase, id in ontology.denials.items()
        for order in permutations(vocabulary.key(phrase))
    }
    anatomy = frozenset(n for n, c in enumerate(ontology.concepts.values()) if ANATOMY.intersection(c.types))
    return Lexicon(vocabulary, ids, anatomy, _table(ranked), _table(lay), _table(normal))


def _too_plain(key: tuple[str, ...], vocabulary: Vocabulary) -> bool:
    """A name made of modifiers, or of a few letters, says nothing by itself."""
    return all(stem in vocabulary.modifiers for stem in key) or (len(key) == 1 and len(key[0]) < 4)


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "is", "us")) else word


def _table(ranked: Mapping[tuple[str, ...], tuple[int, int, int]]) -> dict[str, int]:
    table = {" ".join(key): rank[2] for key, rank in ranked.items()}
    for key in ranked:
        for size in range(1, len(key)):
            table.setdefault(" ".join(key[:size]), PREFIX)
    return table
