"""The course of a cross-encoder: it should put what is relevant before what the hybrid search takes for it.

A step reads queries with one relevant document each and documents mined from the hybrid's ranking; the relevant one
should take all of each row's softmax. Judged as it will serve: the hybrid's best documents read again, its scores
and the first ones fused in equal parts.

A few hundred labelled queries are little for layers that have never read two texts together. So the first cycle may
read what costs no judge: titles and last sentences of the collection's documents, each against its document with that
sentence cut out (inverse cloze, Lee et al., ACL 2019, https://arxiv.org/abs/1906.00300), and the judged queries of
other collections.

Shapes: B queries of a batch, K documents read for each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from encoders.collection import Asked, Lexical, best, ndcg, read_collection, reranked
from encoders.film import precision, source
from encoders.joint import KIND, Joint, pair_tokenizer
from encoders.saving import folder_made, halved, refusing, save, write_json
from encoders.scores import digest
from encoders.student import Student, padded
from encoders.text import text_encoder
from encoders.text_course import Lesson, mined
from encoders.text_recipe import CrossRecipe, read_cross
from encoders.train import place
from retrieval.files import read_source
from retrieval.types import Matrix, Progress

SERVED = 256  # tokens of a pair that the released cross-encoder reads, where the recipe names no number
READ = 64  # pairs read at once when judging
READ_GPU = 512
RELEVANT = 8  # of one query that an epoch reads: some queries of other collections have hundreds
SCALE = 20.0  # of a score that has not learned: ten times two cosines (`encoders.joint.Head`)
PACKAGED_TOKENS = ("pad_token", "cls_token", "sep_token", "unk_token")


class Question(NamedTuple):
    """A query, the documents that answer it, and those that only seem to."""

    text: str
    relevant: tuple[str, ...]
    mined: tuple[str, ...]


def cross_course(recipe: Path, cache: Path, progress: Progress) -> CrossCourse:
    """The course of a cross-encoder's recipe."""
    plan = read_cross(recipe)
    collection = read_collection(source(plan.data.source), plan.data.held_out, plan.data.split)
    torch.manual_seed(plan.schedule.seed)
    start = plan.student
    student = Student(start.base, tokens=start.tokens, frozen=start.frozen, layers=start.layers)
    student.kind = precision(plan.schedule.precision, student.device)
    base = text_encoder(start.base, cache)
    lesson = Lesson(collection, base, plan.teacher, plan.loss.made > 0, cache, progress)
    lesson.shown_to(student, cache, progress)
    warm = made_questions(lesson, plan.loss.depth) if lesson.made else []
    for name in plan.data.others:
        warm += other_questions(source(name), plan.loss.depth)
    digests = {"recipe": plan.digest, "data": collection.digest, "base": student.digest, "teacher": lesson.teacher}
    if plan.data.others:
        digests["others"] = digest(warm)
    return CrossCourse(plan, student, lesson, warm, digests)


def questions(asked: Sequence[Asked], texts: Sequence[str], scores: Matrix, depth: int) -> list[Question]:
    """Queries with their documents and those mined from (Q, N) scores, down to `depth`."""
    among = mined(scores, [set(query.relevant) for query in asked], depth)
    return [
        Question(query.text, tuple(texts[n] for n in query.relevant), tuple(texts[n] for n in rows))
        for query, rows in zip(asked, among, strict=True)
    ]


def made_questions(lesson: Lesson, depth: int) -> list[Question]:
    """The queries made from the documents; what a document is asked by is cut out of it."""
    asked = questions(lesson.made, lesson.texts, lesson.made_scores, depth)
    return [q._replace(relevant=(q.relevant[0].replace(q.text, "", 1).strip() or q.text,)) for q in asked]


def other_questions(folder: Path, depth: int) -> list[Question]:
    """The judged queries of another collection, negatives mined by BM25."""
    names = read_source(folder).splits()
    collection = read_collection(folder, 0.0, "train" if "train" in names else names[0])
    scores = Lexical(collection.texts).scores([query.text for query in collection.train])
    return questions(collection.train, collection.texts, scores, depth)


class CrossCourse:
    """Implements `encoders.train.Course`. warm: what the first cycle reads; empty where all read labelled queries."""

    def __init__(
        self, plan: CrossRecipe, student: Student, lesson: Lesson, warm: list[Question], digests: dict[str, str]
    ) -> None:
        self.plan, self.student, self.lesson, self.digests = plan, student, lesson, digests
        self.pace, self.warm = plan.schedule, warm
        self.joint = Joint(student.model[0].model, plan.student.frozen).to(student.device)
        self.module = nn.ModuleDict({"head": self.joint.head, "layers": self.joint.body.layers[plan.student.frozen :]})
        collection = lesson.collection
        self.labelled = questions(collection.train, lesson.texts, lesson.train_scores, plan.loss.depth)
        self.rows = plan.schedule.batch * (1 + plan.loss.negatives)
        self.steps = max(1, len(collection.train) // plan.schedule.batch)  # `begin` counts anew
        self.pairs: list[tuple[Question, str]] = []
        self.read = best(lesson.first_dev, plan.teacher.depth)

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        warming = bool(self.warm) and place(epoch, self.pace.epochs)[0] == 0
        pairs = [
            (question, str(text))
            for question in (self.warm if warming else self.labelled)
            for text in draw.permutation(np.array(question.relevant, object))[:RELEVANT]
        ]
        kept = max(1, round(len(pairs) * self.plan.data.share)) if warming else len(pairs)
        self.pairs = [pairs[n] for n in draw.permutation(len(pairs))[:kept]]
        self.steps = max(1, kept // self.pace.batch)
        return {}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        count = self.plan.loss.negatives
        asked, read = [], []
        for question, relevant in self.pairs[step * self.pace.batch : (step + 1) * self.pace.batch]:
            asked += [question.text] * (1 + count)
            read += [relevant, *(question.mined[n] for n in _drawn(len(question.mined), count, draw))]
        scores = self._scores(asked, read).view(-1, 1 + count)  # (B, 1 + K), the relevant one first
        first = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        loss = functional.cross_entropy(scores / (self.plan.loss.temperature * SCALE), first)
        if math.isfinite(loss.item()):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    def _scores(self, asked: Sequence[str], read: Sequence[str]) -> Tensor:
        """(B,) of one query and one document each."""
        query, query_mask = padded(self.student.below(asked))
        document, document_mask = padded(self.student.below(read))
        device, kind = self.student.device, self.student.kind
        if self.plan.student.frozen:
            query, document = query.float(), document.float()
        given = (query.to(device), query_mask.to(device), document.to(device), document_mask.to(device))
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            return self.joint.scored(*given).float()

    def settle(self) -> None:
        return

    def judge(self) -> dict[str, float]:
        """`dev`: nDCG@10 of the fused ranking; `alone`: by the cross-encoder's order of the same documents."""
        read = self._read()
        dev, first = self.lesson.collection.dev, self.lesson.first_dev
        fused = ndcg(reranked(first, read, self.read), dev)
        alone = ndcg(reranked(first, read, self.read, 1.0), dev)
        return {"dev": round(fused, 5), "alone": round(alone, 5)}

    @torch.no_grad()
    def _read(self) -> Matrix:
        """(Q, K) scores of what the hybrid puts first for each dev query."""
        out, width = [], READ_GPU if self.student.device.type == "cuda" else READ
        for query, rows in zip(self.lesson.collection.dev, self.read, strict=True):
            texts = [self.lesson.texts[n] for n in rows]
            parts = [texts[n : n + width] for n in range(0, len(texts), width)]
            out.append(torch.cat([self._scores([query.text] * len(part), part) for part in parts]).cpu().numpy())
        return np.stack(out)

    def release(self, folder: Path) -> dict[str, Any]:
        folder_made(folder)
        tokenizer = pair_tokenizer(self.student.model.tokenizer)
        with refusing(folder):
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        body = {key: value for key, value in self.joint.inner.config.to_dict().items() if _plain(key, value)}
        config = {
            "kind": KIND,
            "separate": self.plan.student.frozen,
            "max_length": min(self.plan.student.tokens or SERVED, self.joint.inner.config.max_position_embeddings),
            "tokens": {name: getattr(tokenizer, name) for name in PACKAGED_TOKENS},
            "body": body,
        }
        write_json(folder / "config.json", config)
        state = {name: value for name, value in self.joint.state_dict().items() if ".pooler." not in name}
        save(folder / "model.safetensors", halved(state), {"format": "pt"})
        collection, dev = self.lesson.collection, self.lesson.collection.dev
        return {
            "recipe": dataclasses.asdict(self.plan),
            "documents": len(collection.documents),
            "queries": {"train": len(collection.train), "dev": len(dev), "warm": len(self.warm)},
            "dev_hybrid": ndcg(self.lesson.first_dev, dev),
            "dev_dense": self.lesson.base_dev,
        }


def _drawn(among: int, count: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """`count` different ones, in turn again where there are fewer."""
    return np.resize(draw.permutation(among), count)


def _plain(key: str, value: Any) -> bool:
    """Whether a key of a BERT configuration says what the body is, and not where it came from."""
    return isinstance(value, (int, float, str)) and not key.startswith("_") and key not in ("dtype", "torch_dtype")
