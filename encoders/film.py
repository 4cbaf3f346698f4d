"""The course of a film tower: chest films pulled towards what a frozen text encoder makes of their reports.

A film is pulled towards its report among all reports, and towards single sentences of it (`encoders.contrastive`).
Of each finding its report says whether it is there: the cosine to a phrase for it, scaled and shifted, is the logit of
that. Each term has a learned temperature of its own.

Shapes: B films of a batch, S studies, F findings, D dimensions of the text encoder.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from encoders.contrastive import distribution, info_nce, soft_nce, softened, symmetric
from encoders.lesson import Lesson, augmented, lesson, one_sentence_each
from encoders.packed import unpack
from encoders.recipe import Recipe, Tower
from encoders.saving import halved, save
from encoders.start import start
from encoders.studies import data_digest, read_studies
from encoders.text import text_encoder
from encoders.train import place
from retrieval.errors import BackendError, InputError
from retrieval.types import Encoder, Linker, Progress

ALIKE = 0.05  # temperature of the likeness of reports, where targets are soft


def learned_from(
    plan: Recipe, cache: Path, progress: Progress, text: Encoder | None = None, linker: Linker | None = None
) -> tuple[Lesson, dict[str, str]]:
    """What a recipe's tower learns from, and the digests of its data and text encoder."""
    packed = source(f"{plan.data.source}.lesson")
    if packed.exists() and not source(plan.data.source).exists():
        return unpack(packed, plan)
    studies = read_studies(source(plan.data.source), plan.data.part)
    text = text or text_encoder(None, cache)
    digests = {"data": data_digest(studies), "text": getattr(text, "weights", text.digests["text"])}
    return lesson(plan, studies, text, linker, cache, progress), digests


def source(name: str) -> Path:
    """Where a collection lies; relative names count from LIGHTBOX_DATA."""
    return Path(os.environ.get("LIGHTBOX_DATA", "../shared/data")) / name


class FilmCourse:
    """One member of a film tower. Implements `encoders.train.Course`."""

    def __init__(self, plan: Recipe, lesson: Lesson, digests: dict[str, str], member: int) -> None:
        seed = plan.schedule.seed * plan.tower.members + member
        self.plan, self.lesson = plan, lesson
        self.digests, self.pace = digests, replace(plan.schedule, seed=seed)
        torch.manual_seed(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.texts = lesson.texts.to(self.device)
        self.films = torch.from_numpy(lesson.films).to(self.device)  # on a CPU still mapped, not read
        self.tower = build(plan.tower, self.texts.reports.shape[1]).to(self.device)
        self.shards = Shards(self.tower, plan.schedule.shards, precision(plan.schedule.precision, self.device))
        self.scales = nn.Parameter(torch.full((3,), -math.log(plan.loss.temperature), device=self.device))
        states = self.texts.states
        frequency = (states == 1).float().mean(0).clamp(0.5 / len(states), 0.5)  # (F,)
        self.rarity = frequency**-plan.loss.rarity
        self.shift = nn.Parameter(torch.logit(frequency))
        parts = {"tower": self.tower, "temperatures": nn.ParameterList([self.scales, self.shift])}
        self.module = nn.ModuleDict(parts)
        self.rows = plan.schedule.batch
        self.steps = max(1, int(lesson.frontal.sum()) // self.rows)
        self.order: NDArray[np.int64] = np.zeros(0, np.int64)
        self.size = plan.tower.size

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        self.size = _size(self.plan, epoch)
        self.order = draw.choice(len(self.lesson.study), self.steps * self.rows, p=self.lesson.draw)
        return {"size": self.size}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        rows = self.order[step * self.rows : (step + 1) * self.rows]
        batch = self.films[torch.from_numpy(rows).to(self.device)][:, None].float() / 255  # (B, 1, side, side)
        seen = (augmented(batch, self.size, self.plan.augment) - self.plan.tower.mean) / self.plan.tower.std
        study, share = self.lesson.study[rows], self._share(draw)
        if share < 1:
            seen = share * seen + (1 - share) * seen.flip(0)
        outputs = self.shards.forward(seen.contiguous(memory_format=torch.channels_last))
        vectors = functional.normalize(outputs, dim=1)  # (B, D)
        loss = self._loss(vectors, study, draw)
        if share < 1:
            loss = share * loss + (1 - share) * self._loss(vectors, study[::-1].copy(), draw)
        if math.isfinite(loss.item()):
            loss.backward()  # type: ignore[no-untyped-call]
            self.shards.backward(outputs)
        return float(loss.item())

    def _share(self, draw: np.random.Generator) -> float:
        """How much of each film is itself in a batch that is mixed with its reverse (mixup, arXiv 1710.09412)."""
        mix = self.plan.augment.mix
        return float(draw.beta(mix, mix)) if mix else 1.0

    def settle(self) -> None:
        with torch.no_grad():
            self.scales.clamp_(max=math.log(100.0))

    def judge(self) -> dict[str, float]:
        return {}

    def _loss(self, vectors: Tensor, study: NDArray[np.int64], draw: np.random.Generator) -> Tensor:
        texts, weight = self.texts, self.plan.loss
        to_report, to_sentence, to_finding = self.scales.exp()
        owner = torch.from_numpy(study).to(self.device)
        loss = weight.reports * self._to_reports(to_report * vectors @ texts.reports.T, owner)
        chosen, counts = one_sentence_each(self.lesson.texts, study, weight.denial, draw)
        if weight.sentences and counts.any():
            said = torch.from_numpy(chosen).to(self.device)
            scores = to_sentence * vectors @ texts.sentences[said].T  # (B, B)
            counted = torch.from_numpy(counts).float().to(self.device)
            alike = said[:, None] == said[None, :]
            loss = loss + weight.sentences * symmetric(scores, alike, None, counted, counted)
        if weight.findings:
            asked = torch.stack([p[int(draw.integers(len(p)))] for p in texts.phrases])  # (F, D)
            logits = to_finding * vectors @ asked.T + self.shift  # (B, F)
            loss = loss + weight.findings * decided(logits, texts.states[owner], self.rarity)
        return loss

    def _to_reports(self, scores: Tensor, owner: Tensor) -> Tensor:
        """Films should find their reports among all, and the reports of the batch their films. scores: (B, S)."""
        texts, share = self.texts, self.plan.loss.soft
        alike = texts.keys[owner][:, None] == texts.keys[None, :]  # (B, S)
        back = info_nce(scores[:, owner].T, alike[:, owner].T)
        if not share:
            return (info_nce(scores, alike) + back) / 2
        near = distribution(texts.reports[owner] @ texts.reports.T / ALIKE)  # (B, S)
        return (soft_nce(scores, softened(alike, near, share)) + back) / 2

    def release(self, folder: Path) -> dict[str, Any]:
        save(folder / "model.safetensors", halved(self.tower.state_dict()), {"format": "pt"})
        names = (topic.name for topic in self.plan.findings)
        return {
            "recipe": dataclasses.asdict(self.plan),
            "studies": len(self.texts.reports),
            "films": len(self.lesson.study),
            "affirmed": dict(zip(names, (self.texts.states == 1).sum(0).tolist(), strict=True)),
            "temperatures": [round(float(t), 4) for t in (-self.scales.data).exp()],
        }


def decided(logits: Tensor, states: Tensor, rarity: Tensor) -> Tensor:
    """Cross-entropy of every finding by itself, the mean over those that are not in doubt.

    logits: (B, F). states: (B, F), 1 there, 0 not, -1 in doubt. rarity: (F,), how much a film with the finding counts
    beside one without.

    >>> decided(torch.zeros(1, 2), torch.tensor([[1, -1]]), torch.tensor([3.0, 3.0])) / 3
    tensor(0.6931)
    """
    there = (states == 1).to(logits.dtype)
    counts = torch.where(states == 1, rarity, (states == 0).to(logits.dtype))
    loss = functional.binary_cross_entropy_with_logits(logits, there, counts, reduction="sum")
    return loss / (states >= 0).sum().clamp(min=1)


class Shards:
    """Parts of a batch, each through the tower on a thread of its own.

    Threads that share every operation wait for one another at its end; on a busy machine one thread alone was measured
    at twice the rate of two that share. Here they meet twice a step. The copies share the parameters and keep batch
    statistics of their own, so nothing depends on which is done first; those of the first part are the tower's.
    """

    def __init__(self, tower: nn.Module, count: int, kind: torch.dtype) -> None:
        self.towers = [tower, *(_sharing(tower) for _ in range(count - 1))]
        self.kind = kind
        self.made: list[Tensor] = []
        threads = max(1, (os.cpu_count() or 1) // count)
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads,))
        if count > 1:
            torch.set_num_threads(threads)

    def forward(self, batch: Tensor) -> Tensor:
        """(B, D) outputs in float32, a leaf of its own: see `backward`."""
        self.made = list(self.pool.map(self._encode, self.towers, batch.chunk(len(self.towers))))
        return torch.cat([part.detach() for part in self.made]).requires_grad_()

    def backward(self, outputs: Tensor) -> None:
        """Bring the gradient that arrived at `outputs` down to the parameters."""
        if outputs.grad is None:
            raise BackendError(
                "the loss does not depend on the films: the recipe's loss weights leave nothing to learn"
            )
        list(self.pool.map(torch.autograd.backward, self.made, outputs.grad.chunk(len(self.towers))))

    def _encode(self, tower: nn.Module, part: Tensor) -> Tensor:
        with torch.autocast(part.device.type, self.kind, enabled=self.kind != torch.float32):
            out: Tensor = tower(part)
        return out.float()


def _sharing(tower: nn.Module) -> nn.Module:
    """A copy with the same parameters, not equal ones, and buffers of its own."""
    twin = copy.deepcopy(tower)
    for ours, theirs in zip(tower.modules(), twin.modules(), strict=True):
        theirs._parameters = ours._parameters
    return twin


def build(plan: Tower, dim: int) -> nn.Module:
    """A timm tower that reads one grey channel and gives `dim` numbers: untrained, or as `encoders.start` has it."""
    import timm

    extra: dict[str, Any] = {"drop_path_rate": plan.skipped} if plan.skipped else {}  # not every model knows it
    try:
        tower: nn.Module = timm.create_model(
            plan.name, pretrained=False, in_chans=1, num_classes=dim, drop_rate=plan.dropout, **extra
        )
    except RuntimeError as error:
        message = f"timm knows no model {plan.name!r}; `timm.list_models()` lists what it knows"
        raise InputError(message, "tower.name") from error
    if plan.start:
        start(tower, plan.start)
    return tower.to(memory_format=torch.channels_last)


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """What to compute in. bfloat16 without the instructions for it is ten times slower than float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def _size(plan: Recipe, epoch: int) -> int:
    """The side of the films in an epoch: small ones first, in steps of 16, since small ones cost less."""
    low, high = plan.schedule.size_from or plan.tower.size, plan.tower.size
    share, grown = place(epoch, plan.schedule.epochs)[1], plan.schedule.size_grown
    if share >= grown:
        return high
    return min(high, low + 16 * int((high - low) / 16 * share / grown))
