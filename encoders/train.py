"""One training loop: a recipe in, a tower aligned to the frozen text encoder out.

A film is pulled towards its report, towards single sentences of it, and towards phrases of the findings that it
affirms; each pull is `encoders.contrastive.symmetric` over one score matrix with its own learned temperature.
What is written is safetensors and JSON: `model.safetensors` (float16), `config.json`, `lineage.json`.

Shapes: B films of a batch, F findings, D dimensions of the text encoder.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from encoders.contrastive import same, symmetric
from encoders.lesson import Lesson, augmented, lesson, one_sentence_each
from encoders.recipe import Recipe, Schedule, read
from encoders.studies import data_digest, read_studies
from encoders.text import PACKAGED, text_encoder
from retrieval.errors import BackendError, InputError
from retrieval.types import Encoder, Progress

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class Goal:
    """Where a run leads, and digests of what it learns from and of the text encoder it aligns to."""

    folder: Path
    data: str
    text: str


def train(recipe: Path, out: Path | None, progress: Progress, text: Encoder | None = None) -> Path:
    """Train by the recipe, or go on where a run of it was stopped; the folder that holds the weights.

    out: None means `runs/<name of the recipe>`. text: the frozen text encoder, None for the packaged one.
    Raises InputError for a bad recipe or data, BackendError where the loss stops being a number or the weights
    cannot be written.
    """
    plan = read(recipe)
    folder, cache = out or Path("runs") / recipe.stem, Path("runs") / "cache"
    _make(folder)  # a folder that cannot be written should not be found out after the first epoch
    studies = read_studies(_source(plan.data.source), plan.data.part)
    text = text or text_encoder(None, cache)
    goal = Goal(data=data_digest(studies), text=getattr(text, "weights", text.digests["text"]), folder=folder)
    return _Run(plan, lesson(plan, studies, text, cache, progress), goal, progress).to_the_end()


def _source(name: str) -> Path:
    return Path(os.environ.get("LIGHTBOX_DATA", "../shared/data")) / name


class _Run:
    """One run of a recipe: the tower, its optimiser and where they stand."""

    def __init__(self, plan: Recipe, lesson: Lesson, goal: Goal, progress: Progress) -> None:
        self.plan, self.lesson, self.goal, self.progress = plan, lesson, goal, progress
        _keep_freed_memory()
        torch.manual_seed(plan.schedule.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tower = build(plan.tower.name, lesson.reports.shape[1], plan.tower.dropout).to(self.device)
        self.shards = Shards(self.tower, plan.schedule.shards, precision(plan.schedule.precision, self.device))
        self.scales = nn.Parameter(torch.full((3,), -math.log(plan.loss.temperature), device=self.device))
        self.parameters = [*self.tower.parameters(), self.scales]
        self.optimiser = _optimiser(self.tower, self.scales, plan.schedule)
        self.steps = max(1, lesson.frontal // plan.schedule.batch)  # of an epoch
        self.epochs = sum(plan.schedule.epochs)
        self.history: list[dict[str, float]] = []

    def to_the_end(self) -> Path:
        if self._done():
            return self.goal.folder
        self._resume()
        for epoch in range(len(self.history), self.epochs):
            self.history.append(self._epoch(epoch))
            self._checkpoint()
        _release(self)
        (self.goal.folder / CHECKPOINT).unlink(missing_ok=True)
        return self.goal.folder

    def _done(self) -> bool:
        """Whether the folder holds the end of this very run."""
        try:
            lineage = json.loads((self.goal.folder / "lineage.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(lineage, dict) and lineage.get("key") == self.key

    def _epoch(self, epoch: int) -> dict[str, float]:
        torch.manual_seed(self.plan.schedule.seed * 100_003 + epoch)  # an epoch draws the same wherever it begins
        draw = np.random.default_rng([self.plan.schedule.seed, epoch])
        size, count = _size(self.plan, epoch), self.plan.schedule.batch
        order = draw.choice(len(self.lesson.study), self.steps * count, p=self.lesson.draw)
        self.tower.train()
        total, began = 0.0, time.monotonic()
        for step in range(self.steps):
            self._set_rate(epoch + step / self.steps)
            total += self._step(order[step * count : (step + 1) * count], size, draw)
            self.progress(f"epoch {epoch + 1} of {self.epochs}", step + 1, self.steps)
        seconds = time.monotonic() - began
        rate = round(self.steps * count / seconds, 1)
        return {"loss": total / self.steps, "size": size, "seconds": round(seconds, 1), "films_per_second": rate}

    def _step(self, rows: NDArray[np.int64], size: int, draw: np.random.Generator) -> float:
        batch = torch.from_numpy(self.lesson.films[rows])[:, None].float() / 255  # (B, 1, side, side)
        seen = (augmented(batch, size, self.plan.augment) - self.plan.tower.mean) / self.plan.tower.std
        outputs = self.shards.forward(seen.to(self.device, memory_format=torch.channels_last))
        vectors = functional.normalize(outputs, dim=1)  # (B, D)
        loss = self._loss(vectors, self.lesson.study[rows], draw)
        if not math.isfinite(loss.item()):
            raise BackendError(
                f"the loss is {loss.item()} in epoch {len(self.history) + 1}: lower schedule.rate (now "
                f"{self.plan.schedule.rate}); what was saved before stays"
            )
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.shards.backward(outputs)
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimiser.step()
        with torch.no_grad():
            self.scales.clamp_(max=math.log(100.0))
        return float(loss.item())

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

    def _set_rate(self, epoch: float) -> None:
        cycle, share = place(epoch, self.plan.schedule.epochs)
        rate = self.plan.schedule.rate * 0.7**cycle * one_cycle(share, self.plan.schedule.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    # ---- stopping and going on

    @property
    def key(self) -> str:
        """Digest of recipe, data and text encoder: what one run may not change on its way."""
        return hashlib.sha256(f"{self.plan.digest} {self.goal.data} {self.goal.text}".encode()).hexdigest()

    def _checkpoint(self) -> None:
        tensors = {f"tower.{name}": value for name, value in self.tower.state_dict().items()}
        tensors["scales"] = self.scales.data
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": value for name, value in state.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        notes = {"key": self.key, "history": json.dumps(self.history)}
        save(self.goal.folder / CHECKPOINT, tensors, notes)

    def _resume(self) -> None:
        path = self.goal.folder / CHECKPOINT
        if not path.exists():
            return
        tensors, notes = load(path)
        if notes.get("key") != self.key:
            raise InputError(f"{path} belongs to another recipe or other data: remove it, or choose another folder")
        self.tower.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("tower.")})
        self.scales.data.copy_(tensors["scales"])
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, number, key = name.split(".")
                self._restore(int(number), key, value)
        self.history = json.loads(notes["history"])

    def _restore(self, number: int, key: str, value: Tensor) -> None:
        """Moments lie in memory as their parameter does: the fused optimiser walks over both side by side."""
        parameter = [p for group in self.optimiser.param_groups for p in group["params"]][number]
        kept = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        self.optimiser.state[parameter][key] = kept.copy_(value).detach()


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


def _optimiser(tower: nn.Module, scales: nn.Parameter, schedule: Schedule) -> torch.optim.AdamW:
    """Biases, norms and temperatures do not decay."""
    kept = [p for p in tower.parameters() if p.ndim > 1]
    free = [p for p in tower.parameters() if p.ndim <= 1]
    groups = [
        {"params": kept, "weight_decay": schedule.weight_decay},
        {"params": [*free, scales], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.rate, fused=True)


def one_cycle(share: float, warmup: float) -> float:
    """The rate's factor after a share of all steps: up to 1 over `warmup`, then down to 0 along a cosine.

    >>> [round(one_cycle(share, 0.2), 3) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.04, 0.52, 1.0, 0.5, 0.0]
    """
    if share < warmup:
        return 0.04 + 0.96 * share / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (share - warmup) / (1 - warmup))


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """What to compute in. bfloat16 without the instructions for it is ten times slower than float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def place(epoch: float, lengths: Sequence[int]) -> tuple[int, float]:
    """Number of the cycle that an epoch falls in, and the share of that cycle before it.

    >>> place(0, [4, 2]), place(3.5, [4, 2]), place(5, [4, 2])
    ((0, 0.0), (0, 0.875), (1, 0.5))
    """
    for number, length in enumerate(lengths):
        if epoch < length:
            return number, epoch / length
        epoch -= length
    raise InputError(f"the cycles of {list(lengths)} epochs are over")


def _size(plan: Recipe, epoch: int) -> int:
    """The side of the films in an epoch: small ones first, in steps of 16, since small ones cost less."""
    low, high = plan.schedule.size_from or plan.tower.size, plan.tower.size
    share, grown = place(epoch, plan.schedule.epochs)[1], plan.schedule.size_grown
    if share >= grown:
        return high
    return min(high, low + 16 * int((high - low) / 16 * share / grown))


def _keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks: giving activations back at every step was measured to cost 30 %."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping per block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed
    except (OSError, AttributeError):
        return


# ---- what is written


def _release(run: _Run) -> None:
    weights = {
        name: value.detach().cpu().to(torch.float16 if value.is_floating_point() else value.dtype).contiguous()
        for name, value in run.tower.state_dict().items()
    }
    tower, folder = run.plan.tower, run.goal.folder
    config = {
        "tower": f"timm/{tower.name}",
        "size": tower.size,
        "channels": 1,
        "mean": [tower.mean],
        "std": [tower.std],
        "dim": run.lesson.reports.shape[1],
        "text_encoder": PACKAGED,
        "text_digest": run.goal.text,
    }
    save(folder / "model.safetensors", weights, {"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "lineage.json", _lineage(run))


def _lineage(run: _Run) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(run.plan),
        "recipe_digest": run.plan.digest,
        "key": run.key,
        "data_digest": run.goal.data,
        "seed": run.plan.schedule.seed,
        "commit": _commit(),
        "studies": len(run.lesson.said),
        "films": len(run.lesson.study),
        "affirmed": dict(zip((t.name for t in run.plan.findings), run.lesson.affirmed.sum(0).tolist(), strict=True)),
        "temperatures": [round(float(t), 4) for t in (-run.scales.data).exp()],
        "torch": torch.__version__,
        "seconds": round(sum(epoch["seconds"] for epoch in run.history)),
        "epochs": run.history,
    }


def _commit() -> str | None:
    """The commit that the code stands at, None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"{folder} cannot be written: {error.strerror}") from error


def save(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all. Raises BackendError where the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    try:
        save_file(dict(tensors), part, dict(notes))
        part.chmod(0o644)  # safetensors keeps its files to their owner
        _flush(part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise BackendError(f"{path.name} cannot be written: {error}") from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of a safetensors file. Raises InputError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no readable safetensors file: remove it to start anew") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        _flush(part)
        part.replace(path)
    except OSError as error:
        raise BackendError(f"{path.name} cannot be written: {error.strerror}") from error


def _flush(path: Path) -> None:
    with path.open("rb+") as opened:
        os.fsync(opened.fileno())
