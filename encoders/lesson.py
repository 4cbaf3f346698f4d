"""What a tower learns from, made once from the studies: films, vectors of texts, affirmed findings.

Shapes: N films, S studies, M different sentences, F findings, D dimensions of the text encoder, B films of a batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from encoders.recipe import Augment, Recipe
from encoders.studies import Study, affirmed, denies, films, write_array
from retrieval.errors import InputError
from retrieval.types import Encoder, Item, Progress

MARGIN = 1.15  # films are kept a little larger than the tower reads them, so that crops keep their detail


@dataclass(frozen=True, slots=True)
class Lesson:
    """All that the loop reads, in memory. Sentences, reports and phrases are rows of matrices."""

    films: NDArray[np.uint8]  # (N, side, side)
    study: NDArray[np.int64]  # (N,) the study of each film
    draw: NDArray[np.float64]  # (N,) how often a film is drawn
    frontal: int  # how many films are frontal
    reports: Tensor  # (S, D)
    report_keys: list[str]  # equal texts, equal keys
    sentences: Tensor  # (M, D) different sentences
    said: list[NDArray[np.int64]]  # per study, rows of `sentences`
    denied: NDArray[np.bool_]  # (M,)
    phrases: list[Tensor]  # per finding, (P, D)
    affirmed: Tensor  # (S, F) bool


def lesson(plan: Recipe, studies: Sequence[Study], text: Encoder, cache: Path, progress: Progress) -> Lesson:
    """Films decoded, texts embedded, findings looked up in the sentences."""
    paths = [path for study in studies for path in study.films]
    frontal = np.array([is_frontal for study in studies for is_frontal in study.frontal])
    owner = np.repeat(np.arange(len(studies)), [len(study.films) for study in studies])
    number: dict[str, int] = {}
    said = [np.array([number.setdefault(s.lower(), len(number)) for s in study.sentences]) for study in studies]
    phrases = [t.replace("{}", phrase) for topic in plan.findings for phrase in topic.phrases for t in plan.templates]
    reports = [study.report for study in studies]
    vectors = _embedded([*reports, *number, *phrases], text, cache, progress)
    whole, single, asked = torch.split(vectors, [len(reports), len(number), len(phrases)])
    has = np.stack([affirmed(study, plan.findings) for study in studies])  # (S, F)
    return Lesson(
        films=films(paths, round(plan.tower.size * MARGIN), cache, progress),
        study=owner,
        draw=_chances(has, owner, frontal, plan),
        frontal=int(frontal.sum()),
        reports=whole,
        report_keys=reports,
        sentences=single,
        said=said,
        denied=np.array([denies(s) for s in number], dtype=bool),
        phrases=list(torch.split(asked, [len(topic.phrases) * len(plan.templates) for topic in plan.findings])),
        affirmed=torch.from_numpy(has),
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


def _embedded(texts: list[str], text: Encoder, cache: Path, progress: Progress) -> Tensor:
    """(M, D) unit vectors of the frozen text encoder, computed once and kept under `cache`."""
    key = hashlib.sha256(json.dumps([text.digests["text"], texts]).encode()).hexdigest()[:16]
    kept = cache / f"texts-{key}.npy"
    if not kept.exists():
        progress("embedding texts", 0, len(texts))
        write_array(kept, text.encode_documents([Item(text=t) for t in texts]))
    return torch.from_numpy(np.load(kept, allow_pickle=False))


def one_sentence_each(
    lesson: Lesson, study: NDArray[np.int64], denial: float, draw: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(B,) one sentence of each study, affirming ones oftener, and (B,) how much it counts."""
    chosen, counts = np.zeros(len(study), np.int64), np.zeros(len(study))
    for row, owner in enumerate(study):
        said = lesson.said[owner]
        chance = np.where(lesson.denied[said], denial, 1.0)
        if chance.sum() > 0:
            chosen[row] = draw.choice(said, p=chance / chance.sum())
            counts[row] = denial if lesson.denied[chosen[row]] else 1.0
    return chosen, counts


def augmented(batch: Tensor, size: int, how: Augment) -> Tensor:
    """(B, 1, side, side) greys in [0, 1] to (B, 1, size, size): cropped, turned, and lit differently."""
    side = round(size * MARGIN)
    if side < batch.shape[-1]:
        batch = functional.interpolate(batch, (side, side), mode="bilinear", antialias=True)
    count = len(batch)
    zoom = torch.empty(count).uniform_(how.zoom_low, how.zoom_high)
    turn = torch.empty(count).uniform_(-how.rotate, how.rotate) * math.pi / 180
    move = torch.empty(count, 2).uniform_(-2 * how.shift, 2 * how.shift)
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    matrix = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(count, 2, 3)  # (B, 2, 3)
    grid = functional.affine_grid(matrix, [count, 1, size, size], align_corners=False)
    seen = functional.grid_sample(batch, grid, align_corners=False)  # (B, 1, size, size)
    gain = 1 + torch.empty(count, 1, 1, 1).uniform_(-how.contrast, how.contrast)
    light = torch.empty(count, 1, 1, 1).uniform_(-how.brightness, how.brightness)
    seen = (seen - 0.5) * gain + 0.5 + light
    return (seen + how.noise * torch.randn_like(seen)).clamp(0, 1)
