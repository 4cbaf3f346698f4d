from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from encoders.contrastive import info_nce, same, symmetric
from retrieval.errors import InputError


def _by_loops(scores: Tensor, positive: Tensor, ignore: Tensor, weight: Tensor) -> Tensor:
    """The definition, entry by entry."""
    total, mass = torch.zeros((), dtype=scores.dtype), 0.0
    for i in range(scores.shape[0]):
        wanted = [j for j in range(scores.shape[1]) if positive[i, j]]
        if not wanted:
            continue
        denominator = torch.stack([scores[i, j].exp() for j in range(scores.shape[1]) if not ignore[i, j]]).sum()
        row = torch.stack([-(scores[i, j].exp() / denominator).log() for j in wanted]).sum() / len(wanted)
        total = total + weight[i] * row
        mass += float(weight[i])
    return total / mass


def _case(seed: int, shape: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=draw, dtype=torch.float64) * 3
    positive = torch.rand(shape, generator=draw) < 0.3
    ignore = (torch.rand(shape, generator=draw) < 0.2) & ~positive
    return scores, positive, ignore, torch.rand(shape[0], generator=draw, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_equals_its_definition_and_so_do_its_gradients(seed: int) -> None:
    scores, positive, ignore, weight = _case(seed)
    one, two = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    fast, slow = info_nce(one, positive, ignore, weight), _by_loops(two, positive, ignore, weight)
    torch.testing.assert_close(fast, slow)
    fast.backward()  # type: ignore[no-untyped-call]
    slow.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(one.grad, two.grad)


def test_the_symmetric_loss_is_the_mean_of_both_directions() -> None:
    scores, positive, ignore, rows = _case(9)
    columns = torch.rand(7, dtype=torch.float64)
    across = _by_loops(scores, positive, ignore, rows)
    down = _by_loops(scores.T, positive.T, ignore.T, columns)
    torch.testing.assert_close(symmetric(scores, positive, ignore, rows, columns), (across + down) / 2)


def test_without_targets_the_diagonal_is_meant() -> None:
    scores = _case(3, (4, 4))[0]
    torch.testing.assert_close(symmetric(scores), symmetric(scores, torch.eye(4, dtype=torch.bool)))


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    scores, positive, ignore, weight = _case(1)
    moved = scores + torch.arange(5.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(info_nce(moved, positive, ignore, weight), info_nce(scores, positive, ignore, weight))


def test_an_ignored_pair_gets_no_gradient() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)
    info_nce(scores, torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-0.5, 0.5, 0.0]]


def test_rows_without_a_positive_count_nothing_even_when_all_is_ignored() -> None:
    scores = torch.tensor([[1.0, 0.0], [5.0, 5.0]], requires_grad=True)
    positive, ignore = torch.tensor([[True, False], [False, False]]), torch.tensor([[False, False], [True, True]])
    loss = info_nce(scores, positive, ignore)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    loss.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad[1].tolist() == [0.0, 0.0]


def test_no_positive_at_all_is_a_loss_of_zero() -> None:
    assert info_nce(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).item() == 0.0


def test_copies_of_one_report_share_the_softmax() -> None:
    positive = same(["a", "a", "b"], ["a", "a", "b"])
    equal = torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    alone = torch.tensor([[18.0, 0.0, 0.0], [0.0, 18.0, 0.0], [0.0, 0.0, 18.0]])
    assert symmetric(equal, positive) < symmetric(alone, positive)


def test_descending_it_brings_every_positive_above_every_negative() -> None:
    scores, positive, _, _ = _case(4)
    scores.requires_grad_()
    step = torch.optim.SGD([scores], lr=5.0)
    for _ in range(300):
        step.zero_grad()
        info_nce(scores, positive).backward()  # type: ignore[no-untyped-call]
        step.step()
    for row, wanted in zip(scores.detach(), positive, strict=True):
        if wanted.any():
            assert row[wanted].min() > row[~wanted].max()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 3\) have no diagonal"):
        info_nce(torch.zeros(2, 3))
    with pytest.raises(InputError, match="a matrix"):
        info_nce(torch.zeros(3))
    with pytest.raises(InputError, match=r"positive of shape \(3, 2\)"):
        info_nce(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(InputError, match=r"weight of shape \(3,\)"):
        info_nce(torch.zeros(2, 2), weight=torch.ones(3))
    with pytest.raises(InputError, match="both positive and ignored"):
        info_nce(torch.zeros(2, 2), ignore=torch.eye(2, dtype=torch.bool))
