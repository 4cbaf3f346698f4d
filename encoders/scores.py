"""A teacher's scores, computed once and kept on disk, and how far its order can be trusted.

A teacher is a matrix of scores: any `Scorer` over each query's candidates, or any function that gives rows. The file
holds the matrix, how many of its rows are done, and digests of the teacher, of the corpus and of the candidates; one
that was made from anything else is refused. Rows are written as they come, so that a stopped run goes on.

Shapes: Q queries, K candidates each.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from retrieval.errors import BackendError, InputError
from retrieval.types import Document, Item, Progress, Scorer

Scores = NDArray[np.float32]
Rows = Callable[[int, int], Scores]  # (start, stop) -> (stop - start, K)
BLOCK = 16  # rows computed at once
PAUSE_S = 20.0  # how long a stopped run may lose


@dataclass(frozen=True, slots=True)
class Source:
    """Digests of all that the scores depend on."""

    teacher: str
    corpus: str
    candidates: str


def digest(parts: Iterable[object]) -> str:
    """sha256 over JSON values, in order: ids, texts, rows of ids.

    >>> digest(["a", ["b"]]) == digest(["a", "b"])
    False
    """
    whole = hashlib.sha256()
    for part in parts:
        whole.update(json.dumps(part, ensure_ascii=False).encode() + b"\n")
    return whole.hexdigest()


def place(cache: Path, source: Source) -> Path:
    """The file of these scores in a folder of many."""
    return cache / f"scores-{digest(asdict(source).values())[:16]}.safetensors"


def teacher_scores(
    scorer: Scorer,
    queries: Sequence[Item],
    candidates: Sequence[Sequence[Document]],
    cache: Path,
    progress: Progress,
) -> Scores:
    """(Q, K) scores of each query's candidates by a cross-encoder.

    cache: a folder, or a `.safetensors` file of one's own. Every query needs the same number K of candidates.
    Raises InputError where that is not so, or where the file belongs to another teacher, corpus or list of candidates,
    BackendError where the teacher gives what is no number or the disk refuses.
    """
    source = of_candidates(scorer.digest, queries, candidates)
    path = cache if cache.suffix == ".safetensors" else place(cache, source)

    def rows(start: int, stop: int) -> Scores:
        return np.stack([scorer.score(queries[n], candidates[n]) for n in range(start, stop)])

    return cached(path, source, (len(queries), len(candidates[0]) if candidates else 0), rows, progress)


def of_candidates(teacher: str, queries: Sequence[Item], candidates: Sequence[Sequence[Document]]) -> Source:
    """The source of a teacher's scores over candidates: texts make the corpus, ids the lists."""
    widths = sorted({len(row) for row in candidates})
    if len(queries) != len(candidates) or len(widths) > 1:
        raise InputError(
            f"{len(queries)} queries and {len(candidates)} rows of candidates of {widths} each; every query needs a "
            "row, and all rows the same number"
        )
    texts = {document.id: document.content for row in candidates for document in row}
    return Source(
        teacher=teacher,
        corpus=digest([*([query.id, query.text] for query in queries), *sorted(texts.items())]),
        candidates=digest([document.id for document in row] for row in candidates),
    )


def cached(path: Path, source: Source, shape: tuple[int, int], rows: Rows, progress: Progress) -> Scores:
    """The scores in the file, those that are missing computed by `rows` and written down as they come.

    shape: (Q, K). Raises as `teacher_scores` does.
    """
    scores, done = _read(path, source, shape) if path.exists() else (np.zeros(shape, np.float32), 0)
    written = time.monotonic()
    for start in range(done, shape[0], BLOCK):
        stop = min(start + BLOCK, shape[0])
        scores[start:stop] = _numbers(rows(start, stop), (stop - start, shape[1]))
        progress("teacher scores", stop, shape[0])
        if stop == shape[0] or time.monotonic() - written > PAUSE_S:
            _write(path, source, scores, stop)
            written = time.monotonic()
    return scores


def _numbers(made: Scores, shape: tuple[int, int]) -> Scores:
    if made.shape != shape:
        raise BackendError(f"the teacher gave scores of shape {made.shape}; {shape} was asked")
    if not np.isfinite(made).all():
        raise BackendError("the teacher gave a score that is no number: its weights or its input are broken")
    return made


def _read(path: Path, source: Source, shape: tuple[int, int]) -> tuple[Scores, int]:
    try:
        with safe_open(path, framework="numpy") as opened:
            notes = opened.metadata() or {}
            scores, done = opened.get_tensor("scores"), int(opened.get_tensor("done")[0])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} holds no teacher scores that can be read: remove it to compute them anew") from error
    for name, wanted in asdict(source).items():
        if notes.get(name) != wanted:
            what = {"candidates": "other candidates", "corpus": "another corpus", "teacher": "another teacher"}[name]
            raise InputError(
                f"{path} was made with {what} ({str(notes.get(name))[:12]}, not {wanted[:12]}): remove it, or name "
                "another file",
                "teacher.cache",
            )
    if scores.shape != shape or not 0 <= done <= len(scores):
        raise InputError(
            f"{path} holds scores of shape {scores.shape}, {done} rows done; {shape} is needed: remove it"
        )
    return np.array(scores, np.float32), done


def _write(path: Path, source: Source, scores: Scores, done: int) -> None:
    """Whole or not at all: what was there before stays until then."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"scores": scores, "done": np.array([done])}, part, asdict(source))
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise BackendError(
            f"teacher scores cannot be written to {path.parent}: {error}; free some space and start again, what was "
            "written before stays"
        ) from error


class Reliability(NamedTuple):
    """How often the teacher orders two candidates of one query as their grades do.

    right: mean over queries, 0.5 is chance. per_query: (Q,), NaN where all grades are equal. pairs: all of them.
    """

    right: float
    per_query: NDArray[np.float64]
    pairs: int


def reliability(scores: NDArray[Any], grades: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> Reliability:
    """Pairs of different grades that the scores put in the order of the grades; equal scores are half right.

    scores, grades: (Q, K). mask: (Q, K), candidates to leave out. Measure it on candidates of held-out queries, where
    the teacher is asked: the student's hard ones.

    >>> reliability(np.array([[0.9, 0.5, 0.1]]), np.array([[2, 0, 1]])).right == 2 / 3
    True
    """
    if scores.shape != grades.shape or scores.ndim != 2:
        raise InputError(f"scores of shape {scores.shape} and grades of {grades.shape}; both are (Q, K)")
    per_query, pairs = np.full(len(scores), np.nan), 0
    for row, (score, grade) in enumerate(zip(scores, grades.astype(np.int64), strict=True)):
        kept = slice(None) if mask is None else ~mask[row]
        ordered = np.sign(score[kept, None] - score[None, kept])[np.triu_indices(len(score[kept]), 1)]
        wanted = np.sign(grade[kept, None] - grade[None, kept])[np.triu_indices(len(grade[kept]), 1)]
        judged = wanted != 0
        pairs += int(judged.sum())
        if judged.any():
            per_query[row] = ((ordered * wanted)[judged].mean() + 1) / 2
    right = float(np.nanmean(per_query)) if pairs else float("nan")
    return Reliability(right, per_query, pairs)
