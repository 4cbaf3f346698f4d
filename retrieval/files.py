"""Sources on disk: BEIR folders with pictures, folders of pictures, CSV and JSONL files; TREC judgments and runs.

A source is streamed. A bad document becomes a `Rejected` (line, id and reason, never content) and the rest goes on;
a bad query or judgment is an error, since a measurement without it would flatter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retrieval.documents import (
    Items,
    beir,
    checked_id,
    checked_picture,
    checked_text,
    mapped,
    mapped_columns,
    mapping_beside,
    named_columns,
    pictures,
)
from retrieval.errors import InputError, NotFound
from retrieval.rows import Bad, Row, csv_header, json_rows, opened
from retrieval.types import Document, Hit, Part, Qrels, Query, Ranking, Rejected, Run

_QRELS_SUFFIXES = (".tsv", ".txt", ".qrels", ".qrel")


@dataclass(frozen=True, slots=True)
class Source:
    """Documents to index, and for a BEIR folder queries and judgments to measure with.

    folder: where a BEIR source stands, None for the other kinds.
    """

    name: str
    folder: Path | None
    items: Callable[[], Items]

    def documents(self) -> Iterator[Document | Rejected]:
        """One after another; of two equal ids the first wins. Pictures are there and look like pictures, unread.

        Raises InputError where the source cannot be read or holds nothing at all.
        """
        seen: set[str] = set()
        empty = True
        for line, item in self.items():
            empty = False
            if isinstance(item, Document) and item.id in seen:
                yield Rejected(line, item.id, "duplicate id: the first document with it is kept")
                continue
            if isinstance(item, Document):
                seen.add(item.id)
            yield item
        if empty:
            raise InputError(f"{self.name}: no document in it; expected lines in corpus.jsonl, rows, or pictures")

    def queries(self) -> list[Query]:
        """All queries in their order. Raises NotFound without queries.jsonl, InputError for a bad line."""
        if self.folder is None:
            raise NotFound(f"{self.name}: only a BEIR folder has queries")
        return _queries(self.folder)

    def splits(self) -> list[str]:
        """Names of the judgments there are."""
        return sorted(self._qrels())

    def qrels(self, split: str = "test") -> Qrels:
        """Query -> document -> grade. Raises NotFound with the list of splits, InputError for a bad line."""
        there = self._qrels()
        if split not in there:
            known = ", ".join(sorted(there)) or "none"
            raise NotFound(f"{self.name}: no judgments named {split!r}; there are: {known}")
        return read_qrels(there[split])

    def _qrels(self) -> dict[str, Path]:
        if self.folder is None or not (self.folder / "qrels").is_dir():
            return {}
        files = [path for path in (self.folder / "qrels").iterdir() if path.suffix in _QRELS_SUFFIXES]
        return {path.stem: path for path in sorted(files) if path.is_file() and not path.name.startswith(".")}


def read_source(path: Path | str, mapping: Mapping[str, Any] | None = None) -> Source:
    """The source at `path`: a BEIR folder, a folder of pictures, a .jsonl or a .csv/.tsv file.

    mapping: for a file, which columns make a document: ``{"_id": column, "title": columns, "text": columns, "image":
    column, "metadata": columns or {name: column}}``, columns being one name or a list that is joined; all but
    `_id` optional. Without it, a file ``x.mapping.json`` beside ``x.csv`` is taken; without that, JSONL lines are BEIR
    documents, and columns are taken by their names (`_id` or `id`, `title`, `text`, `image`, the rest metadata).
    Raises NotFound and InputError.
    """
    path = Path(path).absolute()  # what is kept of a picture must not depend on the working folder
    if path.is_dir():
        if mapping is not None:
            raise InputError(f"{path.name}: a column mapping belongs to a CSV or JSONL file, this is a folder")
        if (path / "corpus.jsonl").exists() or (path / "queries.jsonl").exists():
            return Source(path.name, path, lambda: beir(path / "corpus.jsonl"))
        return Source(path.name, None, lambda: pictures(path))
    if not path.exists():
        raise NotFound(f"{path.name}: no such file or folder")
    if path.suffix not in (".jsonl", ".ndjson", ".csv", ".tsv"):
        raise InputError(f"{path.name}: expected a folder, or a file named .jsonl, .ndjson, .csv or .tsv")
    return _file(path, mapping_beside(path) if mapping is None else mapping)


def _file(path: Path, mapping: Mapping[str, Any] | None) -> Source:
    if path.suffix in (".jsonl", ".ndjson"):
        if mapping is None:
            return Source(path.stem, None, lambda: beir(path))
        columns = mapped_columns(mapping)
        return Source(path.stem, None, lambda: mapped(path, columns))
    columns = named_columns(csv_header(path)) if mapping is None else mapped_columns(mapping, csv_header(path))
    return Source(path.stem, None, lambda: mapped(path, columns))


# --- queries ---------------------------------------------------------------------------------------------------------


def _queries(folder: Path) -> list[Query]:
    queries: dict[str, Query] = {}
    for line, row in json_rows(folder / "queries.jsonl"):
        try:
            if isinstance(row, Rejected):
                raise Bad(row.reason)
            query = _query(row, folder)
            if query.id in queries:
                raise Bad("duplicate _id")
        except Bad as bad:
            raise InputError(f"queries.jsonl line {line}: {bad}") from bad
        queries[query.id] = query
    if not queries:
        raise InputError("queries.jsonl: no query in it")
    return list(queries.values())


def _query(row: Row, folder: Path) -> Query:
    """A text and a picture are two parts."""
    id, text, image = (
        checked_id(row.get("_id")),
        checked_text(row, "text").strip(),
        checked_picture(row.get("image"), folder),
    )
    kind = row.get("kind")
    if kind not in (None, "text", "report"):
        raise Bad("kind: expected text or report")
    parts = []
    if text:
        parts.append(Part(text=text, kind=kind or kind_of(text)))
    if image is not None:
        parts.append(Part(image=image))
    if not parts:
        raise Bad("neither text nor image")
    return Query(id=id, parts=tuple(parts))


_SENTENCE_END = re.compile(r"(\w{2,})[\"')\]\u2019\u201d]*\s*[.!?]+[\"')\]\u2019\u201d]*\s+(?=\S)|\n\s*\n")
_ABBREVIATIONS = frozenset(
    ["al", "approx", "ca", "cf", "dr", "etc", "fig", "max", "min", "mr", "mrs", "ms", "no", "resp", "spp", "st", "vs"]
)


def kind_of(text: str) -> Literal["text", "report"]:
    """A text of more than one sentence is a report.

    >>> kind_of("Effusion vs. atelectasis, approx. 3 cm."), kind_of("Heart normal. No effusion.")
    ('text', 'report')
    """
    ends = _SENTENCE_END.finditer(text.strip())
    return "report" if any((end[1] or "").lower() not in _ABBREVIATIONS for end in ends) else "text"


# --- TREC ------------------------------------------------------------------------------------------------------------


def read_qrels(path: Path | str) -> Qrels:
    """Judgments of BEIR (query, document, grade, with a header) or TREC (query, 0, document, grade).

    Raises NotFound, and InputError with the line where one is bad or contradicts another.
    """
    path = Path(path)
    qrels: Qrels = {}
    for line, text in _text_lines(path):
        query, document, grade = _judgment(path, line, text)
        if line == 1 and not re.search(r"\d", grade):
            continue  # the header
        if not re.fullmatch(r"-?\d{1,9}(\.0+)?", grade):
            raise InputError(f"{path.name} line {line}: expected a whole number as grade")
        value = int(float(grade))
        if qrels.setdefault(query, {}).setdefault(document, value) != value:
            raise InputError(f"{path.name} line {line}: the document was judged before, with another grade")
    return qrels


def _judgment(path: Path, line: int, text: str) -> tuple[str, str, str]:
    match _cells(text):
        case [query, document, grade] | [query, _, document, grade]:
            return query, document, grade.strip()
        case cells:
            raise InputError(
                f"{path.name} line {line}: {len(cells)} fields; expected query-id, corpus-id, score"
                " (BEIR) or query, 0, document, grade (TREC)"
            )


def read_run(path: Path | str) -> Run:
    """A TREC run (query, Q0, document, rank, score, tag), ordered by score; ties go to the smaller id.

    Raises NotFound, and InputError with the line where one is bad.
    """
    path = Path(path)
    found: dict[str, dict[str, float]] = {}
    for line, text in _text_lines(path):
        cells = _cells(text)
        if len(cells) != 6:
            raise InputError(
                f"{path.name} line {line}: {len(cells)} fields; expected query Q0 document rank score tag"
            )
        scores = found.setdefault(cells[0], {})
        if cells[2] in scores:
            raise InputError(f"{path.name} line {line}: the document stands twice under its query")
        scores[cells[2]] = _score(cells[4], f"{path.name} line {line}")
    return {query: _ranking(scores) for query, scores in found.items()}


def _ranking(scores: Mapping[str, float]) -> Ranking:
    return Ranking(Hit(id, score) for id, score in sorted(scores.items(), key=lambda hit: (-hit[1], hit[0])))


def _score(text: str, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{where}: expected a finite number as score")
    return score


def write_run(path: Path | str, run: Run, tag: str = "lightbox") -> None:
    """Writes a TREC run whose scores fall strictly in our order.

    trec_eval orders by score alone, in short floats, and ties by id descending: a score that does not fall is lowered
    to the next float below the one before. Fields are parted by tabs where an id holds a blank.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        for query, ranking in run.items():
            before = np.float32(np.inf)
            for rank, hit in enumerate(ranking, 1):
                if not math.isfinite(hit.score):
                    raise InputError(f"run: query {query!r} has a score that is not a finite number")
                before = min(np.float32(hit.score), np.nextafter(before, np.float32(-np.inf)))
                blank = any(letter.isspace() for letter in query + hit.id)
                file.write(
                    ("\t" if blank else " ").join((query, "Q0", hit.id, str(rank), f"{before:.9g}", tag)) + "\n"
                )


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{path.name} line {number}: not UTF-8") from error
            if text.strip():
                yield number, text


def _cells(text: str) -> list[str]:
    """Fields parted by tabs, or by blanks where there is no tab."""
    return text.split("\t") if "\t" in text else text.split()
