"""Gradients of batches larger than memory: GradCache (Gao et al., RepL4NLP 2021, https://arxiv.org/abs/2101.06983).

A contrastive loss needs all vectors of a batch at once, but not all activations: the vectors are made without them,
the loss gives each vector its gradient, and chunk by chunk the vectors are made again and take their gradient down.
It costs a second forward pass, and gives the gradient of the whole batch, dropout included: each chunk draws the
second time what it drew the first.

Shapes: B rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Encode = Callable[[Sequence[str]], Tensor]  # (B, D) of B texts


class Chunked:
    """Vectors of texts, `size` at a time; 0 for all at once, which keeps their activations.

    >>> weight = torch.ones(1, requires_grad=True)
    >>> chunked = Chunked(lambda texts: weight * torch.tensor([[float(len(text))] for text in texts]), 1)
    >>> vectors = chunked(["a", "bcd"])
    >>> (vectors ** 2).sum().backward()
    >>> chunked.backward()
    >>> weight.grad
    tensor([20.])
    """

    def __init__(self, encode: Encode, size: int) -> None:
        self.encode, self.size = encode, size
        self._made: list[tuple[list[str], Tensor, list[Tensor]]] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, D); call `backward` once the loss has its gradient."""
        if not self.size or len(texts) <= self.size:
            return self.encode(texts)
        vectors, states = [], []
        for start in range(0, len(texts), self.size):
            states.append(torch.get_rng_state())
            with torch.no_grad():
                vectors.append(self.encode(texts[start : start + self.size]))
        leaf = torch.cat(vectors).requires_grad_()
        self._made.append((list(texts), leaf, states))
        return leaf

    def backward(self) -> None:
        """Bring the gradients that arrived at the vectors down to the parameters."""
        after = torch.get_rng_state()
        for texts, leaf, states in self._made:
            if leaf.grad is None:
                continue
            for number, state in enumerate(states):
                part = slice(number * self.size, (number + 1) * self.size)
                torch.set_rng_state(state)
                self.encode(texts[part]).backward(leaf.grad[part])  # type: ignore[no-untyped-call]
        torch.set_rng_state(after)
        self._made.clear()
