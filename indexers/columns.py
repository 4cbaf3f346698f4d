"""Metadata as sorted columns: which rows a filter allows, in microseconds.

One column per dotted path and kind of value. A column holds its distinct values in ascending order,
and the rows of each value one after the other, so a comparison of any sort is a bisection and one
slice of rows. What `select` answers is what `retrieval.filters.matches` answers row by row.

On disk a file is flat: a magic word, the length of a JSON header, the header, then arrays at the places
it names. Arrays are memory-mapped and values decoded when a filter first asks for them.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import BackendError
from retrieval.filters import And, Compare, Exists, Filter, In, Not, Or, Scalar, kind

Mask = NDArray[np.bool_]
Rows = NDArray[np.int32]

_MAGIC = b"LBXCOL01"
_CACHED_BYTES = 64 << 20  # masks of recent conditions, per segment
_FEW = 32  # a filter that lets less than one in so many rows through is kept as their numbers
_ODD = "odd"  # NaN: there, but equal to nothing and in no order


class Column:
    """The values of one kind at one path: `values[i]` is held by `rows[starts[i]:starts[i + 1]]`, ascending."""

    __slots__ = ("_forward", "_single", "_values", "rows", "starts")

    def __init__(self, values: list[Any] | bytes, starts: NDArray[np.int64], rows: Rows) -> None:
        self._values = values
        self.starts = starts
        self.rows = rows
        self._single: bool | None = None
        self._forward: tuple[Rows, NDArray[np.int64]] | None = None

    @property
    def values(self) -> list[Any]:
        if isinstance(self._values, bytes):
            self._values = list(json.loads(self._values))
        return self._values

    def between(self, low: int, high: int) -> Rows:
        """Rows of values number `low` to `high` - 1."""
        return self.rows[self.starts[low] : self.starts[high]]

    def bounds(self, op: str, value: Any) -> tuple[int, int]:
        """Which values are `op` (eq, gt, gte, lt, lte) than `value`: from the first number to before the second."""
        match op:
            case "eq":
                return bisect_left(self.values, value), bisect_right(self.values, value)
            case "gt":
                return bisect_right(self.values, value), len(self.values)
            case "gte":
                return bisect_left(self.values, value), len(self.values)
            case "lt":
                return 0, bisect_left(self.values, value)
            case _:
                return 0, bisect_right(self.values, value)

    def within(self, comparisons: Sequence[Compare]) -> Rows:
        """Rows of the values that meet them all."""
        low, high = 0, len(self.values)
        for comparison in comparisons:
            first, end = self.bounds(comparison.op, comparison.value)
            low, high = max(low, first), min(high, end)
        return self.between(low, max(low, high))

    @property
    def single(self) -> bool:
        """No row has two values."""
        if self._single is None:
            self._single = not len(self.rows) or int(np.bincount(self.rows).max()) == 1
        return self._single

    def at(self, rows: NDArray[np.int64]) -> list[list[Any]]:
        """The values of each of `rows`, ascending."""
        if self._forward is None:
            order = np.argsort(self.rows, kind="stable")
            positions = np.repeat(np.arange(len(self.values)), np.diff(self.starts))
            self._forward = self.rows[order], positions[order]
        sorted_rows, positions = self._forward
        low, high = (np.searchsorted(sorted_rows, rows, side).tolist() for side in ("left", "right"))
        return [[self.values[i] for i in positions[a:b].tolist()] for a, b in zip(low, high, strict=True)]


class Segment:
    """Consecutive rows whose columns never change."""

    def __init__(self, size: int, columns: Mapping[str, Mapping[str, Column]]) -> None:
        self.size = size
        self.columns = columns  # path -> kind -> column
        self._masks: dict[Filter, Mask] = {}
        self._lock = threading.Lock()

    def select(self, filter: Filter) -> Mask:
        match filter:
            case And(children):
                return _joined(np.logical_and, list(self._conjuncts(children)), self.size)
            case Or(children):
                return _joined(np.logical_or, [self.select(child) for child in children], self.size)
            case Not(child):
                return np.logical_not(self.select(child))
        mask = self._masks.get(filter)
        if mask is None:
            mask = self._leaf(filter)
            mask.flags.writeable = False
            self._keep(filter, mask)
        return mask

    def _conjuncts(self, children: Sequence[Filter]) -> Iterator[Mask]:
        """Masks whose intersection is asked for; both ends of a range are one slice of rows, not two wide masks."""
        ends: dict[Column, list[Compare]] = {}
        for child in children:
            column = self._ordered(child)
            if column is None:
                yield self.select(child)
            else:
                ends.setdefault(column, []).append(cast(Compare, child))
        for column, several in ends.items():
            if len(several) == 1:
                yield self.select(several[0])
                continue
            mask = np.zeros(self.size, np.bool_)
            mask[column.within(several)] = True
            yield mask

    def few(self, filter: Filter) -> Rows | None:
        """Ascending rows that a filter of one column lets through, where they are few: no mask of all rows is made."""
        several = filter.children if isinstance(filter, And) else (filter,)
        column = self._ordered(several[0]) if several else None
        if column is None or any(self._ordered(other) is not column for other in several[1:]):
            return None
        rows = column.within(cast(Sequence[Compare], several))
        return np.sort(rows) if len(rows) * _FEW < self.size else None

    def _ordered(self, filter: Filter) -> Column | None:
        """The column that a comparison slices, where no row has two values."""
        if not isinstance(filter, Compare) or filter.value is None or filter.value != filter.value:
            return None
        column = self.columns.get(filter.path, {}).get(kind(filter.value))
        return column if column is not None and column.single else None

    def _keep(self, filter: Filter, mask: Mask) -> None:
        with self._lock:
            self._masks[filter] = mask
            while len(self._masks) > max(1, _CACHED_BYTES // max(1, self.size)):
                del self._masks[next(iter(self._masks))]

    def _leaf(self, filter: Compare | In | Exists) -> Mask:
        columns = self.columns.get(filter.path, {})
        if isinstance(filter, Exists):
            present = self._present(columns)
            return present if filter.present else ~present
        if isinstance(filter, Compare):
            return self._holding(columns, filter.op, (filter.value,))
        return self._holding(columns, "eq", filter.values)

    def _holding(self, columns: Mapping[str, Column], op: str, values: Sequence[Scalar]) -> Mask:
        mask = np.zeros(self.size, np.bool_)
        for value in values:
            if value is None:
                if op == "eq":
                    np.logical_or(mask, ~self._present(columns), out=mask)
            elif value == value and (column := columns.get(kind(value))) is not None:
                mask[column.between(*column.bounds(op, value))] = True
        return mask

    def _present(self, columns: Mapping[str, Column]) -> Mask:
        mask = np.zeros(self.size, np.bool_)
        for column in columns.values():
            mask[column.rows] = True
        return mask


class Columns:
    """The metadata of rows 0 to N - 1. Immutable; `extended` shares what it can."""

    def __init__(self, segments: Sequence[Segment] = ()) -> None:
        self._segments = tuple(segment for segment in segments if segment.size)
        self._starts = np.cumsum([0, *(segment.size for segment in self._segments)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @classmethod
    def build(cls, metas: Iterable[Mapping[str, Any]]) -> Columns:
        """Columns of metadata objects, one per row."""
        return cls([_segment(metas)])

    def extended(self, metas: Iterable[Mapping[str, Any]]) -> Columns:
        """These rows and then those of `metas`.

        Costs what the new rows cost: a segment is merged into its neighbour only once it has half its
        size, so a row is merged a logarithmic number of times.
        """
        segments = [*self._segments, _segment(metas)]
        while len(segments) > 1 and segments[-2].size <= 2 * segments[-1].size:
            segments[-2:] = [_merged(*segments[-2:])]
        return Columns(segments)

    def select(self, filter: Filter) -> Mask:
        """(N,) True where the row's metadata match. Read-only: conditions are cached."""
        if len(self._segments) == 1:
            mask = self._segments[0].select(filter)
        else:
            masks = [segment.select(filter) for segment in self._segments]
            mask = np.concatenate(masks) if masks else np.zeros(0, np.bool_)
        mask.flags.writeable = False
        return mask

    def few(self, filter: Filter) -> NDArray[np.int64] | None:
        """What `select` lets through as ascending rows, where they are few and that is cheaper; None elsewhere."""
        if len(self._segments) != 1:
            return None
        rows = self._segments[0].few(filter)
        return None if rows is None else rows.astype(np.int64)

    def values(self, field: str, rows: Sequence[int] | NDArray[np.integer[Any]]) -> list[Any]:
        """What each row has at a dotted path: None, the value, or an ascending list where there are several."""
        wanted = np.asarray(rows, np.int64)
        out: list[Any] = [None] * len(wanted)
        owner = np.searchsorted(self._starts, wanted, "right") - 1
        for number, segment in enumerate(self._segments):
            here = np.flatnonzero(owner == number)
            columns = [column for name, column in segment.columns.get(field, {}).items() if name != _ODD]
            found = [column.at(wanted[here] - self._starts[number]) for column in columns]
            for at, several in zip(here.tolist(), zip(*found, strict=True), strict=False):
                joined = [value for some in several for value in some]
                out[at] = joined if len(joined) > 1 else joined[0] if joined else None
        return out

    def save(self, path: Path) -> None:
        """Write one flat file, fsynced."""
        whole = Columns([_merged(*self._segments)]) if len(self._segments) > 1 else self
        header, blobs = _laid_out(whole._segments[0] if len(whole) else Segment(0, {}))
        try:
            with path.open("wb") as file:
                file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
                for blob in blobs:
                    file.write(blob)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BackendError("the metadata columns could not be written; is the disk full?") from error

    @classmethod
    def load(cls, path: Path) -> Columns:
        """Open what `save` wrote, memory-mapped. BackendError where it is missing or is no such file."""
        try:
            data = np.asarray(np.memmap(path, np.uint8, mode="r"))  # a plain view is sliced in a third of the time
            length = int.from_bytes(data[8:16].tobytes(), "little")
            if data[:8].tobytes() != _MAGIC:
                raise ValueError("magic")
            header = json.loads(data[16 : 16 + length].tobytes())
            return cls([_read(data[16 + length :], header)])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackendError("the metadata columns are missing or damaged; rebuild the collection") from error


# --- building ------------------------------------------------------------------------------------------------------


class _Growing:
    """A column while rows arrive: every value gets a number, every occurrence a (number, row) pair."""

    __slots__ = ("codes", "numbers", "rows")

    def __init__(self) -> None:
        self.codes: dict[Any, int] = {}
        self.numbers = array("i")
        self.rows = array("i")

    def add(self, value: Any, row: int) -> None:
        self.numbers.append(self.codes.setdefault(value, len(self.codes)))
        self.rows.append(row)

    def column(self) -> Column:
        return _column(list(self.codes), np.array(self.numbers, np.int64), np.array(self.rows, np.int32))


def _column(values: list[Any], numbers: NDArray[np.int64], rows: Rows) -> Column:
    """values: distinct, any order. numbers[i] says which of them rows[i] holds; rows ascend for each value."""
    order = sorted(range(len(values)), key=values.__getitem__)
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    places = place[numbers]
    by_value = np.argsort(places, kind="stable")
    places, rows = places[by_value], rows[by_value]
    first = np.ones(len(rows), np.bool_)  # a list may hold one value twice
    first[1:] = (np.diff(places) != 0) | (np.diff(rows) != 0)
    starts = np.concatenate([[0], np.cumsum(np.bincount(places[first], minlength=len(values)))])
    return Column([values[i] for i in order], starts.astype(np.int64), rows[first])


def _segment(metas: Iterable[Mapping[str, Any]]) -> Segment:
    growing: dict[tuple[str, str], _Growing] = {}
    size = 0
    for row, meta in enumerate(metas):
        size = row + 1
        for path, value in _leaves(meta):
            key = (path, kind(value)) if value == value else (path, _ODD)
            if key not in growing:
                growing[key] = _Growing()
            growing[key].add(0 if key[1] == _ODD else value, row)
    return _gathered(size, ((path, name, some.column()) for (path, name), some in growing.items()))


def _gathered(size: int, columns: Iterable[tuple[str, str, Column]]) -> Segment:
    by_path: dict[str, dict[str, Column]] = {}
    for path, name, column in columns:
        by_path.setdefault(path, {})[name] = column
    return Segment(size, by_path)


def _leaves(meta: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
    """Every (path, scalar) of an object, nulls left out; a stack, since nesting is the caller's."""
    stack: list[tuple[str, Any]] = [("", meta)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, Mapping):
            # A key with an empty part between dots cannot be named by a filter.
            prefix = f"{path}." if path else ""
            stack.extend((prefix + key, below) for key, below in node.items() if all(key.split(".")))
        elif isinstance(node, list | tuple):
            stack.extend((path, below) for below in node)
        elif node is not None:
            yield path, node


def _merged(*segments: Segment) -> Segment:
    size = sum(segment.size for segment in segments)
    starts = np.cumsum([0, *(segment.size for segment in segments)])
    keys = {(path, name): None for segment in segments for path, kinds in segment.columns.items() for name in kinds}

    def columns() -> Iterator[tuple[str, str, Column]]:
        for path, name in keys:
            parts = [
                (segment.columns[path][name], int(start))
                for segment, start in zip(segments, starts, strict=False)
                if name in segment.columns.get(path, {})
            ]
            yield path, name, _concatenated(parts)

    return _gathered(size, columns())


def _concatenated(parts: Sequence[tuple[Column, int]]) -> Column:
    codes: dict[Any, int] = {}
    for column, _ in parts:
        for value in column.values:
            codes.setdefault(value, len(codes))
    numbers = [
        np.repeat(np.array([codes[value] for value in column.values], np.int64), np.diff(column.starts))
        for column, _ in parts
    ]
    rows = [column.rows + np.int32(start) for column, start in parts]
    return _column(list(codes), np.concatenate(numbers), np.concatenate(rows))


def _joined(combine: np.ufunc, masks: Sequence[Mask], size: int) -> Mask:
    """All of `masks` in one; none gives what changes nothing: everything for "and", nothing for "or"."""
    first, *more = masks or (np.full(size, combine is np.logical_and),)
    if not more:
        return first
    joined: Mask = combine(first, more[0])
    for mask in more[1:]:
        combine(joined, mask, out=joined)
    return joined


# --- the file ------------------------------------------------------------------------------------------------------


def _laid_out(segment: Segment) -> tuple[bytes, list[bytes]]:
    blobs: list[bytes] = []
    entries = []
    at = 0
    for path, kinds in segment.columns.items():
        for name, column in kinds.items():
            parts = [
                column.starts.astype("<i8").tobytes(),
                column.rows.astype("<i4").tobytes(),
                json.dumps(column.values).encode(),
            ]
            entries.append([path, name, at, *map(len, parts)])
            padding = -sum(map(len, parts)) % 8
            blobs += [*parts, bytes(padding)]
            at += sum(map(len, parts)) + padding
    header = json.dumps({"size": segment.size, "bytes": at, "columns": entries}).encode()
    return header + b" " * (-len(header) % 8), blobs  # arrays start at multiples of 8


def _read(data: NDArray[np.uint8], header: Mapping[str, Any]) -> Segment:
    if len(data) != header["bytes"]:
        raise ValueError("length")

    def columns() -> Iterator[tuple[str, str, Column]]:
        for path, name, at, starts, rows, values in header["columns"]:
            ends = np.cumsum([at, starts, rows, values])
            yield (
                path,
                name,
                Column(
                    data[ends[2] : ends[3]].tobytes(),
                    data[at : ends[1]].view("<i8"),
                    data[ends[1] : ends[2]].view("<i4"),
                ),
            )

    return _gathered(header["size"], columns())
