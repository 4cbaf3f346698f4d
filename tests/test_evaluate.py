from __future__ import annotations

import copy
import math
import time
from itertools import pairwise
from typing import Any

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.errors import InputError
from retrieval.evaluate import compare, evaluate
from retrieval.types import Hit, Qrels, Ranking, Run


def ranking(ids: str | list[str]) -> Ranking:
    return Ranking(Hit(id, 10.0 - rank) for rank, id in enumerate(ids))


def test_a_judged_query_without_an_answer_counts_zero() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}}
    for run in ({"q1": ranking("a")}, {"q1": ranking("a"), "q2": Ranking()}):
        result = evaluate(run, qrels, ["nDCG@10", "RR@10", "R@10", "AP", "P@1", "Judged@10"])
        assert set(result.means.values()) == {0.5}
        assert result.per_query["nDCG@10"] == {"q1": 1.0, "q2": 0.0}
        assert (result.queries, result.unanswered) == (2, 1)


def test_a_run_without_any_answer_is_zero_everywhere() -> None:
    result = evaluate({}, {"q1": {"a": 1}}, ["nDCG@10", "RR@10"])
    assert result.means == {"nDCG@10": 0.0, "RR@10": 0.0}
    assert result.unjudged == 0.0


def test_all_measures_have_one_denominator() -> None:
    run = {"q1": ranking("ab"), "q2": ranking("c"), "q9": ranking("z")}
    qrels = {"q1": {"a": 1}, "q2": {"c": 1}, "q3": {"x": 1}, "q4": {}}
    result = evaluate(run, qrels, ["nDCG@10", "RR@10", "R@10", "AP", "Success@1"])
    assert all(value == pytest.approx(2 / 3) for value in result.means.values())
    assert {query for values in result.per_query.values() for query in values} == {"q1", "q2", "q3"}


def test_a_query_judged_to_have_nothing_relevant_counts_zero() -> None:
    result = evaluate({"q1": ranking("a"), "q2": ranking("a")}, {"q1": {"a": 0}, "q2": {"a": 1}}, ["nDCG@10"])
    assert result.means == {"nDCG@10": 0.5}


@pytest.mark.parametrize("ids", [["b", "c"], ["c", "b"], ["B", "a"], ["a", "B"]])
def test_equal_scores_keep_our_order(ids: list[str]) -> None:
    run = {"q": Ranking(Hit(id, 1.0) for id in ids)}
    for name in ("nDCG@10", "RR@10", "RR", "P@1", "R@1", "Judged@1"):
        assert evaluate(run, {"q": {ids[0]: 1}}, [name]).means == {name: 1.0}


def test_scores_that_a_short_float_cannot_tell_apart_keep_our_order() -> None:
    run = {"q": Ranking([Hit("a", 0.7), Hit("b", math.nextafter(0.7, 0))])}
    assert evaluate(run, {"q": {"a": 1}}, ["RR"]).means == {"RR": 1.0}


def test_ties_at_the_cut_give_the_recall_of_the_order_returned() -> None:
    run = {"q": Ranking(Hit(id, 1.0) for id in "abcd")}
    assert evaluate(run, {"q": {"a": 1, "b": 1}}, ["R@2"]).means == {"R@2": 1.0}


def test_grades_are_kept() -> None:
    qrels = {"q": {"a": 1, "b": 3}}
    worst = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert evaluate({"q": ranking("ab")}, qrels, ["nDCG@10"]).means["nDCG@10"] == pytest.approx(worst)
    assert evaluate({"q": ranking("ba")}, qrels, ["nDCG@10"]).means["nDCG@10"] == pytest.approx(1)
    assert evaluate({"q": ranking("ab")}, qrels, ["P(rel=2)@1"]).means == {"P(rel=2)@1": 0.0}


def test_a_negative_grade_is_judged_and_not_relevant() -> None:
    result = evaluate({"q": ranking("ab")}, {"q": {"a": -2, "b": 1}}, ["nDCG@10", "RR@10", "Judged@10"])
    assert result.means["nDCG@10"] == pytest.approx(1 / math.log2(3))
    assert result.means["RR@10"] == 0.5
    assert result.means["Judged@10"] == 1.0
    assert result.unjudged == 0.0


def test_the_unjudged_share_counts_the_first_ten_hits() -> None:
    ids = [f"d{n}" for n in range(20)]
    assert evaluate({"q": ranking(ids)}, {"q": {"d0": 1, "d9": 0, "d10": 1}}, ["RR"]).unjudged == 0.8


def test_identical_ids_stay_unless_asked_and_nothing_is_edited() -> None:
    run: Run = {"a": ranking("ab")}
    qrels: Qrels = {"a": {"a": 1, "b": 1}}
    before = copy.deepcopy((run, qrels))
    assert evaluate(run, qrels, ["R@1", "RR"]).means == {"R@1": 0.5, "RR": 1.0}
    assert evaluate(run, qrels, ["R@1", "RR"], drop_identical_ids=True).means == {"R@1": 1.0, "RR": 1.0}
    assert (run, qrels) == before


def test_a_query_judged_only_by_itself_is_no_query_once_identical_ids_are_dropped() -> None:
    run = {"a": ranking("ab"), "c": ranking("d")}
    result = evaluate(run, {"a": {"a": 1}, "c": {"d": 1}}, ["RR"], drop_identical_ids=True)
    assert result.per_query == {"RR": {"c": 1.0}}


def test_ids_with_blanks_and_nul_are_only_names() -> None:
    run = {"q 1\0a": ranking(["my cat.jpg", "my dog.jpg", "x\0a", "x\0b"])}
    result = evaluate(run, {"q 1\0a": {"my dog.jpg": 1, "x\0b": 1}}, ["RR@10", "AP", "ERR@10"])
    assert result.means["RR@10"] == 0.5
    assert result.means["AP"] == 0.5


def test_grades_that_a_provider_does_not_take_are_the_callers_fault() -> None:
    with pytest.raises(InputError, match="grades above 4"):
        evaluate({"q": ranking("a")}, {"q": {"a": 9}}, ["ERR@10"])


@pytest.mark.parametrize(
    "name",
    [
        "foo", "ndcg@10", "", "nDCG@", "nDCG@10 R@100", "P", "R@1.5", "P@'x'", "P@True", "P(foo=1)@5", "P@0", "AP@0",
        "R@0", "RR@0", "nDCG@0", "Judged@0", "P@-3", "nDCG@99999999999", "P(rel=0)@5", "P(rel=99999999999999999999)@5",
        "NumQ", "NumRet", "alpha_nDCG@10", "Rprec(rel=True)", "nDCG(gains=3)@10", "nDCG(gains={1:99999999999})@10",
        "nDCG(gains={'x':1})@10", "(" * 5000, "1" + "+1" * 50_000, "__import__('os')", "nDCG@10; 1", "nDCG@10\0",
    ],
)  # fmt: skip
def test_what_is_no_measure_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="measures:") as caught:
        evaluate({"q": ranking("a")}, {"q": {"a": 1}}, ["nDCG@10", name])
    assert caught.value.field == "measures"


def test_measures_are_a_list_of_at_least_one() -> None:
    with pytest.raises(InputError, match="at least one"):
        evaluate({}, {"q": {"a": 1}}, [])
    with pytest.raises(InputError, match="expected a list"):
        evaluate({}, {"q": {"a": 1}}, "nDCG@10")
    not_a_name: Any = 10
    with pytest.raises(InputError):
        evaluate({}, {"q": {"a": 1}}, [not_a_name])


def test_measures_carry_the_names_of_ir_measures_in_the_order_asked() -> None:
    result = evaluate({"q": ranking("a")}, {"q": {"a": 1}}, ["R@100", "MRR@10", "nDCG@10"])
    assert list(result.means) == list(result.intervals) == list(result.per_query) == ["R@100", "RR@10", "nDCG@10"]


def test_bad_runs_and_judgments_are_refused() -> None:
    qrels = {"q": {"a": 1}}
    with pytest.raises(InputError, match="not a number"):
        evaluate({"q": Ranking([Hit("a", math.nan)])}, qrels, ["RR"])
    with pytest.raises(InputError, match="twice"):
        evaluate({"q": ranking("aa")}, qrels, ["RR"])
    with pytest.raises(InputError, match="none of the 1 queries"):
        evaluate({"p": ranking("a")}, qrels, ["RR"])
    unjudged: list[Qrels] = [{}, {"q": {}}]
    for empty in unjudged:
        with pytest.raises(InputError, match="no judged query"):
            evaluate({"q": ranking("a")}, empty, ["RR"])
    with pytest.raises(InputError, match="whole number"):
        evaluate({"q": ranking("a")}, {"q": {"a": 2**40}}, ["nDCG@10"])


def test_the_interval_of_equal_values_is_a_point_and_a_known_one_is_met() -> None:
    run: Run = {f"q{n}": ranking("a" if n % 2 else "b") for n in range(400)}
    qrels: Qrels = {query: {"a": 1} for query in run}
    result = evaluate(run, qrels, ["RR", "R@10"])
    low, high = result.intervals["RR"]
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.005)
    same = evaluate({query: ranking("a") for query in run}, qrels, ["RR"])
    assert same.intervals["RR"] == (1.0, 1.0)


def test_the_same_input_gives_the_same_interval_in_any_order_of_queries() -> None:
    run: Run = {f"q{n}": ranking("xyza"[n % 4 :]) for n in range(20)}
    qrels: Qrels = {query: {"a": 1} for query in run}
    backwards = {query: qrels[query] for query in reversed(qrels)}
    assert evaluate(run, qrels, ["RR"]) == evaluate(run, backwards, ["RR"])


def test_a_thousand_queries_are_evaluated_in_seconds() -> None:
    run: Run = {f"q{n}": ranking([f"d{n}-{rank}" for rank in range(200)]) for n in range(1000)}
    qrels: Qrels = {query: {f"d{query[1:]}-{int(query[1:]) % 7}": 1} for query in run}
    began = time.perf_counter()
    evaluate(run, qrels, ["nDCG@10", "R@100", "RR@10"])
    assert time.perf_counter() - began < 10


GRADES = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3), min_size=1)


@given(
    st.dictionaries(st.sampled_from("pqr"), GRADES, min_size=1),
    st.dictionaries(st.sampled_from("pqr"), st.permutations("abcdef"), min_size=1),
)
def test_the_means_are_those_of_ir_measures_and_no_value_leaves_its_bounds(
    qrels: Qrels, orders: dict[str, list[str]]
) -> None:
    run: Run = {query: ranking(ids[:4]) for query, ids in orders.items()}
    if not set(run) & set(qrels):
        return
    result = evaluate(run, qrels, ["nDCG@10", "AP", "RR"])
    scored = {query: {hit.id: hit.score for hit in hits} for query, hits in run.items()}
    for measure, value in ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 10, ir_measures.AP, ir_measures.RR], qrels, scored
    ).items():
        assert result.means[str(measure)] == pytest.approx(value)
        low, high = result.intervals[str(measure)]
        assert 0 <= low <= high <= 1


def test_ndcg_never_exceeds_one_and_never_changes() -> None:
    chance = np.random.default_rng(0)
    ids = [f"d{n}" for n in range(30)]
    qrels: Qrels = {f"q{n}": {id: int(g) for id, g in zip(ids, chance.integers(-2, 4, 30))} for n in range(50)}
    run: Run = {query: ranking(list(chance.permutation(ids))) for query in qrels}
    results = [evaluate(run, qrels, ["nDCG@10", "nDCG"]) for _ in range(3)]
    assert results[0] == results[1] == results[2]
    assert max(value for values in results[0].per_query.values() for value in values.values()) <= 1


# --- comparing ---


def runs(better: int, worse: int, same: int) -> tuple[Run, Run, Qrels]:
    """Run B answers `better` queries first that A answers second, and so on."""
    orders = [("ba", "ab")] * better + [("ab", "ba")] * worse + [("ab", "ab")] * same
    a: Run = {f"q{n}": ranking(first) for n, (first, _) in enumerate(orders)}
    b: Run = {f"q{n}": ranking(second) for n, (_, second) in enumerate(orders)}
    return a, b, {query: {"a": 1} for query in a}


def test_wins_and_losses_are_counted_for_the_second_run() -> None:
    a, b, qrels = runs(better=5, worse=2, same=3)
    (found,) = compare(a, b, qrels, ["RR"])
    assert (found.wins, found.losses, found.ties) == (5, 2, 3)
    assert found.mean_b - found.mean_a == pytest.approx(found.difference) == pytest.approx(0.15)
    assert found.interval[0] < 0.15 < found.interval[1]
    assert found.per_query["q0"] == 0.5
    assert found.per_query["q5"] == -0.5
    (back,) = compare(b, a, qrels, ["RR"])
    assert (back.wins, back.losses, back.difference, back.p) == (2, 5, -found.difference, found.p)


def test_few_queries_are_tested_exactly() -> None:
    assert compare(*runs(5, 0, 3), ["RR"])[0].p == pytest.approx(2 / 2**5)
    assert compare(*runs(1, 0, 0), ["RR"])[0].p == 1.0
    assert compare(*runs(2, 1, 0), ["RR"])[0].p == 1.0


def test_equal_runs_differ_by_nothing() -> None:
    (found,) = compare(*runs(0, 0, 4), ["RR"])
    assert (found.p, found.difference, found.interval) == (1.0, 0.0, (0.0, 0.0))


def test_many_queries_are_tested_by_sampling() -> None:
    """The normal approximation of 60 against 40: z = 2, p = 0.0455; with a half step of continuity 0.057."""
    assert compare(*runs(60, 40, 10), ["RR"])[0].p == pytest.approx(0.057, abs=0.008)
    assert compare(*runs(100, 0, 0), ["RR"])[0].p == pytest.approx(1 / 10_001)


def test_more_wins_never_raise_p() -> None:
    ps = [compare(*runs(better, 20, 0), ["RR"])[0].p for better in (20, 30, 40, 60)]
    assert all(later <= earlier for earlier, later in pairwise(ps))


def test_a_query_that_only_one_run_answers_is_a_win() -> None:
    (found,) = compare(
        {"q1": ranking("a")}, {"q1": ranking("a"), "q2": ranking("b")}, {"q1": {"a": 1}, "q2": {"b": 1}}, ["RR"]
    )
    assert (found.wins, found.losses, found.ties) == (1, 0, 1)
