"""A film tower of several members, and its last step: turned towards the findings.

Members differ in their seed alone. Few reports teach them, so each errs in its own way, and the mean of their vectors
is better than any (deep ensembles, https://arxiv.org/abs/1612.01474).

A tower that knows its reports by heart gives much weight to what single films have of their own, and little to what
many share. The turn mends that: Fisher's linear discriminant, shrunk, gives each finding the direction that tells
films with it from films without it; a linear map says which of these directions a text speaks of; its transpose, added
to the film's own vector, brings films nearer to the texts that speak of what they show.

All films are alike, and what lies near their mean is near every one of them (a hub). A picture that asks therefore
loses some of that mean. Texts that ask keep their vectors, and so do the films that are found: between those, how near
a film is to the mean also tells how normal it is.

Shapes: B films of a batch, N films, S studies, F findings, P phrases, D dimensions of the text encoder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from encoders.film import FilmCourse, build, learned_from
from encoders.lesson import Lesson, Texts
from encoders.models import configuration
from encoders.recipe import Recipe, Turn, read
from encoders.saving import folder_made, halved, load, save, write_json
from encoders.text import PACKAGED
from encoders.train import Run, done, draw_curve, key_of
from retrieval.types import Encoder, Linker, Progress

AT_ONCE = 64  # films


class Joined(nn.Module):
    """Towers as one: (B, 1, size, size) to (B, D), the mean of their unit vectors, turned.

    middle: (D,), what is taken from the unit vector of a picture that asks.
    """

    middle: Tensor

    def __init__(self, towers: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.turn = nn.Linear(dim, dim, bias=False)
        self.register_buffer("middle", torch.zeros(dim))

    def forward(self, films: Tensor) -> Tensor:
        turned: Tensor = self.turn(self.mean(films))
        return turned

    def mean(self, films: Tensor) -> Tensor:
        """(B, D) unit vectors, not turned."""
        vectors = [functional.normalize(tower(films), dim=1) for tower in self.towers]
        return functional.normalize(torch.stack(vectors).mean(0), dim=1)


def train_members(
    recipe: Path, folder: Path, cache: Path, progress: Progress, text: Encoder | None, linker: Linker | None
) -> Path:
    """Train the members of a film recipe one after another, or go on, and join them; the folder of the weights.

    text: the frozen text encoder, None for the packaged one. linker: reads the recipe's findings in the reports.
    Where the collection is missing but `NAME.lesson` lies in its place, that is learned from: see `encoders.packed`.
    """
    plan = read(recipe)
    lesson, digests = learned_from(plan, cache, progress, text, linker)
    digests = {"recipe": plan.digest} | digests
    if done(folder, key_of(digests)):
        return folder
    parts = [folder_made(folder / f"member-{number}") for number in range(plan.tower.members)]
    for number, part in enumerate(parts):
        told = progress if len(parts) == 1 else _of_member(progress, f"member {number + 1} of {len(parts)}, ")
        Run(FilmCourse(plan, lesson, digests, number), part, told).to_the_end()
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        join(plan, lesson, digests["text"], parts, folder, progress)
    return folder


def _of_member(progress: Progress, who: str) -> Progress:
    def told(phase: str, done: int, total: int | None) -> None:
        progress(who + phase, done, total)

    return told


def join(plan: Recipe, lesson: Lesson, text: str, parts: Sequence[Path], folder: Path, progress: Progress) -> None:
    """Write the release of trained members to `folder`, and remove theirs. text: digest of the text encoder."""
    dim = lesson.texts.reports.shape[1]
    towers = []
    for part in parts:
        tower = build(replace(plan.tower, start=""), dim)
        tower.load_state_dict(load(part / "model.safetensors")[0])
        towers.append(tower)
    joined = Joined(towers, dim).eval()
    with torch.no_grad():
        nn.init.eye_(joined.turn.weight)
        turned = bool(plan.turn.share and lesson.texts.phrases)
        if turned or plan.turn.middle:  # or all films would be encoded for nothing
            films = vectors(joined, lesson, plan, progress)
            if turned:
                joined.turn.weight.copy_(turn(lesson, films, plan.turn))
            joined.middle.copy_(middle(joined.turn(films), plan.turn.middle))
    save(folder / "model.safetensors", halved(joined.state_dict()), {"format": "pt"})
    write_json(folder / "config.json", _config(plan, dim, text))
    lineages = [configuration(part / "lineage.json", part.name) for part in parts]
    apart = ("seed", "seconds", "temperatures", "epochs")
    whole = {name: value for name, value in lineages[0].items() if name not in apart}
    told = [{name: lineage[name] for name in apart} for lineage in lineages]
    draw_curve(folder / "curve.png", told[0]["epochs"])
    write_json(folder / "lineage.json", whole | {"members": told})
    for part in parts:
        shutil.rmtree(part)


def _config(plan: Recipe, dim: int, text: str) -> dict[str, Any]:
    tower = plan.tower
    return {
        "tower": f"timm/{tower.name}",
        "members": tower.members,
        "size": tower.size,
        "channels": 1,
        "mean": [tower.mean],
        "std": [tower.std],
        "dim": dim,
        "text_encoder": PACKAGED,
        "text_digest": text,
    }


@torch.no_grad()
def vectors(joined: Joined, lesson: Lesson, plan: Recipe, progress: Progress) -> Tensor:
    """(N, D) of the lesson's frontal films as they are, the members' mean."""
    films, size, out = lesson.films[lesson.frontal], (plan.tower.size, plan.tower.size), []
    for first in range(0, len(films), AT_ONCE):
        batch = torch.from_numpy(np.ascontiguousarray(films[first : first + AT_ONCE]))[:, None].float() / 255
        batch = functional.interpolate(batch, size, mode="bilinear", antialias=True)
        out.append(joined.mean((batch - plan.tower.mean) / plan.tower.std))
        progress("turning towards the findings", first + len(batch), len(films))
    return torch.cat(out)


def middle(films: Tensor, share: float) -> Tensor:
    """(D,) what a picture that asks loses, of (N, D) films' vectors: `share` of the mean of their unit vectors."""
    return share * functional.normalize(films, dim=1).mean(0)


def turn(lesson: Lesson, films: Tensor, how: Turn) -> Tensor:
    """(D, D) that a film's vector is multiplied by; films: (N, D), the vectors of the lesson's frontal films."""
    owner = torch.from_numpy(lesson.study[lesson.frontal])
    directions = discriminants(films, lesson.texts.states[owner], how.shrink)
    return torch.eye(films.shape[1]) + how.share * _spoken_of(lesson.texts, directions)


def discriminants(films: Tensor, states: Tensor, shrink: float) -> Tensor:
    """(F, D) unit directions along which films with a finding lie apart from films without it.

    films: (N, D). states: (N, F), 1 there, 0 not, -1 in doubt. shrink: how much of a sphere the films' covariance is
    made, in shares of its own mean variance; large values leave the difference of the two means. A finding that no
    film has, or every one, has no direction: 0.

    >>> films = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> discriminants(films, torch.tensor([[1], [1], [0], [0]]), 1.0)
    tensor([[1., 0.]])
    """
    there, not_there = (states == 1).to(films.dtype), (states == 0).to(films.dtype)  # (N, F)
    count, rest = there.sum(0), not_there.sum(0)  # (F,)
    apart = there.T @ films / count[:, None].clamp(min=1) - not_there.T @ films / rest[:, None].clamp(min=1)
    apart = apart * ((count > 0) & (rest > 0))[:, None]
    middle = films - films.mean(0)
    spread = middle.T @ middle / len(films)  # (D, D)
    sphere = torch.eye(len(spread)) * spread.diagonal().mean()
    return functional.normalize(torch.linalg.solve(spread + shrink * sphere, apart.T).T, dim=1)


def _spoken_of(texts: Texts, directions: Tensor) -> Tensor:
    """(D, D) W, by ridge regression: a text t speaks of the directions t W, whose mean length over the texts is 1.

    Learned from phrases, each of its own finding, and from reports, each of all that it affirms; one that affirms
    nothing speaks of the reverse of all.
    """
    affirmed = (texts.states == 1).to(directions.dtype)  # (S, F)
    nothing = affirmed.sum(1, keepdim=True) == 0
    told = torch.where(nothing, -directions.mean(0), affirmed @ directions)
    owner = torch.cat([torch.full((len(phrases),), number) for number, phrases in enumerate(texts.phrases)])
    goal = torch.cat([functional.normalize(told, dim=1), directions[owner]])  # (S + P, D)
    said = torch.cat([texts.reports, *texts.phrases])  # (S + P, D)
    spoken: Tensor = torch.linalg.solve(said.T @ said + torch.eye(said.shape[1]), said.T @ goal)
    return spoken / (said @ spoken).square().sum(1).mean().sqrt().clamp(min=1e-6)
