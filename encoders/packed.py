"""A lesson in one file: what a film tower learns from, for a machine without the collection and its encoders.

`python -m benchmarks.pack RECIPE FILE` writes it where the collection is. In the place of `iu_xray` below
LIGHTBOX_DATA it is named `iu_xray.lesson`. Films are kept as WebP, vectors as float16: a tenth of their size in
memory. The collection's licence holds for the file.

Shapes: N films, S studies.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from encoders.lesson import Lesson, Texts, assembled, stored
from encoders.recipe import Recipe
from encoders.saving import load, save
from retrieval.errors import InputError

QUALITY = 70  # of WebP


def asked(plan: Recipe) -> str:
    """Digest of what a lesson depends on: other schedules, losses and towers can share it."""
    told = [plan.data.source, plan.data.part, plan.templates, [[t.phrases, t.concepts] for t in plan.findings]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def pack(path: Path, plan: Recipe, lesson: Lesson, digests: Mapping[str, str]) -> None:
    """Write a lesson. Raises BackendError where the disk refuses."""
    films = [_written(film) for film in lesson.films]
    texts = lesson.texts
    save(
        path,
        {
            "films": torch.frombuffer(bytearray(b"".join(films)), dtype=torch.uint8),
            "sizes": torch.tensor([len(film) for film in films]),
            "study": torch.from_numpy(lesson.study),
            "frontal": torch.from_numpy(lesson.frontal),
            "reports": texts.reports.half(),
            "keys": texts.keys,
            "sentences": texts.sentences.half(),
            "said": torch.from_numpy(np.concatenate(texts.said)),
            "counts": torch.tensor([len(said) for said in texts.said]),
            "denied": torch.from_numpy(texts.denied),
            "phrases": torch.cat(texts.phrases).half(),
            "states": texts.states,
        },
        {"asked": asked(plan), "data": digests["data"], "text": digests["text"]},
    )


def unpack(path: Path, plan: Recipe) -> tuple[Lesson, dict[str, str]]:
    """The lesson, and the digests of its data and text encoder.

    Raises InputError where it was made for other data or findings.
    """
    held, notes = load(path)
    if notes.get("asked") != asked(plan):
        raise InputError(f"{path.name} was packed for another recipe's data and findings: pack it anew", "data.source")
    lengths = [len(topic.phrases) * len(plan.templates) for topic in plan.findings]
    texts = Texts(
        reports=held["reports"].float(),
        keys=held["keys"],
        sentences=held["sentences"].float(),
        said=np.split(held["said"].numpy(), np.cumsum(held["counts"].numpy())[:-1]),
        denied=held["denied"].numpy(),
        phrases=list(torch.split(held["phrases"].float(), lengths)),
        states=held["states"],
    )
    films = _read(held["films"], held["sizes"], stored(plan))
    taught = assembled(plan, films, held["study"].numpy(), held["frontal"].numpy(), texts)
    return taught, {"data": notes["data"], "text": notes["text"]}


def _written(film: NDArray[np.uint8]) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.asarray(film)).save(target, "WEBP", quality=QUALITY, method=6)
    return target.getvalue()


def _read(content: Tensor, sizes: Tensor, side: int) -> NDArray[np.uint8]:
    """(N, side, side)."""
    whole, ends = content.numpy().tobytes(), np.cumsum(sizes.numpy())

    def film(n: int) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(whole[ends[n] - int(sizes[n]) : ends[n]])) as picture:
            grey = picture.convert("L")
            return np.asarray(
                grey if grey.width == side else grey.resize((side, side), Image.Resampling.BILINEAR), np.uint8
            )

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(film, range(len(sizes)))))
