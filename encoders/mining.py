"""Which candidates a method learns from: one routine for negatives in the batch, for matrices and for runs.

What means the same as the positive is masked first, by id or digest (`encoders.contrastive.same`): a threshold on
similarity is for near misses, and an exact copy never exceeds it. Then thresholds filter, then K are taken: the
hardest, random ones or the easiest. Where fewer than K are left they are repeated in turn, as in UniME
(https://arxiv.org/abs/2504.17432); never does anything masked or filtered come back. All of it is counted.

Shapes: B queries, N candidates, K mined ones a query.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from encoders.contrastive import same
from retrieval.errors import InputError
from retrieval.types import Run

Among = Literal["hard", "random", "easy"]


class Counts(NamedTuple):
    """What became of the candidates of all queries."""

    candidates: int
    masked: int  # mean the same as the positive, or are no candidates
    filtered: int  # over or under a threshold
    duplicated: int  # places that repeat another
    empty: int  # queries that nothing was left for


class Mined(NamedTuple):
    """columns: (B, K), -1 throughout where a row has none. found: (B,) how many different ones a row has."""

    columns: Tensor
    found: Tensor
    counts: Counts


def mine(
    scores: Tensor,
    k: int,
    mask: Tensor | None = None,
    *,
    above: Tensor | float | None = None,
    below: Tensor | float | None = None,
    among: Among = "hard",
    draw: torch.Generator | None = None,
) -> Mined:
    """K candidates of each row.

    scores: (B, N), how near each candidate is to the query. mask: (B, N) bool, what may not be mined: the positive,
    its copies, the same study. above, below: scores above the one (false negatives) and below the other (too easy)
    are left out; one number, or (B, 1). among: the highest scores, random ones by `draw`, or the lowest.
    No gradient goes through. Raises InputError on k < 1, on shapes that do not fit, on scores that are not finite.

    >>> found = mine(torch.tensor([[0.9, 0.8, 0.5, 0.1]]), 2, torch.tensor([[True, False, False, False]]), above=0.7)
    >>> found.columns.tolist(), found.counts
    ([[2, 3]], Counts(candidates=4, masked=1, filtered=1, duplicated=0, empty=0))
    """
    scores = scores.detach()
    mask = _check(scores, k, mask)
    left = ~mask
    if above is not None:
        left &= scores <= above
    if below is not None:
        left &= scores >= below
    wanted = _preference(scores, among, draw).masked_fill(~left, float("-inf"))
    order = wanted.argsort(dim=1, descending=True, stable=True)
    found = left.sum(1)  # (B,)
    places = torch.arange(k, device=scores.device)[None, :] % found.clamp(min=1)[:, None]  # (B, K)
    columns = order.gather(1, places).masked_fill(found[:, None] == 0, -1)
    distinct = found.clamp(max=k)
    counts = Counts(
        candidates=scores.numel(),
        masked=int(mask.sum()),
        filtered=int((~mask & ~left).sum()),
        duplicated=int((k - distinct)[found > 0].sum()),
        empty=int((found == 0).sum()),
    )
    return Mined(columns, distinct, counts)


def mine_run(
    run: Run,
    k: int,
    positives: Mapping[str, Sequence[str]],
    keys: Mapping[str, Sequence[Hashable]] | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    among: Among = "hard",
    draw: torch.Generator | None = None,
) -> tuple[dict[str, list[str]], Counts]:
    """K documents of each query out of its ranking, and the counts; a query that nothing is left for has none.

    run: of any Retriever, deep enough that K are left; its own order counts where scores tie. positives: query ->
    relevant documents, never mined. keys: document -> what makes it the same as another (digest of the text, id of
    the study): whatever shares one with a positive of the query is not mined either. The rest as in `mine`.

    >>> from retrieval.types import Hit, Ranking
    >>> run = {"q": Ranking([Hit("a", 3.0), Hit("copy of a", 2.0), Hit("b", 1.0)])}
    >>> mine_run(run, 1, {"q": ["a"]}, {"a": ["text 1"], "copy of a": ["text 1"], "b": ["text 2"]})[0]
    {'q': ['b']}
    """
    out: dict[str, list[str]] = {}
    total = Counts(0, 0, 0, 0, 0)
    for query, ranking in run.items():
        if not ranking:
            out[query], total = [], total._replace(empty=total.empty + 1)
            continue
        scores = torch.tensor([[hit.score for hit in ranking]], dtype=torch.float64)  # (1, N)
        ids = [hit.id for hit in ranking]
        mask = torch.tensor([_related(ids, positives.get(query, ()), keys or {})])  # (1, N)
        mined = mine(scores, k, mask, above=above, below=below, among=among, draw=draw)
        out[query] = [ids[n] for n in mined.columns[0].tolist() if n >= 0]
        total = Counts(*(one + other for one, other in zip(total, mined.counts, strict=True)))
    return out, total


def alike(*keys: Sequence[Hashable]) -> Tensor:
    """(B, B) bool: which pairs of a batch share any of their keys (the text, the study, the picture).

    >>> alike(["s1", "s1", "s2"], ["normal", "effusion", "normal"]).int().tolist()
    [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    """
    if not keys:
        raise InputError("no keys: pass at least one sequence, such as the ids of the pairs")
    shared = same(keys[0], keys[0])
    for more in keys[1:]:
        shared = shared | same(more, more)
    return shared


def _related(ids: Sequence[str], positives: Sequence[str], keys: Mapping[str, Sequence[Hashable]]) -> list[bool]:
    taken = {key for id in positives for key in keys.get(id, ())}
    return [id in positives or any(key in taken for key in keys.get(id, ())) for id in ids]


def _preference(scores: Tensor, among: Among, draw: torch.Generator | None) -> Tensor:
    if among == "random":
        return torch.rand(scores.shape, generator=draw, device=scores.device)
    return scores if among == "hard" else -scores


def _check(scores: Tensor, k: int, mask: Tensor | None) -> Tensor:
    if k < 1:
        raise InputError(f"k={k}: at least one candidate is mined a query")
    if scores.ndim != 2 or not scores.shape[1]:
        raise InputError(f"scores of shape {tuple(scores.shape)}; a matrix (B, N) is needed")
    if mask is not None and mask.shape != scores.shape:
        raise InputError(f"a mask of shape {tuple(mask.shape)}; the scores are {tuple(scores.shape)}")
    if not bool(scores.isfinite().all()):
        raise InputError("a score is no finite number: mask what has none")
    return torch.zeros_like(scores, dtype=torch.bool) if mask is None else mask
