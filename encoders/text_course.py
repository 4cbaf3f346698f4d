"""The course of a text tower: queries, what is relevant to them, what only seems so, and a teacher's scores.

A batch holds queries with a relevant document each and documents mined from the teacher's ranking. Every query meets
every document of the batch: InfoNCE with all that is relevant marked (`encoders.contrastive`), KL to the teacher's
scores over the same matrix, and the teacher's order among the mined ones (`encoders.cprd`). Queries made from the
documents of the batch ride along: they are short, so they cost little.

What is released lies between the tower that was begun with and the trained one, where dev is best (WiSE-FT, Wortsman
et al., CVPR 2022, https://arxiv.org/abs/2109.01903): few queries teach much and spoil something, and the way back is
free.

Shapes: B labelled queries of a batch, M made ones, N documents of it, D dimensions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.chunks import Chunked
from encoders.collection import (
    Asked,
    Collection,
    Lexical,
    best,
    hybrid,
    kept_vectors,
    made_queries,
    ndcg,
    read_collection,
    reranked,
)
from encoders.contrastive import info_nce, kl_loss
from encoders.cprd import cprd_loss
from encoders.film import precision, source
from encoders.scores import teacher_scores
from encoders.student import Student
from encoders.text import text_encoder
from encoders.text_recipe import Start, Teacher, TextRecipe, read_text
from retrieval.types import Encoder, Item, Matrix, Progress

POOL = 15  # documents of each dev query that dev is judged among
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the trained weights, tried on dev


def text_course(recipe: Path, cache: Path, progress: Progress) -> TextCourse:
    """The course of a text recipe: collection read, teacher's scores computed once and kept under `cache`."""
    plan = read_text(recipe)
    collection = read_collection(source(plan.data.source), plan.data.held_out, plan.data.split)
    student = begun(plan.student, plan.schedule.seed)
    student.kind = precision(plan.schedule.precision, student.device)
    base = text_encoder(plan.student.base, cache)
    lesson = Lesson(collection, base, plan.teacher, plan.loss.made > 0, cache, progress)
    lesson.shown_to(student, cache, progress)
    digests = {"recipe": plan.digest, "data": collection.digest, "base": student.digest, "teacher": lesson.teacher}
    return TextCourse(plan, student, lesson, digests)


def begun(start: Start, seed: int) -> Student:
    """The tower that a recipe begins with."""
    torch.manual_seed(seed)
    student = Student(start.base, tokens=start.tokens, frozen=start.frozen, layers=start.layers, head=start.head)
    student.must_learn()
    return student


class Lesson:
    """A collection with a teacher's scores: (Q, N) of the labelled and of the dev queries, (M, N) of the made ones."""

    def __init__(
        self,
        collection: Collection,
        base: Encoder,
        teacher: Teacher,
        make: bool,
        cache: Path,
        progress: Progress,
    ) -> None:
        self.collection, self.texts = collection, collection.texts
        self.made = made_queries(collection) if make else []
        self.queries = [*collection.train, *collection.dev, *self.made]
        asked = [query.text for query in self.queries]
        self.documents = kept_vectors(self.texts, base, cache, progress)
        self.asked = kept_vectors(asked, base, cache, progress, queries=True)
        first = _first(Lexical(self.texts), asked, self.asked, self.documents)
        count, whole = len(collection.train), len(collection.train) + len(collection.dev)
        self.first_dev = first[count:whole]
        self.base_dev = ndcg(self.asked[count:whole] @ self.documents.T, collection.dev)
        self.teacher, judged = base.digests["text"], first[:whole]
        if teacher.cross:
            self.teacher, judged = self._read_again(judged, self.queries[:whole], teacher, cache, progress)
        self.train_scores, self.dev_scores, self.made_scores = judged[:count], judged[count:], first[whole:]
        self.teacher_dev = ndcg(self.dev_scores, collection.dev)

    def shown_to(self, student: Student, cache: Path, progress: Progress) -> None:
        """What the student's frozen layers make of all texts, ahead of the first step."""
        documents = [student.document_prompt + text for text in self.texts]
        if student.head_only:
            student.know(documents, self.documents)
            student.know([student.query_prompt + query.text for query in self.queries], self.asked)
        else:
            student.keep(documents, cache, progress)

    def _read_again(
        self, first: Matrix, queries: Sequence[Asked], teacher: Teacher, cache: Path, progress: Progress
    ) -> tuple[str, Matrix]:
        """The hybrid's best documents read by the cross-encoder, as a search with a reranker does."""
        from encoders.cross import cross_encoder

        scorer = cross_encoder(teacher.cross, cache)
        top = best(first, teacher.depth)
        rows = [[self.collection.documents[n] for n in row] for row in top]
        read = teacher_scores(scorer, [Item(id=q.id, text=q.text) for q in queries], rows, cache, progress)
        return scorer.digest, reranked(first, read, top, teacher.weight)


def _first(lexical: Lexical, texts: Sequence[str], asked: Matrix, documents: Matrix) -> Matrix:
    """(Q, N) hybrid scores, made in blocks: what BM25 gives thousands of queries is large on its way."""
    out = np.empty((len(texts), len(documents)), np.float32)
    for start in range(0, len(texts), 512):
        part = slice(start, start + 512)
        out[part] = hybrid(lexical.scores(texts[part]), asked[part] @ documents.T)
    return out


class TextCourse:
    """Implements `encoders.train.Course`."""

    def __init__(self, plan: TextRecipe, student: Student, lesson: Lesson, digests: dict[str, str]) -> None:
        self.plan, self.student, self.lesson, self.digests = plan, student, lesson, digests
        self.pace, self.module, self.rows = plan.schedule, student.module, plan.schedule.batch
        self.chunked = Chunked(student.vectors, plan.loss.chunk)
        self.base = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        train = lesson.collection.train
        self.pairs = [(n, row) for n, query in enumerate(train) for row in query.relevant]
        self.relevant = [set(query.relevant) for query in train]
        self.mined = mined(lesson.train_scores, self.relevant, plan.loss.depth)
        self.made_of: dict[int, list[int]] = {}
        for n, query in enumerate(lesson.made):
            self.made_of.setdefault(query.relevant[0], []).append(n)
        self.steps = max(1, len(self.pairs) // self.rows)
        self.order: NDArray[np.int64] = np.zeros(0, np.int64)
        self.pool = self._pool()

    def _pool(self) -> NDArray[np.int64]:
        """What dev is judged among: the whole collection where only a head learns, else what the hybrid puts first."""
        if self.student.head_only:
            return np.arange(len(self.lesson.texts))
        relevant = [query.relevant for query in self.lesson.collection.dev]
        pool: NDArray[np.int64] = np.unique(np.concatenate([best(self.lesson.first_dev, POOL).ravel(), *relevant]))
        return pool.astype(np.int64)

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        del epoch
        self.order = draw.permutation(len(self.pairs))
        return {}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        pairs = [self.pairs[n] for n in self.order[step * self.rows : (step + 1) * self.rows]]
        asked = np.array([n for n, _ in pairs])
        chosen = [draw.permutation(self.mined[n])[: self.plan.loss.negatives] for n in asked]
        documents = self._documents([row for _, row in pairs], chosen)  # (N,)
        made = self._made(
            documents if len(documents) < len(self.lesson.texts) else draw.permutation(documents)[: 2 * self.rows],
            draw,
        )
        texts = [self.lesson.collection.train[n].text for n in asked] + [self.lesson.made[n].text for n in made]
        queries = self.chunked([self.student.query_prompt + text for text in texts])  # (B + M, D)
        found = self.chunked([self.student.document_prompt + self.lesson.texts[n] for n in documents])  # (N, D)
        scores = queries @ found.T  # (B + M, N)
        loss = self._loss(scores, asked, made, documents)
        if self.plan.loss.cprd:
            loss = loss + self.plan.loss.cprd * self._order(scores[: len(asked)], asked, chosen, documents)
        if math.isfinite(loss.item()):
            loss.backward()  # type: ignore[no-untyped-call]
            self.chunked.backward()
        return float(loss.item())

    def _documents(self, relevant: list[int], mined: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """What the batch's queries meet; where only a head learns, the whole collection costs less than choosing."""
        if self.student.head_only:
            return np.arange(len(self.lesson.texts))
        return np.unique(np.concatenate([relevant, *mined]).astype(np.int64))

    def _made(self, documents: NDArray[np.int64], draw: np.random.Generator) -> list[int]:
        """One made query of each document of the batch that has any."""
        if not self.plan.loss.made:
            return []
        return [int(draw.choice(self.made_of[n])) for n in documents.tolist() if n in self.made_of]

    def _loss(self, scores: Tensor, asked: NDArray[np.int64], made: list[int], documents: NDArray[np.int64]) -> Tensor:
        aim, lesson = self.plan.loss, self.lesson
        relevant = [self.relevant[n] for n in asked] + [set(lesson.made[n].relevant) for n in made]
        positive = torch.tensor([[n in rows for n in documents.tolist()] for rows in relevant], device=scores.device)
        weight = torch.tensor([1.0] * len(asked) + [aim.made] * len(made), device=scores.device)
        loss = aim.contrast * info_nce(scores / aim.temperature, positive, weight=weight)
        if aim.distil:
            taught = np.concatenate(
                [
                    lesson.train_scores[np.ix_(asked, documents)],
                    lesson.made_scores[np.ix_(np.array(made, np.int64), documents)],
                ]
            )
            teacher = torch.from_numpy(taught).to(scores.device) / self.plan.teacher.temperature
            loss = loss + aim.distil * kl_loss(scores / aim.temperature, teacher, weight=weight)
        return loss

    def _order(
        self, scores: Tensor, asked: NDArray[np.int64], mined: list[NDArray[np.int64]], documents: NDArray[np.int64]
    ) -> Tensor:
        """CPRD over the mined documents of each labelled query; all have the same number of them."""
        chosen = np.stack(mined)  # (B, K)
        columns = torch.from_numpy(np.searchsorted(documents, chosen)).to(scores.device)
        student = scores.gather(1, columns) / self.plan.loss.temperature
        taught = np.take_along_axis(self.lesson.train_scores[asked], chosen, 1)
        return cprd_loss(student, torch.from_numpy(taught).to(scores.device))

    def settle(self) -> None:
        return

    def judge(self) -> dict[str, float]:
        """`dev`: nDCG@10 of the held-out queries among `pool`."""
        dev = self.lesson.collection.dev
        documents = self.student.encode([self.student.document_prompt + self.lesson.texts[n] for n in self.pool])
        queries = self.student.encode([self.student.query_prompt + query.text for query in dev])
        place = {row: n for n, row in enumerate(self.pool.tolist())}
        among = [query._replace(relevant=tuple(place[row] for row in query.relevant)) for query in dev]
        return {"dev": round(ndcg(queries @ documents.T, among), 5)}

    def release(self, folder: Path) -> dict[str, Any]:
        trained = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        tried = {0.0: self._judged(self.base)}
        for share in SHARES:
            tried[share] = self._judged(
                {name: torch.lerp(self.base[name], value, share) if value.is_floating_point() else value
                 for name, value in trained.items()}
            )  # fmt: skip
        share = max(tried, key=lambda s: tried[s])
        self.module.load_state_dict({n: torch.lerp(self.base[n], v, share) for n, v in trained.items()})
        self.student.save(folder)
        collection = self.lesson.collection
        return {
            "recipe": dataclasses.asdict(self.plan),
            "documents": len(collection.documents),
            "queries": {"train": len(collection.train), "dev": len(collection.dev), "made": len(self.lesson.made)},
            "dev_whole_collection": {"base": self.lesson.base_dev, "teacher": self.lesson.teacher_dev},
            "dev_by_share": tried,
            "share": share,
        }

    def _judged(self, weights: dict[str, Tensor]) -> float:
        self.module.load_state_dict(weights)
        return self.judge()["dev"]


def mined(scores: Matrix, relevant: Sequence[set[int]], depth: int) -> list[NDArray[np.int64]]:
    """Per query the documents that the teacher puts first and that nobody judged relevant."""
    widest = depth + max(len(rows) for rows in relevant)
    return [
        np.array([n for n in row if n not in known][:depth], np.int64)
        for row, known in zip(best(scores, widest).tolist(), relevant, strict=True)
    ]
