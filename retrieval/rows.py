"""Lines of JSONL and CSV files as objects, one at a time; a bad line becomes a `Rejected`, never an exception.

What a row says of itself (its reason for rejection) never repeats what it holds.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from retrieval.errors import InputError, NotFound
from retrieval.types import Rejected

MAX_LINE = 16 << 20  # bytes: a longer line is no document, and would have to fit into memory

Row = dict[str, Any]


class Bad(Exception):
    """Why an item is left out; `args[0]` is the reason for the quarantine."""


def json_rows(path: Path) -> Iterator[tuple[int, Row | Rejected]]:
    """(line number from 1, object) of each line that is not blank. Raises InputError where the file cannot be read."""
    for number, raw in _lines(path):
        try:
            row = _row(raw)
        except Bad as bad:
            yield number, Rejected(number, None, str(bad))
        else:
            if row is not None:
                yield number, row


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes), None for a line over the limit."""
    with opened(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE):
            number += 1
            whole = len(raw) < MAX_LINE or raw.endswith(b"\n")
            while len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE)
            yield number, raw if whole else None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read; what the system refuses is the caller's fault, told without the folder."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise NotFound(f"{path.name}: no such file") from error
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read ({error.strerror})") from error


def _row(raw: bytes | None) -> Row | None:
    """The object of a line, None for a blank one."""
    if raw is None:
        raise Bad(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Bad(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    if not text:
        return None
    row = parsed(text)
    if not isinstance(row, dict):
        raise Bad("expected a JSON object")
    return row


def parsed(text: str) -> Any:
    """A JSON value by the letter of the standard: no NaN, no infinity, no half characters. Raises Bad."""
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise Bad(f"invalid JSON at column {error.colno}: {error.msg.partition(':')[0]}") from error
    except RecursionError as error:
        raise Bad("invalid JSON: nested too deeply") from error
    except UnicodeEncodeError as error:
        raise Bad("invalid JSON: half of a surrogate pair") from error
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise Bad("invalid JSON: a number with too many digits") from error
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Bad("invalid JSON: a number beyond the range of a float")
    return value


def _no_constant(name: str) -> float:
    raise Bad(f"invalid JSON: {name} is no JSON number")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


# --- CSV -------------------------------------------------------------------------------------------------------------


def csv_header(path: Path) -> list[str]:
    """Names of the columns. Raises InputError where there is no header, or a name occurs twice."""
    with opened(path) as file:
        raw = file.readline(MAX_LINE)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: the header is not UTF-8") from error
    names = next(csv.reader([text], delimiter=_delimiter(text)), [])
    names = [name.strip() for name in names]
    if not all(names) or not names or len(set(names)) < len(names):
        raise InputError(f"{path.name}: expected a first line of column names, each once")
    return names


def csv_rows(path: Path) -> Iterator[tuple[int, Row | Rejected]]:
    """(number of the line that a record begins on, column -> typed cell). The first line names the columns."""
    names = csv_header(path)
    csv.field_size_limit(MAX_LINE)  # 128 KiB by itself; a report with an embedded table is longer
    with opened(path) as file:
        header = file.readline(MAX_LINE).decode("utf-8-sig")
        lines = iter(lambda: file.readline(MAX_LINE), b"")
        reader = csv.reader(map(_decoded, lines), delimiter=_delimiter(header), strict=True)
        begun = 2
        while True:
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if cells:
                    yield begun, _record(names, cells)
            except Bad as bad:
                yield begun, Rejected(begun, None, str(bad))
            except csv.Error as error:
                yield begun, Rejected(begun, None, f"invalid CSV: {error}")
            begun = reader.line_num + 2


def _decoded(line: bytes) -> str:
    """Undecodable bytes as surrogates, so that only their own record is lost."""
    return line.decode(errors="surrogateescape")


def _delimiter(header: str) -> str:
    return max(",\t;", key=header.count)


def _record(names: list[str], cells: list[str]) -> Row:
    if len(cells) != len(names):
        raise Bad(f"{len(cells)} fields, expected {len(names)}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        raise Bad("not UTF-8") from error
    return dict(zip(names, cells))


_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,2})?", re.ASCII)


def typed(cell: str) -> str | int | float | bool | None:
    """A CSV cell as JSON would write it: numbers and booleans by their literals, nothing for "" and NaN.

    A leading zero keeps an identifier a text.

    >>> [typed(cell) for cell in ("2010", "-1.5", "007", "true", "", "a")]
    [2010, -1.5, '007', True, None, 'a']
    """
    text = cell.strip()
    if text in ("", "NaN", "nan"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if match := _NUMBER.fullmatch(text):
        return float(text) if match[2] or match[3] else int(text)
    return cell
