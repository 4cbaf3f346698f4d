"""UniME's two stages as a course: a multimodal LLM with LoRA becomes an embedder (https://arxiv.org/abs/2504.17432).

The first cycle of `schedule.epochs` is stage 1: texts of a batch should lie to one another as a stronger text encoder
has them. The cycles behind it are stage 2: pictures should prefer their texts to the hardest others of the batch,
those left out that are nearer than the own text by more than `loss.beta`.

Shapes: B items of a batch, D dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders.collection import kept_vectors
from encoders.contrastive import same
from encoders.cut_course import read_texts
from encoders.film import source
from encoders.models import found
from encoders.multimodal import Multimodal, multimodal_encoder
from encoders.recipe import PACE, Digested, Limits, Pace, read_as
from encoders.scores import digest
from encoders.text import PACKAGED, text_encoder
from encoders.train import place
from encoders.unime import hard_negative_loss, tdd_loss
from retrieval.errors import InputError
from retrieval.files import read_source
from retrieval.types import Document, Encoder, Item, Matrix, Progress

HELD_OUT = 64  # texts that judge stage 1, and at most as many pairs that judge stage 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Collections of texts for stage 1; collections of documents with picture and text for stage 2."""

    sources: tuple[str, ...]
    sentences: int = 2
    limit: int = 4000
    pairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A model of `encoders.multimodal.FAMILIES`, and the size of what learns beside it."""

    base: str
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Both losses: the temperature of stage 1; temperature, negatives and threshold of stage 2."""

    relations: float = 0.05
    temperature: float = 0.02
    k: int = 8
    beta: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class UnimeRecipe(Digested):
    """teacher: a text encoder or a causal LLM, by name or path."""

    kind: str
    data: Read
    student: Adapted
    teacher: str
    loss: Stages = field(default_factory=Stages)
    schedule: Pace


_LIMITS = Limits(
    {
        **PACE.ranges,
        "data.sentences": (0, 100), "data.limit": (1, 10_000_000), "student.rank": (1, 1024),
        "student.alpha": (1, 4096), "student.dropout": (0, 0.9), "loss.relations": (0.001, 10),
        "loss.temperature": (0.001, 10), "loss.k": (1, 10_000), "loss.beta": (-2, 2),
    },
    {**PACE.choices, "kind": ("unime",)},
)  # fmt: skip


def read_unime(path: Path) -> UnimeRecipe:
    """The recipe of a multimodal LLM. Raises InputError that names the key, what it holds and what it may hold."""
    plan: UnimeRecipe = read_as(UnimeRecipe, path, _LIMITS)
    if bool(plan.data.pairs) != (len(plan.schedule.epochs) > 1):
        raise InputError(
            "the first cycle reads data.sources and the others data.pairs: give pairs and two cycles, or neither",
            "schedule.epochs",
        )
    return plan


def unime_course(recipe: Path, cache: Path, progress: Progress) -> UnimeCourse:
    """The course of a recipe: texts read, the teacher's vectors computed once and kept under `cache`."""
    plan = read_unime(recipe)
    texts = read_texts([source(name) for name in plan.data.sources], plan.data.sentences, plan.data.limit)
    pairs = [pair for name in plan.data.pairs for pair in read_pairs(source(name))]
    if plan.data.pairs and len(pairs) < 2 * plan.schedule.batch:
        raise InputError(f"data.pairs hold {len(pairs)} documents with picture and text; two batches are needed")
    teacher = teacher_of(plan.teacher, cache)
    vectors = kept_vectors(texts, teacher, cache, progress)
    torch.manual_seed(plan.schedule.seed)
    student = multimodal_encoder(plan.student.base, cache)
    if pairs and not student.family.picture:
        raise InputError(f"{plan.student.base!r} sees no pictures: leave data.pairs out", "data.pairs")
    digests = {
        "recipe": plan.digest,
        "data": digest([*texts, *([p.id, p.content] for p in pairs)]),
        "base": student.digests["text"],
        "teacher": teacher.digests["text"],
    }
    return UnimeCourse(plan, student, texts, vectors, pairs, digests)


def teacher_of(name: str, cache: Path) -> Encoder:
    """A sentence-transformers model as it says it is to be used, or else a causal LLM, asked as the student is."""
    if name == PACKAGED or (found(name) / "modules.json").is_file():
        return text_encoder(name, cache)
    return multimodal_encoder(name, cache)


def read_pairs(folder: Path) -> list[Document]:
    """Documents that have a picture and a text."""
    documents = (d for d in read_source(folder).documents() if isinstance(d, Document))
    return [d for d in documents if d.image is not None and d.content.strip()]


class Adapters(nn.Module):
    """What LoRA learns, apart from the frozen model beside it: a checkpoint holds no more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is no part of this module
        self.learned = nn.ParameterList(p for p in model.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> Adapters:
        """The model goes along."""
        self._model[0].train(mode)
        return super().train(mode)


class UnimeCourse:
    """Implements `encoders.train.Course`. teacher: (N, D') its vectors of `texts`."""

    def __init__(
        self,
        plan: UnimeRecipe,
        student: Multimodal,
        texts: Sequence[str],
        teacher: Matrix,
        pairs: Sequence[Document],
        digests: dict[str, str],
    ) -> None:
        self.plan, self.student, self.digests, self.pace = plan, student, digests, plan.schedule
        student.adapt(plan.student.rank, plan.student.alpha, plan.student.dropout)
        self.module = Adapters(student.module)
        self.rows = plan.schedule.batch
        self.held, self.texts = list(texts[:HELD_OUT]), list(texts[HELD_OUT:])
        self.held_vectors, self.vectors = teacher[:HELD_OUT], teacher[HELD_OUT:]
        self.pairs = list(pairs)
        self.steps = max(1, len(self.texts) // self.rows)
        self.order: NDArray[np.int64] = np.zeros(0, np.int64)
        self.paired = False

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        self.paired = place(epoch, self.pace.epochs)[0] > 0
        count = len(self.pairs if self.paired else self.texts)
        self.order, self.steps = draw.permutation(count), max(1, count // self.rows)
        return {"stage": 2 if self.paired else 1}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        del draw
        rows = self.order[step * self.rows : (step + 1) * self.rows]
        loss = self._hard([self.pairs[n] for n in rows]) if self.paired else self._relations(rows)
        if bool(loss.isfinite()):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    def _relations(self, rows: NDArray[np.int64]) -> Tensor:
        made = self.student.vectors([Item(text=self.texts[n]) for n in rows])  # (B, D)
        return self._tdd(made, self.vectors[rows])

    def _tdd(self, made: Tensor, teacher: Matrix) -> Tensor:
        wanted = torch.from_numpy(teacher).to(made.device)  # (B, D')
        scale = 1 / self.plan.loss.relations
        return tdd_loss(scale * made @ made.T, scale * wanted @ wanted.T)

    def _hard(self, pairs: Sequence[Document]) -> Tensor:
        aim, texts = self.plan.loss, [pair.content for pair in pairs]
        asked = self.student.vectors([Item(image=pair.image) for pair in pairs])  # (B, D)
        found = self.student.vectors([Item(text=text) for text in texts])  # (B, D)
        alike = same(texts, texts).to(asked.device)
        return hard_negative_loss(
            asked @ found.T, k=aim.k, beta=aim.beta, temperature=aim.temperature, alike=alike
        )  # the diagonal is the positive

    def settle(self) -> None:
        return

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """`dev`: minus stage 1's loss over held-out texts, while that is what learns; nothing to choose by after."""
        if self.pairs:
            return {}
        made = torch.from_numpy(self.student.encode_documents([Item(text=text) for text in self.held]))
        return {"dev": round(-float(self._tdd(made, self.held_vectors)), 5)}

    def release(self, folder: Path) -> dict[str, Any]:
        self.student.save(folder)
        return {
            "recipe": dataclasses.asdict(self.plan),
            "texts": len(self.texts),
            "pairs": len(self.pairs),
            "family": self.student.family.name,
        }
