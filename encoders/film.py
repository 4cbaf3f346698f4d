"""The course of a film tower: chest films pulled towards what a frozen text encoder makes of their reports.

A film is pulled towards its report, towards single sentences of it, and towards phrases of the findings that it
affirms; each pull is `encoders.contrastive.symmetric` over one score matrix with its own learned temperature.

Shapes: B films of a batch, F findings, D dimensions of the text encoder.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from encoders.contrastive import same, symmetric
from encoders.lesson import Lesson, augmented, lesson, one_sentence_each
from encoders.recipe import Recipe, read
from encoders.saving import halved, save, write_json
from encoders.studies import data_digest, read_studies
from encoders.text import PACKAGED, text_encoder
from encoders.train import place
from retrieval.errors import BackendError, InputError
from retrieval.types import Encoder, Progress


def film_course(recipe: Path, cache: Path, progress: Progress, text: Encoder | None = None) -> FilmCourse:
    """The course of a film recipe. text: the frozen text encoder, None for the packaged one."""
    plan = read(recipe)
    studies = read_studies(source(plan.data.source), plan.data.part)
    text = text or text_encoder(None, cache)
    digests = {
        "recipe": plan.digest,
        "data": data_digest(studies),
        "text": getattr(text, "weights", text.digests["text"]),
    }
    return FilmCourse(plan, lesson(plan, studies, text, cache, progress), digests)


def source(name: str) -> Path:
    """Where a collection lies; relative names count from LIGHTBOX_DATA."""
    return Path(os.environ.get("LIGHTBOX_DATA", "../shared/data")) / name


class FilmCourse:
    """Implements `encoders.train.Course`."""

    def __init__(self, plan: Recipe, lesson: Lesson, digests: dict[str, str]) -> None:
        self.plan, self.lesson, self.digests, self.pace = plan, lesson, digests, plan.schedule
        torch.manual_seed(plan.schedule.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tower = build(plan.tower.name, lesson.reports.shape[1], plan.tower.dropout).to(self.device)
        self.shards = Shards(self.tower, plan.schedule.shards, precision(plan.schedule.precision, self.device))
        self.scales = nn.Parameter(torch.full((3,), -math.log(plan.loss.temperature), device=self.device))
        self.module = nn.ModuleDict({"tower": self.tower, "temperatures": nn.ParameterList([self.scales])})
        self.rows = plan.schedule.batch
        self.steps = max(1, lesson.frontal // self.rows)
        self.order: NDArray[np.int64] = np.zeros(0, np.int64)
        self.size = plan.tower.size

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        self.size = _size(self.plan, epoch)
        self.order = draw.choice(len(self.lesson.study), self.steps * self.rows, p=self.lesson.draw)
        return {"size": self.size}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        rows = self.order[step * self.rows : (step + 1) * self.rows]
        batch = torch.from_numpy(self.lesson.films[rows])[:, None].float() / 255  # (B, 1, side, side)
        seen = (augmented(batch, self.size, self.plan.augment) - self.plan.tower.mean) / self.plan.tower.std
        outputs = self.shards.forward(seen.to(self.device, memory_format=torch.channels_last))
        vectors = functional.normalize(outputs, dim=1)  # (B, D)
        loss = self._loss(vectors, self.lesson.study[rows], draw)
        if math.isfinite(loss.item()):
            loss.backward()  # type: ignore[no-untyped-call]
            self.shards.backward(outputs)
        return float(loss.item())

    def settle(self) -> None:
        with torch.no_grad():
            self.scales.clamp_(max=math.log(100.0))

    def judge(self) -> dict[str, float]:
        return {}

    def _loss(self, vectors: Tensor, study: NDArray[np.int64], draw: np.random.Generator) -> Tensor:
        lesson, weight, device = self.lesson, self.plan.loss, self.device
        to_report, to_sentence, to_finding = self.scales.exp()
        keys = [lesson.report_keys[s] for s in study]
        scores = to_report * vectors @ lesson.reports[study].to(device).T  # (B, B)
        loss = weight.reports * symmetric(scores, same(keys, keys).to(device))
        chosen, counts = one_sentence_each(lesson, study, weight.denial, draw)
        if weight.sentences and counts.any():
            scores = to_sentence * vectors @ lesson.sentences[chosen].to(device).T  # (B, B)
            counted = torch.from_numpy(counts).float().to(device)
            alike = same(chosen.tolist(), chosen.tolist()).to(device)
            loss = loss + weight.sentences * symmetric(scores, alike, None, counted, counted)
        if weight.findings:
            asked = torch.stack([p[int(draw.integers(len(p)))] for p in lesson.phrases]).to(device)  # (F, D)
            scores = to_finding * vectors @ asked.T  # (B, F)
            loss = loss + weight.findings * symmetric(scores, lesson.affirmed[study].to(device))
        return loss

    def release(self, folder: Path) -> dict[str, Any]:
        tower = self.plan.tower
        config = {
            "tower": f"timm/{tower.name}",
            "size": tower.size,
            "channels": 1,
            "mean": [tower.mean],
            "std": [tower.std],
            "dim": self.lesson.reports.shape[1],
            "text_encoder": PACKAGED,
            "text_digest": self.digests["text"],
        }
        save(folder / "model.safetensors", halved(self.tower.state_dict()), {"format": "pt"})
        write_json(folder / "config.json", config)
        names = (topic.name for topic in self.plan.findings)
        return {
            "recipe": dataclasses.asdict(self.plan),
            "studies": len(self.lesson.said),
            "films": len(self.lesson.study),
            "affirmed": dict(zip(names, self.lesson.affirmed.sum(0).tolist(), strict=True)),
            "temperatures": [round(float(t), 4) for t in (-self.scales.data).exp()],
        }


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


def build(name: str, dim: int, dropout: float = 0.0) -> nn.Module:
    """An untrained timm tower that reads one grey channel and gives `dim` numbers."""
    import timm

    try:
        tower: nn.Module = timm.create_model(name, pretrained=False, in_chans=1, num_classes=dim, drop_rate=dropout)
    except RuntimeError as error:
        message = f"timm knows no model {name!r}; `timm.list_models()` lists what it knows"
        raise InputError(message, "tower.name") from error
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
