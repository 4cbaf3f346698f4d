"""Labels against the human coding, beside a plain baseline: the lexicon's phrases under the NegEx algorithm."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from benchmarks.ontology_reports import FINDINGS, Report, documents
from ontology.labels import LabelSet, label_documents
from ontology.linker import Dictionary
from ontology.tables import Tables
from retrieval.types import Assertion, Linker

RESAMPLES = 2_000
SEED = 20_240_229


class Counts(NamedTuple):
    """True positives, false positives, false negatives."""

    tp: int
    fp: int
    fn: int

    @property
    def f1(self) -> float:
        return 2 * self.tp / max(1, 2 * self.tp + self.fp + self.fn)


Interval = tuple[float, float, float]  # mean, and the ends of its 95 % interval


class Agreement(NamedTuple):
    """Micro and macro F1 on positive labels, each with its 95 % bootstrap interval over reports, and per finding."""

    micro: Interval
    macro: Interval
    findings: Mapping[str, Counts]


def micro(gold: Sequence[Collection[str]], found: Sequence[Collection[str]]) -> Counts:
    pairs = [(set(a) & set(FINDINGS), set(b) & set(FINDINGS)) for a, b in zip(gold, found, strict=True)]
    return Counts(
        sum(len(a & b) for a, b in pairs), sum(len(b - a) for a, b in pairs), sum(len(a - b) for a, b in pairs)
    )


def agreement(gold: Sequence[Collection[str]], found: Sequence[Collection[str]]) -> Agreement:
    a, b = _matrix(gold), _matrix(found)
    terms = np.stack([a & b, ~a & b, a & ~b]).astype(np.int64)  # (3, N, F)
    rng = np.random.default_rng(SEED)
    draws = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=RESAMPLES)  # (R, N) times each report is drawn
    sums = np.einsum("rn,tnf->rtf", draws, terms)
    draws_of = _f1(sums.sum(2)), _f1(sums).mean(1)
    whole = terms.sum(1)
    counts = {name: Counts(*map(int, whole[:, at])) for at, name in enumerate(FINDINGS)}
    means = float(_f1(whole.sum(1)[None])[0]), float(_f1(whole[None]).mean())
    micro, macro = (
        (mean, *map(float, np.percentile(drawn, [2.5, 97.5]))) for mean, drawn in zip(means, draws_of, strict=True)
    )
    return Agreement(cast(Interval, micro), cast(Interval, macro), counts)


def _matrix(rows: Sequence[Collection[str]]) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    return np.array([[name in row for name in FINDINGS] for row in rows], bool).reshape(len(rows), len(FINDINGS))


def _f1(terms: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """F1 from terms on axis 1; 0 where there is nothing to find and nothing found."""
    tp, fp, fn = np.moveaxis(terms, 1, 0)
    return np.asarray(2 * tp / np.maximum(1, 2 * tp + fp + fn))


def labelled(found: Sequence[Report], linker: Linker, labels: LabelSet) -> list[set[str]]:
    """What the product says of every report."""
    rows = label_documents(documents(found), linker, labels)
    return [{name for name, value in row["labels"].items() if value == 1} for row in rows]


# --- as published ------------------------------------------------------------------------------------------------

_OBSERVED = frozenset(["T047", "T046", "T033"])
_PRECEDENCE = (Assertion.negated, Assertion.affirmed, Assertion.uncertain)
_WORDS = {name: name.replace("_", " ").lower() for name in FINDINGS} | {"Infiltration": "infiltrat"}


def published(found: Sequence[Report], linker: Dictionary, dictionary: Callable[[str], set[str]]) -> list[set[str]]:
    """The two stages of arXiv 2508.19915 to the letter, with our linker and `dictionary` in CheXpert's place.

    First the label whose word is in the name of a concept, or of one a step above it; denied beats affirmed beats
    doubtful. Then, of dictionary labels, ontology labels, what both say and what either says, the one that covers most
    of the report's present concepts; ties go to the first.
    """
    out = []
    for report, findings in zip(found, linker.link([report.text for report in found]), strict=True):
        present = {f.concept for f in findings if f.assertion is not Assertion.negated}
        carried = {f.concept: _named(linker.tables, f.concept) for f in findings}
        said: dict[str, set[Assertion]] = {}
        for finding in findings:
            for name in carried[finding.concept]:
                said.setdefault(name, set()).add(finding.assertion)
        decided = {name: next(a for a in _PRECEDENCE if a in held) for name, held in said.items()}
        ontology = {name for name, assertion in decided.items() if assertion is not Assertion.negated}
        plain = dictionary(report.text)
        answers = [plain, ontology, plain & ontology, plain | ontology]
        out.append(max(answers, key=lambda labels: sum(bool(labels & carried[c]) for c in present)))
    return out


def _named(tables: Tables, concept: str) -> set[str]:
    number = tables.numbers.get(concept)
    if number is None:
        return set()
    own = {name for name, word in _WORDS.items() if word in tables.names[number].lower()}
    above = [
        tables.names[parent].lower() for parent in tables.parents[number] if _OBSERVED & set(tables.types[parent])
    ]
    return own or {name for name, word in _WORDS.items() if any(word in title for title in above)}


# --- the baseline ------------------------------------------------------------------------------------------------


class Phrases(NamedTuple):
    include: re.Pattern[str]
    exclude: re.Pattern[str] | None


Triggers = dict[str, re.Pattern[str]]
_SENTENCE = re.compile(r"(?<=[.;])\s+|\n")
# Where the lexicon's names differ from those of the gold.
# Names of a place and no finding; the lexicon needs a parser to tell a normal one. The baseline gains without them.
_PLACES = frozenset(
    ["the heart", "heart size", "cardiac size", "cardiac shadow", "cardiac contour", "cardiac silhouette"]
)
_NAMES = {"Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Thickening"}


def baseline(lexicon: Path) -> Callable[[str], set[str]]:
    """Text to labels: RadText's phrases for the ChestX-ray14 findings, its patterns and NegEx triggers for denials."""
    phrases = _phrases((lexicon / "radtext" / "cxr14_phrases_v2.yml").read_text(encoding="utf-8"))
    triggers = _triggers((lexicon / "negex_triggers" / "negex_triggers.txt").read_text(encoding="utf-8"))
    patterns = _patterns((lexicon / "radtext" / "patterns" / "regex_negation.yml").read_text(encoding="utf-8"))

    def label(text: str) -> set[str]:
        found = set()
        for sentence in _SENTENCE.split(text.lower()):
            for name, phrase in phrases.items():
                if name not in found and any(not denied for denied in _denials(sentence, phrase, triggers, patterns)):
                    found.add(name)
        return found

    return label


def _denials(sentence: str, phrase: Phrases, triggers: Triggers, patterns: Sequence[str]) -> Iterator[bool]:
    if phrase.exclude is not None and phrase.exclude.search(sentence):
        return
    for match in phrase.include.finditer(sentence):
        masked = f"{sentence[: match.start()]}XXXXX{sentence[match.end() :]}"
        yield _negex(sentence, match.span(), triggers) or any(re.search(pattern, masked) for pattern in patterns)


def _negex(sentence: str, span: tuple[int, int], triggers: Triggers) -> bool:
    """NegEx (Chapman et al. 2001): a cue before the mention, or one behind, with no conjunction in between.

    Cues of mere possibility count as denials of a positive label, too.
    """
    blanked = triggers["PSEU"].sub(lambda match: "_" * len(match[0]), sentence)
    before, after = blanked[: span[0]], blanked[span[1] :]
    last = max((match.end() for match in triggers["CONJ"].finditer(before)), default=0)
    first = min((match.start() for match in triggers["CONJ"].finditer(after)), default=len(after))
    ahead = any(triggers[kind].search(before, last) for kind in ("PREN", "PREP"))
    return ahead or any(triggers[kind].search(after, 0, first) for kind in ("POST", "POSP"))


def _triggers(content: str) -> Triggers:
    kinds: dict[str, list[str]] = {}
    for line in content.splitlines():
        phrase, _, kind = line.partition("\t\t[")
        kinds.setdefault(kind.strip("]\t "), []).append(re.escape(phrase.strip().lower()).replace(r"\ ", r"\s+"))
    return {
        kind: re.compile("|".join(rf"(?<!\w)(?:{p})(?!\w)" for p in sorted(phrases, key=len, reverse=True)))
        for kind, phrases in kinds.items()
    }


def _patterns(content: str) -> list[str]:
    return [
        line.split("pattern:")[1].strip() for line in content.splitlines() if "pattern:" in line and "#" not in line
    ]


def _phrases(content: str) -> dict[str, Phrases]:
    """RadText's lists: a name, then `include` and `exclude` with one phrase a line (regular expressions allowed)."""
    lists: dict[str, dict[str, list[str]]] = {}
    name, key = "", ""
    for line in content.splitlines():
        if line and not line.startswith((" ", "#")):
            name = line.rstrip(":")
        elif line.strip() in ("include:", "exclude:"):
            key = line.strip().rstrip(":")
        elif line.strip().startswith("- "):
            lists.setdefault(name, {}).setdefault(key, []).append(line.strip()[2:].strip().strip("'"))
    found = {}
    for finding in FINDINGS:
        entry = lists[_NAMES.get(finding, finding)]
        include = [phrase for phrase in entry["include"] if phrase not in _PLACES]
        exclude = entry.get("exclude")
        found[finding] = Phrases(re.compile("|".join(include)), re.compile("|".join(exclude)) if exclude else None)
    return found
