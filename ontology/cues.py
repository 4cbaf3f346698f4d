"""Cue phrases: what turns the reading of a finding, and in which direction.

The phrases lie in `triggers/triggers.txt`, which says how to write one; they extend the NegEx lists
(Chapman et al. 2001). A sentence is cut into words, and the longest phrase that starts at a word wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


def bag(words: str) -> frozenset[str]:
    """The words of a line."""
    return frozenset(words.split())


TRIGGERS = Path(__file__).parent / "triggers" / "triggers.txt"
_WORD = re.compile(
    r"\(-\)|\(\+\)|\(\?\)|\+/-|and/or|[wrshc]/[op]?\b|(?<!\w)\+(?=\s?[a-z])|[a-z0-9]+(?:['’][a-z]+)?|[?:;,()=]|(?<=\s)[-–—](?=\s)|[–—]|\n"
)
_RUN_TOGETHER = {"cannot": "can", "cant": "can", "dont": "do", "doesnt": "does", "didnt": "did", "isnt": "is"}
_RUN_TOGETHER |= {"wasnt": "was", "arent": "are", "werent": "were", "hasnt": "has", "havent": "have", "wont": "will"}
_DASHES = {"–": "-", "—": "-", "=": ":"}
_ENDS = frozenset([",", ";", ")", "(", "-", "\n"])
_NO_NOUN = _ENDS | bag(
    "in at on within by for with and or but however though although as given from during after on since today over "
    "now currently yesterday again because which per : this here anywhere bilaterally while x1 x2 x3 x4"
)


class Role(NamedTuple):
    """What a phrase does.

    where: pre, post, pseudo or stop; what: negated or uncertain; reach: clause, near, last or end.
    """

    where: str
    what: str = ""
    reach: str = "clause"


class Word(NamedTuple):
    """One word of a sentence, lower-cased, with its character offsets."""

    text: str
    start: int
    end: int


class Cue(NamedTuple):
    """A phrase found at words `start` to `end` (exclusive)."""

    start: int
    end: int
    roles: tuple[Role, ...]
    text: str


def words(text: str, start: int = 0, end: int | None = None) -> list[Word]:
    """The words of `text[start:end]`; "cannot" and "isn't" are two.

    >>> [word.text for word in words("It isn't 1.No effusion, w/o fever")]
    ['it', 'is', 'not', '1', 'no', 'effusion', ',', 'w/o', 'fever']
    """
    found = []
    # Letters that change length when lower-cased would shift the offsets: they are no part of any cue.
    lowered = text[start:end].translate({304: "i"}).lower()
    for match in _WORD.finditer(lowered):
        word, first, last = match[0], match.start() + start, match.end() + start
        stem = _RUN_TOGETHER.get(word)
        if stem is None and word[-2:] in ("'t", "’t") and word[-3] == "n":
            stem = {"can't": "can", "won't": "will", "can’t": "can", "won’t": "will"}.get(word, word[:-3])
        if stem is not None:
            found += [Word(stem, first, last), Word("not", first, last)]
        else:
            found.append(Word(_DASHES.get(word, word), first, last))
    return found


def find(sentence: list[Word], blocked: range = range(0)) -> list[Cue]:
    """The cues of a sentence from left to right, without overlap; none covers a word in `blocked`."""
    found = []
    at = 0
    while at < len(sentence):
        roles, end = _longest(sentence, at, blocked)
        if roles and all(misplaced(role, sentence, end) for role in roles):
            end = at
        elif roles:
            found.append(Cue(at, end, roles, " ".join(word.text for word in sentence[at:end])))
        at = max(end, at + 1)
    return found


def misplaced(role: Role, sentence: list[Word], end: int) -> bool:
    """True where a cue of that reach, ending before word `end`, is followed by what it must not be followed by."""
    following = sentence[end].text if end < len(sentence) else ";"
    return (role.reach == "end" and following not in _ENDS) or (role.reach == "last" and following not in _NO_NOUN)


def _longest(sentence: list[Word], at: int, blocked: range) -> tuple[tuple[Role, ...], int]:
    node: Node | None = load()
    best: tuple[tuple[Role, ...], int] = ((), at)
    position = at
    while position < len(sentence) and position not in blocked:
        node = node.after(sentence[position].text) if node is not None else None
        if node is None:
            break
        position += 1
        if node.roles:
            best = (node.roles, position)
    return best


class _Line(NamedTuple):
    """A line of the trigger file: slot after slot one of several runs of words; () is a slot left out."""

    slots: tuple[tuple[tuple[str, ...], ...], ...]
    role: Role


class _Place(NamedTuple):
    """Inside a line: what is left of a run in the slot before `slot`."""

    rest: tuple[str, ...]
    line: int
    slot: int


class Node:
    """Where one may be after some words, in all lines at once: an automaton that is built while it is used.

    Written out, the lines are some hundred thousand phrases; a text meets a few hundred of them.
    """

    def __init__(self, lines: list[_Line], places: Iterable[tuple[int, int]], rests: Iterable[_Place] = ()) -> None:
        """places: (line, slot) pairs that may start now."""
        self._lines = lines
        self._after: dict[str, Node | None] = {}
        self._rests: dict[str, list[_Place]] = {}
        roles: dict[Role, None] = {}
        waiting = sorted(places, reverse=True)
        for place in rests:
            self._rests.setdefault(place.rest[0], []).append(place)
        while waiting:
            line, slot = waiting.pop()
            slots, role = lines[line]
            if slot == len(slots):
                roles[role] = None
                continue
            for run in slots[slot]:
                if run:
                    self._rests.setdefault(run[0], []).append(_Place(run, line, slot + 1))
                else:
                    waiting.append((line, slot + 1))
        self.roles = tuple(roles)

    def after(self, word: str) -> Node | None:
        """The node one word further, None where no line goes on with it."""
        if word not in self._rests:
            return None
        if word not in self._after:
            here = [place._replace(rest=place.rest[1:]) for place in self._rests[word]]
            starts = {(place.line, place.slot) for place in here if not place.rest}
            self._after[word] = Node(self._lines, starts, [place for place in here if place.rest])
        return self._after[word]


@lru_cache(maxsize=1)
def load(path: Path = TRIGGERS) -> Node:
    """The phrases of a trigger file, before the first word."""
    lines: list[_Line] = []
    choices: dict[str, str] = {}
    role = Role("")
    for text in path.read_text(encoding="utf-8").splitlines():
        text = text.strip()
        if text.startswith("["):
            role = Role(*text.strip("[]").split())
        elif " = " in text and text.split(" = ")[0].isupper():
            name, choices[name] = text.split(" = ")[0], text.split(" = ")[1]
        elif text and not text.startswith("#"):
            lines.append(_Line(tuple(_slots(text, choices)), role))
    return Node(lines, ((line, 0) for line in range(len(lines))))


def _slots(text: str, choices: dict[str, str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    for word in text.split():
        optional = word.endswith("?") and len(word) > 1
        plain = word.rstrip("?") if optional else word
        names = [choices.get(name, name) for name in plain.split("|")]
        runs = [tuple(run.split("_")) for name in names for run in name.split("|")]
        yield (*runs, ()) if optional else tuple(runs)
