"""The course of a cut text tower: some of its base's layers, narrower or not, taught to give the whole base's vectors.

UniME's first stage (`encoders.unime.tdd_loss`): the texts of a batch should lie to one another as they do for the
teacher. Where student and teacher have the same dimensions, as here, the vectors themselves can be learned beside it.
Unlabelled texts are all it reads. At the end a linear map brings the student's vectors nearer still, in closed form.

Shapes: B texts, D dimensions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders.collection import kept_vectors
from encoders.film import source
from encoders.scores import digest
from encoders.student import Student
from encoders.text import text_encoder
from encoders.text_recipe import CutRecipe, read_cut
from encoders.unime import tdd_loss
from retrieval.errors import InputError
from retrieval.files import read_source
from retrieval.types import Document, Matrix, Progress

HELD_OUT = 256  # texts that judge: how near the student's vectors come to the teacher's
READ = 64  # texts that tell which hidden units matter
RIDGE = 30.0
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")


def cut_course(recipe: Path, cache: Path, progress: Progress) -> CutCourse:
    """The course of a cut student's recipe: texts read, the teacher's vectors computed once and kept under `cache`."""
    plan = read_cut(recipe)
    texts = read_texts([source(name) for name in plan.data.sources], plan.data.sentences, plan.data.limit)
    teacher = text_encoder(plan.student.base, cache)
    wanted = kept_vectors(texts, teacher, cache, progress)
    digests = {"recipe": plan.digest, "data": digest(texts), "base": teacher.digests["text"]}
    return CutCourse(plan, texts, wanted, digests)


def read_texts(folders: Sequence[Path], sentences: int, limit: int) -> list[str]:
    """Different texts of the collections, in a fixed random order: documents and some sentences of each.

    limit: documents of each collection. Judged queries of a `train` split come along; those of others never do.
    """
    draw = np.random.default_rng(0)
    texts: dict[str, None] = {}
    for folder in folders:
        source = read_source(folder)
        documents = [d for d in source.documents() if isinstance(d, Document) and d.content.strip()]
        for n in draw.permutation(len(documents))[:limit]:
            texts[documents[n].content] = None
            parts = [p for p in _SENTENCE.split(documents[n].content) if len(p.split()) > 3]
            texts |= dict.fromkeys(parts[i] for i in draw.permutation(len(parts))[:sentences])
        if "train" in source.splits():
            taught = source.qrels("train")
            asked = (query for query in source.queries() if query.id in taught)
            texts |= dict.fromkeys(" ".join(p.text for p in query.parts if p.text) for query in asked)
    kept = list(texts)
    if len(kept) < 2 * HELD_OUT:
        raise InputError(f"data.sources hold {len(kept)} texts; {2 * HELD_OUT} are needed", "data.sources")
    return [kept[n] for n in draw.permutation(len(kept))]


@torch.no_grad()
def narrow(student: Student, width: int, texts: Sequence[str]) -> None:
    """Keep the `width` hidden units of every feed-forward part that vary most in what they add, and the others' mean.

    A unit adds its activation times its column of the outer weights. What it adds on average, over the tokens of
    `texts`, goes into the bias, so that only its standard deviation is lost: of MiniLM's 1,536 units a sixth can go
    and the vectors keep a cosine of 0.977 to what they were (0.864 where those with the smallest weights go).
    """
    assert student.body is not None  # a cut student keeps some of its layers
    layers: Any = student.body.layers
    parts: list[tuple[Any, Any]] = [(layer.intermediate.dense, layer.output.dense) for layer in layers]
    most = min(into.out_features for into, _ in parts)
    if width > most:
        raise InputError(f"width is {width}; the layers of the base are {most} wide", "student.width")
    seen: list[list[Tensor]] = [[] for _ in parts]
    hooks = [
        layer.intermediate.register_forward_hook(lambda _, __, out, at=at: seen[at].append(out.flatten(0, -2)))
        for at, layer in enumerate(layers)
    ]
    student.encode(texts)
    for hook in hooks:
        hook.remove()
    for (into, out), activations in zip(parts, map(torch.cat, seen), strict=True):  # (tokens, units)
        matters = activations.std(0) * out.weight.norm(dim=0)
        kept, gone = (some.sort().values for some in matters.argsort(descending=True).tensor_split([width]))
        out.bias += out.weight[:, gone] @ activations.mean(0)[gone]
        into.weight, into.bias = nn.Parameter(into.weight[kept]), nn.Parameter(into.bias[kept])
        out.weight = nn.Parameter(out.weight[:, kept])
        into.out_features = out.in_features = width
    student.model[0].model.config.intermediate_size = width


class CutCourse:
    """Implements `encoders.train.Course`. teacher: (N, D) its vectors of `texts`."""

    def __init__(self, plan: CutRecipe, texts: Sequence[str], teacher: Matrix, digests: dict[str, str]) -> None:
        self.plan, self.digests, self.pace = plan, digests, plan.schedule
        torch.manual_seed(plan.schedule.seed)
        start = plan.student
        self.student = Student(start.base, tokens=start.tokens, frozen=start.frozen, layers=start.layers, head=True)
        self.head = self.student.model[2].linear.weight.requires_grad_(False)  # (D, D), see `_straighten`
        if start.width:
            narrow(self.student, start.width, texts[HELD_OUT : HELD_OUT + READ])
        self.module, self.rows = self.student.module, plan.schedule.batch
        self.held, self.texts = list(texts[:HELD_OUT]), list(texts[HELD_OUT:])
        self.held_vectors, self.vectors = teacher[:HELD_OUT], teacher[HELD_OUT:]
        self.steps = max(1, len(self.texts) // self.rows)
        self.order: NDArray[np.int64] = np.zeros(0, np.int64)

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        """Batches of like length, in random order: a batch costs what its longest text costs."""
        del epoch
        shuffled = draw.permutation(len(self.texts))
        lengths = np.array([len(self.texts[n]) for n in shuffled])
        ordered = shuffled[np.argsort(lengths, kind="stable")][: self.steps * self.rows]
        self.order = ordered.reshape(self.steps, self.rows)[draw.permutation(self.steps)]
        return {}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        del draw
        rows = self.order[step]
        made = self.student.vectors([self.texts[n] for n in rows])  # (B, D)
        wanted = torch.from_numpy(self.vectors[rows]).to(made.device)  # (B, D)
        weight = self.plan.loss
        loss = weight.vectors * (1 - (made * wanted).sum(1)).mean()
        if weight.relations:
            scale = 1 / weight.temperature
            loss = loss + weight.relations * tdd_loss(scale * made @ made.T, scale * wanted @ wanted.T)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    def settle(self) -> None:
        return

    def judge(self) -> dict[str, float]:
        """`dev`: mean cosine between the student's and the teacher's vectors of held-out texts."""
        made = self.student.encode(self.held)
        return {"dev": round(float((made * self.held_vectors).sum(1).mean()), 5)}

    def release(self, folder: Path) -> dict[str, Any]:
        self._straighten()
        self.student.save(folder)
        return {
            "recipe": dataclasses.asdict(self.plan),
            "texts": len(self.texts),
            "dev_texts": len(self.held),
            "straightened": self.judge(),
        }

    @torch.no_grad()
    def _straighten(self) -> None:
        """Put behind the pooling the linear map that brings what was learned nearest to the teacher, in closed form.

        Ridge regression of the teacher's vectors T on the student's S from the identity: I + (S'S + aI)^-1 S'(T - S).
        """
        self.student.read_whole()  # it learned from the beginnings of texts
        one = torch.eye(self.student.dim)
        self.head.copy_(one)
        made = torch.from_numpy(self.student.encode(self.texts)).double()  # (N, D)
        left = torch.from_numpy(self.vectors).double() - made
        self.head.copy_((one + torch.linalg.solve(made.T @ made + RIDGE * one, made.T @ left)).T)
