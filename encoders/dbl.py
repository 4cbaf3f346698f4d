"""Deep boosting learning: the target should tell pairs apart better than its anchor does, by a margin.

DBL (Diao et al., IEEE TIP 2024, https://arxiv.org/abs/2404.18114). Not imitation: where distillation wants the
teacher's gap between a pair and its negatives, boosting wants that gap and a margin more. With anchor scores a, target
scores s and margin m, for every row i and its negatives j (and the same for columns):

    relative:  [ m + (a_ii - a_ij) - (s_ii - s_ij) ]+
    absolute:  2 [ m g + a_ii - s_ii ]+  +  [ m (1 - g) + s_ij - a_ij ]+

In the *hardest* form a row takes its worst negative: the one that improved least on the anchor, not the one that
scores highest; in the *sum* form it takes all. The boost is added to `hinge_loss`.

The anchor: *offline*, a finished model, `frozen`; *online*, branches that learn side by side, see `boosted`;
*momentum*, the target's own moving average, `Momentum`. No gradient ever goes into it.

Shapes: B pairs, square matrices with the pairs on the diagonal. Scores are bounded, as cosines are, and not divided by
a temperature. Losses are means over rows, where the paper's code takes sums (B times as much).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from retrieval.errors import InputError

Model = TypeVar("Model", bound=nn.Module)
_NOISE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def hinge_loss(scores: Tensor, margin: float = 0.2, *, alike: Tensor | None = None, hardest: bool = True) -> Tensor:
    """A pair should score above its negatives by a fixed margin, both ways (VSE++, https://arxiv.org/abs/1707.05612).

    scores: (B, B). alike: (B, B) bool, pairs that mean the same and are no negatives of one another; the diagonal
    always is. hardest: the worst negative of each row and column, otherwise all of them.
    Raises InputError on shapes that do not fit.

    >>> round(hinge_loss(torch.tensor([[0.9, 0.8], [0.1, 0.9]])).item(), 4)  # (0.1 + 0) / 2 across, (0 + 0.1) / 2 down
    0.1
    """
    alike = _alike(scores, scores, alike)
    pair = scores.diagonal()[:, None]  # (B, 1)
    across = _worst(margin + scores - pair, alike, hardest)
    down = _worst(margin + scores.T - pair, alike.T, hardest)
    return across + down


def dbl_relative(
    target: Tensor,
    anchor: Tensor,
    margin: float = 0.2,
    *,
    alike: Tensor | None = None,
    hardest: bool = True,
    adapt: bool = False,
) -> Tensor:
    """The target's gap between a pair and a negative should exceed the anchor's by the margin.

    target, anchor: (B, B) scores in [-1, 1]. alike, hardest: as in `hinge_loss`. adapt: shrink the margin where the
    anchor's gap is near the largest possible, 2 (`soft_margin`); without, such a row can never be content.

    >>> anchor = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    >>> round(dbl_relative(anchor, anchor).item(), 4)  # no better than its anchor: the margin, both ways
    0.4
    >>> dbl_relative(torch.tensor([[0.7, -0.1], [-0.1, 0.7]]), anchor).item()
    0.0
    """
    alike, anchor = _alike(target, anchor, alike), anchor.detach()
    lost = target.new_zeros(())
    for s, a, mask in ((target, anchor, alike), (target.T, anchor.T, alike.T)):
        gap = a.diagonal()[:, None] - a  # (B, B)
        wanted = soft_margin(margin, gap, 2.0) if adapt else margin
        lost = lost + _worst(wanted + gap - (s.diagonal()[:, None] - s), mask, hardest)
    return lost


def dbl_absolute(
    target: Tensor,
    anchor: Tensor,
    margin: float = 0.2,
    share: float = 0.5,
    *,
    alike: Tensor | None = None,
    hardest: bool = True,
    adapt: bool = False,
) -> Tensor:
    """The target should score pairs above the anchor and negatives below it, each by its part of the margin.

    share: the pairs' part; the negatives have the rest. Everything else as in `dbl_relative`; adapt shrinks the
    margin of a pair near 1 and of a negative near -1.

    >>> anchor = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    >>> round(dbl_absolute(anchor, anchor).item(), 4)  # 2 * 0.1 for the pair, 0.1 each way for the negative
    0.4
    """
    if not 0 <= share <= 1:
        raise InputError(f"a share of {share} of the margin; it lies between 0 and 1")
    alike, anchor = _alike(target, anchor, alike), anchor.detach()
    up: float | Tensor = margin * share
    down: float | Tensor = margin * (1 - share)
    if adapt:
        up, down = soft_margin(up, anchor.diagonal(), 1.0), soft_margin(down, -anchor, 1.0)
    raised = 2 * (up + anchor.diagonal() - target.diagonal()).clamp(min=0).mean()
    excess = down + target - anchor  # (B, B)
    return raised + _worst(excess, alike, hardest) + _worst(excess.T, alike.T, hardest)


def soft_margin(margin: float | Tensor, reference: Tensor, ceiling: float) -> Tensor:
    """The margin where the anchor has room above it, shrinking to 0 as its score or gap reaches the ceiling.

    Soft adaptation, 2 m / (1 + exp(2 (r - e) / m)) - m: bounded scores cannot exceed their bound, and a margin that
    asks it of them leaves a loss that no model can lower.

    >>> soft_margin(0.2, torch.tensor([0.0, 1.9, 2.0]), 2.0)
    tensor([0.2000, 0.0924, 0.0000])
    """
    if isinstance(margin, float | int) and margin <= 0:
        return torch.zeros_like(reference)
    # 2 / (1 + exp(x)) - 1 is tanh(-x / 2), which does not overflow
    return (margin * ((ceiling - reference) / margin).tanh()).clamp(min=0)


Boost = Callable[[Tensor, Tensor], Tensor]


def boosted(branches: Sequence[Tensor], boost: Boost) -> Tensor:
    """Branches that learn side by side: each should beat all before it; the first is beaten by the others.

    branches: (B, B) scores of each. boost: `dbl_relative` or `dbl_absolute`, perhaps with arguments bound. Branch m
    adds the mean boost over the branches before it, which are constants to it.
    """
    if len(branches) < 2:
        raise InputError(f"{len(branches)} branches; online boosting needs at least two")
    terms = [
        torch.stack([boost(later, earlier.detach()) for earlier in branches[:number]]).mean()
        for number, later in enumerate(branches)
        if number
    ]
    return torch.stack(terms).sum()


def frozen(model: Model, dropout: bool = True) -> Model:
    """A copy that learns nothing: an anchor. Batch statistics are fixed.

    dropout: the copy drops out as the model does in training. An anchor without it beside a target with it would
    put the noise into the gap between them.
    """
    anchor = copy.deepcopy(model).requires_grad_(False).eval()
    if dropout:
        for module in anchor.modules():
            if isinstance(module, _NOISE):
                module.train()
    return anchor


class Momentum:
    """The target's moving average as its anchor: parameters and buffers alike.

    The average starts at the target, and its momentum rises from `start` to 1 along a cosine over `steps`. Anchor and
    target are the same at first, so that every row asks for the margin whatever the data: a small `start` (0.99) or
    some steps without the boost let them part.
    """

    def __init__(self, model: nn.Module, start: float = 0.999, steps: int = 0, dropout: bool = True) -> None:
        if not 0 <= start <= 1:
            raise InputError(f"a momentum of {start}; it lies between 0 and 1")
        self.anchor = frozen(model, dropout)
        self.start, self.steps, self.step = start, steps, 0

    @property
    def momentum(self) -> float:
        """How much of the anchor the next update keeps."""
        if not self.steps:
            return self.start
        done = min(1.0, self.step / self.steps)
        return 1 - (1 - self.start) * (1 + math.cos(math.pi * done)) / 2

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the anchor towards the model; after every step of the optimiser."""
        keep = self.momentum
        fresh = model.state_dict()
        for name, held in self.anchor.state_dict().items():
            if held.is_floating_point():
                held.lerp_(fresh[name].to(held), 1 - keep)
            else:
                held.copy_(fresh[name])  # counters have no average
        self.step += 1


def _worst(excess: Tensor, alike: Tensor, hardest: bool) -> Tensor:
    """Mean over rows of the positive part of the worst negative's excess, or of the sum over all negatives."""
    cost = excess.clamp(min=0).masked_fill(alike, 0.0)  # (B, B)
    return (cost.amax(1) if hardest else cost.sum(1)).mean()


def _alike(target: Tensor, anchor: Tensor, alike: Tensor | None) -> Tensor:
    """(B, B) bool with the diagonal set."""
    if target.ndim != 2 or target.shape[0] != target.shape[1]:
        raise InputError(f"target scores of shape {tuple(target.shape)}; boosting needs a square matrix (B, B)")
    for name, given in (("anchor", anchor), ("alike", alike)):
        if given is not None and given.shape != target.shape:
            raise InputError(f"{name} of shape {tuple(given.shape)}; the target's scores are {tuple(target.shape)}")
    own = torch.eye(len(target), dtype=torch.bool, device=target.device)
    return own if alike is None else alike | own
