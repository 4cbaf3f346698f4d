"""BM25: tantivy against the definition, filters before the cut, ties by id."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from indexers.lexical import Folder, Lexical, Scan, grow
from indexers.shards import Damaged, verify_folder
from retrieval.types import Ranking

DOCUMENTS = ["heart heart lung", "lung", "", "the of", "heart rib rib rib", "nodule"]
NAMES = [f"id{n}" for n in range(10)]


def made(folder: Path, documents: list[str]) -> Lexical:
    grow(None, folder / "first", enumerate(documents), ())
    return Lexical(folder / "first")


def bm25(documents: list[str], query: str) -> dict[str, float]:
    """The definition, over the documents that have a word."""
    texts = {n: text.split() for n, text in enumerate(documents) if text and "the" not in text}
    mean = sum(map(len, texts.values())) / len(texts)
    out: dict[str, float] = {}
    for word in query.split():
        holders = [n for n, words in texts.items() if word in words]
        idf = math.log(1 + (len(texts) - len(holders) + 0.5) / (len(holders) + 0.5))
        for n in holders:
            times = Counter(texts[n])[word]
            out[f"id{n}"] = out.get(f"id{n}", 0) + idf * times / (times + 1.2 * (0.25 + 0.75 * len(texts[n]) / mean))
    return out


def scores(ranking: Ranking) -> dict[str, float]:
    return {hit.id: hit.score for hit in ranking}


@pytest.mark.parametrize("query", ["heart", "lung rib", "heart heart lung", "nodule"])
def test_scores_are_those_of_the_definition(tmp_path: Path, query: str) -> None:
    for engine in (made(tmp_path, DOCUMENTS), Scan(enumerate(DOCUMENTS))):
        assert scores(engine.search([query], 10, None, NAMES)[0]) == pytest.approx(bm25(DOCUMENTS, query), abs=1e-6)


def test_words_meet_through_our_analyzer(tmp_path: Path) -> None:
    index = made(tmp_path, ["Pleural EFFUSIONS, bilateral.", "No change"])
    assert [hit.id for hit in index.search(["effusion"], 5, None, NAMES)[0]] == ["id0"]


def test_empty_text_stop_words_and_unknown_words_find_nothing(tmp_path: Path) -> None:
    index = made(tmp_path, DOCUMENTS)
    assert index.search(["", "the", "unheard", 'AND OR ( : " *'], 5, None, NAMES) == [[], [], [], []]


def test_an_index_of_nothing_finds_nothing(tmp_path: Path) -> None:
    index = made(tmp_path, ["", "the"])
    assert index.search(["heart"], 5, None, NAMES) == [[]]
    assert index.search(["heart"], 5, np.zeros(2, bool), NAMES) == [[]]
    assert Scan([]).search(["heart"], 5, None, NAMES) == [[]]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 10, 1_000])
def test_filters_and_ties_equal_the_scan(tmp_path: Path, share: float, k: int) -> None:
    choose = np.random.default_rng(1)
    words = [f"w{n}" for n in range(50)]
    documents = [" ".join(choose.choice(words, choose.integers(0, 60))) for _ in range(3_000)]
    names = [f"id{n:04d}" for n in choose.permutation(3_000)]
    allowed = choose.random(3_000) < share
    index, scan = made(tmp_path, documents), Scan(enumerate(documents))
    for query in ("w1 w2", "w3", "w4 w4 w5 w6 w7"):
        got, expected = (engine.search([query], k, allowed, names)[0] for engine in (index, scan))
        assert [hit.id for hit in got] == [hit.id for hit in expected]
        assert scores(got) == pytest.approx(scores(expected), abs=1e-5)


def test_the_next_folder_leaves_the_one_before_as_it_was(tmp_path: Path) -> None:
    sums = grow(None, tmp_path / "first", enumerate(DOCUMENTS), ())
    first = Lexical(tmp_path / "first")
    grow(Folder(tmp_path / "first", sums), tmp_path / "second", [(6, "heart again")], [0])
    second = Lexical(tmp_path / "second")
    assert {hit.id for hit in first.search(["heart"], 9, None, NAMES)[0]} == {"id0", "id4"}
    assert {hit.id for hit in second.search(["heart"], 9, None, NAMES)[0]} == {"id4", "id6"}
    verify_folder(tmp_path / "first", sums)


def test_many_small_steps_keep_every_document(tmp_path: Path) -> None:
    previous: Folder | None = None
    for n in range(25):
        dead = [n - 3] if n % 2 and n > 1 else []
        files = grow(previous, tmp_path / f"step{n}", [(n, f"heart w{n}")], dead)
        previous = Folder(tmp_path / f"step{n}", files)
        verify_folder(*previous)
    names = [f"id{n}" for n in range(25)]
    found = {hit.id for hit in Lexical(tmp_path / "step24").search(["heart"], 99, None, names)[0]}
    assert found == {f"id{n}" for n in range(25) if n % 2 or n >= 22}


def test_a_lock_that_a_starting_process_still_holds_is_waited_for(tmp_path: Path) -> None:
    """Between fork and exec a child holds a copy of every open file, the locked one among them."""

    def texts() -> Iterator[tuple[int, str]]:
        opened = [
            f for f in Path("/proc/self/fd").iterdir() if os.path.realpath(f) == f"{folder}/.tantivy-writer.lock"
        ]
        copies = [os.dup(int(file.name)) for file in opened]
        assert copies
        threading.Timer(0.5, lambda: [os.close(copy) for copy in copies]).start()
        yield 0, "pleural effusion"

    folder = tmp_path.resolve() / "words"
    grow(None, folder, texts(), ())
    assert [hit.id for hit in Lexical(folder).search(["effusion"], 1, None, ["a"])[0]] == ["a"]


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        Lexical(tmp_path)
    with pytest.raises(Damaged):
        Lexical(tmp_path / "nowhere")
