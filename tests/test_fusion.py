"""Rankings typed by hand, and what fusing them must give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.fusion import effective_weights, fuse
from retrieval.types import Hit, Ranking


def ranking(**scores: float) -> Ranking:
    return Ranking(sorted((Hit(id, s) for id, s in scores.items()), key=lambda h: (-h.score, h.id)))


def test_minmax_is_the_weighted_sum_of_scores_scaled_to_zero_and_one() -> None:
    fused = fuse(
        {"words": ranking(a=10, b=5, c=0), "meaning": ranking(b=0.9, c=0.4)}, {"words": 0.5, "meaning": 0.5}, 10
    )
    assert [(h.id, h.score) for h in fused] == [("b", 0.25 + 0.5), ("a", 0.5), ("c", 0.0)]


def test_rrf_sums_reciprocal_ranks() -> None:
    fused = fuse({"a": ranking(x=3, y=2), "b": ranking(y=9)}, {"a": 0.5, "b": 0.5}, 10, "rrf")
    assert {h.id: h.score for h in fused} == pytest.approx({"x": 0.5 / 61, "y": 0.5 / 62 + 0.5 / 61})


def test_a_silent_leg_gives_its_weight_to_the_others() -> None:
    assert effective_weights({"a": ranking(x=1), "b": Ranking()}, {"a": 0.2, "b": 0.8}) == {"a": 1.0}


def test_legs_without_any_weight_count_alike() -> None:
    assert effective_weights({"a": ranking(x=1), "b": ranking(x=1)}, {}) == {"a": 0.5, "b": 0.5}


def test_ties_go_to_the_smaller_id() -> None:
    fused = fuse({"a": ranking(z=1, b=1, m=1)}, {"a": 1}, 2)
    assert [h.id for h in fused] == ["b", "m"]


def test_nothing_fused_is_nothing() -> None:
    assert fuse({"a": Ranking(), "b": Ranking()}, {"a": 1}, 5) == []


def test_one_inexact_leg_makes_the_answer_inexact() -> None:
    fused = fuse({"a": ranking(x=1), "b": Ranking([Hit("x", 1)], exact=False, recall=0.97)}, {"a": 1, "b": 1}, 5)
    assert (fused.exact, fused.recall) == (False, 0.97)


SCORES = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-5, 5), max_size=8)


@given(
    st.dictionaries(st.sampled_from(["one", "two", "three"]), SCORES, min_size=1), st.sampled_from(["minmax", "rrf"])
)
def test_the_parts_add_up_to_the_score(legs: dict[str, dict[str, float]], method) -> None:
    fused = fuse({leg: ranking(**s) for leg, s in legs.items()}, {"one": 1, "two": 2, "three": 0.5}, 20, method)
    for hit in fused:
        assert sum(share.weight * share.normalised for share in hit.parts.values()) == pytest.approx(
            hit.score, abs=1e-6
        )


@given(SCORES, SCORES, st.integers(1, 8))
def test_a_shorter_list_is_the_head_of_a_longer_one(one, two, k: int) -> None:
    legs, weights = {"one": ranking(**one), "two": ranking(**two)}, {"one": 1.0, "two": 2.0}
    assert fuse(legs, weights, 20)[:k] == fuse(legs, weights, k)
