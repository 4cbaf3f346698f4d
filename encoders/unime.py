"""UniME: discriminative distillation of texts, then hard negatives without the false ones.

UniME (Gu et al., ACM MM 2025, https://arxiv.org/abs/2504.17432), both stages as functions of score matrices.

Stage 1, `tdd_loss`: the similarities among the texts of a batch should be distributed as a stronger text encoder has
them, row by row KL(teacher || student). Only B x B matrices meet, so the two may differ in dimensions. The paper
leaves direction and diagonal open: a text is as near to itself for the one as for the other, and at a low temperature
that would take nearly all of the mass, so the diagonal is masked.

Stage 2, `hard_negative_loss`: candidates that score above the positive by more than `beta` are taken for unlabelled
positives and dropped; InfoNCE runs over the positive and the K hardest of the rest. The filter asks the student
itself: start it after stage 1 or a warm-up, since everything is similar at first.

Shapes: B queries, N candidates, K negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from encoders.contrastive import kl_loss
from encoders.mining import Among, Mined, mine
from retrieval.errors import InputError


def tdd_loss(student: Tensor, teacher: Tensor, *, alike: Tensor | None = None) -> Tensor:
    """Each text's neighbours should be as near to it as they are for the teacher.

    student, teacher: (B, B) similarities within the batch, each divided by its temperature. alike: (B, B) bool,
    copies of one text, which are masked as the diagonal is. The mean over rows, where the paper sums.
    Raises InputError on shapes that do not fit.

    Two other texts each, equally near for the student; the teacher has them at odds of 3 to 1:

    >>> teacher = torch.tensor([[9.0, 3.0, 1.0], [3.0, 9.0, 1.0], [3.0, 1.0, 9.0]]).log()
    >>> student = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 0.0], [0.0, 0.0, 50.0]])
    >>> round(tdd_loss(student, teacher).item(), 4)  # log 2 minus the entropy of (3/4, 1/4)
    0.1308
    """
    if student.ndim != 2 or student.shape[0] != student.shape[1]:
        raise InputError(f"student similarities of shape {tuple(student.shape)}; a square matrix (B, B) is needed")
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)
    if alike is not None and alike.shape != student.shape:
        raise InputError(f"alike of shape {tuple(alike.shape)}; the similarities are {tuple(student.shape)}")
    return kl_loss(student, teacher, own if alike is None else own | alike)


def hard_negative_loss(
    scores: Tensor,
    *,
    k: int = 8,
    beta: float = 0.1,
    temperature: float = 0.02,
    alike: Tensor | None = None,
    among: Among = "hard",
    draw: torch.Generator | None = None,
) -> Tensor:
    """Each query should prefer its positive to its K hardest negatives, likely false ones left out.

    scores: (B, N) cosines, N >= B, the positive of row i in column i. beta: candidates above the positive's cosine
    plus beta are dropped; infinity drops none. alike: (B, N) bool, candidates that mean the same as the positive,
    never negatives whatever their score. among: which of the rest are taken, see `encoders.mining.mine`; `draw` for
    random. Fewer than K: they are repeated. A row without any counts nothing. Only queries to candidates.
    Raises InputError on shapes that do not fit, k < 1, temperature <= 0.

    >>> scores = torch.tensor([[0.5, 0.5, 0.9]])  # the third is a false negative at beta 0.1
    >>> hard_negative_loss(scores, k=1, temperature=1.0).item() == torch.tensor(2.0).log().item()
    True
    """
    if temperature <= 0:
        raise InputError(f"temperature {temperature}: it must be above 0")
    mined = hard_negatives(scores, k, beta, alike, among, draw)
    has = mined.found > 0  # (B,)
    negatives = scores.gather(1, mined.columns.clamp(min=0))  # (B, K)
    rows = torch.cat([scores.diagonal()[:, None], negatives], 1) / temperature  # (B, 1 + K)
    first = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    loss = functional.cross_entropy(rows, first, reduction="none")  # (B,)
    return (loss * has).sum() / has.sum().clamp(min=1)


def hard_negatives(
    scores: Tensor,
    k: int,
    beta: float,
    alike: Tensor | None = None,
    among: Among = "hard",
    draw: torch.Generator | None = None,
) -> Mined:
    """What `hard_negative_loss` contrasts each positive with; the counts say what was masked, filtered, repeated."""
    if scores.ndim != 2 or scores.shape[1] < scores.shape[0]:
        raise InputError(f"scores of shape {tuple(scores.shape)}; (B, N) with a column for each row's positive")
    own = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    mask = own if alike is None else own | alike
    threshold = scores.detach().diagonal()[:, None] + beta  # (B, 1)
    return mine(scores, k, mask, above=threshold, among=among, draw=draw)
