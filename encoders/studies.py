"""What a film tower learns from: studies with their films, reports, sentences and findings.

Only report text teaches, as the linker reads it: coded labels are not read.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encoders.images import pixels
from encoders.recipe import Topic
from retrieval.errors import BackendError, InputError, RetrievalError
from retrieval.types import Assertion, Finding, Progress

_SENTENCE = re.compile(r"(?<=[.;:?!])\s+|\n")
_WORDS = re.compile(r"[A-Za-z]{3}")
_DENIAL = re.compile(
    r"\b(no|not|without|negative|free of|absent|absence|resolved|rather than|unlikely|clear|unremarkable|normal|"
    r"within normal limits|intact|stable|unchanged|limits)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Study:
    uid: str
    report: str  # findings and impression
    sections: tuple[str, str]  # the same apart; one of them may be empty
    sentences: tuple[str, ...]
    films: tuple[Path, ...]
    frontal: tuple[bool, ...]  # one per film


def is_held_out(uid: str) -> bool:
    """True for the fifth of the studies that is kept for evaluation, by a hash of the id."""
    return zlib.crc32(uid.encode()) % 5 == 0


def read_studies(folder: Path, part: str = "train") -> list[Study]:
    """The studies of a folder with `reports.jsonl` and `images/` that have films and a report.

    part: "train" leaves the held-out fifth away, "dev" is that fifth, "all" takes both.
    Raises InputError where the folder, or anything in it, is missing or not what it should be.
    """
    try:
        lines = (folder / "reports.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"no reports.jsonl in {folder}: set LIGHTBOX_DATA to the folder that holds the data, or data.source to "
            "the collection itself",
            "data.source",
        ) from error
    studies = [s for number, line in enumerate(lines, 1) if (s := _study(line, number, folder))]
    studies = [s for s in studies if part == "all" or is_held_out(s.uid) == (part == "dev")]
    if not studies:
        raise InputError(f"{folder} holds no study with films and a report in part {part!r}", "data.source")
    return studies


def _study(line: str, number: int, folder: Path) -> Study | None:
    try:
        row = json.loads(line)
        uid, bodies = str(row["uid"]), (str(row["findings"] or ""), str(row["impression"] or ""))
        films = tuple(folder / str(image["file"]) for image in row["images"])
        frontal = tuple(image["projection"] == "Frontal" for image in row["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"reports.jsonl, line {number}: not a study ({type(error).__name__})", "data.source"
        ) from error
    report = " ".join(filter(None, bodies)).strip()
    if not report or not films:
        return None
    return Study(uid, report, bodies, tuple(s for body in bodies for s in sentences(body)), films, frontal)


def sentences(text: str) -> list[str]:
    """The sentences of a report that hold words; list numbers fall away.

    >>> sentences("1. Heart size normal. 2. No effusion; lungs clear.")
    ['Heart size normal.', 'No effusion;', 'lungs clear.']
    """
    parts = (part.strip() for part in _SENTENCE.split(text))
    return [part for part in parts if _WORDS.search(part)]


def denies(sentence: str) -> bool:
    """True where a sentence says that something is absent, normal or as before.

    >>> denies("No effusion."), denies("Small left effusion.")
    (True, False)
    """
    return bool(_DENIAL.search(sentence))


def said(findings: Sequence[Finding], topics: Sequence[Topic]) -> NDArray[np.int8]:
    """(F,) what a report says of each finding: 1 affirmed, -1 only in doubt, 0 denied or not mentioned."""
    states = {Assertion.affirmed: 1, Assertion.uncertain: -1, Assertion.negated: 0}
    told = {(finding.concept, states[finding.assertion]) for finding in findings}
    found = [{state for concept, state in told if concept in topic.concepts} for topic in topics]
    return np.array([1 if 1 in states else -1 if -1 in states else 0 for states in found], np.int8)


def data_digest(studies: Sequence[Study]) -> str:
    """sha256 over ids, reports and the bytes of all films."""
    whole = hashlib.sha256()
    for study in studies:
        whole.update(json.dumps([study.uid, study.report, [f.name for f in study.films]]).encode())
        for film in study.films:
            whole.update(_bytes(film))
    return whole.hexdigest()


def films(paths: Sequence[Path], side: int, cache: Path, progress: Progress) -> NDArray[np.uint8]:
    """(N, side, side) grey films, decoded once and kept under `cache`, memory-mapped.

    A film is squeezed to a square, as the collection's own copies are.
    """
    names = hashlib.sha256("\n".join(f"{p} {p.stat().st_mtime_ns}" if p.exists() else str(p) for p in paths).encode())
    kept = cache / f"films-{side}-{names.hexdigest()[:16]}.npy"
    if not kept.exists():
        out = np.empty((len(paths), side, side), np.uint8)
        with ThreadPoolExecutor(2) as pool:
            for n, film in enumerate(pool.map(lambda path: _decoded(path, side), paths)):
                out[n] = film
                if n % 500 == 499:
                    progress("decoding", n + 1, len(paths))
        write_array(kept, out)
    mapped: NDArray[np.uint8] = np.load(kept, mmap_mode="c", allow_pickle=False)  # as torch wants it
    return mapped


def _decoded(path: Path, side: int) -> NDArray[np.uint8]:
    try:
        film = pixels(path).convert("L").resize((side, side), Image.Resampling.BILINEAR)
    except RetrievalError as error:
        raise InputError(f"film {path.name} cannot be read: mend or remove it", "data.source") from error
    return np.asarray(film, np.uint8)


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Keep an array as `.npy`, whole or not at all. Raises BackendError where the disk refuses."""
    part = path.with_suffix(".part.npy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(part, values, allow_pickle=False)
        part.replace(path)
    except OSError as error:
        raise BackendError(f"{path.name} cannot be written: {error.strerror}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"film {path.name} is missing: mend reports.jsonl or bring the film", "data.source"
        ) from error
