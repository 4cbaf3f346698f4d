"""The filter language: one small tree, parsed once, strict.

A filter says which documents may be found, by their metadata::

    {"$and": [{"projection": "ap"}, {"year": {"$gte": 2010, "$lt": 2020}}]}

A *path* names a value below the metadata object, keys joined by dots; a list on the way gives several values, and a
condition holds where one of them meets it. What `matches` answers is the meaning of a filter: the columns of the
embedded index and Elasticsearch only say the same faster.

- ``$eq``, ``$in``: equal and of one kind. Text is compared letter by letter, numbers by value (1 is 1.0), and true is
  no number.
- ``$gt $gte $lt $lte``: numbers with numbers, texts with texts (by code point); false across kinds.
- null stands for no value: ``{"a": null}`` holds where `a` is missing, null, or a list of nothing else;
  ``{"$exists": true}`` is the opposite.
- ``$ne``, ``$nin``, ``$not`` are the negations, so they hold for documents without the value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from retrieval.errors import Invalid

Scalar = str | int | float | bool | None
Op = Literal["eq", "gt", "gte", "lt", "lte"]

MAX_DEPTH = 32  # levels of nesting: more is a mistake or an attack
MAX_CONDITIONS = 1_000  # Lucene refuses more than 1,024 clauses
MAX_VALUES = 10_000  # of all $in and $nin together
_INT64 = 2**63  # beyond it neither Elasticsearch nor a numeric column holds a whole number


@dataclass(frozen=True, slots=True)
class And:
    children: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    children: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    child: Filter


@dataclass(frozen=True, slots=True, eq=False)
class Compare:
    """One value against a constant. Ordering (`gt` and its kin) takes a number or a text."""

    path: str
    op: Op
    value: Scalar

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compare) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.path, self.op, _tagged(self.value)


@dataclass(frozen=True, slots=True, eq=False)
class In:
    """One value against several constants."""

    path: str
    values: tuple[Scalar, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, In) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.path, tuple(map(_tagged, self.values))


@dataclass(frozen=True, slots=True)
class Exists:
    """present: at least one value that is not null."""

    path: str
    present: bool = True


Filter = And | Or | Not | Compare | In | Exists


def _tagged(value: Scalar) -> tuple[bool, Scalar]:
    """Python holds 1 and True equal, a filter does not: without the tag a cache would mix the two up."""
    return isinstance(value, bool), value


# --- meaning ---------------------------------------------------------------------------------------------------------


def lookup(meta: Mapping[str, Any], path: str) -> list[Scalar]:
    """The scalars at a dotted path, none of them null; a list gives several.

    A key may hold dots itself, as in Elasticsearch.

    >>> lookup({"study": {"views": ["pa", "lateral", None]}, "lab.crp": 3.5}, "study.views")
    ['pa', 'lateral']
    >>> lookup({"study": {"views": ["pa", "lateral", None]}, "lab.crp": 3.5}, "lab.crp")
    [3.5]
    """
    return list(_at(meta, path))


def _at(node: Any, path: str) -> Iterator[Scalar]:
    if isinstance(node, list | tuple):
        for element in node:
            yield from _at(element, path)
    elif not path:
        if node is not None and not isinstance(node, Mapping):
            yield node
    elif isinstance(node, Mapping):
        cut = path.find(".")
        while cut >= 0:
            if path[:cut] in node:
                yield from _at(node[path[:cut]], path[cut + 1 :])
            cut = path.find(".", cut + 1)
        if path in node:
            yield from _at(node[path], "")


def matches(filter: Filter, meta: Mapping[str, Any]) -> bool:
    """True where a document with this metadata may be found.

    >>> matches(Compare("year", "gte", 2010), {"year": [2009, 2011]})
    True
    >>> matches(Not(Compare("year", "eq", 2010)), {})
    True
    """
    match filter:
        case And(children):
            return all(matches(child, meta) for child in children)
        case Or(children):
            return any(matches(child, meta) for child in children)
        case Not(child):
            return not matches(child, meta)
        case Exists(path, present):
            return bool(lookup(meta, path)) == present
        case In(path, values):
            found = lookup(meta, path)
            return any(_equal(found, value) for value in values)
        case Compare(path, "eq", value):
            return _equal(lookup(meta, path), value)
        case Compare(path, op, value):
            return any(kind(found) == kind(value) and _ORDER[op](found, value) for found in lookup(meta, path))


def kind(value: Scalar) -> str:
    """What a value can be compared with: "number", "text" or "bool" (and "null")."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    return "text" if isinstance(value, str) else "number"


def _equal(found: list[Scalar], value: Scalar) -> bool:
    if value is None:
        return not found
    return any(kind(one) == kind(value) and one == value for one in found)


_ORDER: Mapping[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


def paths(filter: Filter) -> Iterator[str]:
    """The paths that a filter asks for.

    >>> list(paths(And((Compare("year", "gt", 2010), Not(Exists("view"))))))
    ['year', 'view']
    """
    match filter:
        case And(children) | Or(children):
            for child in children:
                yield from paths(child)
        case Not(child):
            yield from paths(child)
        case _:
            yield filter.path


# --- parsing ---------------------------------------------------------------------------------------------------------

_LOGICAL = ("$and", "$or", "$not")
_ORDERING: Mapping[str, Op] = {"$gt": "gt", "$gte": "gte", "$lt": "lt", "$lte": "lte"}
_FIELD = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists", "$not")


def parse(where: Mapping[str, Any] | None, at: str = "where") -> Filter | None:
    """The filter that a JSON object says, None where it says nothing.

    at: how the caller names the object; error paths start with it.
    Raises Invalid with the path of the offence.

    >>> parse({"year": {"$gte": 2010}, "view": "pa"})
    And(children=(Compare(path='year', op='gte', value=2010), Compare(path='view', op='eq', value='pa')))
    """
    if where is None:
        return None
    if isinstance(where, Mapping) and not where:
        return None
    return _Parser().filter(where, at, 1)


class _Parser:
    """Counts what was read, so that size is bounded as well as depth."""

    def __init__(self) -> None:
        self.conditions = 0
        self.values = 0

    def filter(self, where: Any, at: str, depth: int) -> Filter:
        """An object of conditions that must all hold."""
        _object(where, at, depth)
        parts: list[Filter] = []
        for key, value in where.items():
            if not isinstance(key, str):
                raise Invalid(f"{at}: a key must be text, got {type(key).__name__}", at)
            if key in ("$and", "$or"):
                parts.append(self.group(key, value, f"{at}.{key}", depth))
            elif key == "$not":
                parts.append(Not(self.filter(value, f"{at}.$not", depth + 1)))
            elif key.startswith("$"):
                raise _unknown(key, f"{at}.{key}", _LOGICAL)
            else:
                parts.append(self.field(_path(key, at), value, f"{at}.{key}", depth))
        return _joined(parts)

    def group(self, key: str, value: Any, at: str, depth: int) -> Filter:
        if not isinstance(value, list | tuple) or not value:
            raise Invalid(f"{at}: expected a list with at least one filter, got {_said(value)}", at)
        children = tuple(self.filter(child, f"{at}[{n}]", depth + 1) for n, child in enumerate(value))
        return And(children) if key == "$and" else Or(children)

    def field(self, path: str, value: Any, at: str, depth: int) -> Filter:
        """What must hold at one path: a bare value, or an object of operators."""
        if not isinstance(value, Mapping):
            return self.condition("$eq", path, value, at)
        _object(value, at, depth + 1)
        parts: list[Filter] = []
        for key, operand in value.items():
            here = f"{at}.{key}"
            if key not in _FIELD:
                raise _unknown(key, here, _FIELD)
            if key == "$not":
                if not isinstance(operand, Mapping):
                    raise Invalid(f"{here}: expected an object of operators, got {_said(operand)}; use $ne", here)
                parts.append(Not(self.field(path, operand, here, depth + 1)))
            else:
                parts.append(self.condition(key, path, operand, here))
        return _joined(parts)

    def condition(self, key: str, path: str, operand: Any, at: str) -> Filter:
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            raise Invalid(f"{at}: more than {MAX_CONDITIONS:,} conditions; use $in for many values", at)
        match key:
            case "$eq":
                return Compare(path, "eq", _scalar(operand, at))
            case "$ne":
                return Not(Compare(path, "eq", _scalar(operand, at)))
            case "$in":
                return In(path, self.several(operand, at))
            case "$nin":
                return Not(In(path, self.several(operand, at)))
            case "$exists":
                if not isinstance(operand, bool):
                    raise Invalid(f"{at}: expected true or false, got {_said(operand)}", at)
                return Exists(path, operand)
            case _:
                return Compare(path, _ORDERING[key], _ordered(operand, at))

    def several(self, operand: Any, at: str) -> tuple[Scalar, ...]:
        if not isinstance(operand, list | tuple):
            raise Invalid(f"{at}: expected a list of values, got {_said(operand)}", at)
        self.values += len(operand)
        if self.values > MAX_VALUES:
            raise Invalid(f"{at}: more than {MAX_VALUES:,} values in one filter", at)
        return tuple(_scalar(value, f"{at}[{n}]") for n, value in enumerate(operand))


def _joined(parts: list[Filter]) -> Filter:
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def _object(value: Any, at: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        # The path itself would be as deep as the filter.
        raise Invalid(f"the filter is nested deeper than {MAX_DEPTH} levels", at[:200])
    if not isinstance(value, Mapping):
        raise Invalid(f"{at}: expected an object, got {_said(value)}", at)
    if not value:
        raise Invalid(f"{at}: expected at least one condition, got an empty object", at)


def _path(key: str, at: str) -> str:
    if not all(key.split(".")) or not _is_text(key):
        raise Invalid(f"{at}: {key!r} is no path: expected keys joined by single dots", at)
    return key


def _scalar(value: Any, at: str) -> Scalar:
    match value:
        case None | bool():
            return value
        case str() if _is_text(value):
            return value
        case int() if -_INT64 <= value < _INT64:
            return value
        case float() if math.isfinite(value):
            return value
        case str() | int() | float():
            raise Invalid(f"{at}: expected valid Unicode, a finite number or a whole number of 64 bits", at)
    hint = "; use $in for a choice" if isinstance(value, list | tuple) else ""
    raise Invalid(f"{at}: expected a text, a number, true, false or null, got {_said(value)}{hint}", at)


def _ordered(value: Any, at: str) -> Scalar:
    if value is None or isinstance(value, bool):
        raise Invalid(f"{at}: expected a number or a text to compare with, got {_said(value)}", at)
    return _scalar(value, at)


def _is_text(value: str) -> bool:
    """False for lone surrogates, which JSON can write and UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _said(value: Any) -> str:
    """How JSON calls a value; never the value itself."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return {str: "a text", int: "a number", float: "a number"}.get(type(value), type(value).__name__)


def _unknown(key: object, at: str, known: tuple[str, ...]) -> Invalid:
    if isinstance(key, str) and not key.startswith("$"):
        return Invalid(f"{at}: expected an operator ({' '.join(known)}); a nested value is named by a dotted path", at)
    return Invalid(f"{at}: unknown operator; expected one of {' '.join(known)}", at)
