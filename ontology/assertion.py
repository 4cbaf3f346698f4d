"""Whether a text affirms, denies or doubts what it mentions: ConText-style scopes over cue phrases.

A cue opens a scope over its clause (Harkema et al. 2009). A clause ends with its sentence, with a word such as
"but", and where a list turns into a statement of its own: "no effusion, heart is enlarged". Which cues there
are, and in which direction they work, is data (`triggers/triggers.txt`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from ontology.cues import Cue, Role, bag, find, misplaced, words
from ontology.sentences import sentences
from retrieval.types import Assertion

_FINITE = bag(
    "is are was were has have had does did shows show showed demonstrates demonstrate appears appear remains remain "
    "persists persist developed develops became becomes continues continued reports presents presented underwent "
    "received started complains stayed looks looked measures measured extends suggests suggest represents "
    "represent may might could can will would should improved worsened persisted occurred began returned recurred "
    "increased decreased"
)
_EXISTS = bag(
    "seen identified noted present demonstrated visualized visualised evident appreciated detected found observed "
    "apparent visible shown suspected reported palpable"
)
_SUBJECTS = bag("there he she it they we i patient pt")
# A list of things denied is bare; what comes with an article, a size or a course is stated.
_STATED = bag(
    "a an mild mildly moderate moderately minimal minimally small stable unchanged persistent persisting trace tiny "
    "mild-to-moderate slight slightly low lower decreased worsening improved improving increasing bibasilar "
    "multiple several some severe severely residual interval old healed healing chronic"
)
_SIDED = bag("left right bilateral bilaterally")
_LINKS = bag("or nor and/or")
_BREAKS = frozenset([",", ";", ":", "(", ")", "-", "and", "with", "of", "in", "for", "to", "but", "from", "without"])
_REOPENS = bag("with but consistent compatible")
_COUNTS = bag("one two three 1 2 3 more left right upper lower either few")
_LISTING = re.compile(r"differential|includ|considerations|possibilit")
_STOP = Role("stop")
_PRONOUNS = bag("this that it these those they which all both none each either who now then later")
_AUXILIARIES = bag(
    "is are was were be been being seems appears appear remains remain felt thought considered deemed judged believed "
    "initially originally first briefly strongly also very highly still clinically radiographically highly therefore "
    "most has have had to would should will may might could can"
)
_SUSPECTED = bag("suspected questioned entertained raised feared possible")  # "was suspected, but this was ruled out"
_NEAR = 4  # words that a near cue reaches over
_FAR_BACK = 14  # words that a cue behind the finding reaches back over
_PREFIX = re.compile(r"(?:\b(?:non|no|not)-?|\bnon )$", re.IGNORECASE)
_MINUS, _PLUS = re.compile(r"(?<!\S)-$"), re.compile(r"(?<!\S)\+\s?[A-Za-z]")  # "+cough, -fever"
_EMPTY_BOX = re.compile(r"(?:\[ ?\]|\( ?\)|☐) ?$")
_INSIDE = frozenset(["not", "no", "without"])

_SECTION = re.compile(
    r"(?im)(?:^|(?<=[.;:?]\s)|(?<=\n))[ \t]*(?:"
    r"(?P<reason>(?:clinical |patient )?(?:indications?|information|question)|clinical (?:data|statement)"
    r"|reason for (?:the )?(?:exam|examination|study|visit|referral|this exam\w*|procedure|test|consult\w*)"
    r"|(?:clinical|patient|relevant|pertinent|brief|provided) history"
    r"|history(?!:[^.\n]*\b(?:was|who|is an?|presented)\b)"
    r"|clinical (?:history|indication)s?(?:/|\s+and\s+)\w+|indication/history|signs? (?:and|/) symptoms?"
    r"|ordering diagnosis|rule out)"
    r"|(?P<family>family (?:medical )?history|fh|fhx|fam hx)"
    r"|(?P<title>findings|impression|conclusions?|technique|comparison|procedure|exam(?:ination)?|assessment|plan"
    r"|results?|hospital course|physical exam(?:ination)?|medications|past medical history|laboratory data)"
    r"|(?P<other>[a-z][a-z /&,()-]{1,48}(?=[ \t]*:|[ \t]-[ \t])))[ \t]*(?::(?!\d)|[ \t]-[ \t]|(?=\r?\n))"
)
_RELATIVE = re.compile(
    r"\b(?:mother|father|brother|sister|aunt|uncle|grandmother|grandfather|grandparents?|cousin|sibling|parents?"
    r"|mom|dad|son|daughter|relatives?|family history|maternal|paternal|roommate)s?\b"
    r"(?!['’]?s? (?:states|says|reports|noted|stated|reported|denies|brought|notes))"
    r"(?=[^.;]*\b(?:had|has|with|died|of|who|history|also|have|diagnosed|for)\b)",
    re.IGNORECASE,
)
_OWN = re.compile(r";|\b(?:patient|pt)\b(?!['’])", re.IGNORECASE)  # from here on, the patient is spoken of again
_PAST = re.compile(
    r"\b(?:history of|h/o|hx of|hx|prior|previous|previously|status post|s/p|old|past)\W+(?:\w+\W+){0,4}$"
    r"|\bon (?:an? |the )?(?:previous|prior|old|earlier|outside)\b[^.;]*,[^,.;]*\b(?:was|were)\b[^,.;]*$",
    re.IGNORECASE,
)
_SEEN_BEFORE = re.compile(
    r"\W+(?:(?:was|were) )?(?:seen|noted|described|present|identified|reported|demonstrated) on "
    r"(?:an? |the )?(?:previous|prior|old|earlier|outside)\b"
    r"(?![^.;]*\b(?:has|have|is|are|again|remains?|persists?|now|unchanged|stable|currently)\b)",
    re.IGNORECASE,
)


class Reach(NamedTuple):
    """A cue that reaches a span. separated: by an item of a list at least."""

    role: Role
    text: str
    separated: bool


class Reading(NamedTuple):
    """What a text says of one span, and the cue that decided it ("" where none did).

    An affirmed reading has a cue where the text speaks of the past ("past").
    """

    assertion: Assertion
    cue: str


def assertions(text: str, spans: Sequence[tuple[int, int]]) -> list[Assertion]:
    """One assertion per span of character offsets, in the order given.

    >>> text = "No effusion, pneumothorax or edema. Possible nodule; cardiomegaly."
    >>> targets = ["effusion", "pneumothorax", "edema", "nodule", "cardiomegaly"]
    >>> spans = [(text.index(word), text.index(word) + len(word)) for word in targets]
    >>> [str(assertion) for assertion in assertions(text, spans)]
    ['negated', 'negated', 'negated', 'uncertain', 'affirmed']
    """
    return [reading.assertion for reading in readings(text, spans)]


def readings(text: str, spans: Sequence[tuple[int, int]]) -> list[Reading]:
    """As `assertions`, with the cue that decided."""
    if not spans:
        return []
    ranges = sentences(text, spans)
    starts = [start for start, _ in ranges]
    sections = _sections(text)
    parsed: dict[int, _Sentence] = {}
    found = []
    for span in spans:
        number = max(0, bisect_right(starts, span[0]) - 1)
        if number not in parsed:
            start, end = ranges[number] if ranges else (0, len(text))
            parsed[number] = _Sentence(text, start, end)
        found.append(_in_context(text, span, parsed[number], sections))
    return found


def _sections(text: str) -> list[tuple[int, str]]:
    """Where sections start, and of which kind: only reason and family matter."""
    if ":" not in text and "\n" not in text:
        return []
    return [(match.end(), str(match.lastgroup)) for match in _SECTION.finditer(text)]


def _in_context(text: str, span: tuple[int, int], sentence: _Sentence, sections: list[tuple[int, str]]) -> Reading:
    reading = sentence.reading(span)
    if reading.assertion is not Assertion.affirmed:
        return reading
    at = bisect_right(sections, (span[0], "~")) - 1
    if at >= 0 and sections[at][1] in ("reason", "family") and "\n\n" not in text[sections[at][0] : span[0]].lstrip():
        return Reading(Assertion.uncertain, sections[at][1])
    before = text[sentence.start : span[0]]
    if _RELATIVE.search(_OWN.split(before)[-1]):
        return Reading(Assertion.uncertain, "family")
    past = _PAST.search(before) or _SEEN_BEFORE.match(text, span[1])
    return Reading(Assertion.affirmed, "past") if past else reading


class _Sentence:
    """The words and cues of one sentence, and what they say of a span in it."""

    def __init__(self, text: str, start: int, end: int) -> None:
        self.text = text
        self.start = start
        self.end = end
        self.words = words(text, start, end)
        self.ends = [word.end for word in self.words]
        self.cues = find(self.words)
        # "no effusion, possible atelectasis": where a doubt opens, a statement of its own begins.
        self.doubts = {cue.start for cue in self.cues if Role("pre", "uncertain") in cue.roles}

    def reading(self, span: tuple[int, int]) -> Reading:
        target = self._target(span)
        if self._prefixed(span, target):
            return Reading(Assertion.negated, "non")
        cues = self.cues
        if any(cue.start < target.stop and target.start < cue.end for cue in cues):
            cues = find(self.words, target)
        reading = _decide(self._before(target, cues), self._after(target, cues))
        if reading.assertion is Assertion.affirmed and self._alternative(target):
            return Reading(Assertion.uncertain, "or")
        return reading

    def _alternative(self, target: range) -> bool:
        """True for "A or B": one of them is there, but the text does not say which."""
        if any(cue.end <= target.start and cue.text.startswith(("no", "not", "without")) for cue in self.cues):
            return False
        following = [word.text for word in self.words[target.stop : target.stop + 2]]
        if following[:1] == ["or"] and following[1:] not in (["no"], ["not"], ["without"]):
            return True
        for at in range(target.start - 1, max(0, target.start - 4), -1):
            if self.words[at].text in _BREAKS or self._is_verb(at):
                return False
            if self.words[at].text == "or":
                return not (self.words[at - 1].text in _COUNTS or self.words[at - 1].text in _BREAKS)
        return False

    def _target(self, span: tuple[int, int]) -> range:
        """The words that the span touches."""
        first = bisect_right(self.ends, span[0])
        last = first
        while last < len(self.words) and self.words[last].start < span[1]:
            last += 1
        return range(first, last)

    def _prefixed(self, span: tuple[int, int], target: range) -> bool:
        before = self.text[max(self.start, span[0] - 5) : span[0]]
        if _EMPTY_BOX.search(self.text, max(0, span[0] - 5), span[0]):
            return True
        if _PREFIX.search(before) and not before.endswith(" "):
            return True
        if _MINUS.search(before) and _PLUS.search(self.text, self.start, self.end):
            return True
        return any(self.words[at].text in _INSIDE for at in target)

    def _before(self, target: range, cues: list[Cue]) -> list[Reach]:
        """Cues before the target whose scope reaches it, nearest first."""
        found = []
        denial_ended = False
        for cue in reversed([cue for cue in cues if cue.end <= target.start]):
            if cue.roles[0] == _STOP:
                break
            denial_ended = denial_ended or cue.roles[0].where == "stop"
            found += [
                Reach(role, cue.text, self._separated(cue.end, target.start))
                for role in cue.roles
                if role.where == "pre"
                and not (denial_ended and role.what == "negated")
                and self._reaches(cue, role, target)
            ]
        return found

    def _after(self, target: range, cues: list[Cue]) -> list[Reach]:
        """Cues behind the target whose scope reaches back to it, nearest first."""
        found = []
        for number, cue in enumerate(cues):
            if cue.start < target.stop:
                continue
            if cue.roles[0].where == "stop":
                if not self._continues(cue, cues[number + 1 : number + 2]):
                    break
                continue
            found += [
                Reach(role, cue.text, self._separated(target.stop, cue.start))
                for role in cue.roles
                if role.where == "post" and self._reached_back(cue, role, target)
            ]
        return found

    def _continues(self, stop: Cue, following: list[Cue]) -> bool:
        """ "pneumonia, which was ruled out", "possible pneumonia, but this was ruled out"."""
        if not following or following[0].roles[0].where == "stop":
            return False
        between = self.words[stop.end : following[0].start]
        return all(word.text in _PRONOUNS or word.text in _AUXILIARIES or word.text == "," for word in between)

    def _separated(self, start: int, end: int) -> bool:
        return any(word.text in (",", "and", ";", "with") for word in self.words[start:end])

    def _reaches(self, cue: Cue, role: Role, target: range) -> bool:
        between = range(cue.end, target.start)
        both_ways = len(cue.roles) > 1 and any(r.where == "post" for r in cue.roles)
        if (
            both_ways
            and cue.text != "versus"
            and cue.end < len(self.words)
            and self.words[cue.end].text in (",", ";", ")")
        ):
            return False
        if role.reach == "near":
            ends = (",", ";", "with", "and", "or", "in", "of", ":", ")", "for")
            return len(between) <= _NEAR and not any(self.words[at].text in ends for at in between)
        return not any(self._closes(at, cue, target) for at in between)

    def _closes(self, at: int, cue: Cue, target: range) -> bool:
        """True where the word at `at`, between a cue and a target behind it, ends the cue's clause."""
        text = self.words[at].text
        if text in (";", "-", "?"):
            return True
        if text == ")":
            return not any(self.words[i].text == "(" for i in range(cue.end, at))
        if text == ":":
            return at != cue.end and self.words[at - 1].text not in ("following", "for", "of")
        if text in (",", "and", "(", "with", "plus"):
            return self._new_clause(at + 1, cue, target)
        return False

    def _new_clause(self, start: int, cue: Cue, target: range) -> bool:
        """True where a statement of its own starts at word `start`, rather than the next item of a list."""
        opener = self.words[start - 1].text
        if opener == "and" and self._resumes(start - 1, cue):
            return True
        while start < target.start and self.words[start].text in ("and", ","):
            start += 1
        first = self.words[start].text if start < len(self.words) else ""
        if first in _LINKS:
            return False
        if first in _SUBJECTS or (first in _REOPENS and opener != "with"):
            return True
        if start in self.doubts and start < target.start:
            return True
        if first in _FINITE or (first in ("now", "also", "then") and start < target.start):
            return start < target.start
        end = self._segment_end(target.stop)
        listed = any(word.text in _LINKS for word in self.words[target.stop : self._clause_end(target.stop)])
        verb = next((at for at in range(start, end) if at not in target and self._is_verb(at)), None)
        stated = first in _STATED and not listed and not _LISTING.search(cue.text)
        if opener == "with":
            return stated or (first in _SIDED and not listed)
        if verb is None:
            return stated
        if verb < target.start:
            return True
        exists = any(self.words[i].text in _EXISTS for i in range(verb, min(verb + 4, len(self.words))))
        denied = any(self.words[i].text in ("not", "no") for i in range(verb, min(verb + 3, len(self.words))))
        return denied or not exists or stated or (first in _SIDED and not listed)

    def _resumes(self, at: int, cue: Cue) -> bool:
        """ "Fever, no cough, and dyspnea": a denial amid a list denies one item."""
        between = [word.text for word in self.words[cue.end : at]]
        amid = cue.start > 0 and self.words[cue.start - 1].text == ","
        return amid and between.count(",") == 1 and between[-1] == ","

    def _is_verb(self, at: int) -> bool:
        return self.words[at].text in _FINITE and not (at and self.words[at - 1].text == "to")

    def _segment_end(self, at: int) -> int:
        while at < len(self.words) and self.words[at].text not in (",", ";", "and", "but", "(", ":"):
            at += 1
        return at

    def _clause_end(self, at: int) -> int:
        while at < len(self.words) and self.words[at].text not in (";", "but", "however"):
            at += 1
        return at

    def _reached_back(self, cue: Cue, role: Role, target: range) -> bool:
        between = self._between(target, cue)
        if len(between) > _FAR_BACK or ";" in between or "-" in between:
            return False
        if misplaced(role, self.words, cue.end) or (role.reach == "near" and between):
            return False
        if (
            between
            and between[-1] in ("and", "or", ",", "with", "no", "to")
            and cue.text not in ("versus", "vs", "and/or")
        ):
            return between[-1] == "," and role.reach == "clause" and len(between) == 1
        if any(word in _FINITE or word in ("with", "without", "no", "for", "from", ":") for word in between):
            return False
        if "(" in between and ")" not in between:
            return between == ["("] and role.reach in ("end", "last")
        if "," in between and len(between) > 1:
            last = between[len(between) - between[::-1].index(",") :]
            if last and not {"and", "or", "nor", "both", "all"} & set(last):
                return False
        return not any(word in (",", "and") for word in between) or not self._stated_before(target)

    def _between(self, target: range, cue: Cue) -> list[str]:
        """The words between, less an "is" before the cue and a "which" or "but this" that takes the target up."""
        between = [self.words[at].text for at in range(target.stop, cue.start)]
        while between and between[-1] in _AUXILIARIES:
            between.pop()
        if between and between[-1] in _PRONOUNS | {"but", "however"}:
            taken_up = between[-1] in _PRONOUNS
            while between and (between[-1] in _PRONOUNS or between[-1] in ("but", "however", ",")):
                between.pop()
            if taken_up and all(word in _AUXILIARIES or word in _SUSPECTED for word in between):
                between = []
        return between

    def _stated_before(self, target: range) -> bool:
        """True where the clause has a verb before the target: what follows an "and" is then no longer its subject."""
        at = target.start - 1
        while at >= 0 and self.words[at].text not in (";", ","):
            if self.words[at].text in _FINITE or self.words[at].text == "with":
                return True
            at -= 1
        return False


def _decide(before: list[Reach], after: list[Reach]) -> Reading:
    """The nearer clause speaks first; within one clause a denial outweighs a doubt, but for one that excludes it:
    "no effusion, although a small one cannot be excluded"."""
    if any(not reach.separated for reach in after) and all(reach.separated for reach in before):
        before = []
    denials = [reach for reach in (*before, *after) if reach.role.what == Assertion.negated.value]
    doubts = [reach for reach in (*before, *after) if reach.role.what == Assertion.uncertain.value]
    excluded = before and any("exclu" in reach.text or "ruled" in reach.text for reach in after if reach in doubts)
    if denials and not (excluded and not any(reach in denials for reach in after)):
        return Reading(Assertion.negated, denials[0].text)
    return Reading(Assertion.uncertain, doubts[0].text) if doubts else Reading(Assertion.affirmed, "")
