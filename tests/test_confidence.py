"""Confidence on samples typed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.confidence import Calibration, combined, cut, from_json, to_json
from retrieval.types import Share

SAMPLE = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30).map(sorted)


@given(SAMPLE, SAMPLE, st.lists(st.floats(-2, 2, width=32), min_size=1).map(sorted))
def test_confidence_rises_with_the_score_and_stays_between_zero_and_one(related, unrelated, scores) -> None:
    found = Calibration(related, unrelated).confidence(np.array(scores, np.float32))
    assert (np.diff(found) >= 0).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_one_half_is_where_both_errors_are_equal() -> None:
    calibration = Calibration(np.linspace(0.4, 1, 101), np.linspace(0, 0.6, 101))
    assert calibration.confidence(np.array([0.5], np.float32))[0] == pytest.approx(0.5, abs=0.02)


def test_bm25_counts_per_word_of_the_query() -> None:
    calibrations = {"lexical": Calibration([2.0], [1.0])}
    shares = [{"lexical": Share(1, 6.0, 1.0, 1.0)}]
    assert combined(shares, calibrations, words=3)[0] == 1
    assert combined(shares, calibrations, words=6)[0] == 0


def test_a_leg_that_was_not_calibrated_has_no_say() -> None:
    assert combined([{"rerank": Share(1, 9.0, 1.0, 1.0)}], {"dense": Calibration([1], [0])}, 1) is None


def test_calibrations_survive_json() -> None:
    calibrations = {"text": {"dense": Calibration([0.5, 0.75], [0.25])}}
    assert to_json(from_json(to_json(calibrations))) == to_json(calibrations)


def test_a_cutting_is_a_run_of_the_text() -> None:
    rng = np.random.default_rng(0)
    assert cut("a b c d e", 3, rng) in {"a b c", "b c d", "c d e"}
    assert cut("a b", 3, rng) is None
