"""Cue phrases: what turns the reading of a finding, and in which direction.

The phrases lie in `triggers/triggers.txt`, which says how to write one; they extend the NegEx lists
(Chapman et al. 2001). A sentence is cut into words, and the longest phrase that starts at a word wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple


def bag(words: str) -> frozenset[str]:
    """The words of a line."""
    return frozenset(words.split())


TRIGGERS = Path(__file__).parent / "triggers" / "triggers.txt"
_WORD = re.compile(
    r"\(-\)|\(\+\)|\(\?\)|\+/-|and/or|[wrshc]/[op]?\b|[a-z0-9]+(?:['’][a-z]+)?|[?:;,()=]|(?<=\s)[-–—](?=\s)|[–—]|\n"
)
_RUN_TOGETHER = {"cannot": "can", "cant": "can", "dont": "do", "doesnt": "does", "didnt": "did", "isnt": "is"}
_RUN_TOGETHER |= {"wasnt": "was", "arent": "are", "werent": "were", "hasnt": "has", "havent": "have", "wont": "will"}
_DASHES = {"–": "-", "—": "-", "=": ":"}
_ENDS = frozenset([",", ";", ")", "(", "-", "\n"])
_NO_NOUN = _ENDS | bag(
    "in at on within by for with and or but however though although as given from during after on since today over "
    "now currently yesterday again because which per : this here anywhere bilaterally while"
)
_END = ""  # key of a trie node that holds the roles of the phrase that ends there


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
        if stem is None and word.endswith(("n't", "n’t")):
            stem = {"can't": "can", "won't": "will", "can’t": "can", "won’t": "will"}.get(word, word[:-3])
        if stem is not None:
            found += [Word(stem, first, last), Word("not", first, last)]
        else:
            found.append(Word(_DASHES.get(word, word), first, last))
    return found


def find(sentence: list[Word], blocked: range = range(0)) -> list[Cue]:
    """The cues of a sentence from left to right, without overlap; none covers a word in `blocked`."""
    trie = load()
    found = []
    at = 0
    while at < len(sentence):
        roles, end = _longest(trie, sentence, at, blocked)
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


def _longest(trie: dict[str, Any], sentence: list[Word], at: int, blocked: range) -> tuple[tuple[Role, ...], int]:
    node: dict[str, Any] | None = trie
    best: tuple[tuple[Role, ...], int] = ((), at)
    position = at
    while position < len(sentence) and position not in blocked:
        node = node.get(sentence[position].text)  # type: ignore[union-attr]
        if node is None:
            break
        position += 1
        if _END in node:
            best = (node[_END], position)
    return best


@lru_cache(maxsize=1)
def load(path: Path = TRIGGERS) -> dict[str, Any]:
    """The phrases of a trigger file as a trie over words."""
    trie: dict[str, Any] = {}
    choices: dict[str, str] = {}
    role = Role("")
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if line.startswith("["):
            role = Role(*line.strip("[]").split())
        elif " = " in line and line.split(" = ")[0].isupper():
            name, choices[name] = line.split(" = ")[0], line.split(" = ")[1]
        elif line and not line.startswith("#"):
            for phrase in _expand(line, choices):
                _insert(trie, phrase, role)
    return trie


def _expand(line: str, choices: dict[str, str]) -> Iterator[tuple[str, ...]]:
    slots = []
    for word in line.split():
        optional = word.endswith("?") and len(word) > 1
        word = word.rstrip("?") if optional else word
        names = [choices.get(name, name) for name in word.split("|")]
        options = [tuple(option.split("_")) for name in names for option in name.split("|")]
        slots.append([*options, ()] if optional else options)
    for choice in product(*slots):
        yield tuple(word for option in choice for word in option)


def _insert(trie: dict[str, Any], phrase: tuple[str, ...], role: Role) -> None:
    node = trie
    for word in phrase:
        node = node.setdefault(word, {})
    roles = node.get(_END, ())
    if role not in roles:
        node[_END] = (*roles, role)
