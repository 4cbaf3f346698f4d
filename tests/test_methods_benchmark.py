"""The benchmark of the methods on a few made-up vectors: its measures, its arms, and that a stopped grid goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import methods, methods_arms, methods_page
from benchmarks.methods_arms import (
    Abstracts,
    Alike,
    Boosted,
    Films,
    Heads,
    Sections,
    Setting,
    fit,
    graded,
    measured,
    trained,
)
from benchmarks.methods_features import Claims, Pictures, Reports
from benchmarks.methods_measure import difference, ndcg, rank
from retrieval.evaluate import evaluate
from retrieval.types import Document, Hit, Ranking

DIM, SHORT = 8, {"steps": 3, "batch": 6, "k": 4}


def _unit(draw: np.random.Generator, count: int) -> NDArray[np.float32]:
    vectors = draw.standard_normal((count, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


@pytest.fixture
def reports() -> Reports:
    draw, n = np.random.default_rng(0), 60
    gold = draw.random((n, 3)) < 0.4
    return Reports(
        whole=_unit(draw, n),
        findings=_unit(draw, n),
        impression=_unit(draw, n),
        both=np.ones(n, bool),
        keys=[f"text {n // 2}" for n in range(n)],
        conclusions=[f"end {n // 3}" for n in range(n)],
        tversky=draw.random((n, n)).astype(np.float32),
        gold=gold,
        part=np.array((["fit"] * 4 + ["validate", "dev"]) * 10),
    )


@pytest.fixture
def pictures() -> Pictures:
    draw = np.random.default_rng(1)
    return Pictures(_unit(draw, 70), draw.integers(60, size=70))


@pytest.fixture
def claims() -> Claims:
    draw = np.random.default_rng(2)
    grades = np.zeros((12, 80), np.uint8)
    grades[np.arange(12), np.arange(12)] = 1
    documents = [Document(id=f"d{n}", text=f"abstract {n}") for n in range(80)]
    parts = np.array(["fit"] * 8 + ["validate"] * 2 + ["test"] * 2)
    lexical = draw.random((12, 80)).astype(np.float32)
    return Claims(
        _unit(draw, 80), _unit(draw, 12), lexical, grades, parts, [f"claim {n}" for n in range(12)], documents
    )


def test_ndcg_is_that_of_the_product() -> None:
    draw = np.random.default_rng(3)
    scores, grades = draw.random((5, 20)), draw.integers(0, 3, (5, 20))
    run = {f"q{q}": Ranking(Hit(f"d{d}", float(scores[q, d])) for d in np.argsort(-scores[q])) for q in range(5)}
    qrels = {f"q{q}": {f"d{d}": int(grades[q, d]) for d in range(20)} for q in range(5)}
    wanted = evaluate(run, qrels, ["nDCG@10"]).per_query["nDCG@10"]
    assert ndcg(scores, grades).tolist() == pytest.approx([wanted[f"q{q}"] for q in range(5)])


def test_a_tie_counts_against_the_rank() -> None:
    assert rank(np.array([[0.5, 0.5]]), np.array([[True, False]])).tolist() == [2]


def test_a_difference_says_in_how_many_seeds_the_arm_is_better() -> None:
    found = difference(np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([[0.5, 0.5], [0.5, 0.5]]))
    assert (found.value, found.wins, found.spread) == (0.0, 1, 0.5)


def test_grades_are_those_of_the_task(reports: Reports) -> None:
    rows, grades = graded(reports, "dev")
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            one, other = set(np.flatnonzero(reports.gold[a])), set(np.flatnonzero(reports.gold[b]))
            wanted = 0 if reports.keys[a] == reports.keys[b] else 2 if one == other and one else int(bool(one & other))
            assert grades[i, j] == wanted


@pytest.mark.parametrize("name", ["alike", "films", "sections", "boosting"])
def test_every_arm_starts_as_the_encoder_and_trains(name: str, reports: Reports, pictures: Pictures) -> None:
    tasks = {
        "alike": lambda: Alike(reports),
        "films": lambda: Films(reports, pictures),
        "sections": lambda: Sections(reports, reports.impression),
        "boosting": lambda: Boosted(reports, pictures),
    }
    task = tasks[name]()
    start, _ = trained(task, Setting(name, "baseline" if name == "boosting" else "none", **SHORT))  # type: ignore[arg-type]
    for arm in methods.ARMS[name]:
        how = Setting(name, arm, "dev", injected=0.2 if name == "sections" else 0.0, **SHORT)  # type: ignore[arg-type]
        if isinstance(task, Boosted):
            task.begin(how, start)
        result = fit(task, how, start)
        assert np.isfinite(result.gradient)
        assert all(len(values) for values in result.values.values())


def test_claims_have_a_teacher_that_is_read_once(
    claims: Claims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods_arms, "KEPT", tmp_path)
    task = Abstracts(claims)
    assert len(list(tmp_path.glob("scores-*.safetensors"))) == 1
    assert not task.relevant.gather(1, task.pools["hard"]).any()
    for arm in methods.ARMS["abstracts"]:
        result = fit(task, Setting("abstracts", arm, "test", **SHORT))  # type: ignore[arg-type]
        assert len(result.values["nDCG@10"]) == 2
    assert task.taught("fit").queries > 0


def test_a_stopped_grid_goes_on_where_it_was(
    reports: Reports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, how = Alike(reports), Setting("alike", "none", **SHORT)  # type: ignore[arg-type]
    first = methods.Runs(tmp_path / "runs.jsonl", 60).get(task, how)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"key": "torn')
    with pytest.raises(SystemExit, match="goes on from here"):
        methods.Runs(tmp_path / "runs.jsonl", -1).get(task, replace(how, seed=1))
    monkeypatch.setattr(methods, "fit", None)  # nothing is computed again
    again = methods.Runs(tmp_path / "runs.jsonl", -1).get(task, how)
    assert again == first


def test_equal_settings_give_equal_figures(reports: Reports) -> None:
    how = Setting("alike", "CPRD random", **SHORT)  # type: ignore[arg-type]
    assert fit(Alike(reports), how) == fit(Alike(reports), how)


def test_the_page_is_written_from_the_figures(
    reports: Reports, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods_page, "PAGE", tmp_path / "methods.md")
    task, how = Films(reports, pictures), Setting("films", "none", "dev", **SHORT)  # type: ignore[arg-type]
    runs = [fit(task, replace(how, seed=seed)) for seed in range(2)]
    worse = [r._replace(values={m: [v - 1 for v in vs] for m, vs in r.values.items()}) for r in runs]
    untouched = {m: float(np.nanmean(v)) for m, v in measured(task, Heads(DIM), "dev").items()}
    found = {
        "main": "graded nDCG@10",
        "teacher": task.taught("dev")._asdict() | {"teacher_ndcg": 0.1, "student_ndcg": 0.2},
        "untouched": untouched,
        "arms": {"none": methods.row(runs, runs, how), "KL": methods.row(worse, runs, how)},
    }
    (tmp_path / "methods.json").write_text(json.dumps({"films": found}))
    methods_page.write_page()
    page = (tmp_path / "methods.md").read_text()
    assert "**The teacher is no better than the student" in page
    assert "worse than none: KL" in page
    assert (tmp_path / "methods-films.png").stat().st_size > 1_000
