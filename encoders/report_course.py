"""The course of a text tower for reports: two texts should lie to one another as an ontology says they are alike.

UniME's first stage (`encoders.unime.tdd_loss`), the teacher being a weighted Tversky index over what a linker finds in
the texts (arXiv 2508.19915; `ontology.tversky`): of the texts alone, no label is read. A batch holds whole reports and
single sentences of them, so that a phrase comes to lie by the reports that say what it says.

Shapes: B reports of a batch, S sentences beside them, D dimensions.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.collection import graded_ndcg
from encoders.contrastive import same, symmetric
from encoders.film import source
from encoders.scores import digest
from encoders.student import Student
from encoders.studies import Study, read_studies
from encoders.text_course import begun
from encoders.text_recipe import ReportRecipe, read_reports
from encoders.unime import tdd_loss
from retrieval.errors import InputError
from retrieval.types import Assertion, Finding, Likeness, Linker, Matrix

HELD_OUT = 0.1  # share of the studies that judge
GRADES = 100  # steps of the teacher's scale
WORDS = {Assertion.negated: "no", Assertion.uncertain: "possible"}


def report_course(recipe: Path, linker: Linker | None, alike: Likeness | None) -> ReportCourse:
    """The course of a recipe: reports read, and what the linker finds in them."""
    plan = read_reports(recipe)
    if linker is None or alike is None:
        raise InputError("a recipe of kind 'reports' needs a linker and its measure of likeness", "kind")
    studies = read_studies(source(plan.data.source), plan.data.part)
    student = begun(plan.student, plan.schedule.seed)
    digests = {
        "recipe": plan.digest,
        "data": digest([study.uid, *study.sections] for study in studies),
        "base": student.digest,
        "teacher": linker.digest,
    }
    return ReportCourse(plan, student, studies, linker, alike, digests)


class ReportCourse:
    """Implements `encoders.train.Course`."""

    def __init__(
        self,
        plan: ReportRecipe,
        student: Student,
        studies: list[Study],
        linker: Linker,
        alike: Likeness,
        digests: dict[str, str],
    ) -> None:
        self.plan, self.student, self.alike, self.digests = plan, student, alike, digests
        self.pace, self.module, self.rows = plan.schedule, student.module, plan.schedule.batch
        self.studies = [study for study in studies if not _judges(study)]
        self.held = [study for study in studies if _judges(study)]
        if plan.loss.contrast and not any(all(study.sections) for study in self.studies):
            raise InputError(
                "no report has both findings and impression: loss.contrast has nothing to compare", "loss"
            )
        if len(self.studies) < self.rows or not self.held:
            raise InputError(
                f"{len(self.studies)} reports to learn from and {len(self.held)} to judge by; a batch of "
                f"{self.rows} and one are needed",
                "data.source",
            )
        texts = list(dict.fromkeys(text for s in studies for text in (s.report, *s.sentences)))
        self.found = dict(zip(texts, linker.link(texts), strict=True))
        self.named: dict[str, list[str]] = {}  # report -> its findings by name
        for study in self.studies:
            phrases = {_phrase(finding, linker): finding for finding in self.found[study.report]}
            self.named[study.report] = list(phrases)
            for phrase, finding in phrases.items():
                self.found.setdefault(phrase, (finding,))
        likeness = np.round(GRADES * self._likeness([study.report for study in self.held])).astype(int)  # (H, H)
        np.fill_diagonal(likeness, 0)
        self.grades = [{int(n): int(row[n]) for n in np.flatnonzero(row)} for row in likeness]
        if not any(self.grades):
            raise InputError("the linker finds nothing in the reports that judge: nothing to judge by", "data.source")
        self.steps = len(self.studies) // self.rows
        self.order: NDArray[np.int64] = np.zeros(0, np.int64)

    def begin(self, epoch: int, draw: np.random.Generator) -> dict[str, float]:
        del epoch
        self.order = draw.permutation(len(self.studies))
        return {}

    def learn(self, step: int, draw: np.random.Generator) -> float:
        batch = [self.studies[n] for n in self.order[step * self.rows : (step + 1) * self.rows]]
        weight = self.plan.loss
        loss = torch.zeros(())
        if weight.relations:
            loss = loss + weight.relations * self._relations(batch, draw)
        if weight.contrast:
            loss = loss + weight.contrast * self._contrast(batch)
        if math.isfinite(loss.item()):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    def _relations(self, batch: list[Study], draw: np.random.Generator) -> Tensor:
        texts = [study.report for study in batch]
        for study in batch:
            texts += _some(study.sentences, self.plan.data.sentences, draw)
            texts += _some(self.named[study.report], self.plan.data.names, draw)
        made = self.student.vectors(texts)  # (B + S, D)
        wanted = torch.from_numpy(self._likeness(texts)).to(made.device)  # (B + S, B + S)
        return tdd_loss(
            made @ made.T / self.plan.loss.temperature,
            wanted / self.plan.loss.teacher,
            alike=same(texts, texts).to(made.device),
        )

    def _contrast(self, batch: list[Study]) -> Tensor:
        """Findings and impression of one report belong together; equal impressions are all right."""
        whole = [study.sections for study in batch if all(study.sections)]
        if not whole:
            return torch.zeros((), requires_grad=True)
        findings = self.student.vectors([section for section, _ in whole])  # (B, D)
        impressions = self.student.vectors([section for _, section in whole])  # (B, D)
        keys = [section for _, section in whole]
        return symmetric(findings @ impressions.T / self.plan.loss.temperature, same(keys, keys).to(findings.device))

    def _likeness(self, texts: list[str]) -> Matrix:
        found = [self.found[text] for text in texts]
        return self.alike(found, found)

    def settle(self) -> None:
        return

    def judge(self) -> dict[str, float]:
        """`dev`: nDCG@10 of held-out reports among themselves, the teacher's likeness being the grade."""
        vectors = self.student.encode([study.report for study in self.held])
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -1.0)
        return {"dev": round(graded_ndcg(scores, self.grades), 5)}

    def release(self, folder: Path) -> dict[str, Any]:
        self.student.save(folder)
        return {
            "recipe": dataclasses.asdict(self.plan),
            "reports": len(self.studies),
            "dev_reports": len(self.held),
            "texts": len(self.found),
        }


def _phrase(finding: Finding, linker: Linker) -> str:
    name = linker.name(finding.concept)
    return name if finding.assertion is Assertion.affirmed else f"{WORDS[finding.assertion]} {name}"


def _some(texts: Sequence[str], count: int, draw: np.random.Generator) -> list[str]:
    return [texts[n] for n in draw.permutation(len(texts))[:count]]


def _judges(study: Study) -> bool:
    return zlib.crc32(b"judge" + study.uid.encode()) % 1000 < 1000 * HELD_OUT
