"""Learned weights on worlds where the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval.evaluate import evaluate
from retrieval.fusion import fuse
from retrieval.tune import judged, learn_weights
from retrieval.types import Hit, Ranking


def ranking(*ids: str) -> Ranking:
    return Ranking(Hit(id, float(len(ids) - n)) for n, id in enumerate(ids))


def test_the_leg_that_ranks_well_gets_the_weight() -> None:
    legs = {"good": {"q": ranking("r", "x", "y")}, "bad": {"q": ranking("x", "y", "z", "r")}}
    weights, ndcg = learn_weights(["good", "bad"], [judged(legs, {"q": {"r": 1}})])
    assert ndcg == pytest.approx(1)
    assert [h.id for h in fuse({leg: run["q"] for leg, run in legs.items()}, weights, 1)] == ["r"]


def test_what_was_learned_is_what_evaluation_measures() -> None:
    rng = np.random.default_rng(0)
    ids = [f"d{n:02}" for n in range(40)]
    qrels = {f"q{n}": dict.fromkeys(rng.choice(ids, 4, replace=False), 1) for n in range(20)}
    legs = {
        leg: {q: ranking(*sorted(ids, key=lambda d: rng.normal() - bias * (d in rel))) for q, rel in qrels.items()}
        for leg, bias in (("a", 1.0), ("b", 1.5), ("c", 0.0))
    }
    weights, ndcg = learn_weights(list(legs), [judged(legs, qrels)])
    run = {q: fuse({leg: legs[leg][q] for leg in legs}, weights, 1000) for q in qrels}
    assert evaluate(run, qrels, ["nDCG@10"]).means["nDCG@10"] == pytest.approx(ndcg, abs=2e-3)
    assert weights["c"] < min(weights["a"], weights["b"])


def test_sources_count_alike_however_many_queries_they_have() -> None:
    likes_a = {"a": {"q": ranking("z", "x")}, "b": {"q": ranking("x", "z")}}
    likes_b = {"a": likes_a["b"], "b": likes_a["a"]}
    many = judged(
        {leg: {f"q{n}": run["q"] for n in range(9)} for leg, run in likes_a.items()},
        {f"q{n}": {"z": 1} for n in range(9)},
    )
    _, ndcg = learn_weights(["a", "b"], [many, judged(likes_b, {"q": {"z": 1}})])
    assert ndcg < 0.9


def test_queries_without_candidates_or_relevance_are_left_out() -> None:
    assert judged({"a": {"q": Ranking()}}, {"q": {"r": 1}, "p": {"r": 0}}) == []
