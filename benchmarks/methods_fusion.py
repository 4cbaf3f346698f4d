"""The image-text teacher of `benchmarks.methods`: a fusion cross-encoder over the frozen features, trained once.

A film is one token; the whole report, its findings and its impression are three. Pairs of "fit" teach, with one hard
negative each way; the weights that find the right report best among the towers' first candidates on "validate" stay.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.methods_features import KEPT, Pictures, Reports
from benchmarks.methods_measure import rank
from encoders.contrastive import same
from encoders.fusion import Fusion, hard_columns, matching_loss
from encoders.scores import digest

STEPS, BATCH, RATE, EVERY = 600, 64, 5e-4, 100
DEPTH = 50


class Matcher:
    """Films and reports, by number, to logits."""

    def __init__(self, reports: Reports, pictures: Pictures, model: Fusion) -> None:
        self.model = model.eval()
        self.films = torch.from_numpy(pictures.films)[:, None]  # (M, 1, D)
        parts = (reports.whole, reports.findings, reports.impression)
        self.texts = torch.from_numpy(np.stack(parts, 1))  # (N, 3, D)

    @torch.no_grad()
    def __call__(self, films: Tensor, reports: Tensor) -> Tensor:
        """Logits of the broadcast shape of both."""
        films, reports = torch.broadcast_tensors(films, reports)
        pairs = zip(films.flatten().split(2048), reports.flatten().split(2048), strict=True)
        return torch.cat([self.model(self.films[f], self.texts[r]) for f, r in pairs]).view(films.shape)


def matcher(reports: Reports, pictures: Pictures) -> Matcher:
    """The teacher, trained where it is not there yet."""
    key = digest([STEPS, BATCH, RATE, reports.keys, pictures.owner.tolist(), float(pictures.films.sum())])[:16]
    path = KEPT / f"fusion-{key}.safetensors"
    if not path.exists():
        save_file(_trained(reports, pictures).state_dict(), path)
    model = Fusion(pictures.films.shape[1])
    model.load_state_dict(load_file(path))
    return Matcher(reports, pictures, model)


def _trained(reports: Reports, pictures: Pictures) -> Fusion:
    torch.manual_seed(0)
    draw, seed = np.random.default_rng(0), torch.Generator().manual_seed(0)
    model = Fusion(pictures.films.shape[1])
    matched = Matcher(reports, pictures, model)
    fit = np.flatnonzero(reports.part[pictures.owner] == "fit")
    twins = same(reports.keys, reports.keys)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    best, kept = found(matched, reports, pictures, "validate"), copy.deepcopy(model.state_dict())
    print(json.dumps({"fusion": 0, "RR among candidates": round(best, 4)}), flush=True)
    for step in range(1, STEPS + 1):
        rows = torch.from_numpy(draw.choice(fit, BATCH, replace=False))
        studies = torch.from_numpy(pictures.owner)[rows]
        scores = matched.films[rows, 0] @ matched.texts[studies, 0].T / 0.05  # (B, B)
        alike = twins[studies][:, studies]
        texts, some = hard_columns(scores, alike, seed)
        films, others = hard_columns(scores.T, alike.T, seed)
        left = torch.cat([rows, rows[some], rows[films[others]]])
        right = torch.cat([studies, studies[texts[some]], studies[others]])
        model.train()
        logits = model(matched.films[left], matched.texts[right])
        optimiser.zero_grad()
        matching_loss(logits[:BATCH], logits[BATCH:]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % EVERY == 0:
            model.eval()
            reached = found(matched, reports, pictures, "validate")
            print(json.dumps({"fusion": step, "RR among candidates": round(reached, 4)}), flush=True)
            if reached > best:
                best, kept = reached, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model


def found(matched: Matcher, reports: Reports, pictures: Pictures, part: str) -> float:
    """Mean reciprocal rank of a right report among the towers' first DEPTH; 0 where they have none."""
    films, rows, columns, right = candidates(reports, pictures, part)
    logits = matched(torch.from_numpy(films)[:, None], torch.from_numpy(rows[columns])).numpy()
    return float(np.where(right.any(1), 1 / rank(logits, right), 0.0).mean())


def candidates(reports: Reports, pictures: Pictures, part: str) -> tuple[np.ndarray, ...]:
    """Films of a part, its reports, (M, DEPTH) the towers' first ones among these, and which are right."""
    rows = np.flatnonzero(reports.part == part)
    films = np.flatnonzero(reports.part[pictures.owner] == part)
    columns = np.argsort(-pictures.films[films] @ reports.whole[rows].T, axis=1, kind="stable")[:, :DEPTH]
    keys = np.array(reports.keys)
    return films, rows, columns, keys[rows][columns] == keys[pictures.owner[films]][:, None]
