"""One training loop for every kind of encoder: a recipe in; weights, a lineage and a curve out.

What differs between a film tower, a text tower and a cross-encoder is a `Course`: it draws what a step learns from,
computes the loss, judges on dev and writes the release. The loop owns the rest: the rate's cycles, averaged weights,
the best epoch, checkpoints, several processes, and the record of all of it.

What is written is safetensors, JSON and one PNG: never pickle.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed, nn

from encoders.recipe import Pace, kind_of
from encoders.saving import folder_made, load, save, write_json
from retrieval.errors import BackendError, InputError
from retrieval.types import Encoder, Likeness, Linker, Progress

CHECKPOINT = "checkpoint.safetensors"


class Course(Protocol):
    """What one kind of training teaches; `module` holds all that learns, on the device where it learns."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def pace(self) -> Pace: ...

    @property
    def digests(self) -> Mapping[str, str]:
        """What one run may not change on its way: recipe, data, base."""
        ...

    @property
    def steps(self) -> int:
        """Of an epoch."""
        ...

    @property
    def rows(self) -> int:
        """That one step reads: what the rate counts."""
        ...

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        """Draw what an epoch learns from; figures to note beside it."""
        ...

    def learn(self, step: int, draw: np.random.Generator) -> float:
        """Add one step's gradient to the parameters; its loss."""
        ...

    def settle(self) -> None:
        """Bring what a step changed back into its bounds."""
        ...

    def judge(self) -> dict[str, float]:
        """Figures on dev; `dev` is the one that chooses the epoch. Empty where a course has none."""
        ...

    def release(self, folder: Path) -> dict[str, Any]:
        """Write the weights and their configuration; what the lineage should tell."""
        ...


def train(
    recipe: Path,
    out: Path | None,
    progress: Progress,
    text: Encoder | None = None,
    linker: Linker | None = None,
    alike: Likeness | None = None,
) -> Path:
    """Train by the recipe, or go on where a run of it was stopped; the folder that holds the weights.

    out: None means `runs/<name of the recipe>`. text: the frozen text encoder of a film tower, None for the packaged
    one. linker: what reads findings in reports. alike: how alike the findings of two texts are. Under `torchrun` every
    process learns from its own draw and the gradients are averaged.
    Raises InputError for a bad recipe or data, BackendError where the loss stops being a number or the weights
    cannot be written.
    """
    kind = kind_of(recipe)
    folder, cache = folder_made(out or Path("runs") / recipe.stem), Path("runs") / "cache"
    with _processes(), _removed_if_empty(folder):
        if kind == "film":
            from encoders.joined import train_members

            return train_members(recipe, folder, cache, progress, text, linker)
        if kind == "reports":
            from encoders.report_course import report_course

            return Run(report_course(recipe, linker, alike), folder, progress).to_the_end()
        return Run(_course(kind, recipe, cache, progress), folder, progress).to_the_end()


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """A recipe that is refused leaves nothing behind."""
    try:
        yield
    except InputError:
        with suppress(OSError):
            folder.rmdir()
        raise


def _course(kind: str, recipe: Path, cache: Path, progress: Progress) -> Course:
    if kind == "text":
        from encoders.text_course import text_course

        return text_course(recipe, cache, progress)
    if kind == "cross":
        from encoders.cross_course import cross_course

        return cross_course(recipe, cache, progress)
    if kind == "cut":
        from encoders.cut_course import cut_course

        return cut_course(recipe, cache, progress)
    if kind == "unime":
        from encoders.unime_course import unime_course

        return unime_course(recipe, cache, progress)
    raise InputError(f"kind is {kind!r}; it must be one of film, text, cross, cut, unime, reports", "kind")


class Run:
    """One run of a course: what learns, its optimiser and where they stand."""

    def __init__(self, course: Course, folder: Path, progress: Progress) -> None:
        self.course, self.pace, self.folder, self.progress = course, course.pace, folder, progress
        self.freed = Freed()
        self.parameters = [p for p in course.module.parameters() if p.requires_grad]
        self.optimiser = _optimiser(self.parameters, course.pace)
        self.epochs = sum(course.pace.epochs)
        self.history: list[dict[str, float]] = []
        self.average = Average(course.module, course.pace.ema) if course.pace.ema else None
        self.best: dict[str, Tensor] = {}
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0

    def to_the_end(self) -> Path:
        if done(self.folder, self.key):
            return self.folder
        self._resume()
        for epoch in range(len(self.history), self.epochs):
            if self._given_up():
                break
            self.history.append(self._epoch(epoch) | self._judged())
            self._keep_best()
            if self.rank == 0:
                self._checkpoint()
        if self.rank == 0:
            self._release()
        return self.folder

    def _epoch(self, epoch: int) -> dict[str, float]:
        torch.manual_seed(self.pace.seed * 100_003 + epoch)  # an epoch draws the same wherever it begins
        draw = np.random.default_rng([self.pace.seed, epoch, self.rank] if self.rank else [self.pace.seed, epoch])
        noted = self.course.begin(epoch, draw)
        self.course.module.train()
        total, began = 0.0, time.monotonic()
        for step in range(self.course.steps):
            self._set_rate(epoch + step / self.course.steps)
            total += self._step(step, draw)
            self.freed.look()
            self.progress(f"epoch {epoch + 1} of {self.epochs}", step + 1, self.course.steps)
        seconds = time.monotonic() - began
        rate = round(self.course.steps * self.course.rows / max(seconds, 1e-9), 1)
        return {"loss": total / self.course.steps, **noted, "seconds": round(seconds, 1), "rows_per_second": rate}

    def _step(self, step: int, draw: np.random.Generator) -> float:
        self.optimiser.zero_grad()
        loss = self.course.learn(step, draw)
        if not math.isfinite(loss):
            raise BackendError(
                f"the loss is {loss} in epoch {len(self.history) + 1}: lower schedule.rate (now {self.pace.rate}); "
                "what was saved before stays"
            )
        _share(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.pace.clip)
        self.optimiser.step()
        self.course.settle()
        if self.average is not None:
            self.average.update(self.course.module)
        return loss

    def _set_rate(self, epoch: float) -> None:
        cycle, share = place(epoch, self.pace.epochs)
        rate = self.pace.rate * 0.7**cycle * one_cycle(share, self.pace.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    # ---- the best epoch

    def _judged(self) -> dict[str, float]:
        self.course.module.eval()
        with self._averaged():
            return self.course.judge()

    def _keep_best(self) -> None:
        """Where there is a dev figure, the epoch with the best one is released; elsewhere the last."""
        figures = [epoch.get("dev", math.nan) for epoch in self.history]
        if not math.isnan(figures[-1]) and figures[-1] >= max(f for f in figures if not math.isnan(f)):
            with self._averaged():
                self.best = {name: value.detach().clone() for name, value in self.course.module.state_dict().items()}

    def _given_up(self) -> bool:
        """Whether dev has not risen for `patience` epochs."""
        figures = [epoch["dev"] for epoch in self.history if "dev" in epoch]
        if not self.pace.patience or not figures:
            return False
        return len(figures) - 1 - int(np.argmax(figures)) >= self.pace.patience

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the module's place, where there are any."""
        if self.average is None:
            yield
            return
        own = {name: value.clone() for name, value in self.course.module.state_dict().items()}
        self.course.module.load_state_dict(self.average.weights)
        try:
            yield
        finally:
            self.course.module.load_state_dict(own)

    # ---- stopping and going on

    @property
    def key(self) -> str:
        return key_of(self.course.digests)

    def _checkpoint(self) -> None:
        tensors = {f"module.{name}": value for name, value in self.course.module.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.weights.items()}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": value for name, value in state.items()}
        tensors = {name: value.clone() for name, value in tensors.items()}  # safetensors takes no shared memory
        save(self.folder / CHECKPOINT, tensors, {"key": self.key, "history": json.dumps(self.history)})

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        tensors, notes = load(path)
        if notes.get("key") != self.key:
            raise InputError(f"{path} belongs to another recipe or other data: remove it, or choose another folder")
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "best": {}, "average": {}, "optimiser": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.course.module.load_state_dict(parts["module"])
        self.history, self.best = json.loads(notes["history"]), parts["best"]
        if self.average is not None:
            self.average.weights = parts["average"]
            self.average.steps = len(self.history) * self.course.steps
        for name, value in parts["optimiser"].items():
            number, _, key = name.partition(".")
            self._restore(int(number), key, value)

    def _restore(self, number: int, key: str, value: Tensor) -> None:
        """Moments lie in memory as their parameter does: the fused optimiser walks over both side by side."""
        parameter = [p for group in self.optimiser.param_groups for p in group["params"]][number]
        kept = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        self.optimiser.state[parameter][key] = kept.copy_(value).detach()

    # ---- what is written

    def _release(self) -> None:
        if self.best:
            self.course.module.load_state_dict(self.best)
            told = self.course.release(self.folder)
        else:
            with self._averaged():
                told = self.course.release(self.folder)
        draw_curve(self.folder / "curve.png", self.history)
        write_json(self.folder / "lineage.json", self._lineage() | told | {"epochs": self.history})
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def _lineage(self) -> dict[str, Any]:
        figures = [epoch["dev"] for epoch in self.history if "dev" in epoch]
        return {
            **{f"{name}_digest": value for name, value in self.course.digests.items()},
            "key": self.key,
            "seed": self.pace.seed,
            "commit": _commit(),
            "torch": torch.__version__,
            "seconds": round(sum(epoch["seconds"] for epoch in self.history)),
            **({"best_epoch": int(np.argmax(figures)) + 1} if figures else {}),
        }


def key_of(digests: Mapping[str, str]) -> str:
    """Digest of recipe, data and base: what one run may not change on its way."""
    return hashlib.sha256(" ".join(digests.values()).encode()).hexdigest()


def done(folder: Path, key: str) -> bool:
    """Whether the folder holds the end of this very run."""
    try:
        lineage = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(lineage, dict) and lineage.get("key") == key


class Average:
    """Weights averaged over the steps (Polyak), nearer to the latest ones while there are few steps.

    decay: share of the old average that a step keeps, in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step's weights in; counts and other whole numbers are copied."""
        self.steps += 1
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - kept)
            else:
                self.weights[name].copy_(value)


def _optimiser(parameters: Sequence[nn.Parameter], pace: Pace) -> torch.optim.AdamW:
    """Biases, norms and temperatures do not decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": pace.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=pace.rate, fused=True)


def one_cycle(share: float, warmup: float) -> float:
    """The rate's factor after a share of all steps: up to 1 over `warmup`, then down to 0 along a cosine.

    >>> [round(one_cycle(share, 0.2), 3) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.04, 0.52, 1.0, 0.5, 0.0]
    """
    if share < warmup:
        return 0.04 + 0.96 * share / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (share - warmup) / (1 - warmup))


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


class Freed:
    """What a step frees stays with the process for the next one, until it lies in pieces that are too small for it.

    Giving activations back at every step was measured to cost 30 %. But where steps ask for blocks of ever other sizes
    (texts of other lengths), what is kept no longer fits them: a training that needs 9 GB was ended at 23.
    """

    def __init__(self) -> None:
        self.usual = 0  # bytes of the largest step that began without pieces
        self._whole = True
        try:
            self._libc: Any = ctypes.CDLL("libc.so.6")
            self._libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping per block
            self._libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed
        except (OSError, AttributeError):
            self._libc = None

    def look(self) -> None:
        """After a step: give all that is free back where the process holds half as much again as it should."""
        held = own_memory() if self._libc else 0
        if self._whole:
            self.usual = max(self.usual, held)
        self._whole = held > 1.5 * self.usual
        if self._whole:
            self._libc.malloc_trim(0)


def own_memory() -> int:
    """Bytes of memory that are this process's own, no file's."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def _commit() -> str | None:
    """The commit that the code stands at, None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def draw_curve(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Loss and dev figure by epoch, as a PNG. Raises BackendError where the disk refuses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes: Any = figure.subplots()
    numbers = range(1, len(history) + 1)
    axes.plot(numbers, [epoch["loss"] for epoch in history], "o-", color="tab:blue", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss", color="tab:blue")
    if any("dev" in epoch for epoch in history):
        beside = axes.twinx()
        beside.plot(numbers, [epoch.get("dev", math.nan) for epoch in history], "s--", color="tab:red", markersize=3)
        beside.set_ylabel("dev", color="tab:red")
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise BackendError(f"{path.name} cannot be written: {error.strerror}") from error


# ---- several processes


@contextmanager
def _processes() -> Iterator[None]:
    """Join the processes that `torchrun` started, where it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _share(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of all processes."""
    if not distributed.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()
