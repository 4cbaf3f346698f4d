"""Columns answer what `retrieval.filters.matches` answers, faster."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexers.columns import Columns
from retrieval.errors import BackendError
from retrieval.filters import And, Compare, Exists, Filter, In, Not, Or, matches, parse

FIELDS = ["a", "b", "a.b", "b.a", "a.b.a"]
ODD_KEYS = ["a", "b", "a.b", "", "a.", ".b", "a..b"]

numbers = st.one_of(
    st.integers(-2, 2), st.floats(-2, 2), st.sampled_from([2**53, 2**53 + 1, float(2**53), 2**63, 1.0, -0.0, math.inf])
)
texts = st.sampled_from(["", "a", "b", "ab", "é", "1", "true", "\U0001f600", "\uffff"])
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    st.one_of(scalars, st.just(math.nan)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(ODD_KEYS), inner, max_size=3)
    ),
    max_leaves=6,
)
metas = st.dictionaries(st.sampled_from(ODD_KEYS), values, max_size=3)
leaves = st.one_of(
    st.builds(Compare, st.sampled_from(FIELDS), st.sampled_from(["eq", "gt", "gte", "lt", "lte"]), scalars),
    st.builds(In, st.sampled_from(FIELDS), st.lists(scalars, max_size=3).map(tuple)),
    st.builds(Exists, st.sampled_from(FIELDS), st.booleans()),
)
filters = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(And, st.lists(inner, max_size=3).map(tuple)),
        st.builds(Or, st.lists(inner, max_size=3).map(tuple)),
        st.builds(Not, inner),
    ),
    max_leaves=5,
)


def where(condition: dict[str, Any]) -> Filter:
    parsed = parse(condition)
    assert parsed is not None
    return parsed


@settings(max_examples=300, deadline=None)
@given(st.lists(metas, max_size=6), st.lists(filters, min_size=1, max_size=4), st.integers(0, 6))
def test_columns_select_what_the_reference_matches(
    documents: list[dict[str, Any]], several: list[Filter], cut: int
) -> None:
    whole = Columns.build(documents)
    grown = Columns.build(documents[:cut]).extended(documents[cut:])
    for filter in several * 2:  # the second time from the cache
        expected = [matches(filter, meta) for meta in documents]
        assert whole.select(filter).tolist() == expected
        assert grown.select(filter).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(metas, max_size=6), filters)
def test_a_file_says_what_was_saved(documents: list[dict[str, Any]], filter: Filter) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "columns"
        grown = Columns.build(documents[:2]).extended(documents[2:])
        grown.save(path)
        loaded = Columns.load(path)
        assert len(loaded) == len(documents)
        assert loaded.select(filter).tolist() == [matches(filter, meta) for meta in documents]
        assert loaded.values("a", range(len(documents))) == grown.values("a", range(len(documents)))


def test_growth_by_many_small_appends_keeps_every_row_in_place() -> None:
    documents = [{"n": i % 7, "tag": [f"t{i % 3}", f"u{i % 5}"]} for i in range(200)]
    columns = Columns()
    for start in range(0, 200, 9):
        columns = columns.extended(documents[start : start + 9])
    assert len(columns) == 200
    filter = where({"$and": [{"n": {"$gte": 3}}, {"tag": "u4"}]})
    assert columns.select(filter).tolist() == [matches(filter, meta) for meta in documents]
    assert columns.values("n", [0, 8, 199]) == [0, 1, 3]


def test_true_is_not_one_even_from_the_cache() -> None:
    columns = Columns.build([{"a": True}, {"a": 1}, {"a": 1.0}])
    assert columns.select(Compare("a", "eq", 1)).tolist() == [False, True, True]
    assert columns.select(Compare("a", "eq", True)).tolist() == [True, False, False]


def test_whole_numbers_beyond_a_float_are_told_apart() -> None:
    columns = Columns.build([{"a": 2**53}, {"a": 2**53 + 1}])
    assert columns.select(Compare("a", "gt", 2**53)).tolist() == [False, True]


def test_both_ends_of_a_range_over_lists_may_be_met_by_two_values() -> None:
    documents: list[dict[str, Any]] = [{"n": [1, 9]}, {"n": 5}, {"n": 1}, {"n": "5"}]
    between = where({"n": {"$gt": 2, "$lt": 8}})
    assert Columns.build(documents).select(between).tolist() == [True, True, False, False]
    assert Columns.build(documents[1:]).select(between).tolist() == [True, False, False]
    assert not Columns.build(documents[1:]).select(where({"n": {"$gt": 8, "$lt": 2}})).any()


def test_values_are_none_one_value_or_an_ascending_list() -> None:
    columns = Columns.build([{"v": "pa"}, {"v": ["b", "a", "b"]}, {}, {"v": []}, {"v": ["pa"]}, {"v": None}])
    assert columns.values("v", [1, 0, 2, 3, 4, 5, 1]) == [["a", "b"], "pa", None, None, "pa", None, ["a", "b"]]
    assert columns.values("missing", [0]) == [None]
    assert columns.values("v", []) == []


def test_a_selection_cannot_be_written_into() -> None:
    columns = Columns.build([{"a": 1}])
    for filter in (where({"a": 1}), where({"$not": {"a": 1}}), where({"$and": [{"a": 1}, {"b": None}]})):
        with pytest.raises(ValueError, match="read-only"):
            columns.select(filter)[0] = False
    assert columns.select(where({"a": 1})).tolist() == [True]


def test_an_empty_collection_selects_nothing() -> None:
    assert Columns().select(where({"a": None})).tolist() == []
    assert Columns.build([]).values("a", []) == []


def test_deep_metadata_is_no_recursion_error() -> None:
    deep: Any = 1
    for _ in range(5_000):
        deep = [deep]
    assert Columns.build([{"a": deep}]).select(where({"a": 1})).tolist() == [True]


@pytest.mark.parametrize("damage", ["missing", "empty", "magic", "header", "short", "long"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "columns"
    Columns.build([{"a": i, "b": "x"} for i in range(20)]).save(path)
    data = path.read_bytes()
    broken = {
        "empty": b"",
        "magic": b"X" + data[1:],
        "header": data[:20] + b"\xff" + data[21:],
        "short": data[:-9],
        "long": data + b"x",
    }
    path.unlink()
    if damage in broken:
        path.write_bytes(broken[damage])
    with pytest.raises(BackendError, match="missing or damaged"):
        Columns.load(path)


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="could not be written"):
        Columns.build([{"a": 1}]).save(tmp_path)  # a folder cannot be opened for writing


def test_one_condition_costs_far_less_than_looking_at_every_row() -> None:
    rng = np.random.default_rng(0)
    metas = [{"x": float(x), "view": "ap" if x < 0.5 else "pa"} for x in rng.random(50_000)]
    columns = Columns.build(metas)
    filters = [where({"x": {"$lt": 0.01 + i / 1e6}}) for i in range(200)]
    columns.select(filters[0])
    taken, looking = [], []
    for filter in filters:
        start = time.perf_counter()
        columns.select(filter)
        taken.append(time.perf_counter() - start)
        start = time.perf_counter()
        for meta in metas[:500]:
            matches(filter, meta)
        looking.append(time.perf_counter() - start)
    assert sorted(taken)[100] < sorted(looking)[100]  # all rows, in less than a hundredth of them takes one by one


def test_files_hold_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "columns"
    Columns.build([{"a": "word"}]).save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    assert json.loads(data[16 : 16 + length])["size"] == 1
    assert b'["word"]' in data
