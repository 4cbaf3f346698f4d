"""Recipes of text towers and cross-encoders: what their courses depend on, read as strictly as a film's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from encoders.recipe import PACE, Digested, Limits, Pace, read_as
from retrieval.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A collection with judged queries. A relative `source` lies under LIGHTBOX_DATA (default ../shared/data)."""

    source: str
    split: str = "train"
    held_out: float = 0.15  # share of the judged queries that choose instead of teaching
    others: tuple[str, ...] = ()  # collections whose judged queries warm a cross-encoder up
    share: float = 1.0  # of what warms it up that an epoch draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The tower to begin with."""

    base: str = "all-MiniLM-L6-v2"  # a sentence-transformers model, by name or path
    tokens: int = 0  # of a text that are read in training; 0 for as many as the model reads
    frozen: int = 0  # layers that stay, from below; what they make of a text is computed once
    layers: tuple[int, ...] = ()  # which layers a cut student keeps; empty: all
    head: bool = False  # a linear map behind the pooling, which learns; with all layers frozen nothing else does


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Scores to learn from: the hybrid of BM25 and the base tower, read again by a cross-encoder if one is named."""

    cross: str = ""  # a cross-encoder by name or path
    depth: int = 20  # how many of the hybrid's best documents it reads
    weight: float = 0.5  # of its scores against the hybrid's
    temperature: float = 0.05  # of the teacher's softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """Weights of the loss's terms."""

    contrast: float = 1.0  # InfoNCE over the batch and the mined negatives
    distil: float = 0.0  # KL to the teacher over all documents of the batch
    cprd: float = 0.0  # the teacher's order among the mined negatives
    temperature: float = 0.05
    negatives: int = 1  # mined documents beside each relevant one
    depth: int = 20  # how deep they are mined in the teacher's ranking
    chunk: int = 0  # texts whose activations are held at once, by computing them twice; 0 holds all
    made: float = 1.0  # how much a query counts that was made from a document of the batch; 0 makes none


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossAim(Aim):
    """Weights of a cross-encoder's loss: of the terms there is only the first."""

    made: float = 0.0  # more than 0: the first cycle reads queries that are made from the documents


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe(Digested):
    """A text tower learns to find what a collection's judged queries ask for."""

    kind: str
    data: Judged
    student: Start = field(default_factory=Start)
    teacher: Teacher = field(default_factory=Teacher)
    loss: Aim = field(default_factory=Aim)
    schedule: Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossRecipe(Digested):
    """A cross-encoder learns to put what is relevant before what the hybrid takes for it.

    With `loss.made` or `data.others`, the first cycle of `schedule.epochs` reads made queries and other collections,
    and the cycles behind it the labelled queries.
    """

    kind: str
    data: Judged
    student: Start = field(default_factory=Start)
    teacher: Teacher = field(default_factory=Teacher)  # whose candidates it reads; `cross` stays empty
    loss: CrossAim = field(default_factory=CrossAim)
    schedule: Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Collections whose texts are read: documents, their sentences and their train queries, nothing judged."""

    sources: tuple[str, ...]
    sentences: int = 2  # drawn from each document in an epoch
    limit: int = 4000  # documents drawn in an epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class CutLoss:
    """UniME's first stage beside what only equal dimensions allow."""

    relations: float = 1.0  # similarities within the batch distributed as the teacher's
    vectors: float = 1.0  # each vector where the teacher's is
    temperature: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(Start):
    """What is kept of the base."""

    width: int = 0  # hidden units of each kept layer's feed-forward part; 0: all


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRecipe(Digested):
    """A text tower with fewer and narrower layers learns to give the whole tower's vectors."""

    kind: str
    data: Texts
    student: Cut
    loss: CutLoss = field(default_factory=CutLoss)
    schedule: Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class Studies:
    """Reports of a folder as a film tower reads it. A relative `source` lies under LIGHTBOX_DATA."""

    source: str
    part: str = "train"  # a fifth of the studies, cut by a hash of the id, is kept for evaluation; "all" takes both
    sentences: int = 1  # drawn from each report of a batch
    names: int = 1  # of findings of each, as the ontology has them


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportLoss:
    """UniME's first stage with an ontology for a teacher, and what there is without one."""

    relations: float = 1.0  # similarities within the batch distributed as the teacher's
    contrast: float = 0.0  # InfoNCE: findings and impression of one report belong together
    temperature: float = 0.1
    teacher: float = 0.2  # temperature of the teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRecipe(Digested):
    """A text tower learns which reports are alike."""

    kind: str
    data: Studies
    student: Start = field(default_factory=Start)
    loss: ReportLoss = field(default_factory=ReportLoss)
    schedule: Pace


_LIMITS = Limits(
    {
        **PACE.ranges,
        "data.held_out": (0, 0.9), "data.share": (0, 1), "data.sentences": (0, 100), "data.names": (0, 100),
        "data.limit": (1, 10_000_000),
        "student.tokens": (0, 8192), "student.frozen": (0, 1000),
        "student.width": (0, 1_000_000),
        "teacher.depth": (2, 1000), "teacher.weight": (0, 1), "teacher.temperature": (0.001, 10),
        "loss.contrast": (0, 100), "loss.distil": (0, 100), "loss.cprd": (0, 100), "loss.temperature": (0.001, 10),
        "loss.negatives": (0, 100), "loss.chunk": (0, 1_000_000), "loss.depth": (1, 1000), "loss.made": (0, 100),
        "loss.relations": (0, 100), "loss.vectors": (0, 100), "loss.teacher": (0.001, 10),
    },
    {**PACE.choices, "kind": ("text", "cross", "cut", "reports"), "data.part": ("train", "all")},
)  # fmt: skip


def read_text(path: Path) -> TextRecipe:
    """The recipe of a text tower. Raises InputError that names the key, what it holds and what it may hold."""
    plan: TextRecipe = read_as(TextRecipe, path, _LIMITS)
    if plan.loss.contrast + plan.loss.distil + plan.loss.cprd == 0:
        raise InputError("loss.contrast, loss.distil and loss.cprd are all 0; nothing would be learned", "loss")
    if plan.loss.cprd and plan.loss.negatives < 2:
        raise InputError("loss.cprd orders mined negatives: loss.negatives must be 2 or more", "loss.negatives")
    return plan


def read_cross(path: Path) -> CrossRecipe:
    """The recipe of a cross-encoder. Raises as `read_text` does."""
    plan: CrossRecipe = read_as(CrossRecipe, path, _LIMITS)
    if not plan.loss.negatives:
        raise InputError("loss.negatives is 0: a cross-encoder learns by comparing", "loss.negatives")
    if (plan.loss.made or plan.data.others) and len(plan.schedule.epochs) < 2:
        raise InputError(
            "made queries and other collections fill the first cycle: schedule.epochs needs a second one",
            "schedule.epochs",
        )
    return plan


def read_cut(path: Path) -> CutRecipe:
    """The recipe of a cut student. Raises as `read_text` does."""
    plan: CutRecipe = read_as(CutRecipe, path, _LIMITS)
    if not plan.student.layers:
        raise InputError("student.layers names no layer; a cut student keeps some of its base's", "student.layers")
    if plan.student.width and plan.student.frozen:
        raise InputError("student.width narrows every layer, so none may be frozen", "student.frozen")
    if not plan.loss.relations + plan.loss.vectors:
        raise InputError("loss.relations and loss.vectors are both 0; nothing would be learned", "loss")
    return plan


def read_reports(path: Path) -> ReportRecipe:
    """The recipe of a text tower for reports. Raises as `read_text` does."""
    plan: ReportRecipe = read_as(ReportRecipe, path, _LIMITS)
    if not plan.loss.relations + plan.loss.contrast:
        raise InputError("loss.relations and loss.contrast are both 0; nothing would be learned", "loss")
    return plan
