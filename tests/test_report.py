from __future__ import annotations

import json
from pathlib import Path

import pytest

from retrieval.errors import InputError
from retrieval.evaluate import evaluate
from retrieval.files import read_run
from retrieval.types import Hit, Part, Query, Ranking
from server.judging import Judgments, Measured
from server.report import html, write

QRELS = {"q1": {"a": 1}, "q2": {"b": 2, "c": 0}}


def measured(query_text: str = "enlarged heart") -> Measured:
    runs = {
        "lexical": {"q1": Ranking([Hit("a", 2.0), Hit("z", 1.0)])},
        "dense+rerank": {"q1": Ranking([Hit("z", 2.0), Hit("a", 1.0)]), "q2": Ranking([Hit("b", 1.0)])},
    }
    queries = [Query(id="q1", parts=(Part(text=query_text),)), Query(id="q2", parts=(Part(image=b"x"),))]
    evaluations = {name: evaluate(run, QRELS, ["RR@10", "R@10"]) for name, run in runs.items()}
    return Measured("demo", Judgments("source", "test", queries, QRELS), runs, evaluations)


def test_the_table_shows_means_with_intervals_and_marks_the_best() -> None:
    page = html(measured())
    assert '<td class="best">0.7500<br><small>' in page  # dense+rerank: (1/2 + 1) / 2
    assert "<td>0.5000<br><small>" in page  # lexical: q2 without an answer counts as zero
    assert page.count("<svg") == 2


def test_every_query_can_be_opened_and_shows_what_was_relevant() -> None:
    page = html(measured())
    assert page.count("<details>") == 2
    assert '<li class="good">a <small>grade 1</small></li>' in page
    assert "<li>z <small>unjudged</small></li>" in page
    assert page.index("q1: enlarged heart") > page.index("q2: [picture]")  # worst first


def test_markup_in_a_query_is_shown_not_run() -> None:
    page = html(measured("<script>alert(1)</script>"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = html(measured())
    assert "src=" not in page
    assert "@import" not in page


def test_the_folder_holds_the_page_the_figures_and_runs_in_our_order(tmp_path: Path) -> None:
    write(measured(), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["queries"] == 2
    run = read_run(tmp_path / "out" / "dense+rerank.run")
    assert [hit.id for hit in run["q1"]] == ["z", "a"]


def test_a_folder_that_cannot_be_written_is_the_callers_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into"):
        write(measured(), tmp_path / "file" / "out")
