"""A cross-encoder of pictures and texts over frozen features: it reads both together and says whether they match.

As ALBEF's fusion encoder (Li et al., https://arxiv.org/abs/2107.07651), small: the vectors that frozen towers give for
a picture and for parts of a text are tokens of one sequence, a few transformer layers read it, and a matching head
gives a logit. It is trained on pairs, and on the negatives that the towers themselves find hard, drawn by their
similarity with everything of the same study or text left out. It teaches (`encoders.cprd`): rank by its logit.

Shapes: B pairs, P tokens of a picture, T of a text, D of a frozen vector, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.errors import InputError


class Fusion(nn.Module):
    """Frozen vectors of a picture and of a text to one logit: the higher, the likelier they belong together.

    Beside the sequence it sees the towers' own cosine (of the first token of each side), and starts by repeating it.
    """

    def __init__(self, dim: int, width: int = 128, layers: int = 2, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"width {width} cannot be shared by {heads} heads: make it a multiple")
        self.picture, self.text = nn.Linear(dim, width), nn.Linear(dim, width)
        self.first = nn.Parameter(torch.randn(width) * 0.02)  # the token that the matching head reads
        self.kinds = nn.Parameter(torch.randn(2, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, functional.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.match = nn.Linear(width, 1)
        nn.init.zeros_(self.match.weight)
        nn.init.zeros_(self.match.bias)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """(B,) logits. pictures: (B, P, D); texts: (B, T, D)."""
        if pictures.ndim != 3 or texts.ndim != 3 or len(pictures) != len(texts):
            raise InputError(
                f"pictures of shape {tuple(pictures.shape)} and texts of {tuple(texts.shape)}: (B, P, D) and "
                "(B, T, D) are needed"
            )
        first = self.first.expand(len(pictures), 1, -1)  # (B, 1, W)
        seen = self.picture(pictures) + self.kinds[0]  # (B, P, W)
        read = self.text(texts) + self.kinds[1]  # (B, T, W)
        out = self.layers(torch.cat([first, seen, read], 1))  # (B, 1 + P + T, W)
        cosine = functional.cosine_similarity(pictures[:, 0], texts[:, 0])  # (B,)
        said: Tensor = self.match(out[:, 0]).squeeze(1)
        return said + self.scale * cosine


def matching_loss(right: Tensor, wrong: Tensor) -> Tensor:
    """Pairs should be told from what is none: binary cross-entropy over logits, both sides counting the same.

    right: (B,) logits of pairs; wrong: (N,) of hard negatives.

    >>> matching_loss(torch.zeros(2), torch.zeros(4)).item() == torch.tensor(2.0).log().item()
    True
    """
    return (functional.softplus(-right).mean() + functional.softplus(wrong).mean()) / 2


def hard_columns(scores: Tensor, alike: Tensor, draw: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """One hard negative a row, drawn by the softmax of the towers' scores; (B,) columns, (B,) bool where there is one.

    scores: (B, N), divided by the temperature. alike: (B, N) bool, what means the same as the row (its own pair, the
    same study, the same text): never drawn.

    >>> hard_columns(torch.tensor([[9.0, 5.0, 0.0]]) * 100, torch.tensor([[True, False, False]]))
    (tensor([1]), tensor([True]))
    """
    if alike.shape != scores.shape or scores.ndim != 2:
        raise InputError(f"alike of shape {tuple(alike.shape)} and scores of {tuple(scores.shape)}; both are (B, N)")
    some = ~alike.all(1)
    chances = scores.detach().masked_fill(alike & some[:, None], float("-inf")).softmax(1)  # (B, N)
    return torch.multinomial(chances, 1, generator=draw).squeeze(1), some
