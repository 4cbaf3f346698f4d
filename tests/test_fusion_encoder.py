from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from encoders.fusion import Fusion, hard_columns, matching_loss
from retrieval.errors import InputError


def _pairs(count: int, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(count)
    return torch.randn(count, 2, dim, generator=draw), torch.randn(count, 3, dim, generator=draw)


def test_an_untrained_one_ranks_as_the_towers_do() -> None:
    pictures, texts = _pairs(6)
    cosine = functional.cosine_similarity(pictures[:, 0], texts[:, 0])
    torch.testing.assert_close(Fusion(8, width=16).eval()(pictures, texts), 10 * cosine)


def test_a_pair_scores_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model = Fusion(8, width=16).eval()
    torch.nn.init.normal_(model.match.weight)
    pictures, texts = _pairs(5)
    whole = model(pictures, texts)
    torch.testing.assert_close(model(pictures[2:3], texts[2:3]), whole[2:3])


def test_the_loss_is_binary_cross_entropy_with_both_sides_alike() -> None:
    right, wrong = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.1, -3.0])
    one = functional.binary_cross_entropy_with_logits(right, torch.ones(2))
    other = functional.binary_cross_entropy_with_logits(wrong, torch.zeros(3))
    torch.testing.assert_close(matching_loss(right, wrong), (one + other) / 2)


def test_hard_negatives_are_drawn_by_similarity_and_never_what_means_the_same() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, -50.0]]).repeat(4000, 1)
    alike = torch.tensor([[True, False, False, False]]).repeat(4000, 1)
    columns, some = hard_columns(scores, alike, torch.Generator().manual_seed(0))
    shares = torch.bincount(columns, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.731, 0.269, 0.0]), atol=0.03, rtol=0)
    assert some.all()


def test_a_row_without_a_negative_says_so() -> None:
    columns, some = hard_columns(torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]))
    assert (columns[1].item(), some.tolist()) == (1, [False, True])


def test_it_learns_what_no_cosine_can_tell() -> None:
    """Pairs match where the signs of two numbers agree; the first tokens say nothing of it."""
    torch.manual_seed(0)
    model, draw = Fusion(4, width=16, layers=1, dropout=0.0), torch.Generator().manual_seed(1)
    pictures, texts = (torch.randint(0, 2, (64, 2, 4), generator=draw).float() * 2 - 1 for _ in range(2))
    pictures[:, 0], texts[:, 0] = torch.tensor([1.0, -1, 1, -1]), 1.0  # a cosine of 0
    right = pictures[:, 1, 0] == texts[:, 1, 0]
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(100):
        logits = model(pictures, texts)
        optimiser.zero_grad()
        matching_loss(logits[right], logits[~right]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    logits = model.eval()(pictures, texts)
    assert ((logits > 0) == right).float().mean() > 0.95


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="multiple"):
        Fusion(8, width=10, heads=4)
    with pytest.raises(InputError, match=r"\(B, P, D\)"):
        Fusion(8, width=16)(torch.zeros(2, 8), torch.zeros(2, 1, 8))
    with pytest.raises(InputError, match="both are"):
        hard_columns(torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.bool))
