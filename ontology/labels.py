"""Labels of reports: which of a label set's names a report affirms, denies or doubts.

Two stages (arXiv 2508.19915, section 3): a mention is linked to a concept, and the concept, or one above it in the
ontology, carries a label. Then the mentions of a label are reconciled: a finding that is affirmed anywhere is there,
whatever is denied elsewhere, and a doubt stays a doubt unless the label set's conventions read it.
Labels and conventions are small TOML files (`label_sets/`) that a user can copy and edit.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ontology.assertion import Reading, readings
from retrieval.errors import Invalid, NotFound
from retrieval.types import Assertion, Document, Finding, Linker

if TYPE_CHECKING:
    from ontology.tables import Tables

LABEL_SETS = Path(__file__).parent / "label_sets"
DEFAULT = "chest14"
BATCH = 256  # documents linked at a time
STATES = {"present": 1, "absent": 0, "uncertain": -1}
# What decides a mention that is not plainly affirmed or denied, by the cue that `readings` gives.
HEDGES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("past", re.compile(r"past$")),
    ("reason", re.compile(r"(?:reason|family)$")),
    ("alternative", re.compile(r"(?:or|and/or|versus|vs|either)$")),
    ("borderline", re.compile(r"borderline")),
    ("excluded", re.compile(r".*(?:exclu|ruled? out|r/o)")),
    ("question", re.compile(r"(?:\?|\(\?\)|quer|question|if\b|evaluat|assess|correlat|check|test|rule|risk|to )")),
    (
        "possible",
        re.compile(r".*\b(?:may|might|could|would|possib|perhaps|maybe|potential|differential|concern|worr|susp)"),
    ),
    ("suggestive", re.compile(r".*suggest")),
    ("probable", re.compile(r".*(?:probab|likely|presum|favor|favour|most xxxx|thought|felt|believed)")),
)
KINDS = (*(name for name, _ in HEDGES), "other")
Ancestors = Callable[[str], frozenset[str]]


@dataclass(frozen=True)
class Label:
    """One label.

    where: concept -> words of which a mention of it must hold one; unless: words that rule a mention out;
    readings: kind of hedge -> present, absent or uncertain.
    """

    name: str
    concepts: frozenset[str]
    excluded: frozenset[str] = frozenset()
    where: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    unless: re.Pattern[str] | None = None
    readings: Mapping[str, str] = field(default_factory=dict)

    def carries(self, concept: str, above: frozenset[str], surface: str) -> bool:
        """True where a mention of `concept`, below the concepts `above`, written as `surface`, carries this label."""
        if self.unless is not None and self.unless.search(surface):
            return False
        if concept in self.concepts:
            return concept not in self.where or bool(self.where[concept].search(surface))
        return bool(self.concepts & above) and concept not in self.excluded and not self.excluded & above

    def value(self, reading: Reading) -> int:
        """1, 0 or -1 for one mention."""
        kind = hedge(reading)
        if kind is None:
            return 1 if reading.assertion is Assertion.affirmed else 0
        default = "present" if reading.assertion is Assertion.affirmed else "uncertain"
        return STATES[self.readings.get(kind, default)]


@dataclass(frozen=True)
class LabelSet:
    """Labels in the order of their file."""

    labels: tuple[Label, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @property
    def concepts(self) -> frozenset[str]:
        """Every concept that a label names."""
        return frozenset().union(*(label.concepts | label.excluded for label in self.labels))


def hedge(reading: Reading) -> str | None:
    """The kind of hedge that decided a reading, None where the text affirms or denies outright.

    >>> hedge(Reading(Assertion.uncertain, "may represent")), hedge(Reading(Assertion.negated, "no"))
    ('possible', None)
    """
    if reading.assertion is Assertion.negated or (reading.assertion is Assertion.affirmed and reading.cue != "past"):
        return None
    return next((name for name, pattern in HEDGES if pattern.match(reading.cue)), "other")


def load_labels(name_or_path: str | Path | None = None, *, conventions: bool = True) -> LabelSet:
    """A shipped label set by name (None: `chest14`), or one from a TOML file; without its conventions where told so.

    Raises NotFound for an unknown name, Invalid for a file that is no label set.
    """
    path = LABEL_SETS / f"{name_or_path or DEFAULT}.toml"
    if not path.is_file():
        path = Path(str(name_or_path))
    if not path.is_file():
        shipped = ", ".join(sorted(found.stem for found in LABEL_SETS.glob("*.toml") if "labels" in _read(found)))
        raise NotFound(f"no label set {str(name_or_path)!r}: expected a TOML file or one of {shipped}")
    data = _read(path)
    habits: dict[str, Any] = {}
    if conventions and "conventions" in data:
        beside = path.parent / str(data["conventions"])
        if not beside.is_file():
            raise NotFound(f"label set {path.name} names conventions {beside.name!r}, which do not lie beside it")
        habits = _read(beside)
    return LabelSet(tuple(_labels(data, habits, path.name)))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"label set {path.name} is no TOML: {error}") from error


def _labels(data: dict[str, Any], conventions: dict[str, Any], file: str) -> Iterator[Label]:
    table = data.get("labels")
    if not isinstance(table, dict) or not table:
        raise Invalid(f"label set {file} has no [labels.NAME] table", field="labels")
    for name in conventions:
        if name != "readings" and name not in table:
            raise Invalid(f"conventions of {file} speak of {name!r}, which is no label of it", field=name)
    shared = conventions.get("readings", {})
    for name, entry in table.items():
        local = conventions.get(name, {})
        named = _strings(entry, "concepts", file, name) + _strings(local, "also", file, name)
        parts = [(concept, words) for concept, _, words in (entry.partition(" where ") for entry in named)]
        unless = _strings(local, "unless", file, name)
        yield Label(
            name,
            frozenset(concept for concept, _ in parts),
            frozenset(_strings(entry, "except", file, name) + _strings(local, "except", file, name)),
            {concept: _begins(words.split("|")) for concept, words in parts if words},
            _begins(unless) if unless else None,
            _readings({**shared, **local.get("readings", {})}, file, name),
        )


def _begins(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(rf"\b{re.escape(word.strip())}" for word in words), re.IGNORECASE)


def _strings(table: Any, key: str, file: str, name: str) -> list[str]:
    values = table.get(key, []) if isinstance(table, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise Invalid(f"{file}: `{key}` of {name} must be a list of strings", field=f"labels.{name}.{key}")
    return values


def _readings(table: dict[str, Any], file: str, name: str) -> dict[str, str]:
    for kind, state in table.items():
        if kind not in KINDS or state not in STATES:
            expected = f"one of {', '.join(KINDS)} = one of {', '.join(STATES)}"
            raise Invalid(
                f"{file}: got {kind} = {state!r} among the readings of {name}, expected {expected}", field=name
            )
    return table


def label_documents(documents: Iterable[Document], linker: Linker, labels: LabelSet) -> Iterator[dict[str, Any]]:
    """One JSON object per document, in order: its id, its findings, and 1, 0, -1 or None for every label."""
    ancestors = ancestry(linker)
    remaining = iter(documents)
    while batch := list(islice(remaining, BATCH)):
        for document, linked in zip(batch, linker.link([document.text for document in batch]), strict=True):
            findings = said_once(linked)
            yield {
                "_id": document.id,
                "findings": [_row(finding, linker) for finding in findings],
                "labels": label_findings(document.text, findings, labels, ancestors),
            }


def said_once(findings: Iterable[Finding]) -> list[Finding]:
    """Each mention with its first assertion: an index hears twice of a doubt that leans to presence, a reader once."""
    once: dict[tuple[str, tuple[int, int]], Finding] = {}
    for finding in findings:
        once.setdefault((finding.concept, finding.span), finding)
    return list(once.values())


def _row(finding: Finding, linker: Linker) -> dict[str, Any]:
    start, end = finding.span
    return {
        "concept": finding.concept,
        "name": linker.name(finding.concept),
        "assertion": finding.assertion.value,
        "start": start,
        "end": end,
    }


def ancestry(linker: Linker) -> Ancestors:
    """The concepts above a concept, where the linker has an ontology (`tables`); none elsewhere."""
    tables: Tables | None = getattr(linker, "tables", None)
    if tables is None:
        return lambda _: frozenset()
    return lru_cache(maxsize=None)(partial(_above, tables))


def _above(tables: Tables, concept: str) -> frozenset[str]:
    start = tables.numbers.get(concept)
    found: set[int] = set()
    waiting = [] if start is None else list(tables.parents[start])
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += tables.parents[number]
    return frozenset(tables.lexicon.concepts[number] for number in found)


def label_findings(
    text: str, findings: Sequence[Finding], labels: LabelSet, ancestors: Ancestors
) -> dict[str, int | None]:
    """1 present, 0 denied, -1 doubtful, None not mentioned, for every label of the set."""
    values: dict[str, int | None] = dict.fromkeys(labels.names)
    for finding, reading in zip(findings, _read_again(text, findings), strict=True):
        above = ancestors(finding.concept)
        surface = _surface(text, finding.span)
        for label in labels.labels:
            if label.carries(finding.concept, above, surface):
                values[label.name] = _stronger(values[label.name], label.value(reading))
    return values


def _surface(text: str, span: tuple[int, int]) -> str:
    """A mention with the word before it, which may narrow it: "bullous" emphysema."""
    before = text[max(0, span[0] - 30) : span[0]]
    word = re.search(r"[\w-]+[ \n]$", before)
    return f"{word[0] if word else ''}{text[span[0] : span[1]]}"


def _read_again(text: str, findings: Sequence[Finding]) -> list[Reading]:
    """The cue behind each assertion. Where the linker reads otherwise (a name of the normal), it is right."""
    again = readings(text, [finding.span for finding in findings])
    return [
        reading if reading.assertion is finding.assertion else Reading(finding.assertion, "")
        for finding, reading in zip(findings, again, strict=True)
    ]


def _stronger(old: int | None, new: int) -> int:
    """Present beats doubtful beats denied: a report denies one place and affirms another."""
    order = (0, -1, 1)
    return new if old is None or order.index(new) > order.index(old) else old
