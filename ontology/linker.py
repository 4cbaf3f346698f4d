"""Texts to findings: names by dictionary, misspellings by candidate generation, everyday words by their facets.

Documents go through scispaCy (`ontology.pipeline`): sentence splitter, abbreviation detector, and candidates from its
generator over our knowledge base. Queries take the same road on compiled tables alone: no spaCy, no torch. A test
holds the two equal.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ontology.assertion import Reading, readings
from ontology.cues import TRIGGERS
from ontology.facets import Meaning
from ontology.labels import hedge
from ontology.lexicon import Mention
from ontology.spelling import allowance, shortened, slips
from ontology.tables import CHEST, GRAM, LETTERS, Tables, load_tables
from ontology.trigrams import Candidate
from ontology.understanding import understood
from ontology.words import Word
from retrieval.errors import NotFound
from retrieval.types import Assertion, Encoder, Finding

if TYPE_CHECKING:
    from ontology.pipeline import Pipeline

Candidates = Callable[[Sequence[str], int], list[list[Candidate]]]

VERSION = 9  # of the rules: raise it when the same tables give other findings
LEANING = ("probable", "alternative", "borderline")  # kinds of hedges, see `ontology.labels`
_PHRASE = 14  # words of a query that is read in everyday words
_NEIGHBOURS = 10  # names looked at for a misspelled one
_REMEMBERED = 100_000  # spellings
_NORMAL = re.compile(r"\b(?:normal|unremarkable|clear|intact|wnl|limits)\b")


class Span(NamedTuple):
    """Where a text names a concept. See `ontology.lexicon.Mention`."""

    start: int
    end: int
    concept: int
    denies: bool = False
    whole: bool = False


class Spelled(NamedTuple):
    """The name that some words misspell, its concept and by how many slips."""

    name: str
    concept: int
    slips: int


class Dictionary:
    """The default linker. Implements `retrieval.types.Linker`."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        rules = hashlib.sha256(TRIGGERS.read_bytes()).hexdigest()
        self.digest = hashlib.sha256(f"{tables.digest} {VERSION} {rules}".encode()).hexdigest()
        self._spelled: dict[str, Spelled | None] = {}

    def link(self, texts: Sequence[str]) -> list[tuple[Finding, ...]]:
        """Findings of document texts, in the order of their spans."""
        return [
            self._findings(text, [*self._spans(text, self.pipeline.candidates), *more])
            for text, more in zip(texts, self.pipeline.abbreviations(texts, self._long_form), strict=True)
        ]

    def link_queries(self, texts: Sequence[str]) -> list[tuple[Finding, ...]]:
        """Findings of queries; a phrase is read in everyday words too, a whole report as a document is."""
        return [self._findings(text, self._spans(text, self.tables.trigrams)) for text in texts]

    def understood(self, text: str, findings: Sequence[Finding]) -> float:
        """Share of a query that its findings make out. See `ontology.understanding`."""
        return understood(self.tables, text, findings)

    def name(self, concept: str) -> str:
        """Preferred name; the id itself where this ontology does not have it."""
        number = self.tables.numbers.get(concept)
        return concept if number is None else self.tables.names[number]

    @cached_property
    def pipeline(self) -> Pipeline:
        """spaCy and scispaCy, loaded when the first document is linked."""
        from ontology.pipeline import Pipeline

        return Pipeline(self.tables)

    def _long_form(self, text: str) -> int | None:
        """The concept that the long form of an abbreviation names, if it is that and nothing else."""
        words = self.tables.lexicon.vocabulary.words(text)
        found = [m for m in self.tables.lexicon.mentions(words) if not m.denies]
        return found[0].concept if len(found) == 1 and len(words) <= found[0].last - found[0].first + 2 else None

    def _spans(self, text: str, candidates: Candidates) -> list[Span]:
        words = self.tables.lexicon.vocabulary.words(text)
        everyday = _is_phrase(text, words)
        found = self.tables.lexicon.mentions(words, everyday)
        found += self._misspelled(words, found, candidates, everyday)
        named = [mention for mention in found if mention.concept not in self.tables.lexicon.anatomy]
        if everyday:
            named = self._meant(words, named)
        return [Span(words[m.first].start, words[m.last].end, m.concept, m.denies, m.whole) for m in named]

    def _misspelled(
        self, words: Sequence[Word], found: Sequence[Mention], candidates: Candidates, everyday: bool
    ) -> list[Mention]:
        """Names with a slip in them: runs of words outside any name, at least one of which no name has."""
        covered = {at for mention in found for at in range(mention.first, mention.last + 1)}
        strange = {at for at, word in enumerate(words) if at not in covered and self._is_strange(word, everyday)}
        runs = sorted({run for at in strange for run in _runs(words, at, covered)}, key=lambda r: (-len(r), r.start))
        texts = {run: " ".join(words[at].surface for at in run) for run in runs}
        self._spell([text for text in texts.values() if len(text) >= LETTERS], candidates)
        taken: set[int] = set()
        extra = []
        for run, text in texts.items():
            spelled = self._spelled.get(text)
            if spelled and not taken.intersection(run) and (everyday or self._is_plain(spelled)):
                taken.update(run)
                extra.append(Mention(run.start, run.stop - 1, spelled.concept))
        return extra

    def _is_strange(self, word: Word, everyday: bool) -> bool:
        """True for a word that no name has; in a document, where most such words are right, one slip from one."""
        known = self.tables.known
        if word.stem in known or word.surface in known or not word.surface.isalpha():
            return False
        return everyday or not self.tables.near.isdisjoint(shortened(word.surface))

    def _is_plain(self, spelled: Spelled) -> bool:
        """What documents are corrected to: a trusted name that they use, one slip away. "Mitosis" is no miosis."""
        words = self.tables.lexicon.vocabulary.words(spelled.name)
        return spelled.slips < 2 and spelled.name in self.tables.trusted and bool(self.tables.lexicon.mentions(words))

    def _spell(self, texts: Sequence[str], candidates: Candidates) -> None:
        """Remember for each text the name that it misspells, or None."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._spelled]
        if len(self._spelled) > _REMEMBERED:
            self._spelled.clear()
        for text, near in zip(fresh, candidates(fresh, _NEIGHBOURS) if fresh else (), strict=True):
            self._spelled[text] = self._slip(text, near)

    def _slip(self, text: str, near: Sequence[Candidate]) -> Spelled | None:
        limit = allowance(text)
        best: tuple[int, str] = (limit + 1, "")
        for name, _ in near:
            if name[0] == text[0] and name in self.tables.named:
                best = min(best, (slips(text, name, limit), name))
        return Spelled(best[1], self.tables.named[best[1]], best[0]) if best[0] <= limit else None

    def _meant(self, words: Sequence[Word], named: Sequence[Mention]) -> list[Mention]:
        """The names, and what clauses mean by their facets: beside the names, or where they say less."""
        found = list(named)
        for clause in self._joined(words, named):
            meaning = self._meaning(words, clause)
            if meaning is None:
                continue
            met = [m for m in found if m.first <= meaning.last and meaning.first <= m.last]
            if all(self._says_less(words, mention, meaning) for mention in met):
                found = [mention for mention in found if mention not in met] + [self._mention(meaning)]
                continue
            rest = [self._meaning(words, run) for run in _free(clause, found)]
            found += [self._mention(meaning) for meaning in rest if meaning]
        return found

    def _joined(self, words: Sequence[Word], named: Sequence[Mention]) -> list[range]:
        """The clauses, less those commas beside which nothing is said: "filled with fluid, pus or blood"."""
        out: list[range] = []
        silent = False
        for clause in _clauses(words):
            inside = any(m.first in clause for m in named)
            says = inside or self._meaning(words, clause) is not None
            if out and not words[clause.start].breaks and (silent or not says):
                out[-1] = range(out[-1].start, clause.stop)
                silent = silent and not says
            else:
                out.append(clause)
                silent = not says
        return out

    def _meaning(self, words: Sequence[Word], run: range) -> Meaning | None:
        meaning = self.tables.facets.meaning([words[at] for at in run], self.tables.known)
        return meaning and Meaning(meaning.concept, tuple(run.start + at for at in meaning.words))

    def _mention(self, meaning: Meaning) -> Mention:
        return Mention(meaning.first, meaning.last, self.tables.numbers[meaning.concept], whole=True)

    def _says_less(self, words: Sequence[Word], mention: Mention, meaning: Meaning) -> bool:
        """True where the meaning has every word of the name, and more: "scarred pleura" is no mere scar.

        A name that the ontology merely knows from elsewhere yields to what is as long: "small abnormal growth".
        """
        if mention.concept not in self.tables.own:
            return len(meaning.words) >= mention.size
        modifiers = self.tables.lexicon.vocabulary.modifiers
        inside = range(mention.first, mention.last + 1)
        kept = all(at in meaning.words or words[at].stem in modifiers for at in inside)
        return kept and not mention.denies and any(at not in inside for at in meaning.words)

    def _findings(self, text: str, spans: Sequence[Span]) -> tuple[Finding, ...]:
        ordered = sorted(set(spans))
        for span in ordered:
            if span.whole:  # "not fully expanded": the negation is part of the name
                text = text[: span.start] + "x" * (span.end - span.start) + text[span.end :]
        said = readings(text, [(span.start, span.end) for span in ordered])
        ids = self.tables.lexicon.concepts
        return tuple(
            Finding(ids[span.concept], assertion, (span.start, span.end))
            for span, reading in zip(ordered, said, strict=True)
            for assertion in (_denied(reading) if span.denies else _asserted(reading))
        )


def load_linker(name_or_path: str | None, cache: Path, encoder: Encoder | None = None) -> Dictionary:
    """A linker by name (None: `chest`), or over an ontology of one's own: a file or folder.

    Other names are `radgraph` and trained scispaCy models (`en_core_sci_sm` ...); `sapbert` needs its `encoder`.
    All of them link to `chest`. Raises NotFound and Invalid for what is no ontology, or is not installed.
    """
    name = name_or_path or "chest"
    if name == "chest":
        return Dictionary(load_tables(CHEST, cache))
    if name == "radgraph":
        from ontology.radgraph import RadGraph

        return RadGraph(load_tables(CHEST, cache))
    if name == "sapbert":
        from ontology.named import Neighbours

        if encoder is None:
            raise NotFound("ontology 'sapbert': got no encoder, expected SapBERT's weights; use 'chest'")
        return Neighbours(load_tables(CHEST, cache), encoder)
    if name.startswith(("en_core_sci_", "en_ner_")):
        from ontology.named import Trained

        return Trained(load_tables(CHEST, cache), name)
    path = Path(name)
    if not path.exists():
        raise NotFound(f"ontology: got '{path.name}', expected 'chest' or the path of an ontology file or folder")
    return Dictionary(load_tables(path, cache))


def _is_phrase(text: str, words: Sequence[Word]) -> bool:
    return len(words) <= _PHRASE and sum(word.breaks for word in words) <= 2 and "\n" not in text.strip()


def _runs(words: Sequence[Word], at: int, covered: set[int]) -> list[range]:
    """Runs of up to three neighbouring words around word `at`, inside one clause and outside names."""
    found = []
    for size in range(1, GRAM + 1):
        for first in range(max(0, at - size + 1), min(at, len(words) - size) + 1):
            run = range(first, first + size)
            if not covered.intersection(run) and not any(words[n].breaks or words[n].comma for n in run[1:]):
                found.append(run)
    return found


def _free(clause: range, mentions: Sequence[Mention]) -> list[range]:
    """The runs of a clause's words that lie in no mention."""
    taken = {at for mention in mentions for at in range(mention.first, mention.last + 1)}
    cuts = [clause.start - 1, *(at for at in clause if at in taken), clause.stop]
    return [range(a + 1, b) for a, b in pairwise(cuts) if b - a > 1]


def _clauses(words: Sequence[Word]) -> list[range]:
    starts = [at for at, word in enumerate(words) if word.breaks or word.comma or at == 0]
    return [range(first, last) for first, last in zip(starts, [*starts[1:], len(words)])]


def _denied(reading: Reading) -> list[Assertion]:
    """What a statement of the normal says of the finding: affirmed, it denies it, and so does one more of its kind."""
    plain = reading.assertion is Assertion.affirmed or _NORMAL.search(reading.cue)
    return [Assertion.negated if plain else Assertion.uncertain]


def _asserted(reading: Reading) -> list[Assertion]:
    """A doubt that leans to presence counts as both: "probable edema", "atelectasis versus infiltrate".

    An index keeps nothing but concepts and assertions, and must tell it from one that leaves all open ("may be"), as
    it must tell what a text says of the past ("history of a mass") from what it says of today.
    """
    kind = hedge(reading)
    if kind in LEANING:
        return [reading.assertion, Assertion.affirmed]
    return [reading.assertion, Assertion.uncertain] if kind == "past" else [reading.assertion]
