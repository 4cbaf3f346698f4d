"""Ids, findings and rankings of one published state."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexers import rows as module
from indexers.records import Record
from indexers.rows import Base, Rows, ranked
from indexers.scan import TIE
from indexers.shards import Damaged
from retrieval.filters import parse
from retrieval.types import Assertion


def record(row: int, id: str, *concepts: str, **meta: object) -> Record:
    findings = [(concept, "affirmed", 0, 1) for concept in concepts]
    return Record(row, id, "", "", json.dumps(meta), json.dumps(findings))


NONE = np.empty(0, np.int32)


def based(rows: Rows) -> Rows:
    """The same state, as its derived file gives it back."""
    return Rows.over(Base(rows.arrays()), rows.columns)


@pytest.mark.parametrize("again", [lambda rows: rows, based], ids=["in memory", "from its file"])
@pytest.mark.parametrize("many", [0, 1_000], ids=["hashes", "dict"])
def test_ids_are_found_whatever_came_later(again: object, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY", 0 if many else 1_000)
    first = Rows.empty().extended([record(0, "a"), record(1, "ü"), record(2, "c")], 3, NONE)
    rows = again(first).extended([record(3, "a"), record(4, "e")], 5, np.array([0, 2], np.int32))  # type: ignore[operator]
    assert rows.find(["a", "ü", "c", "e", "", "\ud800"]) == [3, 1, -1, 4, -1, -1]
    assert [rows[row] for row in (1, 3, 4)] == ["ü", "a", "e"]
    assert list(rows.names)[3:] == ["a", "e"]
    assert (len(rows), rows.documents) == (5, 3)
    assert based(rows).find(["a", "ü", "c", "e"]) == [3, 1, -1, 4]


def test_ids_with_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hash", lambda id: 7)
    rows = based(Rows.empty().extended([record(n, f"id{n}") for n in range(5)], 5, NONE))
    assert rows.find(["id3", "id0", "other"]) == [3, 0, -1]


def test_findings_leave_out_the_dead_and_take_in_the_new() -> None:
    rows = Rows.empty().extended([record(0, "a", "x", "x"), record(1, "b", "x", "y")], 2, NONE)
    rows = based(rows).extended([record(2, "c", "x")], 3, np.array([1], np.int32))
    assert rows.rows("x", Assertion.affirmed).tolist() == [0, 2]
    assert rows.rows("x", Assertion.negated).tolist() == []
    assert set(rows.concepts()) == {("x", Assertion.affirmed)}
    assert rows.size == 3
    assert set(based(rows).concepts()) == {("x", Assertion.affirmed)}


def test_columns_stay_in_step_with_rows_that_are_gone() -> None:
    rows = Rows.empty().extended([record(0, "a", n=1), record(2, "c", n=2)], 3, NONE)
    where = parse({"n": {"$gte": 1}})
    assert where is not None
    assert rows.columns.select(where).tolist() == [True, False, True]
    assert rows.alive.tolist() == [True, False, True]


def test_two_living_documents_of_one_id_are_damage() -> None:
    with pytest.raises(Damaged, match="same id"):
        Rows.empty().extended([record(0, "a"), record(1, "a")], 2, NONE)


def test_a_file_that_is_no_table_of_rows_is_damage() -> None:
    with pytest.raises(Damaged):
        Base({"alive": np.ones(1, bool)})


def slowly(scores: list[float], names: list[str], k: int) -> list[str]:
    """Runs of scores within TIE of their first, each in the order of ids."""
    left = sorted(zip(scores, names, strict=True), key=lambda pair: -pair[0])
    out: list[str] = []
    while left:
        run = [pair for pair in left if left[0][0] - pair[0] <= TIE]
        out += sorted(name for _, name in run)
        left = left[len(run) :]
    return out[:k]


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 35))
def test_ties_are_ordered_by_id_from_the_first_of_a_run(steps: list[int], k: int) -> None:
    scores = [1 + step * 0.4 * TIE for step in steps]
    names = [f"id{(n * 7) % 31:02d}" for n in range(len(steps))]
    hits = ranked(np.array(scores), np.arange(len(steps)), k, names)
    assert [hit.id for hit in hits] == slowly(scores, names, k)
