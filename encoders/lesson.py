"""What a tower learns from, made once from the studies: films, vectors of texts, findings.

Shapes: N films, S studies, M different sentences, F findings, D dimensions of the text encoder, B films of a batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from encoders.recipe import Augment, Recipe
from encoders.studies import Study, denies, films, said, write_array
from retrieval.errors import InputError
from retrieval.types import Encoder, Item, Linker, Progress

MARGIN = 1.15  # films are kept a little larger than the tower reads them, so that crops keep their detail


@dataclass(frozen=True, slots=True)
class Lesson:
    """All that the loop reads, in memory. Sentences, reports and phrases are rows of matrices."""

    films: NDArray[np.uint8]  # (N, side, side)
    study: NDArray[np.int64]  # (N,) the study of each film
    draw: NDArray[np.float64]  # (N,) how often a film is drawn
    frontal: NDArray[np.bool_]  # (N,)
    texts: Texts


@dataclass(frozen=True, slots=True)
class Texts:
    """What the reports and the recipe say, as vectors and numbers."""

    reports: Tensor  # (S, D)
    keys: Tensor  # (S,) equal texts, equal numbers
    sentences: Tensor  # (M, D) different sentences
    said: list[NDArray[np.int64]]  # per study, rows of `sentences`
    denied: NDArray[np.bool_]  # (M,)
    phrases: list[Tensor]  # per finding, (P, D)
    states: Tensor  # (S, F) int8: 1 affirmed, -1 only in doubt, 0 denied or not mentioned

    def to(self, device: torch.device) -> Texts:
        """The same, its tensors on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("reports", "keys", "sentences", "states")}
        return replace(self, **moved, phrases=[phrases.to(device) for phrases in self.phrases])


def lesson(
    plan: Recipe, studies: Sequence[Study], text: Encoder, linker: Linker | None, cache: Path, progress: Progress
) -> Lesson:
    """Films decoded, texts embedded, findings read by the linker."""
    paths = [path for study in studies for path in study.films]
    frontal = np.array([is_frontal for study in studies for is_frontal in study.frontal])
    owner = np.repeat(np.arange(len(studies)), [len(study.films) for study in studies])
    texts = _texts(plan, studies, text, linker, cache, progress)
    return assembled(plan, films(paths, stored(plan), cache, progress), owner, frontal, texts)


def assembled(
    plan: Recipe, films: NDArray[np.uint8], owner: NDArray[np.int64], frontal: NDArray[np.bool_], texts: Texts
) -> Lesson:
    """A lesson of films, the study that each belongs to, which are frontal, and what the studies say."""
    draw = _chances(texts.states.numpy() == 1, owner, frontal, plan)
    return Lesson(films, owner, draw, frontal, texts)


def stored(plan: Recipe) -> int:
    """The side at which films are kept."""
    return round(plan.tower.size * MARGIN)


def _texts(
    plan: Recipe, studies: Sequence[Study], text: Encoder, linker: Linker | None, cache: Path, progress: Progress
) -> Texts:
    number: dict[str, int] = {}
    spoken = [np.array([number.setdefault(s.lower(), len(number)) for s in study.sentences]) for study in studies]
    phrases = [t.replace("{}", phrase) for topic in plan.findings for phrase in topic.phrases for t in plan.templates]
    reports = [study.report for study in studies]
    vectors = _embedded([*reports, *number, *phrases], text, cache, progress)
    whole, single, asked = torch.split(vectors, [len(reports), len(number), len(phrases)])
    return Texts(
        reports=whole,
        keys=torch.tensor([reports.index(report) for report in reports]),
        sentences=single,
        said=spoken,
        denied=np.array([denies(s) for s in number], dtype=bool),
        phrases=list(torch.split(asked, [len(topic.phrases) * len(plan.templates) for topic in plan.findings])),
        states=torch.from_numpy(_read(plan, reports, linker, cache, progress)),
    )


def _chances(
    has: NDArray[np.bool_], owner: NDArray[np.int64], frontal: NDArray[np.bool_], plan: Recipe
) -> NDArray[np.float64]:
    """(N,) chances of the films: rare findings oftener by `balance`, lateral films `lateral` of all."""
    rarity = (len(has) / np.maximum(has.sum(0), 1)) ** plan.data.balance  # (F,)
    study = np.where(has, rarity, 1.0).max(1, initial=1.0)  # (S,)
    chance: NDArray[np.float64] = study[owner]
    for side, share in ((frontal, 1 - plan.data.lateral), (~frontal, plan.data.lateral)):
        chance[side] *= share / max(chance[side].sum(), 1e-9)
    if not frontal.any():
        raise InputError("no frontal film among the studies", "data.source")
    chance /= chance.sum()
    return chance


def _read(
    plan: Recipe, reports: list[str], linker: Linker | None, cache: Path, progress: Progress
) -> NDArray[np.int8]:
    """(S, F) what the reports say of the findings, read once and kept under `cache`."""
    if not plan.findings:
        return np.zeros((len(reports), 0), np.int8)
    if linker is None:
        raise InputError("the recipe lists [[findings]]; a linker must be given that reads them", "findings")
    asked = [topic.concepts for topic in plan.findings]
    key = hashlib.sha256(json.dumps([linker.digest, reports, asked]).encode()).hexdigest()[:16]
    kept = cache / f"findings-{key}.npy"
    if not kept.exists():
        progress("reading reports", 0, len(reports))
        write_array(kept, np.stack([said(found, plan.findings) for found in linker.link(reports)]))
    states: NDArray[np.int8] = np.load(kept, allow_pickle=False)
    return states


def _embedded(texts: list[str], text: Encoder, cache: Path, progress: Progress) -> Tensor:
    """(M, D) unit vectors of the frozen text encoder, computed once and kept under `cache`."""
    key = hashlib.sha256(json.dumps([text.digests["text"], texts]).encode()).hexdigest()[:16]
    kept = cache / f"texts-{key}.npy"
    if not kept.exists():
        progress("embedding texts", 0, len(texts))
        write_array(kept, text.encode_documents([Item(text=t) for t in texts]))
    return torch.from_numpy(np.load(kept, allow_pickle=False))


def one_sentence_each(
    texts: Texts, study: NDArray[np.int64], denial: float, draw: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(B,) one sentence of each study, affirming ones oftener, and (B,) how much it counts."""
    chosen, counts = np.zeros(len(study), np.int64), np.zeros(len(study))
    for row, owner in enumerate(study):
        said = texts.said[owner]
        chance = np.where(texts.denied[said], denial, 1.0)
        if chance.sum() > 0:
            chosen[row] = draw.choice(said, p=chance / chance.sum())
            counts[row] = denial if texts.denied[chosen[row]] else 1.0
    return chosen, counts


def augmented(batch: Tensor, size: int, how: Augment) -> Tensor:
    """(B, 1, side, side) greys in [0, 1] to (B, 1, size, size): cropped, turned, lit differently, a part covered."""
    side = round(size * MARGIN)
    if side < batch.shape[-1]:
        batch = functional.interpolate(batch, (side, side), mode="bilinear", antialias=True)
    count, where = len(batch), batch.device
    zoom = torch.empty(count, device=where).uniform_(how.zoom_low, how.zoom_high)
    turn = torch.empty(count, device=where).uniform_(-how.rotate, how.rotate) * math.pi / 180
    room = (1 - zoom).clamp(min=0) + 2 * how.shift  # (B,), how far a crop may lie from the middle
    move = torch.empty(count, 2, device=where).uniform_(-1, 1) * room[:, None]
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    matrix = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(count, 2, 3)  # (B, 2, 3)
    grid = functional.affine_grid(matrix, [count, 1, size, size], align_corners=False)
    seen = functional.grid_sample(batch, grid, align_corners=False)  # (B, 1, size, size)
    gain = 1 + torch.empty(count, 1, 1, 1, device=where).uniform_(-how.contrast, how.contrast)
    light = torch.empty(count, 1, 1, 1, device=where).uniform_(-how.brightness, how.brightness)
    seen = (seen - 0.5) * gain + 0.5 + light
    seen = (seen + how.noise * torch.randn_like(seen)).clamp(0, 1)
    return _covered(seen, how.cover) if how.cover else seen


def _covered(films: Tensor, most: float) -> Tensor:
    """(B, 1, size, size) with a box of each film grey, its sides up to `most` of the film's."""
    count, size = len(films), films.shape[-1]
    low = torch.rand(count, 2, 1, device=films.device)  # (B, 2, 1): rows, columns
    high = low + most * torch.rand(count, 2, 1, device=films.device)
    place = (torch.arange(size, device=films.device) + 0.5) / size
    inside = (place >= low) & (place < high)  # (B, 2, size)
    box = inside[:, 0, :, None] & inside[:, 1, None, :]  # (B, size, size)
    return films.masked_fill(box[:, None], 0.5)
