"""Rows and pictures as documents, each checked: what fits neither backend, or leads out of the source, is left out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from retrieval.errors import InputError
from retrieval.rows import MAX_LINE, Bad, Row, csv_rows, json_rows, opened, parsed, typed
from retrieval.types import Document, Rejected

MAX_ID = 512  # bytes of UTF-8: Elasticsearch takes no longer id
MAX_NESTING = 20  # levels of metadata: Elasticsearch's default
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".dcm", ".dicom"})

Items = Iterator[tuple[int | None, Document | Rejected]]  # with the line that each came from


def beir(path: Path) -> Items:
    """Lines in BEIR layout; pictures are named from the file's folder."""
    return _documents(path, json_rows(path), lambda row: row)


def _documents(path: Path, rows: Iterator[tuple[int, Row | Rejected]], renamed: Callable[[Row], Row]) -> Items:
    """Rows as documents; `renamed` gives a row the names of BEIR."""
    for line, row in rows:
        if isinstance(row, Rejected):
            yield line, row
            continue
        id = None
        try:
            row = renamed(row)
            id = checked_id(row.get("_id"))
            yield line, _document(id, row, path.parent)
        except Bad as bad:
            yield line, Rejected(line, id, str(bad))


def checked_id(value: Any) -> str:
    """An id that both backends and TREC files can hold. Raises Bad."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Bad("no _id, or an empty one")
    if not isinstance(value, str):
        raise Bad(f"_id: expected a text, got {_kind(value)}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise Bad("_id: not valid Unicode") from error
    if size > MAX_ID:
        raise Bad(f"_id: longer than {MAX_ID} bytes")
    if _CONTROL.search(value):
        raise Bad("_id: holds a control character")
    return value


def _document(id: str, row: Row, folder: Path) -> Document:
    return Document(
        id=id,
        title=checked_text(row, "title"),
        text=checked_text(row, "text"),
        image=checked_picture(row.get("image"), folder),
        meta=checked_meta(row.get("metadata")),
    )


def checked_text(row: Row, name: str) -> str:
    """The text under a name, "" for none. Raises Bad."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise Bad(f"{name}: expected a text, got {_kind(value)}")
    return value or ""


def checked_meta(value: Any) -> dict[str, Any]:
    """Metadata that both backends can hold and a filter can ask for. Raises Bad."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Bad(f"metadata: expected an object, got {_kind(value)}")
    _check_meta(value, 1)
    return value


def _check_meta(value: Any, depth: int) -> None:
    if depth > MAX_NESTING:
        raise Bad(f"metadata: nested deeper than {MAX_NESTING} levels")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_meta(inner, depth + isinstance(inner, dict | list))
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise Bad("metadata: a whole number beyond 64 bits")


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


# --- pictures --------------------------------------------------------------------------------------------------------


def checked_picture(name: Any, folder: Path) -> Path | None:
    """The picture that a source names, checked. Symbolic links are the operator's and are followed."""
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise Bad(f"image: expected a path below the source, got {_kind(name)}")
    steps = re.split(r"[/\\]", name)
    if not steps[0] or ".." in steps or re.match(r"[A-Za-z]:", name) or _CONTROL.search(name):
        raise Bad("image: expected a path below the source, without '..'")
    path = folder / name
    if not is_picture(path):
        raise Bad("image: not a JPEG, PNG, WebP or DICOM file")
    return path


def is_picture(path: Path) -> bool:
    """True where the first bytes are those of a picture, whatever the name. Raises Bad where there are none."""
    try:
        if not path.is_file():  # a pipe or a device would block the reader
            raise Bad("image: no such file")
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise Bad("image: cannot be read") from error
    if not head:
        raise Bad("image: empty file")
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or head[128:] == b"DICM"
        or _is_bare_dicom(head)
    )


def _is_bare_dicom(head: bytes) -> bool:
    """DICOM without its preamble begins with an element of group 2 or 8: a tag, then two letters or a short length."""
    if head[:2] not in (b"\x02\x00", b"\x08\x00") or len(head) < 16:
        return False
    return re.fullmatch(rb"[A-Z]{2}", head[4:6]) is not None or head[5:8] == b"\0\0\0"


def pictures(folder: Path) -> Items:
    """Every picture below a folder; its id is its path there. Files that neither are nor claim to be one are left."""
    for path in _walk(folder):
        id = path.relative_to(folder).as_posix()
        try:
            checked_id(id)
        except Bad:
            yield None, Rejected(None, None, "the file's name cannot be an id: too long, or not UTF-8")
            continue
        try:
            item: Document | Rejected | None = _pictured(path, id)
        except Bad as bad:
            item = Rejected(None, id, str(bad))
        if item is not None:
            yield None, item


def _pictured(path: Path, id: str) -> Document | None:
    """A picture with its caption, None for a file that neither is nor claims to be one."""
    claims = path.suffix.lower() in _PICTURE_SUFFIXES
    try:
        if not is_picture(path):
            raise Bad("image: not a JPEG, PNG, WebP or DICOM file")
    except Bad:
        if claims:
            raise
        return None
    return Document(id=id, text=_caption(path), image=path, meta=_place(id))


def _walk(folder: Path) -> Iterator[Path]:
    """Files in the order of their names, none hidden; a folder that links lead to twice is read once."""
    seen = set()

    def refuse(error: OSError) -> None:
        raise InputError(f"{Path(error.filename).name}: folder cannot be read ({error.strerror})") from error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(root)
        place = status.st_dev, status.st_ino
        folders[:] = [] if place in seen else sorted(name for name in folders if not name.startswith("."))
        if place not in seen:
            seen.add(place)
            yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _caption(path: Path) -> str:
    """``x.txt`` beside ``x.jpg``. A DICOM name often holds dots that end nothing, so the whole name counts as well."""
    stems = [path.stem, path.name] if path.suffix.lower() in _PICTURE_SUFFIXES else [path.name]
    for stem in stems:
        try:
            with path.with_name(f"{stem}.txt").open("rb") as file:
                raw = file.read(MAX_LINE + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Bad("caption: cannot be read") from error
        if len(raw) > MAX_LINE:
            raise Bad(f"caption: longer than {MAX_LINE >> 20} MiB")
        try:
            return raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise Bad("caption: not UTF-8") from error
    return ""


def _place(id: str) -> dict[str, Any]:
    """Folders often sort pictures by what they show: something to filter by."""
    folder = id.rpartition("/")[0]
    return {"folder": folder} if folder else {}


# --- column mappings -------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """Which columns make a document; metadata maps a name to its column."""

    id: str
    title: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    image: str | None = None
    metadata: Mapping[str, str] = {}

    def asked(self) -> set[str]:
        image = () if self.image is None else (self.image,)
        return {self.id, *self.title, *self.text, *image, *self.metadata.values()}


def named_columns(header: list[str]) -> Columns:
    """Columns by their own names."""
    id = next((name for name in ("_id", "id") if name in header), None)
    if id is None:
        raise InputError(f"no column _id or id; map one of: {', '.join(header)}", "mapping._id")
    own = {"title", "text", "image", id}
    return Columns(
        id=id,
        title=("title",) if "title" in header else (),
        text=("text",) if "text" in header else (),
        image="image" if "image" in header else None,
        metadata={name: name for name in header if name not in own},
    )


def mapped_columns(mapping: Mapping[str, Any], header: list[str] | None = None) -> Columns:
    """A mapping as it was given, checked; with `header`, every column must be there."""
    for name in mapping:
        if name not in ("_id", "title", "text", "image", "metadata"):
            raise InputError("mapping: unknown name; expected _id, title, text, image, metadata", f"mapping.{name}")
    if not isinstance(mapping.get("_id"), str):
        raise InputError("mapping: expected the column of the id under _id", "mapping._id")
    metadata = mapping.get("metadata", {})
    if not isinstance(metadata, Mapping):
        metadata = {column: column for column in _several(metadata, "metadata")}
    image = mapping.get("image")
    columns = Columns(
        id=mapping["_id"],
        title=_several(mapping.get("title"), "title"),
        text=_several(mapping.get("text"), "text"),
        image=_several(image, "image")[0] if image else None,
        metadata={name: _several(column, f"metadata.{name}")[0] for name, column in metadata.items()},
    )
    if header is not None and (missing := sorted(columns.asked() - set(header))):
        raise InputError(f"mapping: no column {', '.join(missing)}; there are: {', '.join(header)}", "mapping")
    return columns


def _several(value: Any, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    names = value if isinstance(value, list | tuple) else [value]
    if not names or not all(isinstance(column, str) and column for column in names):
        raise InputError(f"mapping: expected a column or a list of columns under {name}", f"mapping.{name}")
    return tuple(names)


def mapping_beside(path: Path) -> Mapping[str, Any] | None:
    beside = path.with_name(f"{path.stem}.mapping.json")
    if not beside.exists():
        return None
    with opened(beside) as file:
        raw = file.read(MAX_LINE)
    try:
        mapping = parsed(raw.decode("utf-8-sig"))
    except (Bad, UnicodeDecodeError) as error:
        raise InputError(f"{beside.name}: {error}", "mapping") from error
    if not isinstance(mapping, dict):
        raise InputError(f"{beside.name}: expected a JSON object", "mapping")
    return mapping


def mapped(path: Path, columns: Columns) -> Items:
    """Rows of a CSV or JSONL file, each with the columns that make a document."""
    is_text = path.suffix in (".csv", ".tsv")
    rows = csv_rows(path) if is_text else json_rows(path)

    def renamed(row: Row) -> Row:
        id = row.get(columns.id)
        return {
            "_id": str(id) if isinstance(id, int) and not isinstance(id, bool) else id,
            "title": _joined(row, columns.title, " "),
            "text": _joined(row, columns.text, "\n"),
            "image": row.get(columns.image) if columns.image else None,
            "metadata": {name: typed(row[c]) if is_text else row.get(c) for name, c in columns.metadata.items()},
        }

    return _documents(path, rows, renamed)


def _joined(row: Row, columns: tuple[str, ...], between: str) -> str:
    return between.join(filter(None, (checked_text(row, column).strip() for column in columns)))
