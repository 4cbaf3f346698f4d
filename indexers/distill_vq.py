"""Distill-VQ (Xiao et al., SIGIR 2022, arXiv 2204.00185): centroids and codewords that keep the exact scores.

K-means makes quantized vectors that lie near the stored ones; here they are moved until they *score* as the stored
ones do for queries like those to come. The teacher is exact search, so nothing has to be labelled.

Shapes: B queries of a batch, N candidate documents, D dimensions, L centroids, M codebooks of C codewords.
The only module of `indexers` that imports torch; serving does without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from indexers.product import Quantizers, other_side
from indexers.scan import TIE, Numbers, Stored, nearest
from retrieval.errors import BackendError, Invalid
from retrieval.types import Matrix, Progress

ARMS = ("listnet", "kl", "mse", "margin_mse", "ranknet", "contrastive")
_SCALE_RATE = 0.02
_NEAREST = 2  # codewords of a soft choice
_PAIRS_AT_ONCE = 1 << 24  # of candidates, in the one arm that compares all


def distill_vq_loss(student: Tensor, teacher: Tensor, arm: str = "listnet", positives: Tensor | None = None) -> Tensor:
    """How far scores of quantized documents are from the exact ones: a scalar, the mean over queries.

    student, teacher: (B, N) scores over a temperature. positives: (B,) columns, for `contrastive` alone.
    """
    if arm == "listnet":  # teacher first: the entropy of the teacher more than KL(teacher || student)
        return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    if arm == "kl":  # student first
        ours = student.log_softmax(1)
        return (ours.exp() * (ours - teacher.log_softmax(1))).sum(1).mean()
    if arm == "mse":
        return F.mse_loss(student, teacher)
    if arm == "margin_mse":  # the mean over ordered pairs of ((t1 - t2) - (s1 - s2))^2 is twice a variance
        return 2 * (teacher - student).var(1, correction=0).mean()
    if arm == "ranknet":
        return _ranknet(student, teacher)
    if arm == "contrastive":
        if positives is None:
            raise Invalid("the contrastive arm learns from positives, got none", "arm")
        return F.cross_entropy(student, positives)
    raise Invalid(f"no arm {arm!r}; there are {', '.join(ARMS)}", "arm")


def _ranknet(student: Tensor, teacher: Tensor) -> Tensor:
    """-(t1 - t2) log sigmoid(s1 - s2), over pairs that the teacher orders; their mean over all ordered pairs."""
    total = student.new_zeros(())
    step = max(1, _PAIRS_AT_ONCE // student.shape[1] ** 2)
    for at in range(0, len(student), step):
        ours, theirs = student[at : at + step], teacher[at : at + step]
        wanted = (theirs[:, :, None] - theirs[:, None, :]).clamp(min=0)
        total = total - (wanted * F.logsigmoid(ours[:, :, None] - ours[:, None, :])).sum()
    return total / (len(student) * student.shape[1] ** 2)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the quantizers are learned. The defaults were chosen on dev queries (docs/distill_vq.md)."""

    arm: str = "listnet"
    steps: int = 200  # at most
    passes: int = 30  # over the queries, at most
    batch: int = 32  # queries
    sampled: int = 16  # of the teacher's best, for each query; all candidates are shared in the batch
    best: int = 200  # how many of the teacher's best they are drawn from
    tau: float = 0.1  # temperature, as a share of what lies between the scores of a query's first and last best
    lr_ivf: float = 0.003  # as a share of the size of a codeword's coordinates, as the next
    lr_pq: float = 0.003
    warmup: float = 0.1  # share of the steps, then down to zero in a straight line
    seed: int = 0


class Lesson(NamedTuple):
    """Training queries (Q, D), what the teacher ranks best for each (Q, K), and a positive for each (Q,).

    spread: by how much the first of the best outscores the last, on average. Scores of unit vectors lie close
    together, in some spaces closer than in others; temperatures are measured in this.
    """

    queries: Matrix
    best: Numbers
    positives: Numbers
    spread: float

    def some(self, chosen: NDArray[np.bool_]) -> Lesson:
        return Lesson(self.queries[chosen], self.best[chosen], self.positives[chosen], self.spread)


def lesson(stored: Stored, queries: Matrix, best: int, progress: Progress, positives: Numbers | None = None) -> Lesson:
    """What exact search over `stored` teaches. positives: of a log with clicks or labels; else the best of all."""
    found = np.empty((len(queries), min(best, len(stored))), np.int64)
    spread = np.empty(len(queries))
    for at in range(0, len(queries), 4_096):
        some = np.ascontiguousarray(queries[at : at + 4_096])
        scores, numbers = nearest(stored, some, found.shape[1])
        found[at : at + len(some)] = numbers[:, : found.shape[1]]
        spread[at : at + len(some)] = scores[:, 0] - scores[:, found.shape[1] - 1]
        progress("teach", at + len(some), len(queries))
    return Lesson(queries, found, found[:, 0] if positives is None else positives, max(float(spread.mean()), TIE))


def distill(
    start: Quantizers, stored: Stored, taught: Lesson, progress: Progress, recipe: Recipe | None = None
) -> Quantizers:
    """Learn centroids and codewords; the turn, and which centroid a document belongs to, stay as they are.

    stored: the documents (N, D), which need not fit in memory. Equal arguments give equal results on one machine.
    Raises BackendError where the learning diverges, Invalid for an unknown arm.
    """
    recipe = recipe or Recipe()
    if recipe.arm not in ARMS:
        raise Invalid(f"no arm {recipe.arm!r}; there are {', '.join(ARMS)}", "arm")
    student = _Student(start, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with _threads():
        _fit(student, stored, taught, progress, recipe)
    return student.learned(start)


def _fit(student: _Student, stored: Stored, taught: Lesson, progress: Progress, recipe: Recipe) -> None:
    steps = min(recipe.steps, recipe.passes * -(-len(taught.queries) // recipe.batch))
    size = max(float(student.codebooks.detach().square().mean().sqrt()), TIE)
    rates = ((student.centroids, recipe.lr_ivf), (student.codebooks, recipe.lr_pq))
    groups = [{"params": [parameter], "lr": rate * size} for parameter, rate in rates]
    optimizer = torch.optim.Adam([*groups, {"params": [student.scales], "lr": _SCALE_RATE}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_linear(steps, recipe.warmup))
    weight_ivf: float | None = None
    for step, batch in enumerate(_batches(stored, taught, recipe, steps)):
        loss_ivf, loss_pq = student.losses(batch, recipe.arm)
        if weight_ivf is None:  # both objectives count the same in the beginning, of every fit anew
            weight_ivf = float(loss_pq.detach()) / (float(loss_ivf.detach()) + 1e-6)
        loss = loss_pq + weight_ivf * loss_ivf
        if not math.isfinite(float(loss.detach())):
            raise BackendError("learning the vector index diverged; are all vectors of unit length?")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        progress("distill", step + 1, steps)


def taught(
    start: Quantizers, stored: Stored, queries: Matrix, progress: Progress, recipe: Recipe | None = None
) -> Quantizers | None:
    """What exact search over `stored` teaches by `queries` (Q, D); None where unseen queries gain nothing by it.

    A sixteenth of the queries is kept back for that judgment.
    """
    recipe = recipe or Recipe()
    known = lesson(stored, queries, recipe.best, progress)
    back = np.arange(len(queries)) % 16 == 15
    if not back.any():
        back[:] = True
    unseen, seen = known.some(back), known.some(~back if not back.all() else back)
    learned = distill(start, stored, seen, progress, recipe)
    return learned if agreement(learned, stored, unseen) > agreement(start, stored, unseen) else None


def agreement(quantizers: Quantizers, stored: Stored, known: Lesson) -> float:
    """Share of the teacher's first ten that quantized documents keep among the ten best, of the teacher's best."""
    student = _Student(quantizers, torch.device("cpu"))
    k = min(10, known.best.shape[1])
    kept = 0
    with torch.no_grad(), _threads():
        for at in range(0, len(known.queries), 32):
            best = known.best[at : at + 32]
            numbers, places = np.unique(best, return_inverse=True)
            queries, documents = student.turned(known.queries[at : at + 32], stored.gather(numbers))
            scores = queries @ student.approximate(documents)[1].T
            own = scores.gather(1, torch.from_numpy(places.reshape(best.shape)))
            kept += int((own.topk(k, 1).indices < k).sum())
    return kept / (k * len(known.queries))


class _Batch(NamedTuple):
    queries: Matrix  # (B, D)
    documents: Matrix  # (N, D), each once
    positives: Numbers  # (B,) places among the documents
    tau: float


def _batches(stored: Stored, taught: Lesson, recipe: Recipe, steps: int) -> Iterator[_Batch]:
    rng = np.random.default_rng(recipe.seed)
    size = min(recipe.batch, len(taught.queries))
    order: Numbers = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(len(taught.queries))])
        picked, order = order[:size], order[size:]
        drawn = rng.integers(taught.best.shape[1], size=(size, recipe.sampled))
        drawn = np.take_along_axis(taught.best[picked], drawn, 1)
        positives = taught.positives[picked]
        candidates, places = np.unique(np.concatenate([positives, drawn.ravel()]), return_inverse=True)
        yield _Batch(taught.queries[picked], stored.gather(candidates), places[:size], recipe.tau * taught.spread)


class _Student:
    """Centroids and codebooks as parameters, and the scores that they give."""

    def __init__(self, start: Quantizers, device: torch.device) -> None:
        def parameter(array: NDArray[np.float32]) -> Tensor:
            return torch.tensor(array, device=device, requires_grad=True)

        self.device = device
        self.turns = [torch.tensor(turn, device=device) for turn in (other_side(start.turn), start.turn)]
        self.frozen = torch.tensor(start.centroids, device=device)  # decides which centroid a document has
        self.centroids = parameter(start.centroids)
        self.codebooks = parameter(start.codebooks)
        # Quantized vectors are shorter than their originals, which no ranking sees: the loss shall not either.
        self.scales = torch.zeros(2, device=device, requires_grad=True)
        self.width: float | None = None  # of the soft assignment

    def losses(self, batch: _Batch, arm: str) -> tuple[Tensor, Tensor]:
        """(centroids alone, centroids and codewords)."""
        queries, documents = self.turned(batch.queries, batch.documents)
        positives = torch.from_numpy(batch.positives).to(self.device)
        teacher = queries @ documents.T / batch.tau
        coarse, whole = self.approximate(documents)
        ivf, pq = (
            distill_vq_loss(scale.exp() * (queries @ approximate.T) / batch.tau, teacher, arm, positives)
            for approximate, scale in zip((coarse, whole), self.scales, strict=True)
        )
        return ivf, pq

    def turned(self, queries: Matrix, documents: Matrix) -> tuple[Tensor, Tensor]:
        """Both in turned coordinates; their inner products stay what they were."""
        first, second = (
            torch.from_numpy(rows).to(self.device) @ turn.T
            for rows, turn in zip((queries, documents), self.turns, strict=True)
        )
        return first, second

    def approximate(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) twice: the centroid of each document; the centroid and the codewords."""
        coarse = self.centroids[(documents @ self.frozen.T).argmax(1)]
        return coarse, coarse + self._quantized(documents - coarse)

    def _quantized(self, residuals: Tensor) -> Tensor:
        """(N, D): the nearest codeword of every part; gradients flow as if the choice were soft (straight-through).

        The soft choice is among the nearest few: the others would hardly weigh, and take four times as long.
        """
        books, width = self.codebooks, self.codebooks.shape[2]
        parts = residuals.view(len(residuals), len(books), width).transpose(0, 1)  # (M, N, D / M)
        with torch.no_grad():
            distances = torch.baddbmm(
                books.square().sum(2)[:, None], parts, books.transpose(1, 2), alpha=-2
            )  # - |part|^2
            nearest = distances.topk(min(_NEAREST, books.shape[1]), 2, largest=False).indices  # (M, N, few)
            nearest += torch.arange(len(books), device=self.device)[:, None, None] * books.shape[1]
        chosen = F.embedding(nearest, books.reshape(-1, width))  # (M, N, few, D / M)
        apart = (parts[:, :, None] - chosen).square().sum(3)
        if self.width is None:
            self.width = max(float((apart[..., 1] - apart[..., 0]).detach().mean()), TIE**2)
        soft = (-apart / self.width).softmax(2)
        hard = torch.zeros_like(soft)
        hard[..., 0] = 1
        weights = (hard + soft - soft.detach())[..., None]
        return (weights * chosen).sum(2).transpose(0, 1).reshape(residuals.shape)

    def learned(self, start: Quantizers) -> Quantizers:
        centroids, codebooks = (p.detach().cpu().numpy() for p in (self.centroids, self.codebooks))
        return Quantizers(start.turn, np.ascontiguousarray(centroids), np.ascontiguousarray(codebooks))


@contextmanager
def _threads() -> Iterator[None]:
    """As many as FAISS was given by the caller: on small batches more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(faiss.omp_get_max_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_linear(steps: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(steps * warmup))
    return lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising))
