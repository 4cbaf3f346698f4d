from __future__ import annotations

import pytest
import torch

from encoders.mining import Counts, alike, mine, mine_run
from retrieval.errors import InputError
from retrieval.types import Hit, Ranking

SCORES = torch.tensor([[0.9, 0.7, 0.5, 0.3, 0.1], [0.2, 0.4, 0.6, 0.8, 1.0]])


def test_the_hardest_are_the_nearest_that_are_not_masked() -> None:
    mined = mine(SCORES, 2, torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]) > 0)
    assert mined.columns.tolist() == [[1, 2], [3, 2]]
    assert mined.counts == Counts(candidates=10, masked=2, filtered=0, duplicated=0, empty=0)


def test_the_easiest_are_the_farthest() -> None:
    assert mine(SCORES, 2, among="easy").columns.tolist() == [[4, 3], [0, 1]]


def test_random_ones_follow_the_seed_and_never_the_mask() -> None:
    mask = torch.rand(200, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :4] = False
    scores = torch.rand(200, 30)
    one, two = (mine(scores, 4, mask, among="random", draw=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.columns, two.columns)
    assert not mask.gather(1, one.columns).any()
    assert all(len(set(row)) == 4 for row in one.columns.tolist())


def test_thresholds_filter_on_both_sides_and_may_differ_by_row() -> None:
    mined = mine(SCORES, 5, above=torch.tensor([[0.6], [0.9]]), below=0.3)
    assert [sorted(set(row)) for row in mined.columns.tolist()] == [[2, 3], [1, 2, 3]]
    assert mined.found.tolist() == [2, 3]
    assert mined.counts == Counts(candidates=10, masked=0, filtered=5, duplicated=5, empty=0)


def test_too_few_are_repeated_in_turn() -> None:
    mined = mine(SCORES[:1], 5, above=0.3)
    assert mined.columns.tolist() == [[3, 4, 3, 4, 3]]
    assert mined.counts.duplicated == 3


def test_a_row_with_nothing_left_has_no_columns_at_all() -> None:
    mined = mine(SCORES, 2, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]) > 0)
    assert mined.columns.tolist() == [[-1, -1], [4, 3]]
    assert (mined.found.tolist(), mined.counts.empty) == ([0, 2], 1)


def test_equal_scores_keep_their_order() -> None:
    assert mine(torch.zeros(1, 4), 3).columns.tolist() == [[0, 1, 2]]


def test_no_gradient_goes_through_the_choice() -> None:
    assert not mine(SCORES.clone().requires_grad_(), 1).columns.requires_grad


def _run() -> dict[str, Ranking]:
    hits = [Hit("pos", 5.0), Hit("copy", 4.0), Hit("same study", 3.0), Hit("n1", 2.0), Hit("n2", 1.0)]
    return {"q": Ranking(hits), "silent": Ranking()}


def test_a_run_gives_ids_without_positives_their_copies_and_their_studies() -> None:
    keys = {"pos": ["text a", "study 1"], "copy": ["text a"], "same study": ["text b", "study 1"], "n1": ["text c"]}
    mined, counts = mine_run(_run(), 2, {"q": ["pos"]}, keys)
    assert mined == {"q": ["n1", "n2"], "silent": []}
    assert counts == Counts(candidates=5, masked=3, filtered=0, duplicated=0, empty=1)


def test_a_run_is_mined_with_thresholds_too() -> None:
    mined, counts = mine_run(_run(), 2, {"q": ["pos"]}, above=3.5, below=1.5)
    assert mined["q"] == ["same study", "n1"]
    assert counts.filtered == 2


def test_pairs_are_alike_by_any_of_their_keys() -> None:
    assert alike("ab", "xx").all()
    with pytest.raises(InputError, match="no keys"):
        alike()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="k=0"):
        mine(SCORES, 0)
    with pytest.raises(InputError, match="mask of shape"):
        mine(SCORES, 1, torch.zeros(1, 5) > 0)
    with pytest.raises(InputError, match="a matrix"):
        mine(torch.zeros(2, 0), 1)
    with pytest.raises(InputError, match="no finite number"):
        mine(torch.tensor([[float("nan"), 1.0]]), 1)
