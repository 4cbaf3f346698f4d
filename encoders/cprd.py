"""Contrastive partial ranking distillation: the student orders hard negatives as a cross-encoder does.

CPRD (Chen et al., CVPR 2024, https://arxiv.org/abs/2407.07479). Cross-encoder scores crowd at the ends and
dual-encoder scores do not, so numbers transfer badly and order transfers well; and only the order among hard negatives
says anything. The student's K hardest negatives are sorted by the teacher; each *valid* one should win against all
behind it:

    L = - sum over j < J of log( exp(s_j) / sum over k >= j of exp(s_k) )

which is the Plackett-Luce likelihood (ListMLE, Xia et al., ICML 2008) cut off after the valid prefix. Whatever stands
behind it is no target and stays in every denominator. The paper's rule of validity, its normalisation and the
positive's part are not published in code; ours: a negative is valid while the teacher puts it more than `tie` above
the next, above `threshold`, and among its first `top`; a row is the mean over its targets. L is added to the
contrastive loss, which keeps the positive on top.

Rank by logit: probabilities that saturate tie, and ties end the prefix, as do cells that a reranker filled with one
constant.

Shapes: B queries, K negatives each. Scores of the student arrive divided by its temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoders.contrastive import without
from retrieval.errors import InputError


def cprd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    top: int | None = None,
    threshold: float | None = None,
    tie: float = 0.0,
    ignore: Tensor | None = None,
) -> Tensor:
    """The student should put the teacher's best negatives first, in the teacher's order.

    student: (B, K), or (B, 1 + K) with the positive's score in front: it then leads the list, and nothing else
    competes with the teacher's order. teacher: (B, K). top: how many may be valid. threshold: what a valid one's
    teacher score exceeds. tie: how far apart two scores must be to be in an order. ignore: (B, K) bool, candidates
    that leave the list (padding, a copy of the positive).
    The mean over the rows that have a target; 0 where none has. Raises InputError on shapes that do not fit, on a
    teacher score that is no number, and on top < 1 or tie < 0.

    Two valid negatives, in the teacher's order (the 3 before the 2), and a third that only pushes down:

    >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 3.0, 1.0]])
    >>> cprd_loss(student, teacher, top=2).item() == ((torch.tensor(3.0).log() + torch.tensor(2.0).log()) / 2).item()
    True
    >>> cprd_loss(student, torch.tensor([[1.0, 1.0, 1.0]])).item()  # nothing but ties: nothing to learn
    0.0
    """
    if tie < 0 or (top is not None and top < 1):
        raise InputError(f"top={top}, tie={tie}: at least one negative must be able to be valid, and tie is no minus")
    lead = _check(student, teacher, ignore)
    order, beats = _sorted(teacher, ignore)  # (B, K), (B, K)
    ranked = teacher.detach().gather(1, order)
    valid = beats & (ranked - ranked.roll(-1, 1) > tie)
    if threshold is not None:
        valid &= ranked > threshold
    if top is not None:
        valid[:, top:] = False
    return _likelihood(student, order, valid.cumprod(1).bool(), lead, ignore)


def listmle_loss(student: Tensor, teacher: Tensor, *, ignore: Tensor | None = None) -> Tensor:
    """The student should order all candidates as the teacher does, ties and easy ones included.

    What `cprd_loss` is measured against; shapes and errors as there. Tied candidates keep the order they came in.

    >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 3.0, 1.0]])
    >>> round(listmle_loss(student, teacher).item() * 2, 4) == round(torch.tensor(6.0).log().item(), 4)
    True
    """
    lead = _check(student, teacher, ignore)
    order, beats = _sorted(teacher, ignore)
    return _likelihood(student, order, beats, lead, ignore)


def _sorted(teacher: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, K) places of the candidates, best first and ignored ones last; (B, K) bool, which has another behind it."""
    order = without(teacher.detach(), ignore).argsort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(order, dtype=torch.bool) if ignore is None else ~ignore.gather(1, order)
    beats = kept.roll(-1, 1)
    beats[:, -1] = False
    return order, beats


def _likelihood(student: Tensor, order: Tensor, valid: Tensor, lead: bool, ignore: Tensor | None) -> Tensor:
    """Minus the logarithm of each valid one's share among itself and all behind it, mean by row, then over rows."""
    negatives = without(student[:, 1:] if lead else student, ignore)  # (B, K)
    ranked = negatives.gather(1, order)
    if lead:
        ranked = torch.cat([student[:, :1], ranked], 1)  # (B, 1 + K), and so on below
        valid = torch.cat([torch.ones_like(valid[:, :1]), valid], 1)
    behind = ranked.flip(1).logcumsumexp(1).flip(1)  # (B, K) log of the sum from here to the end
    terms = (behind - ranked).masked_fill(~valid, 0.0)
    count = valid.sum(1)  # (B,)
    rows = terms.sum(1) / count.clamp(min=1)  # (B,)
    return rows.sum() / (count > 0).sum().clamp(min=1)


def _check(student: Tensor, teacher: Tensor, ignore: Tensor | None) -> bool:
    """Whether the student's first column is the positive."""
    if teacher.ndim != 2 or teacher.shape[1] < 1:
        raise InputError(f"teacher scores of shape {tuple(teacher.shape)}; a matrix (B, K) is needed")
    count, width = teacher.shape
    if tuple(student.shape) not in ((count, width), (count, 1 + width)):
        raise InputError(
            f"student scores of shape {tuple(student.shape)}; the teacher's {tuple(teacher.shape)} need "
            f"{(count, width)}, or {(count, 1 + width)} with the positive in front"
        )
    if ignore is not None and ignore.shape != teacher.shape:
        raise InputError(f"ignore of shape {tuple(ignore.shape)}; the teacher's is {tuple(teacher.shape)}")
    seen = teacher if ignore is None else teacher.masked_fill(ignore, 0.0)
    if not bool(seen.isfinite().all()):
        raise InputError("a teacher score is no finite number; put candidates that it never saw in `ignore`")
    return student.shape[1] == 1 + width
