"""The course of a cross-encoder: it should put what is relevant before what the hybrid search takes for it.

A step reads queries with one relevant document each and documents mined from the hybrid's ranking; the relevant one
should take all of each row's softmax. Judged as it will serve: the hybrid's best documents read again, its scores
and the first ones fused in equal parts.

Shapes: B queries of a batch, K documents read for each.
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
from torch import Tensor, nn
from torch.nn import functional

from encoders.collection import best, ndcg, read_collection, reranked
from encoders.film import source
from encoders.joint import KIND, Joint, pair_tokenizer
from encoders.saving import folder_made, halved, refusing, save, write_json
from encoders.student import Student, padded
from encoders.text import text_encoder
from encoders.text_course import Lesson, mined
from encoders.text_recipe import CrossRecipe, read_cross
from retrieval.types import Matrix, Progress

SERVED = 256  # tokens of a pair that the released cross-encoder reads
READ = 64  # pairs read at once when judging
PACKAGED_TOKENS = ("pad_token", "cls_token", "sep_token", "unk_token")


def cross_course(recipe: Path, cache: Path, progress: Progress) -> CrossCourse:
    """The course of a cross-encoder's recipe."""
    plan = read_cross(recipe)
    collection = read_collection(source(plan.data.source), plan.data.held_out, plan.data.split)
    torch.manual_seed(plan.schedule.seed)
    start = plan.student
    student = Student(start.base, tokens=start.tokens, frozen=start.frozen, layers=start.layers)
    lesson = Lesson(collection, text_encoder(start.base, cache), plan.teacher, False, cache, progress)
    lesson.shown_to(student, cache, progress)
    digests = {"recipe": plan.digest, "data": collection.digest, "base": student.digest, "teacher": lesson.teacher}
    return CrossCourse(plan, student, lesson, digests)


class CrossCourse:
    """Implements `encoders.train.Course`."""

    def __init__(self, plan: CrossRecipe, student: Student, lesson: Lesson, digests: dict[str, str]) -> None:
        self.plan, self.student, self.lesson, self.digests = plan, student, lesson, digests
        self.pace = plan.schedule
        self.joint = Joint(student.model[0].model, plan.student.frozen).to(student.device)
        self.module = nn.ModuleDict({"head": self.joint.head, "layers": self.joint.body.layers[plan.student.frozen :]})
        train = lesson.collection.train
        self.pairs = [(n, row) for n, query in enumerate(train) for row in query.relevant]
        self.mined = mined(lesson.train_scores, [set(query.relevant) for query in train], plan.loss.depth)
        self.rows = plan.schedule.batch * (1 + plan.loss.negatives)
        self.steps = max(1, len(self.pairs) // plan.schedule.batch)
        self.order: NDArray[np.int64] = np.zeros(0, np.int64)
        self.read = best(lesson.first_dev, plan.teacher.depth)

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        del epoch
        self.order = draw.permutation(len(self.pairs))
        return {}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        chosen = [self.pairs[n] for n in self.order[step * self.pace.batch : (step + 1) * self.pace.batch]]
        count = self.plan.loss.negatives
        rows = np.array([[row, *draw.permutation(self.mined[n])[:count]] for n, row in chosen])  # (B, 1 + K)
        asked = [self.lesson.collection.train[n].text for n, _ in chosen for _ in range(1 + count)]
        scores = self._scores(asked, rows.ravel()).view(len(chosen), 1 + count)
        first = torch.zeros(len(chosen), dtype=torch.long, device=scores.device)
        loss = functional.cross_entropy(scores / (self.plan.loss.temperature * 20), first)
        if math.isfinite(loss.item()):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    def _scores(self, asked: Sequence[str], rows: NDArray[np.int64]) -> Tensor:
        """(B,) of one query and one document each."""
        query, query_mask = padded(self.student.below(asked))
        document, document_mask = padded(self.student.below([self.lesson.texts[n] for n in rows]))
        device = self.student.device
        given = (query.float(), query_mask, document.float(), document_mask)
        return self.joint.scored(*(part.to(device) for part in given))

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
        out = []
        for query, rows in zip(self.lesson.collection.dev, self.read, strict=True):
            parts = [rows[n : n + READ] for n in range(0, len(rows), READ)]
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
            "max_length": min(SERVED, self.joint.inner.config.max_position_embeddings),
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
            "queries": {"train": len(collection.train), "dev": len(dev)},
            "dev_hybrid": ndcg(self.lesson.first_dev, dev),
            "dev_dense": self.lesson.base_dev,
        }


def _plain(key: str, value: Any) -> bool:
    """Whether a key of a BERT configuration says what the body is, and not where it came from."""
    return isinstance(value, (int, float, str)) and not key.startswith("_") and key not in ("dtype", "torch_dtype")
