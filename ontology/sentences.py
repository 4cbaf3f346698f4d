"""Where a clinical text's sentences end: list numbers, abbreviations, wrapped lines, glued full stops."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ontology.cues import bag

_CANDIDATE = re.compile(
    r"(?P<stop>[.!?]+)[\"')\]]*(?=\s|[A-Z]|$)"
    r"|(?P<line>\s*\n\s*)"
    r"|(?<=\s)(?P<number>(?:\d{1,2}[.)]|\(\d{1,2}\)))(?=\s*[A-Z])"
    r"|(?<=[a-z] )(?P<field>[A-Z][a-z]+(?: [A-Za-z]+){0,2}:)"
    r"|(?P<bullet>[•●▪◦])"
)
_ANSWER = re.compile(
    r"(?:a(?:nswer)?:\s*)?(?:no|none|yes|negative|unlikely|doubtful|denie[sd])\b[.,;]?(?!\s+[a-z])", re.IGNORECASE
)
_LETTER_ANSWER = re.compile(r":\s?[ynYN]$")
_WORD_BEFORE = re.compile(r"[A-Za-z0-9.'/-]+$")
_ABBREVIATIONS = bag(
    "dr drs mr mrs ms vs v approx e.g i.e eg ie pt st jr sr fig prof ca cf al resp assoc dept incl esp temp "
    "ant post lat inf sup med bilat abd hx dx rx tx sx"
)
_OPENERS = bag("No The There He She It This Heart Lungs Normal Without Stable Patient We Bones")
_JOINS_NEXT = bag(
    "no not without of or and nor for with in the a an any to by on at is are was were has have denies denied "
    "evidence possible probable likely new old left right versus vs no, acute focal mild large small"
)
_JOINS_PREVIOUS = bag("or and nor of versus vs")
_ITEM = re.compile(r"(?:[-*•●▪◦+]\s|\(?\d{1,2}[.)]|[A-Za-z][.)]\s|[A-Za-z][\w /&-]{0,40}:)")
_LONGEST = 1000  # characters: keeps reading linear in texts without a full stop
_OVERLAPS = 8  # mentions that may overlap at one place
_WRAPPED = 40  # characters: a shorter line was ended on purpose


def sentences(text: str, keep: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Character ranges that cover `text`, in order; no boundary falls inside a range of `keep`.

    >>> text = "1.No acute disease of Dr. Roe. 2. Mass"
    >>> [text[a:b] for a, b in sentences(text)]
    ['1.', 'No acute disease of Dr. Roe.', ' ', '2. Mass']
    """
    kept = sorted(keep)
    starts = [start for start, _ in kept]
    cuts = [cut for cut in _cuts(text) if not _inside(cut, kept, starts)]
    edges = [0, *_short(text, cuts, len(text))]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def _inside(cut: int, kept: list[tuple[int, int]], starts: list[int]) -> bool:
    """True where a kept range, of the few that start just before the cut, reaches over it."""
    at = bisect_left(starts, cut)
    return any(kept[number][1] > cut for number in range(max(0, at - _OVERLAPS), at))


def _short(text: str, cuts: list[int], end: int) -> Iterator[int]:
    """The cuts and the end, with further cuts at spaces where a "sentence" would run for pages."""
    last = 0
    for cut in [*cuts, end]:
        while cut - last > _LONGEST:
            space = text.rfind(" ", last + 1, last + _LONGEST)
            last = space if space > last else last + _LONGEST
            yield last
        last = cut
        yield cut


def _cuts(text: str) -> Iterator[int]:
    last = 0
    for match in _CANDIDATE.finditer(text):
        cut = _cut(text, match)
        if cut is not None and cut > last:
            last = cut
            yield cut


def _cut(text: str, match: re.Match[str]) -> int | None:
    start, end = match.span()
    if match["stop"] is not None:
        return end if _ends_sentence(text, start, end) else None
    if match["line"] is not None:
        return end if _ends_line(text, match) else None
    if match["field"] is not None:
        before = text[:start].split()[-1] if start < 80 else text[start - 80 : start].split()[-1]
        return None if before.lower() in _JOINS_NEXT else start
    return start


def _ends_sentence(text: str, start: int, end: int) -> bool:
    found = _WORD_BEFORE.search(text, max(0, start - 30), start)
    word = found[0].lower().rstrip(".") if found else ""
    rest = text[end : end + 30].lstrip()
    if text[start] == "?":
        return bool(word) and not _ANSWER.match(rest) and (not rest or not rest[0].islower())
    if word in _ABBREVIATIONS or (word == "no" and rest[:1].isdigit()):
        return False
    glued = end < len(text) and not text[end].isspace()
    if len(word) == 1 and word.isalpha():
        return not glued and (_opens(rest) or bool(_LETTER_ANSWER.search(text, max(0, start - 4), start)))
    if "." in word and word[-2:-1] == ".":  # p.o., C.O.P.D.
        return not glued and (not rest or rest[0].isupper())
    return True


def _opens(rest: str) -> bool:
    return not rest or rest.split()[0].strip(",:;.") in _OPENERS


def _ends_line(text: str, match: re.Match[str]) -> bool:
    if match[0].count("\n") > 1:
        return True
    start, end = match.span()
    begin = text.rfind("\n", 0, start) + 1
    line, rest = text[begin:start].rstrip(), text[end : end + 60]
    if not line or not rest or _ITEM.match(rest):
        return True
    first, last = rest.split()[0].lower().strip(",;"), line.split()[-1].lower()
    if last in _JOINS_NEXT or last.endswith(",") or first in _JOINS_PREVIOUS:
        return False
    return not (len(line) >= _WRAPPED and rest[0].islower() and line[-1] not in ".!?:;")
