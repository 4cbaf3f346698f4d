from __future__ import annotations

import resource
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from encoders import scores
from encoders.scores import Source, cached, of_candidates, place, reliability, teacher_scores
from retrieval.errors import BackendError, InputError
from retrieval.types import Document, Item
from tests.fakes import OverlapScorer

SOURCE = Source("teacher", "corpus", "candidates")
QUERIES = [Item(id=f"q{n}", text=f"heart w{n}") for n in range(40)]
DOCUMENTS = [Document(id=f"d{n}", text=f"heart w{n} w{n + 1}") for n in range(42)]
CANDIDATES = [DOCUMENTS[n : n + 3] for n in range(40)]


def quiet(phase: str, done: int, total: int | None) -> None:
    pass


class Counting(OverlapScorer):
    """Counts what it is asked, and may break down."""

    def __init__(self, breaks_at: int = 1_000) -> None:
        self.asked, self.breaks_at = 0, breaks_at

    def score(self, query: Item, documents: Sequence[Document]) -> NDArray[np.float32]:
        self.asked += 1
        if self.asked > self.breaks_at:
            raise KeyboardInterrupt
        return super().score(query, documents)


def test_scores_are_computed_once(tmp_path: Path) -> None:
    teacher = Counting()
    first = teacher_scores(teacher, QUERIES, CANDIDATES, tmp_path, quiet)
    second = teacher_scores(teacher, QUERIES, CANDIDATES, tmp_path, quiet)
    assert first.tolist() == second.tolist() == [[2.0, 1.0, 1.0]] + [[2.0, 1.0, 1.0]] * 39
    assert teacher.asked == 40


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "PAUSE_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        teacher_scores(Counting(breaks_at=20), QUERIES, CANDIDATES, tmp_path, quiet)
    teacher = Counting()
    got = teacher_scores(teacher, QUERIES, CANDIDATES, tmp_path, quiet)
    assert teacher.asked == 40 - scores.BLOCK
    assert got.tolist() == teacher_scores(Counting(), QUERIES, CANDIDATES, tmp_path / "other", quiet).tolist()


@pytest.mark.parametrize("what", ["teacher", "corpus", "candidates"])
def test_scores_of_anything_else_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "mine.safetensors"
    cached(path, SOURCE, (2, 2), lambda start, stop: np.zeros((stop - start, 2), np.float32), quiet)
    with pytest.raises(InputError, match=rf"(another|other) {what}.*remove it"):
        cached(path, replace(SOURCE, **{what: "else"}), (2, 2), lambda *_: np.zeros((2, 2), np.float32), quiet)


def test_a_changed_text_is_another_corpus_and_another_list_other_candidates() -> None:
    source = of_candidates("t", QUERIES, CANDIDATES)
    changed = [[replace(CANDIDATES[0][0], text="changed"), *CANDIDATES[0][1:]], *CANDIDATES[1:]]
    assert of_candidates("t", QUERIES, changed).corpus != source.corpus
    turned = [list(reversed(row)) for row in CANDIDATES]
    assert of_candidates("t", QUERIES, turned).corpus == source.corpus
    assert of_candidates("t", QUERIES, turned).candidates != source.candidates
    assert len({place(Path(), s) for s in (source, of_candidates("u", QUERIES, CANDIDATES))}) == 2


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"torn")
    with pytest.raises(InputError, match="no teacher scores that can be read: remove it"):
        cached(path, SOURCE, (1, 1), lambda *_: np.zeros((1, 1), np.float32), quiet)


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    cached(path, SOURCE, (2, 2), lambda *_: np.zeros((2, 2), np.float32), quiet)
    with pytest.raises(InputError, match=r"\(2, 2\).*\(2, 3\) is needed"):
        cached(path, SOURCE, (2, 3), lambda *_: np.zeros((2, 3), np.float32), quiet)


def test_a_full_disk_is_a_clear_error_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    rows = np.ones((scores.BLOCK, 4), np.float32)
    cached(path, SOURCE, (scores.BLOCK, 4), lambda *_: rows, quiet)
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(BackendError, match="cannot be written.*free some space"):
            scores._write(path, SOURCE, np.ones((4096, 4), np.float32), 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_teacher_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no number"):
        cached(tmp_path / "a.safetensors", SOURCE, (1, 1), lambda *_: np.full((1, 1), np.nan, np.float32), quiet)
    with pytest.raises(BackendError, match="shape"):
        cached(tmp_path / "b.safetensors", SOURCE, (1, 2), lambda *_: np.zeros((1, 1), np.float32), quiet)


def test_every_query_needs_as_many_candidates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the same number"):
        teacher_scores(OverlapScorer(), QUERIES[:2], [CANDIDATES[0], CANDIDATES[1][:2]], tmp_path, quiet)
    with pytest.raises(InputError, match="the same number"):
        teacher_scores(OverlapScorer(), QUERIES[:1], CANDIDATES[:2], tmp_path, quiet)


def test_no_queries_are_no_scores(tmp_path: Path) -> None:
    assert teacher_scores(OverlapScorer(), [], [], tmp_path, quiet).shape == (0, 0)


def test_reliability_is_the_share_of_graded_pairs_in_order() -> None:
    found = reliability(np.array([[3.0, 2.0, 1.0], [0.0, 0.0, 1.0]]), np.array([[2, 0, 1], [1, 0, 0]]))
    assert found.per_query.tolist() == pytest.approx([2 / 3, 0.25])
    assert (found.pairs, found.right) == (5, pytest.approx((2 / 3 + 0.25) / 2))


def test_reliability_leaves_out_what_is_masked_and_queries_without_a_pair() -> None:
    values, grades = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), np.array([[0, 1, 0], [1, 1, 1]])
    found = reliability(values, grades, np.array([[True, False, False], [False, False, False]]))
    assert found.right == 1.0
    assert np.isnan(found.per_query[1])
    assert np.isnan(reliability(values, np.zeros((2, 3), int)).right)
    with pytest.raises(InputError, match="both are"):
        reliability(values, grades[:1])
