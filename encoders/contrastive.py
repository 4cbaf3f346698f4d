"""Contrastive loss over a matrix of scores: the base that the distillation methods add to.

InfoNCE (van den Oord et al., https://arxiv.org/abs/1807.03748) in both directions, as CLIP uses it
(https://arxiv.org/abs/2103.00020), with targets that know of more than one positive a row, as in supervised
contrastive learning (https://arxiv.org/abs/2004.11362), and soft targets from a teacher's scores or from the model's
own momentum copy, as in ALBEF (https://arxiv.org/abs/2107.07651).

Shapes: B rows (pictures), N columns (texts). Scores arrive divided by the temperature.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from retrieval.errors import InputError


def without(scores: Tensor, ignore: Tensor | None) -> Tensor:
    """The scores, with those to ignore so low that no softmax sees them.

    Not minus infinity, which makes gradients NaN where a whole row has it.
    """
    return scores if ignore is None else scores.masked_fill(ignore, torch.finfo(scores.dtype).min / 4)


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


def distribution(scores: Tensor, ignore: Tensor | None = None) -> Tensor:
    """(B, N) shares: the softmax of each row over what is not ignored; a row that is ignored as a whole is 0.

    scores: (B, N), divided by the temperature: cosines of a teacher, logits, or a Tversky matrix.

    >>> distribution(torch.tensor([[2.0, 2.0, 9.0]]), torch.tensor([[False, False, True]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    share = without(scores, ignore).softmax(1)
    return share if ignore is None else share.masked_fill(ignore, 0.0)


def softened(positive: Tensor, soft: Tensor, share: float) -> Tensor:
    """(B, N) targets: `share` of the mass goes as `soft` says, the rest to the positives in equal parts.

    ALBEF's momentum distillation, with `soft` the `distribution` of the momentum copy; raise `share` from 0 to 0.4
    over the first epoch. positive: (B, N) bool; a row without a positive goes wholly as `soft` says.

    >>> softened(torch.tensor([[True, False]]), torch.tensor([[0.5, 0.5]]), 0.4)
    tensor([[0.8000, 0.2000]])
    """
    if not 0 <= share <= 1:
        raise InputError(f"a share of {share} for the soft targets; it lies between 0 and 1")
    if positive.shape != soft.shape:
        raise InputError(f"positives of shape {tuple(positive.shape)} and soft targets of {tuple(soft.shape)}")
    hard = positive.to(soft.dtype)
    count = hard.sum(1, keepdim=True)  # (B, 1)
    return torch.where(count > 0, share * soft + (1 - share) * hard / count.clamp(min=1), soft)


def soft_nce(scores: Tensor, target: Tensor, ignore: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Each row should spread its softmax as the target does: cross-entropy, the mean over the rows.

    scores, target: (B, N); rows of `target` sum to 1, or to 0 where a row counts nothing. No gradient goes into
    `target`. ignore: (B, N) bool, pairs that leave the denominator. weight: (B,). With one 1 a row it is `info_nce`.
    Raises InputError on shapes that do not fit and on targets on ignored pairs.

    >>> soft_nce(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.3, 0.7]])).item() == torch.tensor(2.0).log().item()
    True
    """
    target = target.detach()
    _check(scores, target, None, weight, "target")
    if ignore is not None:
        _check(scores, target > 0, ignore, weight)
    loss = -(target * without(scores, ignore).log_softmax(1)).sum(1)  # (B,)
    counts = (target.sum(1) > 0).to(loss.dtype) * (1.0 if weight is None else weight.to(loss.dtype))
    return (loss * counts).sum() / counts.sum().clamp(min=torch.finfo(loss.dtype).tiny)


def kl_loss(student: Tensor, teacher: Tensor, ignore: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """The student's softmax should be the teacher's: KL(teacher || student), the mean over the rows.

    student, teacher: (B, N) scores, each divided by a temperature of its own. No gradient goes into the teacher.
    ignore: (B, N) bool, pairs that neither of them sees. weight: (B,).

    >>> kl_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0]])).abs().item() < 1e-6
    True
    """
    _check(student, teacher, ignore, weight, "teacher")
    target = distribution(teacher.detach(), ignore)
    entropy = soft_nce(target.clamp(min=torch.finfo(target.dtype).tiny).log(), target, ignore, weight)
    return soft_nce(student, target, ignore, weight) - entropy


def gathered(vectors: Tensor) -> Tensor:
    """(W * B, D): the rows of all W processes in order of rank, one's own with their gradient.

    The other processes' rows are constants here: each process brings down the gradient of its own. Summed over the
    processes that is the gradient of the whole batch; DDP takes the mean, so scale the loss by W. Without
    `torch.distributed` the rows come back as they are.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, vectors.detach().contiguous())
    parts[distributed.get_rank()] = vectors  # all_gather cuts the graph: without this line nothing would train
    return torch.cat(parts)


def _positives(scores: Tensor, positive: Tensor | None) -> Tensor:
    if scores.ndim != 2:
        raise InputError(f"scores of shape {tuple(scores.shape)}; a matrix (B, N) is needed")
    if positive is not None:
        return positive
    if scores.shape[0] != scores.shape[1]:
        raise InputError(f"scores of shape {tuple(scores.shape)} have no diagonal of positives; pass `positive`")
    return torch.eye(len(scores), dtype=torch.bool, device=scores.device)


def _check(
    scores: Tensor, positive: Tensor, ignore: Tensor | None, weight: Tensor | None, name: str = "positive"
) -> None:
    if scores.ndim != 2:
        raise InputError(f"scores of shape {tuple(scores.shape)}; a matrix (B, N) is needed")
    whole, rows = tuple(scores.shape), tuple(scores.shape[:1])
    for what, given, shape in ((name, positive, whole), ("ignore", ignore, whole), ("weight", weight, rows)):
        if given is not None and tuple(given.shape) != shape:
            raise InputError(f"{what} of shape {tuple(given.shape)}; scores of shape {whole} need {shape}")
    if ignore is not None and positive.dtype == torch.bool and bool((positive & ignore).any()):
        raise InputError("a pair is both positive and ignored; take it out of one of the two")
