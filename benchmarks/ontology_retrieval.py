"""The ontology leg alone on the report tasks: nDCG@10, contradictions among the first ten, and ablations.

Where documents score alike, each place is worth the mean over their group: what all orders of the ties come to on
average, so no tie-break, no luck, and no other leg flatters a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.ontology_reports import FINDINGS, Report, Task
from ontology.facets import Facets
from ontology.graph import load
from ontology.labels import load_labels
from ontology.lexicon import compiled
from ontology.linker import Dictionary
from ontology.tables import CHEST, Tables
from ontology.tversky import Index, findings_score
from retrieval import analysis
from retrieval.types import Assertion, Finding, Linker, Part

DEPTH = 10
RESAMPLES = 2_000
Scores = NDArray[np.float32]
Link = Callable[[Sequence[str]], list[tuple[Finding, ...]]]


class Mean(NamedTuple):
    """A mean over queries with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Memory:
    """Findings of documents as `retrieval.types.Postings`."""

    def __init__(self, findings: Sequence[Iterable[Finding]]) -> None:
        self.size = len(findings)
        held: dict[tuple[str, Assertion], set[int]] = {}
        for row, found in enumerate(findings):
            for finding in found:
                held.setdefault((finding.concept, finding.assertion), set()).add(row)
        self._held = {key: np.array(sorted(rows), np.int32) for key, rows in held.items()}

    def concepts(self) -> Iterable[tuple[str, Assertion]]:
        return self._held

    def rows(self, concept: str, assertion: Assertion) -> NDArray[np.int32]:
        return self._held.get((concept, assertion), np.zeros(0, np.int32))


@dataclass(frozen=True)
class System:
    """What an ablation changes. `of_documents` and `of_queries` link; `tables` and `index` score."""

    of_documents: Link
    of_queries: Link
    scorer: Linker | None = None
    index: Index | None = None

    def scores(self, reports: Sequence[Report], task: Task) -> dict[str, Scores]:
        """Query -> (N,) scores of all reports."""
        postings = Memory(self.of_documents([report.text for report in reports]))
        score = findings_score(self.scorer, self.index)
        linked = self.of_documents if task.kind == "report" else self.of_queries
        found = linked(list(task.queries.values()))
        kind: Literal["text", "report"] = "report" if task.kind == "report" else "text"
        return {
            query: score(Part(text=text, kind=kind, findings=findings), postings)
            for (query, text), findings in zip(task.queries.items(), found, strict=True)
        }


# --- measures ----------------------------------------------------------------------------------------------------


def ndcg(scores: Mapping[str, Scores], task: Task, ids: Sequence[str]) -> dict[str, float]:
    """nDCG@10 of every query, over all orders of the ties. Scores of 0 are no hits, nor is a query's own id."""
    numbers = {id: row for row, id in enumerate(ids)}
    out = {}
    for query, grades in task.grades.items():
        gains = np.zeros(len(ids))
        for id, grade in grades.items():
            if id in numbers and id != query:
                gains[numbers[id]] = grade
        values = scores[query].copy()
        if query in numbers:
            values[numbers[query]] = 0
        out[query] = _gain(_expected(values, gains)) / max(_gain(np.sort(gains)[::-1]), 1e-9)
    return out


def _gain(gains: NDArray[np.float64]) -> float:
    first = gains[:DEPTH]
    return float((first / np.log2(np.arange(len(first)) + 2)).sum())


def _expected(scores: Scores, gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gains of the first ten hits, each the mean over the hits that score as it does."""
    hits = np.flatnonzero(scores > 0)
    _, group = np.unique(-np.round(scores[hits], 6), return_inverse=True)
    means = np.bincount(group, gains[hits]) / np.bincount(group)
    return np.asarray(means[np.sort(group)][:DEPTH])


def contradictions(scores: Mapping[str, Scores], task: Task, reports: Sequence[Report]) -> dict[str, float]:
    """Share of the first ten that are coded with the finding that the query denies."""
    out = {}
    for query in task.queries:
        codes = np.array([task.finding(query) in report.gold for report in reports], float)
        top = _expected(scores[query], codes)
        out[query] = float(top.mean()) if len(top) else 0.0
    return out


def mean(values: Mapping[str, float]) -> Mean:
    """Over queries."""
    array = np.array(list(values.values()))
    draws = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(1), [2.5, 97.5])
    return Mean(float(array.mean()), float(low), float(high))


def by_finding(values: Mapping[str, float], task: Task) -> dict[str, float]:
    """Mean per finding asked for."""
    groups: dict[str, list[float]] = {}
    for query, value in values.items():
        groups.setdefault(task.finding(query), []).append(value)
    return {finding: float(np.mean(group)) for finding, group in groups.items()}


def rare(reports: Sequence[Report]) -> set[str]:
    """The third of the findings that fewest reports have."""
    ordered = sorted(FINDINGS, key=lambda finding: sum(finding in report.gold for report in reports))
    return set(ordered[: len(FINDINGS) // 3])


# --- beside it ---------------------------------------------------------------------------------------------------


def bm25(reports: Sequence[Report], task: Task, k1: float = 1.2, b: float = 0.75) -> dict[str, Scores]:
    """Query -> (N,) BM25 over the product's own tokens."""
    held_by = [analysis.tokens(report.text) for report in reports]
    lengths = np.array([len(tokens) for tokens in held_by], np.float32)
    norms = k1 * (1 - b + b * lengths / lengths.mean())
    counts: dict[str, dict[int, int]] = {}
    for row, tokens in enumerate(held_by):
        for token in tokens:
            held = counts.setdefault(token, {})
            held[row] = held.get(row, 0) + 1
    out = {}
    for query, text in task.queries.items():
        total = np.zeros(len(held_by), np.float32)
        for token in analysis.tokens(text):
            held = counts.get(token, {})
            rows, tf = np.array(list(held), np.int64), np.array(list(held.values()), np.float32)
            idf = np.log(1 + (len(held_by) - len(held) + 0.5) / (len(held) + 0.5))
            total[rows] += np.float32(idf) * tf * (k1 + 1) / (tf + norms[rows])
        out[query] = total
    return out


# --- ablations ---------------------------------------------------------------------------------------------------


def systems(linker: Dictionary, reports: Sequence[Report], task: Task) -> dict[str, System]:
    """The whole system and what is left of it without one of its parts."""
    labels = load_labels(conventions=False)
    link = _remembered(linker.link)
    query = _remembered(linker.link_queries)
    flat: Any = SimpleNamespace(tables=replace(linker.tables, parents=[[] for _ in linker.tables.parents]))
    bare = _Names(_without_synonyms(linker.tables))
    codes = {name: min(label.concepts) for name, label in zip(labels.names, labels.labels, strict=True)}
    oracle = {report.text: report.gold for report in reports}
    return {
        "whole": System(link, query, linker),
        "no negation": System(partial(_blind, link), partial(_blind, query), linker),
        "no synonyms": System(_remembered(bare.link), _remembered(bare.link_queries), linker),
        "no hierarchy": System(link, query, flat),
        "uniform weights": System(link, query, linker, Index(uniform=True)),
        "gold concepts": System(
            partial(_coded, link, oracle, codes),
            partial(_asked, task, codes),
            flat,
        ),
    }


def _remembered(link: Link) -> Link:
    """Every text is linked once, whatever asks."""
    known: dict[str, tuple[Finding, ...]] = {}

    def remembered(texts: Sequence[str]) -> list[tuple[Finding, ...]]:
        fresh = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(fresh, link(fresh), strict=True))
        return [known[text] for text in texts]

    return remembered


def _blind(link: Link, texts: Sequence[str]) -> list[tuple[Finding, ...]]:
    """What is mentioned, as if it were affirmed."""
    return [tuple(f._replace(assertion=Assertion.affirmed) for f in found) for found in link(texts)]


def _coded(
    link: Link, oracle: Mapping[str, Iterable[str]], codes: Mapping[str, str], texts: Sequence[str]
) -> list[tuple[Finding, ...]]:
    """The human codes as affirmed concepts; denials stay as linked, less what is coded."""
    out = []
    for text, found in zip(texts, link(texts), strict=True):
        present = {codes[name] for name in oracle.get(text, ())}
        denied = [f for f in found if f.assertion is Assertion.negated and f.concept not in present]
        out.append((*(Finding(concept, Assertion.affirmed, (0, 0)) for concept in sorted(present)), *denied))
    return out


def _asked(task: Task, codes: Mapping[str, str], texts: Sequence[str]) -> list[tuple[Finding, ...]]:
    """The concept that the query was written for, denied where its id says so."""
    known = {text: query for query, text in task.queries.items()}
    out: list[tuple[Finding, ...]] = []
    for text in texts:
        query = known[text]
        assertion = Assertion.negated if query.startswith("no-") else Assertion.affirmed
        out.append((Finding(codes[task.finding(query)], assertion, (0, len(text))),))
    return out


class _Names(Dictionary):
    """Reads preferred names alone: no synonyms, no everyday words, no misspellings."""

    def _misspelled(self, *_: object) -> list[object]:  # type: ignore[override]
        return []


def _without_synonyms(tables: Tables) -> Tables:
    ontology = load(CHEST)
    concepts = {
        id: concept._replace(synonyms=tuple(name for name in concept.synonyms if name.text == concept.name))
        for id, concept in ontology.concepts.items()
    }
    lexicon = compiled(replace(ontology, concepts=concepts), tables.lexicon.vocabulary)
    return replace(tables, lexicon=lexicon, facets=Facets({}, []))
