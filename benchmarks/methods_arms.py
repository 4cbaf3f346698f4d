"""The arms of `benchmarks.methods`: small residual heads on frozen features, trained by one loss each.

A run is a `Setting`; equal settings give equal figures. Heads start as the identity, so that before the first step
every arm is the untouched encoder.

Shapes: B of a batch, N candidates, K mined ones, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.methods_features import KEPT, Claims, Graded, Pictures, Reports
from benchmarks.methods_measure import Values, ndcg, rank
from encoders.contrastive import info_nce, kl_loss, same, symmetric
from encoders.cprd import cprd_loss, listmle_loss
from encoders.dbl import Momentum, boosted, dbl_absolute, dbl_relative, frozen, hinge_loss
from encoders.mining import Among, mine
from encoders.scores import reliability, teacher_scores
from encoders.unime import hard_negative_loss, tdd_loss
from retrieval.types import Document, Item, Matrix, Scorer

KINDS: tuple[Among, ...] = ("hard", "random", "easy")
POOL = 16  # candidates of each kind that the teacher reads for a claim
NEAR = 40  # candidates that order is measured on
TAUGHT = 32  # rows of a batch that are distilled: candidates cost most of a step
MARGIN = 0.2
DEPTH = 50  # candidates that teacher and student are compared on


@dataclass(frozen=True, slots=True)
class Setting:
    """All that a run depends on besides the data. part: what it is measured on."""

    task: str
    arm: str
    part: str = "validate"
    seed: int = 0
    tau: float = 0.1
    weight: float = 1.0  # of the distillation term
    teacher_tau: float = 0.1
    beta: float | None = None  # None: no filter
    injected: float = 0.0  # share of candidates that are false negatives
    steps: int = 100
    batch: int = 64
    k: int = 16
    top: int = 8  # how many CPRD lets be valid
    rate: float = 1e-3


class Result(NamedTuple):
    """values: measure -> one value a query. gradient: mean norm over the steps after the warm-up."""

    values: dict[str, list[float]]
    gradient: float


class Taught(NamedTuple):
    """Teacher and untouched student on the student's own first DEPTH candidates of a part: nDCG@10 among these, and
    the share of differently graded pairs that each has in order."""

    teacher_ndcg: float
    student_ndcg: float
    teacher_order: float
    student_order: float
    queries: int


def _taught(teacher: NDArray[Any], student: NDArray[Any], grades: NDArray[Any]) -> Taught:
    """teacher, student, grades: (Q, DEPTH)."""
    ndcgs = [float(np.nanmean(ndcg(scores, grades))) for scores in (teacher, student)]
    orders = [reliability(scores, grades).right for scores in (teacher, student)]
    return Taught(*ndcgs, *orders, int(grades.any(1).sum()))


class Head(nn.Module):
    """x + W2 gelu(W1 x), then unit length; W2 starts at zero."""

    def __init__(self, dim: int, width: int = 48) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x + self.out(functional.gelu(self.into(x))), dim=-1)


class Heads(nn.Module):
    """One head a side; `shared` is one for both."""

    def __init__(self, dim: int, shared: bool = False) -> None:
        super().__init__()
        self.left = Head(dim)
        self.right = self.left if shared else Head(dim)


class Task(Protocol):
    """Features, and what the arms make of them."""

    shared: bool
    dim: int

    def loss(self, heads: Heads, how: Setting, draw: np.random.Generator, step: int) -> Tensor: ...

    def values(self, heads: Heads, part: str) -> dict[str, Values]: ...


def fit(task: Task, how: Setting, start: Heads | None = None) -> Result:
    """Train heads by a setting and measure them."""
    heads, gradient = trained(task, how, start)
    values = {name: np.round(v, 4).tolist() for name, v in measured(task, heads, how.part).items()}
    return Result(values, gradient)


@torch.no_grad()
def measured(task: Task, heads: Heads, part: str) -> dict[str, Values]:
    """What heads reach on a part, query by query."""
    return task.values(heads, part)


def trained(task: Task, how: Setting, start: Heads | None = None) -> tuple[Heads, float]:
    torch.manual_seed(how.seed)
    draw = np.random.default_rng(how.seed)
    heads = Heads(task.dim, task.shared)
    if start is not None:
        heads.load_state_dict(start.state_dict())
    optimiser = torch.optim.Adam(heads.parameters(), how.rate)
    norms = []
    for step in range(how.steps):
        for group in optimiser.param_groups:
            group["lr"] = how.rate * min(1.0, (step + 1) / 10) * (1 - step / how.steps)
        optimiser.zero_grad()
        task.loss(heads, how, draw, step).backward()  # type: ignore[no-untyped-call]
        norms.append(float(nn.utils.clip_grad_norm_(heads.parameters(), 5.0)))
        optimiser.step()
        if (after := getattr(task, "after", None)) is not None:
            after(heads)
    return heads, float(np.mean(norms[how.steps // 5 :]))


def distilled(student: Tensor, teacher: Tensor, positive: Tensor | None, how: Setting) -> Tensor:
    """The term that an arm adds. student, teacher: (B, K) negatives; positive: (B, 2), the student's score of the
    positive and the teacher's, which KL sees too. Scores are cosines here."""
    scaled = student / how.tau
    if how.arm == "ListMLE":
        return listmle_loss(scaled, teacher)
    if how.arm.startswith("CPRD"):
        return cprd_loss(scaled, teacher, top=how.top, tie=1e-6)
    if positive is not None:
        scaled = torch.cat([positive[:, :1] / how.tau, scaled], 1)  # (B, 1 + K)
        teacher = torch.cat([positive[:, 1:], teacher], 1)
    return kl_loss(scaled, teacher / how.teacher_tau)


def among(arm: str) -> Among:
    """Where an arm's negatives come from."""
    return next((kind for kind in KINDS if arm.endswith(kind)), "hard")


# ---- claims find abstracts


class Fused:
    """BM25 and cosine together: a teacher of another family than the student. Implements `Scorer`."""

    def __init__(self, claims: Claims, share: float) -> None:
        self.digest = f"bm25+cosine-{share}"
        self._row = {document.id: n for n, document in enumerate(claims.contents)}
        top = claims.lexical.max(1, keepdims=True)
        self.matrix = share * claims.lexical / np.where(top > 0, top, 1) + claims.queries @ claims.documents.T

    def score(self, query: Item, documents: Sequence[Document]) -> NDArray[np.float32]:
        return self.matrix[int(query.id)][[self._row[document.id] for document in documents]].astype(np.float32)


class Abstracts:
    """SciFact: claims find abstracts. Candidates are mined by the untouched encoder and read by the teacher once."""

    shared = False

    def __init__(self, claims: Claims, teacher: Scorer | None = None, graded: Graded | None = None) -> None:
        self.claims, self.dim, self.graded = claims, claims.queries.shape[1], graded
        self.grades = None if graded is None else torch.from_numpy(graded.grades)  # of the digest of kept runs
        self.queries, self.documents = torch.from_numpy(claims.queries), torch.from_numpy(claims.documents)
        self.relevant = torch.from_numpy(claims.grades > 0)
        self.rows = {part: np.flatnonzero(claims.part == part) for part in ("fit", "validate", "test")}
        self.share = self._best_share() if teacher is None else 0.0
        self.teacher = teacher or Fused(claims, self.share)
        self.pools = self._pools()
        self.scores = self._read()

    def _best_share(self) -> float:
        """The teacher's only constant, by nDCG@10 on the student's own candidates of fit queries."""
        rows = self.rows["fit"]
        cosines = self.claims.queries[rows] @ self.claims.documents.T
        columns = np.argsort(-cosines, axis=1, kind="stable")[:, :DEPTH]
        grades = np.take_along_axis(self.claims.grades[rows], columns, 1)

        def reached(share: float) -> float:
            scores = np.take_along_axis(Fused(self.claims, share).matrix[rows], columns, 1)
            return float(np.nanmean(ndcg(scores, grades)))

        return max((0.25, 0.5, 0.75, 1.0, 1.5, 2.0), key=reached)

    def _pools(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        scores = self.queries @ self.documents.T
        return {kind: mine(scores, POOL, self.relevant, among=kind, draw=draw).columns for kind in KINDS}

    def _read(self) -> dict[str, Tensor]:
        """The teacher's scores of every claim's first positive and of its pools."""
        first = self.relevant.int().argmax(1, keepdim=True)
        columns = torch.cat([first, *self.pools.values()], 1)  # (Q, 1 + 3 * POOL)
        asked = [Item(id=str(n), text=text) for n, text in enumerate(self.claims.texts)]
        lists = [[self.claims.contents[c] for c in row] for row in columns.tolist()]
        made = torch.from_numpy(teacher_scores(self.teacher, asked, lists, KEPT, lambda *_: None))
        return dict(zip(("positive", *KINDS), made.split([1, POOL, POOL, POOL], 1), strict=True))

    def taught(self, part: str) -> Taught:
        rows = self.rows[part]
        cosines = self.claims.queries @ self.claims.documents.T
        fused = Fused(self.claims, self.share).matrix if self.share else cosines
        columns = np.argsort(-cosines[rows], axis=1, kind="stable")[:, :DEPTH]
        grades = np.take_along_axis(self.claims.grades[rows], columns, 1)
        return _taught(*(np.take_along_axis(m[rows], columns, 1) for m in (fused, cosines)), grades)

    def loss(self, heads: Heads, how: Setting, draw: np.random.Generator, step: int) -> Tensor:  # noqa: ARG002
        rows = torch.from_numpy(draw.choice(self.rows["fit"], how.batch, replace=False))
        asked = heads.left(self.queries[rows])  # (B, D)
        first = self.relevant[rows].int().argmax(1)
        positives = heads.right(self.documents[first])
        scores = asked @ positives.T  # (B, B)
        loss = info_nce(scores / how.tau, self.relevant[rows][:, first])
        if how.arm == "none":
            return loss
        kind, some = among(how.arm), rows[:TAUGHT]
        candidates = heads.right(self.documents[self.pools[kind][some]])  # (B, K, D)
        student = torch.einsum("bd,bkd->bk", asked[:TAUGHT], candidates)
        both = torch.stack([scores.diagonal()[:TAUGHT], self.scores["positive"][some, 0]], 1)
        return loss + how.weight * distilled(student, self.scores[kind][some], both, how)

    def values(self, heads: Heads, part: str) -> dict[str, Values]:
        rows = self.rows[part]
        asked, documents = heads.left(self.queries[rows]), heads.right(self.documents)
        student = torch.einsum("bd,bkd->bk", asked, documents[self.pools["hard"][rows]]).numpy()
        agreement = reliability(student, _order(self.scores["hard"][rows].numpy()))
        found = {
            "nDCG@10": ndcg((asked @ documents.T).numpy(), self.claims.grades[rows]),
            "agreement": agreement.per_query,
        }
        if self.graded is not None and part == "test":
            left, right = (torch.from_numpy(side) for side in (self.graded.queries, self.graded.documents))
            scores, grades = heads.left(left) @ heads.right(right).T, self.graded.grades
            found["order on Cranfield"] = reliability(scores.numpy(), grades, grades < 0).per_query
        return found


def _order(scores: NDArray[Any]) -> NDArray[np.int64]:
    """(Q, K) ranks as grades: what a student agrees with if it orders candidates as the teacher does."""
    return np.asarray(np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable"))


# ---- reports find reports


class Alike:
    """Reports find reports with the same findings. Contrast: findings and impression of one report belong together;
    teacher: the ontology's Tversky matrix over whole reports. One head for every text."""

    shared = True

    def __init__(self, reports: Reports) -> None:
        self.reports, self.dim = reports, reports.whole.shape[1]
        self.whole = torch.from_numpy(reports.whole)
        self.findings, self.impression = torch.from_numpy(reports.findings), torch.from_numpy(reports.impression)
        self.fit = np.flatnonzero((reports.part == "fit") & reports.both)
        self.tversky = torch.from_numpy(reports.tversky)
        self.twins = same(reports.keys, reports.keys)
        self.conclusions = same(reports.conclusions, reports.conclusions)
        self._seen: Tensor = torch.zeros(0)

    def loss(self, heads: Heads, how: Setting, draw: np.random.Generator, step: int) -> Tensor:
        rows = torch.from_numpy(draw.choice(self.fit, how.batch, replace=False))
        scores = heads.left(self.findings[rows]) @ heads.left(self.impression[rows]).T
        loss = symmetric(scores / how.tau, self.conclusions[rows][:, rows])
        if how.arm == "none":
            return loss
        asked = heads.left(self.whole[rows])  # (B, D)
        if how.arm.startswith("TDD"):  # all pairs of the batch, no candidates beside it
            term = tdd_loss(
                asked @ asked.T / how.tau,
                self.tversky[rows][:, rows] / how.teacher_tau,
                alike=self.twins[rows][:, rows],
            )
            return how.weight * term if how.arm == "TDD alone" else loss + how.weight * term
        if step % 25 == 0:
            with torch.no_grad():
                self._seen = heads.left(self.whole[self.fit])  # (N, D)
        rows, asked = rows[:TAUGHT], asked[:TAUGHT]
        near = asked.detach() @ self._seen.T  # (B, N)
        seed = torch.Generator().manual_seed(how.seed * 1_000 + step)
        chosen = mine(near, how.k, self.twins[rows][:, self.fit], among=among(how.arm), draw=seed).columns
        columns = torch.from_numpy(self.fit)[chosen]  # (B, K)
        student = torch.einsum("bd,bkd->bk", asked, heads.left(self.whole[columns]))
        return loss + how.weight * distilled(student, self.tversky[rows[:, None], columns], None, how)

    def taught(self, part: str) -> Taught:
        rows, grades = graded(self.reports, part)
        asked = np.flatnonzero(grades.any(1))
        cosines = self.reports.whole[rows] @ self.reports.whole[rows].T
        cosines[self.twins.numpy()[rows][:, rows]] = -1.0
        columns = np.argsort(-cosines[asked], axis=1, kind="stable")[:, :DEPTH]
        teacher = self.reports.tversky[rows[asked]][:, rows]
        return _taught(*(np.take_along_axis(m, columns, 1) for m in (teacher, cosines[asked], grades[asked])))

    def values(self, heads: Heads, part: str) -> dict[str, Values]:
        vectors = heads.left(self.whole).numpy()
        return self.measured(lambda rows: vectors[rows] @ vectors[rows].T, part)

    def measured(self, matrix: Any, part: str) -> dict[str, Values]:
        """Of any scores over the reports of a part: `matrix` gives (Q, Q) for their rows."""
        rows, grades = graded(self.reports, part)
        scores = np.array(matrix(rows), np.float64)
        np.fill_diagonal(scores, -1e9)
        asked = np.flatnonzero(grades.any(1))
        hard = np.argsort(-self.reports.whole[rows[asked]] @ self.reports.whole[rows].T, axis=1)[:, 1 : NEAR + 1]
        order = reliability(
            np.take_along_axis(scores[asked], hard, 1),
            np.take_along_axis(grades[asked], hard, 1),
            np.take_along_axis(self.twins.numpy()[rows[asked]][:, rows], hard, 1),
        )
        return {"nDCG@10": ndcg(scores[asked], grades[asked]), "order": order.per_query}


def graded(reports: Reports, part: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a part, and their grades as in `report_reports`: 2 the same findings, 1 an overlap; abnormal ones."""
    rows = np.flatnonzero(reports.part == part)
    gold = reports.gold[rows].astype(np.int64)
    shared, size = gold @ gold.T, gold.sum(1)
    equal = (shared == size[:, None]) & (shared == size[None, :]) & (size[:, None] > 0)
    grades = np.where(equal, 2, (shared > 0).astype(np.int64))
    keys = np.array(reports.keys)[rows]
    grades[keys[:, None] == keys[None, :]] = 0
    return rows, grades


# ---- films find reports


Pairs = Callable[[Tensor, Tensor], Tensor]  # films and reports by number -> scores of their broadcast shape


class Films:
    """Films find their reports and back. Teacher: the Tversky matrix of the reports, or what reads pairs of films and
    reports by number (`benchmarks.methods_fusion.Matcher`)."""

    shared = False

    def __init__(self, reports: Reports, pictures: Pictures, teacher: Pairs | None = None) -> None:
        self.reports, self.pictures, self.dim = reports, pictures, pictures.films.shape[1]
        self.films, self.whole = torch.from_numpy(pictures.films), torch.from_numpy(reports.whole)
        self.owner = torch.from_numpy(pictures.owner)
        part = reports.part[pictures.owner]
        self.fit = np.flatnonzero(part == "fit")
        self.tversky, self.teacher = torch.from_numpy(reports.tversky), teacher
        self.twins = same(reports.keys, reports.keys)
        self._seen: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))

    def loss(self, heads: Heads, how: Setting, draw: np.random.Generator, step: int) -> Tensor:
        rows = torch.from_numpy(draw.choice(self.fit, how.batch, replace=False))  # films
        studies = self.owner[rows]
        films, texts = heads.left(self.films[rows]), heads.right(self.whole[studies])
        loss = symmetric(films @ texts.T / how.tau, self.twins[studies][:, studies])
        if how.arm == "none":
            return loss
        fit = torch.from_numpy(self.fit)
        if step % 25 == 0:
            with torch.no_grad():
                self._seen = heads.left(self.films[fit]), heads.right(self.whole[self.owner[fit]])
        rows = rows[:TAUGHT]
        across = self._one_way(heads, films[:TAUGHT], rows, fit, how, step, texts_wanted=True)
        down = self._one_way(heads, texts[:TAUGHT], rows, fit, how, step, texts_wanted=False)
        return loss + how.weight * (across + down) / 2

    def _one_way(
        self, heads: Heads, asked: Tensor, rows: Tensor, fit: Tensor, how: Setting, step: int, texts_wanted: bool
    ) -> Tensor:
        seen = self._seen[1 if texts_wanted else 0]
        seed = torch.Generator().manual_seed(how.seed * 1_000 + step)
        mask = self.twins[self.owner[rows]][:, self.owner[fit]]
        chosen = fit[mine(asked.detach() @ seen.T, how.k, mask, among=among(how.arm), draw=seed).columns]  # films
        others = heads.right(self.whole[self.owner[chosen]]) if texts_wanted else heads.left(self.films[chosen])
        student = torch.einsum("bd,bkd->bk", asked, others)
        return distilled(student, self._taught(rows, chosen, texts_wanted), None, how)

    def _taught(self, rows: Tensor, chosen: Tensor, texts_wanted: bool) -> Tensor:
        """(B, K) teacher scores of film against text, whichever of them asks."""
        if self.teacher is None:
            return self.tversky[self.owner[rows][:, None], self.owner[chosen]]
        if texts_wanted:
            return self.teacher(rows[:, None], self.owner[chosen])
        return self.teacher(chosen, self.owner[rows][:, None])

    def taught(self, part: str) -> Taught:
        """Of films against reports: by shared findings for the Tversky matrix, by the film's own report for pairs."""
        rows, grades = graded(self.reports, part)
        films = np.flatnonzero(self.reports.part[self.pictures.owner] == part)
        owner = self.pictures.owner[films]
        place = {row: n for n, row in enumerate(rows)}
        cosines = self.pictures.films[films] @ self.reports.whole[rows].T
        right = self.twins.numpy()[owner][:, rows]
        grades = grades[[place[o] for o in owner]] if self.teacher is None else right.astype(np.int64)
        if self.teacher is None:
            cosines[right] = -1.0
        columns = np.argsort(-cosines, axis=1, kind="stable")[:, :DEPTH]
        if self.teacher is None:
            teacher = np.take_along_axis(self.tversky.numpy()[owner][:, rows], columns, 1)
        else:
            teacher = self.teacher(torch.from_numpy(films)[:, None], torch.from_numpy(rows[columns])).numpy()
        return _taught(teacher, *(np.take_along_axis(m, columns, 1) for m in (cosines, grades)))

    def values(self, heads: Heads, part: str) -> dict[str, Values]:
        films, texts = heads.left(self.films).numpy(), heads.right(self.whole).numpy()
        return self.measured(lambda f, r: films[f] @ texts[r].T, part)

    def measured(self, matrix: Any, part: str) -> dict[str, Values]:
        """R@k both ways (a query is found where any right answer is among the first k), graded nDCG@10 of films
        against reports by shared findings, and how far a pair stands above its best negative."""
        rows, grades = graded(self.reports, part)
        films = np.flatnonzero(self.reports.part[self.pictures.owner] == part)
        place = {row: n for n, row in enumerate(rows)}
        mine_ = np.array([place[o] for o in self.pictures.owner[films]])
        scores = np.array(matrix(films, rows), np.float64)  # (M, Q)
        right = self.twins.numpy()[self.pictures.owner[films]][:, rows]
        has = right.any(0)
        out = {}
        for way, s, r in (("image_reports", scores, right), ("report_images", scores.T[has], right.T[has])):
            places = rank(s, r)
            out |= {f"{way} R@{k}": (places <= k).astype(float) for k in (1, 5, 10)}
            out[f"{way} RR"] = 1 / places
        abnormal = grades[mine_].any(1)
        seen = scores[abnormal].copy()
        seen[right[abnormal]] = -1e9  # the report itself and its copies are no neighbours
        out["graded nDCG@10"] = ndcg(seen, grades[mine_[abnormal]])
        own = scores[np.arange(len(films)), mine_]
        out["separation"] = own - np.where(right, -np.inf, scores).max(1)
        return out


# ---- boosting


class Boosted(Films):
    """DBL on films and reports: hinge losses on cosines, from one baseline that every arm starts from.

    In the sum form: with the hardest negative alone the heads let all cosines become equal (separation near 0 and a
    third of the untouched towers' R@10 lost, the collapse that VSE++ describes), and all arms with them.
    """

    def __init__(self, reports: Reports, pictures: Pictures) -> None:
        super().__init__(reports, pictures)
        self.anchor: Heads | None = None
        self.momentum: Momentum | None = None
        self.branch: Heads | None = None
        self._steps: torch.optim.Adam | None = None

    def begin(self, how: Setting, start: Heads) -> None:
        """Before a run: the anchor that the arm's mode asks for."""
        self.anchor = frozen(start)
        self.momentum = Momentum(start, 0.99, how.steps) if how.arm.endswith("momentum") else None
        self.branch, self._steps = None, None
        if how.arm.endswith("online"):
            self.branch = Heads(self.dim)
            self.branch.load_state_dict(start.state_dict())
            self._steps = torch.optim.Adam(self.branch.parameters(), how.rate)

    def after(self, heads: Heads) -> None:
        if self.momentum is not None:
            self.momentum.update(heads)

    def loss(self, heads: Heads, how: Setting, draw: np.random.Generator, step: int) -> Tensor:
        rows = torch.from_numpy(draw.choice(self.fit, how.batch, replace=False))
        studies = self.owner[rows]
        twins = self.twins[studies][:, studies]
        scores = self._scores(heads, rows)
        kind, _, rest = how.arm.partition(" ")
        if kind == "margin":
            return hinge_loss(scores, float(rest), alike=twins, hardest=False)
        loss = hinge_loss(scores, MARGIN, alike=twins, hardest=False)
        if kind in ("baseline", "continued"):
            return loss
        if kind == "online" or how.arm.endswith("online"):
            return loss + self._online(scores, rows, twins, how, step)
        assert self.anchor is not None
        source = self.momentum.anchor if self.momentum is not None else self.anchor
        with torch.no_grad():
            anchor = self._scores(source, rows)  # type: ignore[arg-type]
        if kind == "imitation":
            ignore = twins & ~torch.eye(len(twins), dtype=torch.bool)
            return (
                loss
                + (kl_loss(scores * 10, anchor * 10, ignore) + kl_loss(scores.T * 10, anchor.T * 10, ignore.T)) / 2
            )
        return loss + self._boost(how)(scores, anchor, alike=twins)

    def _boost(self, how: Setting) -> Any:
        loss = dbl_relative if how.arm.startswith("relative") else dbl_absolute
        return partial(loss, margin=MARGIN, hardest="hardest" in how.arm, adapt="adapted" in how.arm)

    def _online(self, scores: Tensor, rows: Tensor, twins: Tensor, how: Setting, step: int) -> Tensor:
        """One step of the first branch by its own loss, and the boost of the second over it."""
        assert self.branch is not None
        assert self._steps is not None
        first = self._scores(self.branch, rows)
        boost = boosted([first, scores], partial(self._boost(how), alike=twins))
        for group in self._steps.param_groups:
            group["lr"] = how.rate * min(1.0, (step + 1) / 10) * (1 - step / how.steps)
        self._steps.zero_grad()
        hinge_loss(first, MARGIN, alike=twins, hardest=False).backward()  # type: ignore[no-untyped-call]
        self._steps.step()
        return boost

    def _scores(self, heads: Heads, rows: Tensor) -> Tensor:
        return heads.left(self.films[rows]) @ heads.right(self.whole[self.owner[rows]]).T


# ---- hard negatives


class Sections:
    """UniME stage 2: the findings of a report find its impression, among false negatives put in on purpose.

    An injected candidate says what the positive of some row says in other words; no id gives it away.
    """

    shared = False

    def __init__(self, reports: Reports, reworded: Matrix) -> None:
        self.reports, self.dim = reports, reports.whole.shape[1]
        self.findings, self.impression = torch.from_numpy(reports.findings), torch.from_numpy(reports.impression)
        self.reworded = torch.from_numpy(reworded)
        self.conclusions = same(reports.conclusions, reports.conclusions)
        self.rows = {p: np.flatnonzero((reports.part == p) & reports.both) for p in ("fit", "validate", "dev")}

    def loss(self, heads: Heads, how: Setting, draw: np.random.Generator, step: int) -> Tensor:
        rows = torch.from_numpy(draw.choice(self.rows["fit"], how.batch, replace=False))
        asked = heads.left(self.findings[rows])
        texts, alike = self.impression[rows], self.conclusions[rows][:, rows]
        if how.injected:
            count = round(how.injected * how.batch)
            of = torch.from_numpy(draw.choice(how.batch, count, replace=False))
            texts = torch.cat([texts, self.reworded[rows[of]]])  # (N, D)
            alike = torch.cat([alike, torch.zeros(how.batch, count, dtype=torch.bool)], 1)  # nobody knows
        scores = asked @ heads.right(texts).T  # (B, N)
        own = torch.eye(*scores.shape, dtype=torch.bool)
        if how.arm == "all" or step < how.steps // 5:  # a warm-up, the same for every arm
            return info_nce(scores / how.tau, own, alike & ~own)
        seed = torch.Generator().manual_seed(how.seed * 1_000 + step)
        beta = float("inf") if how.beta is None else how.beta
        kind = among(how.arm)
        return hard_negative_loss(scores, k=8, beta=beta, temperature=how.tau, alike=alike, among=kind, draw=seed)

    def values(self, heads: Heads, part: str) -> dict[str, Values]:
        rows = self.rows[part]
        scores = (heads.left(self.findings[rows]) @ heads.right(self.impression[rows]).T).numpy()
        places = rank(scores, self.conclusions.numpy()[rows][:, rows])
        gold = self.reports.gold[rows].astype(np.int64)
        grades = ((gold @ gold.T) > 0).astype(np.int64)
        graded_ = ndcg(scores, grades)
        return {"RR": 1 / places, "R@1": (places <= 1).astype(float), "graded nDCG@10": graded_[~np.isnan(graded_)]}
