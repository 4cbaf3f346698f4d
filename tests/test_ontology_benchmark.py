"""The measures behind docs/ontology.md, on three reports."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.ontology_labels import Counts, Phrases, agreement, micro
from benchmarks.ontology_labels import _denials as denials
from benchmarks.ontology_labels import _triggers as triggers
from benchmarks.ontology_reports import Report, Task
from benchmarks.ontology_retrieval import Memory, bm25, by_finding, contradictions, mean, ndcg
from retrieval.evaluate import evaluate
from retrieval.types import Assertion, Finding, Hit, Ranking

IDS = ["a", "b", "c"]
REPORTS = [
    Report("a", "Edema.", frozenset(["Edema"])),
    Report("b", "No edema.", frozenset()),
    Report("c", "Mass and edema.", frozenset(["Edema", "Mass"])),
]


def task(grades: dict[str, dict[str, int]], queries: dict[str, str] | None = None) -> Task:
    return Task("label_reports", "text", queries or dict.fromkeys(grades, ""), grades)


def row(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, np.float32)


def test_ndcg_is_what_ir_measures_says_where_nothing_is_tied() -> None:
    grades = {"Edema-0": {"a": 2, "c": 1}, "Mass-0": {"b": 1}}
    scores = {"Edema-0": row(0.2, 0.9, 0.5), "Mass-0": row(0.2, 0.0, 0.5)}
    run = {q: Ranking(sorted((Hit(i, float(s)) for i, s in zip(IDS, values) if s > 0), key=lambda h: -h.score))
           for q, values in scores.items()}  # fmt: skip
    expected = evaluate(run, grades, ["nDCG@10"]).per_query["nDCG@10"]
    assert ndcg(scores, task(grades), IDS) == pytest.approx(expected)


def test_ties_are_worth_their_mean_and_not_their_luck() -> None:
    [value] = ndcg({"Edema-0": row(1, 1, 1)}, task({"Edema-0": {"b": 1}}), IDS).values()
    assert value == pytest.approx(np.mean(1 / np.log2([2, 3, 4])))


def test_a_query_does_not_find_itself() -> None:
    assert ndcg({"a": row(1, 0.5, 0)}, task({"a": {"b": 1}}), IDS) == {"a": pytest.approx(1.0)}


def test_contradictions_are_hits_coded_with_what_is_denied() -> None:
    asked = task({"no-Edema": {"b": 1}}, {"no-Edema": "no edema"})
    assert contradictions({"no-Edema": row(0.5, 0.9, 0)}, asked, REPORTS) == {"no-Edema": 0.5}
    assert contradictions({"no-Edema": row(0, 0, 0)}, asked, REPORTS) == {"no-Edema": 0.0}


def test_a_mean_lies_in_its_interval_and_findings_count_once() -> None:
    value = mean({"x": 0.0, "y": 1.0, "z": 0.5})
    assert value.low <= value.value == 0.5 <= value.high
    asked = task({})
    assert by_finding({"Edema-0": 1.0, "Edema-1": 0.0, "no-Mass": 0.3}, asked) == {"Edema": 0.5, "Mass": 0.3}


def test_bm25_prefers_the_rarer_word() -> None:
    scores = bm25(REPORTS, task({}, {"q": "mass edema"}))["q"]
    assert scores.argmax() == 2 and (scores > 0).all()


def test_memory_answers_as_postings_do() -> None:
    memory = Memory([[Finding("x", Assertion.affirmed, (0, 1))], [], [Finding("x", Assertion.affirmed, (0, 1))]])
    assert memory.size == 3
    assert memory.rows("x", Assertion.affirmed).tolist() == [0, 2]
    assert memory.rows("x", Assertion.negated).tolist() == []
    assert list(memory.concepts()) == [("x", Assertion.affirmed)]


def test_agreement_counts_positive_labels_with_intervals() -> None:
    gold, found = [{"Edema"}, set(), {"Edema", "Mass"}], [{"Edema"}, {"Mass"}, {"Edema"}]
    assert micro(gold, found) == Counts(2, 1, 1)
    result = agreement(gold, found)
    assert result.micro[0] == pytest.approx(micro(gold, found).f1) == pytest.approx(2 / 3)
    assert result.micro[1] <= result.micro[0] <= result.micro[2]
    assert result.findings["Edema"] == Counts(2, 0, 0)


KINDS = {
    "no": "PREN",
    "no change": "PSEU",
    "rule out": "PREP",
    "unlikely": "POST",
    "being ruled out": "POSP",
    "but": "CONJ",
}
NEGEX = "".join(f"{phrase}\t\t[{kind}]\n" for phrase, kind in KINDS.items())


@pytest.mark.parametrize(
    ("sentence", "denied"),
    [
        ("edema", False),
        ("no edema", True),
        ("no fever but edema", False),
        ("no change in edema", False),
        ("edema unlikely", True),
        ("rule out edema", True),
        ("nothing but edema", False),
    ],
)
def test_the_baseline_is_negex(sentence: str, denied: bool) -> None:

    phrase = Phrases(re.compile("edema"), None)
    assert list(denials(sentence, phrase, triggers(NEGEX), [])) == [denied]


def test_the_published_labels_take_a_name_or_one_step_above() -> None:
    from benchmarks.ontology_labels import published

    tables = SimpleNamespace(
        numbers={"p": 0, "e": 1, "x": 2},
        names=["pulmonary edema", "interstitial flooding", "other"],
        parents=[[], [0], [1]],
        types=[["T047"], ["T047"], ["T047"]],
    )
    found = {"one": ("e", Assertion.affirmed), "two": ("x", Assertion.affirmed), "three": ("p", Assertion.negated)}
    linker: Any = SimpleNamespace(
        tables=tables, link=lambda texts: [(Finding(*found[text], (0, 1)),) for text in texts]
    )
    reports = [Report(text, text, frozenset()) for text in found]
    assert published(reports, linker, lambda _: set()) == [{"Edema"}, set(), set()]
