from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.errors import Invalid
from retrieval.filters import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_VALUES,
    And,
    Compare,
    Exists,
    In,
    Not,
    Or,
    lookup,
    matches,
    parse,
)


def holds(where: dict[str, Any], meta: dict[str, Any]) -> bool:
    filter = parse(where)
    assert filter is not None
    return matches(filter, meta)


def test_the_whole_grammar_becomes_six_plain_nodes() -> None:
    assert parse({"a": 1}) == Compare("a", "eq", 1)
    assert parse({"a": {"$eq": "x"}}) == Compare("a", "eq", "x")
    assert parse({"a": {"$ne": None}}) == Not(Compare("a", "eq", None))
    assert parse({"a.b": {"$gt": 1, "$lte": 2.5}}) == And((Compare("a.b", "gt", 1), Compare("a.b", "lte", 2.5)))
    assert parse({"a": {"$gte": "x"}, "b": {"$lt": 3}}) == And((Compare("a", "gte", "x"), Compare("b", "lt", 3)))
    assert parse({"a": {"$in": [1, "x", None]}}) == In("a", (1, "x", None))
    assert parse({"a": {"$nin": []}}) == Not(In("a", ()))
    assert parse({"a": {"$exists": False}}) == Exists("a", False)
    assert parse({"$or": [{"a": 1}, {"b": True}]}) == Or((Compare("a", "eq", 1), Compare("b", "eq", True)))
    assert parse({"$and": [{"a": 1}]}) == And((Compare("a", "eq", 1),))
    assert parse({"$not": {"a": 1}}) == Not(Compare("a", "eq", 1))
    assert parse({"a": {"$not": {"$gt": 1}}}) == Not(Compare("a", "gt", 1))


def test_nothing_asked_is_no_filter() -> None:
    assert parse(None) is None
    assert parse({}) is None


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ({"$and": [{"a": 1}, {"year": {"$foo": 1}}]}, "where.$and[1].year.$foo"),
        ({"$nor": [{"a": 1}]}, "where.$nor"),
        ({"a": {"$regex": "x"}}, "where.a.$regex"),
        ({"a": {"$and": [{"b": 1}]}}, "where.a.$and"),
        ({"a": {"b": 1}}, "where.a.b"),
        ({"a": {"$gt": 1, "b": 1}}, "where.a.b"),
        ({"a": {}}, "where.a"),
        ({"a": [1, 2]}, "where.a"),
        ({"a": {"$eq": {"b": 1}}}, "where.a.$eq"),
        ({"a": {"$in": 1}}, "where.a.$in"),
        ({"a": {"$in": "text"}}, "where.a.$in"),
        ({"a": {"$in": [1, [2]]}}, "where.a.$in[1]"),
        ({"a": {"$exists": 1}}, "where.a.$exists"),
        ({"a": {"$gt": None}}, "where.a.$gt"),
        ({"a": {"$lte": True}}, "where.a.$lte"),
        ({"a": {"$gt": [1]}}, "where.a.$gt"),
        ({"a": {"$not": 5}}, "where.a.$not"),
        ({"$not": [{"a": 1}]}, "where.$not"),
        ({"$not": {}}, "where.$not"),
        ({"$and": []}, "where.$and"),
        ({"$or": {"a": 1}}, "where.$or"),
        ({"$or": [1]}, "where.$or[0]"),
        ({"$or": [{}]}, "where.$or[0]"),
        ({"": 1}, "where"),
        ({"a..b": 1}, "where"),
        ({".a": 1}, "where"),
        ({"\ud800": 1}, "where"),
        ({1: 1}, "where"),
        ({"a": float("nan")}, "where.a"),
        ({"a": float("inf")}, "where.a"),
        ({"a": 2**63}, "where.a"),
        ({"a": "\ud800"}, "where.a"),
        ({"a": b"x"}, "where.a"),
        ([], "where"),
        ("a = 1", "where"),
        (7, "where"),
    ],
)
def test_what_is_not_in_the_grammar_is_refused_where_it_stands(where: Any, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(where)
    assert caught.value.field == field


def test_the_message_names_the_operators_there_are() -> None:
    with pytest.raises(Invalid, match=r"where\.year\.\$foo: unknown operator; expected one of \$eq \$ne"):
        parse({"year": {"$foo": 1}})


def test_the_caller_names_the_object() -> None:
    with pytest.raises(Invalid) as caught:
        parse({"$foo": 1}, at="query.where")
    assert caught.value.field == "query.where.$foo"


@pytest.mark.parametrize("wrap", [lambda inner: {"$not": inner}, lambda inner: {"$and": [inner]}])
def test_a_filter_ten_thousand_levels_deep_is_refused_clearly(wrap: Any) -> None:
    where: dict[str, Any] = {"a": 1}
    for _ in range(10_000):
        where = wrap(where)
    with pytest.raises(Invalid, match=f"deeper than {MAX_DEPTH} levels"):
        parse(where)


def test_a_field_ten_thousand_negations_deep_is_refused_clearly() -> None:
    operand: dict[str, Any] = {"$eq": 1}
    for _ in range(10_000):
        operand = {"$not": operand}
    with pytest.raises(Invalid, match=f"deeper than {MAX_DEPTH} levels"):
        parse({"a": operand})


def test_depth_counts_up_to_the_limit() -> None:
    where: dict[str, Any] = {"a": 1}
    for _ in range(MAX_DEPTH - 1):
        where = {"$not": where}
    assert parse(where) is not None
    with pytest.raises(Invalid):
        parse({"$not": where})


def test_size_is_bounded() -> None:
    assert parse({"$or": [{"a": n} for n in range(MAX_CONDITIONS)]}) is not None
    with pytest.raises(Invalid, match="use \\$in"):
        parse({"$or": [{"a": n} for n in range(MAX_CONDITIONS + 1)]})
    assert parse({"a": {"$in": list(range(MAX_VALUES))}}) is not None
    with pytest.raises(Invalid, match="more than 10,000 values"):
        parse({"a": {"$in": list(range(MAX_VALUES))}, "b": {"$nin": [1]}})


def test_nodes_are_hashable_and_tell_true_from_one() -> None:
    one, true = parse({"a": 1}), parse({"a": True})
    assert one != true
    assert len({one, true, parse({"a": 1.0})}) == 2
    assert parse({"a": {"$in": [0]}}) != parse({"a": {"$in": [False]}})
    assert parse({"$not": {"a": 1}}) != parse({"$not": {"a": True}})
    assert hash(parse({"$or": [{"a": {"$in": [1, "x"]}}, {"b": {"$exists": True}}]}))


def test_paths_go_through_objects_and_lists() -> None:
    meta = {"a": {"b": [1, {"c": "x"}, [2, None]], "d.e": 3}, "a.b": 4}
    assert lookup(meta, "a.b") == [1, 2, 4]
    assert lookup(meta, "a.b.c") == ["x"]
    assert lookup(meta, "a.d.e") == [3]
    assert lookup(meta, "a") == []
    assert lookup(meta, "a.b.c.d") == []
    assert lookup(meta, "z") == []


def test_a_list_matches_where_one_element_does() -> None:
    assert holds({"views": "pa"}, {"views": ["lateral", "pa"]})
    assert holds({"n": {"$gt": 4, "$lt": 2}}, {"n": [1, 5]})
    assert not holds({"views": {"$ne": "pa"}}, {"views": ["lateral", "pa"]})


def test_null_means_no_value() -> None:
    absent: list[dict[str, Any]] = [{}, {"a": None}, {"a": []}, {"a": [None]}, {"a": {"b": 1}}]
    present: list[dict[str, Any]] = [{"a": 0}, {"a": ""}, {"a": False}, {"a": [None, 1]}]
    for meta in absent:
        assert holds({"a": None}, meta)
        assert holds({"a": {"$in": [None, 7]}}, meta)
        assert holds({"a": {"$exists": False}}, meta)
        assert not holds({"a": {"$ne": None}}, meta)
        assert not holds({"a": {"$exists": True}}, meta)
    for meta in present:
        assert not holds({"a": None}, meta)
        assert holds({"a": {"$exists": True}}, meta)


def test_negations_hold_for_documents_without_the_value() -> None:
    assert holds({"a": {"$ne": 1}}, {})
    assert holds({"a": {"$nin": [1, 2]}}, {})
    assert holds({"a": {"$not": {"$gt": 1}}}, {})
    assert holds({"$not": {"a": 1}}, {})
    assert not holds({"a": {"$lte": 1}}, {})


def test_kinds_do_not_mix() -> None:
    assert holds({"a": 1}, {"a": 1.0})
    assert not holds({"a": 1}, {"a": True})
    assert not holds({"a": True}, {"a": 1})
    assert not holds({"a": "1"}, {"a": 1})
    assert not holds({"a": {"$gt": 0}}, {"a": "1"})
    assert not holds({"a": {"$gt": 0}}, {"a": True})
    assert not holds({"a": {"$gte": "0"}}, {"a": 1})
    assert not holds({"a": {"$in": [1]}}, {"a": True})


def test_texts_are_ordered_by_code_point() -> None:
    assert holds({"date": {"$gte": "2010-01-01", "$lt": "2011"}}, {"date": "2010-12-31"})
    assert holds({"a": {"$lt": "a"}}, {"a": "Z"})
    assert holds({"a": {"$gt": "\uffff"}}, {"a": "\U00010000"})


def test_whole_numbers_beyond_a_float_stay_exact() -> None:
    assert not holds({"a": 2**53 + 1}, {"a": 2**53})
    assert holds({"a": {"$gt": 2**53}}, {"a": 2**53 + 1})


# --- against an evaluator that reads the JSON as it stands, without the tree ---

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from(["", "a", "b"])
)
PATHS = st.sampled_from(["a", "b", "b.c", "b.c.d"])
KEYS = st.sampled_from(["a", "b", "c", "d"])
METAS = st.recursive(
    st.dictionaries(KEYS, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=3),
    lambda inner: st.dictionaries(KEYS, st.one_of(SCALARS, inner, st.lists(inner)), max_size=3),
    max_leaves=6,
)
ORDERED = st.one_of(st.integers(-2, 2), st.sampled_from([0.5, "a", "b"]))
OPERATORS = st.one_of(
    SCALARS,
    st.builds(lambda op, value: {op: value}, st.sampled_from(["$eq", "$ne"]), SCALARS),
    st.builds(lambda op, value: {op: value}, st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), ORDERED),
    st.builds(lambda op, values: {op: values}, st.sampled_from(["$in", "$nin"]), st.lists(SCALARS, max_size=3)),
    st.builds(lambda present: {"$exists": present}, st.booleans()),
    st.builds(lambda low, high: {"$gte": low, "$lt": high}, ORDERED, ORDERED),
    st.builds(lambda value: {"$not": {"$eq": value}}, SCALARS),
)
WHERES = st.recursive(
    st.dictionaries(PATHS, OPERATORS, min_size=1, max_size=2),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["$and", "$or"]), st.lists(inner, min_size=1, max_size=3), min_size=1),
        st.builds(lambda part: {"$not": part}, inner),
    ),
    max_leaves=8,
)


def naive(where: dict[str, Any], meta: dict[str, Any]) -> bool:
    return all(naive_entry(key, value, meta) for key, value in where.items())


def naive_entry(key: str, value: Any, meta: dict[str, Any]) -> bool:
    if key == "$and":
        return all(naive(part, meta) for part in value)
    if key == "$or":
        return any(naive(part, meta) for part in value)
    if key == "$not":
        return not naive(value, meta)
    found = [meta]
    for name in key.split("."):
        found = [one[name] for one in unrolled(found) if isinstance(one, dict) and name in one]
    scalars = [one for one in unrolled(found) if one is not None and not isinstance(one, dict)]
    asked = value if isinstance(value, dict) else {"$eq": value}
    return all(naive_operator(op, operand, scalars) for op, operand in asked.items())


def unrolled(values: list[Any]) -> list[Any]:
    return [leaf for value in values for leaf in (unrolled(value) if isinstance(value, list) else [value])]


def naive_operator(op: str, operand: Any, found: list[Any]) -> bool:
    def same(one: Any, other: Any) -> bool:
        return isinstance(one, bool) == isinstance(other, bool) and one == other

    if op == "$not":
        return not all(naive_operator(key, value, found) for key, value in operand.items())
    if op == "$exists":
        return (found != []) is operand
    if op in ("$eq", "$ne"):
        return (op == "$eq") is (any(same(one, operand) for one in found) if operand is not None else not found)
    if op in ("$in", "$nin"):
        return (op == "$in") is any(naive_operator("$eq", value, found) for value in operand)
    order = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}[op]
    comparable = [
        one for one in found if not isinstance(one, bool) and isinstance(one, str) == isinstance(operand, str)
    ]
    return any(order(one, operand) for one in comparable)


@given(WHERES, st.lists(METAS, min_size=1, max_size=5))
def test_any_filter_means_what_its_text_says(where: dict[str, Any], metas: list[dict[str, Any]]) -> None:
    filter = parse(where)
    assert filter is not None
    assert hash(filter) == hash(parse(where))
    for meta in metas:
        assert matches(filter, meta) is naive(where, meta)


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=3), st.sampled_from(["$and", "$not", "$in", "$eq", "a"])), inner),
    ),
)


@given(JUNK)
def test_whatever_json_is_sent_the_answer_is_a_filter_or_a_refusal(where: Any) -> None:
    refused = None
    try:
        parse(where)
    except Invalid as error:
        refused = error
    assert refused is None or (refused.field or "").startswith("where")
