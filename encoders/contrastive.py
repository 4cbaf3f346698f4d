"""Contrastive loss over a matrix of scores: the base that the distillation methods add to.

InfoNCE (van den Oord et al., https://arxiv.org/abs/1807.03748) in both directions, as CLIP uses it
(https://arxiv.org/abs/2103.00020), with targets that know of more than one positive a row, as in supervised
contrastive learning (https://arxiv.org/abs/2004.11362).

Shapes: B rows (pictures), N columns (texts). Scores arrive divided by the temperature.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from retrieval.errors import InputError


def same(rows: Sequence[Hashable], columns: Sequence[Hashable]) -> Tensor:
    """(B, N) bool: which column means the same as which row, by key (an id, a digest of the text).

    Two copies of one report are both right answers; taken for negatives they would be pushed apart.

    >>> same(["a", "b", "a"], ["a", "b", "a"]).int().tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    number: dict[Hashable, int] = {}
    left = torch.tensor([number.setdefault(key, len(number)) for key in rows], dtype=torch.long)  # (B,)
    right = torch.tensor([number.setdefault(key, len(number)) for key in columns], dtype=torch.long)  # (N,)
    return left[:, None] == right[None, :]  # (B, N)


def info_nce(
    scores: Tensor, positive: Tensor | None = None, ignore: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Each row should give its positives, in equal shares, all of its softmax.

    scores: (B, N). positive: (B, N) bool, the diagonal where it is None. ignore: (B, N) bool, pairs that are
    neither positive nor negative and leave the denominator. weight: (B,), how much a row counts.
    A row without a positive counts nothing; without any positive at all the loss is 0.
    Raises InputError on shapes that do not fit and on pairs that are both positive and ignored.

    >>> info_nce(torch.tensor([[2.0, 2.0], [0.0, 0.0]])).item() == torch.tensor(2.0).log().item()
    True
    >>> info_nce(torch.zeros(1, 3), torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])).exp()
    tensor(2.)
    """
    positive = _positives(scores, positive)
    _check(scores, positive, ignore, weight)
    kept = scores if ignore is None else scores.masked_fill(ignore, float("-inf"))
    # A row that is ignored as a whole would make log_softmax NaN; it has no positive, so its scores do not matter.
    kept = torch.where(positive.any(1, keepdim=True), kept, torch.zeros_like(kept))
    log_share = kept.log_softmax(1)  # (B, N)
    count = positive.sum(1)  # (B,)
    loss = -log_share.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)  # (B,)
    counts = (count > 0).to(loss.dtype) * (1.0 if weight is None else weight.to(loss.dtype))
    return (loss * counts).sum() / counts.sum().clamp(min=torch.finfo(loss.dtype).tiny)


def symmetric(
    scores: Tensor,
    positive: Tensor | None = None,
    ignore: Tensor | None = None,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
) -> Tensor:
    """Rows should find their columns and columns their rows: the mean of `info_nce` both ways.

    scores: (B, N). row_weight: (B,). column_weight: (N,).

    >>> round(symmetric(torch.tensor([[9.0, 0.0], [0.0, 9.0]])).item(), 4)
    0.0001
    """
    positive = _positives(scores, positive)
    across = info_nce(scores, positive, ignore, row_weight)
    down = info_nce(scores.T, positive.T, None if ignore is None else ignore.T, column_weight)
    return (across + down) / 2


def _positives(scores: Tensor, positive: Tensor | None) -> Tensor:
    if scores.ndim != 2:
        raise InputError(f"scores of shape {tuple(scores.shape)}; a matrix (B, N) is needed")
    if positive is not None:
        return positive
    if scores.shape[0] != scores.shape[1]:
        raise InputError(f"scores of shape {tuple(scores.shape)} have no diagonal of positives; pass `positive`")
    return torch.eye(len(scores), dtype=torch.bool, device=scores.device)


def _check(scores: Tensor, positive: Tensor, ignore: Tensor | None, weight: Tensor | None) -> None:
    whole, rows = tuple(scores.shape), tuple(scores.shape[:1])
    for name, given, shape in (("positive", positive, whole), ("ignore", ignore, whole), ("weight", weight, rows)):
        if given is not None and tuple(given.shape) != shape:
            raise InputError(f"{name} of shape {tuple(given.shape)}; scores of shape {whole} need {shape}")
    if ignore is not None and bool((positive & ignore).any()):
        raise InputError("a pair is both positive and ignored; take it out of one of the two")
