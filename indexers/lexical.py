"""BM25 over `retrieval.analysis` tokens: tantivy, and an exact scan for when its files cannot be trusted.

tantivy is given tokens joined by blanks and splits at blanks, so the analyzer is ours alone. Only
documents with at least one token are in it, since documents without would count in its averages. Its
scores hold the factor k1 + 1 that Lucene dropped; it is divided out, so that both engines agree.

A published lexical index is a folder that never changes: the next one starts from hard links to its
immutable segment files.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tantivy
from numpy.typing import NDArray

from indexers.rows import ranked
from indexers.scan import TIE
from indexers.shards import Checksums, Damaged, checksums, disk
from retrieval import analysis
from retrieval.errors import BackendError
from retrieval.types import Ranking

K1, B = 1.2, 0.75  # fixed in tantivy
Mask = NDArray[np.bool_]

_HEAP_BYTES = 128_000_000
_LOCKED_FOR_S = 10.0  # at most, by a process that is being started
_SLACK = 16  # fetched beyond 1.25 k, so that most ties at the cut are seen at once
_SELECT_ROWS = 2_000  # up to so many allowed rows can be cheaper to name in the query than to fetch past
_FETCH_CHEAP = 4_000
_LOCKS = (".tantivy-meta.lock", ".tantivy-writer.lock")


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("body", tokenizer_name="whitespace", index_option="freq")
    builder.add_unsigned_field("row", indexed=True, fast=True)
    return builder.build()


# --- writing ---------------------------------------------------------------------------------------


class Folder(NamedTuple):
    """A published lexical index."""

    path: Path
    files: Checksums


def grow(previous: Folder | None, target: Path, texts: Iterable[tuple[int, str]], deaths: Iterable[int]) -> Checksums:
    """Writes a new folder: what `previous` holds, with `texts` (row, content) and without the rows `deaths`.

    The folder is complete and flushed when this returns; `previous` is left as it was.
    """
    with disk("writing the lexical index"), _tantivy("writing the lexical index"):
        target.mkdir()
        if previous is not None:
            _link(previous.path, target)
        index = tantivy.Index(_schema(), str(target))
        writer = _writer(index)
        for row in deaths:
            # By term, tantivy takes the number for a signed one and deletes nothing.
            writer.delete_documents_by_query(tantivy.Query.term_query(index.schema, "row", int(row)))
        for row, text in texts:
            if found := analysis.tokens(text):
                document = tantivy.Document()
                document.add_text("body", " ".join(found))
                document.add_unsigned("row", row)
                writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        return _settle(index, target, previous.files if previous is not None else {})


def _writer(index: tantivy.Index) -> tantivy.IndexWriter:
    """Waits for the lock of a folder that nobody else writes to.

    The lock lies on an open file. Where another thread is starting a process, as jobs do, that process holds a copy of
    the file until it runs its own program, and what was let go here is still locked for a moment.
    """
    until = time.monotonic() + _LOCKED_FOR_S
    while True:
        try:
            return index.writer(_HEAP_BYTES, 1)
        except ValueError as error:
            if "LockBusy" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _link(previous: Path, target: Path) -> None:
    """Segment files never change, so a link is a copy; the few files that do change are copied."""
    for file in previous.iterdir():
        if file.name in _LOCKS:
            continue
        if file.suffix == ".json":
            shutil.copyfile(file, target / file.name)
        else:
            try:
                os.link(file, target / file.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(file, target / file.name)


def _settle(index: tantivy.Index, folder: Path, known: Checksums) -> Checksums:
    """Drops the files of merged segments, flushes the rest and takes their checksums."""
    _writer(index).garbage_collect_files()
    for name in _LOCKS:
        (folder / name).unlink(missing_ok=True)
    return checksums(folder, known)


@contextmanager
def _tantivy(doing: str) -> Iterator[None]:
    """Turns tantivy's errors, ValueError mostly and OSError, into ours."""
    try:
        yield
    except (ValueError, SystemError, RuntimeError) as error:
        raise BackendError(f"{doing}: {error}; if the disk is full, free some space and try again") from error


# --- searching -------------------------------------------------------------------------------------


class Lexical:
    """A published tantivy folder. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        try:
            index = tantivy.Index.open(str(folder))
        except (ValueError, OSError) as error:
            raise Damaged("the lexical index cannot be opened") from error
        self._schema = index.schema
        self._searcher = index.searcher()

    def search(self, texts: Sequence[str], k: int, allowed: Mask | None, ids: Sequence[str]) -> list[Ranking]:
        """One ranking per text. allowed: (rows,), None for all."""
        with _tantivy("searching the lexical index"):
            return [self._search(Counter(analysis.tokens(text)), k, allowed, ids) for text in texts]

    def _search(self, wanted: Mapping[str, int], k: int, allowed: Mask | None, ids: Sequence[str]) -> Ranking:
        share = 1.0 if allowed is None else float(allowed.mean()) if len(allowed) else 0.0
        if not wanted or share == 0.0:
            return Ranking()
        query = self._query(wanted)
        limit = int(1.25 * k / share) + _SLACK
        if allowed is not None and limit > _FETCH_CHEAP and share * len(allowed) <= _SELECT_ROWS:
            query, limit = self._among(query, np.flatnonzero(allowed)), int(1.25 * k) + _SLACK
        total = self._searcher.num_docs
        while True:
            scores, rows = self._best(query, limit)
            last = scores[-1] if len(scores) == limit and limit < total else -np.inf
            if allowed is not None:
                kept = allowed[rows]
                scores, rows = scores[kept], rows[kept]
            if last == -np.inf or (len(scores) > k and last < scores[k - 1] - TIE):
                return Ranking(ranked(scores, rows, k, ids))
            limit = min(4 * limit, total)

    def _best(self, query: tantivy.Query, limit: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        hits = self._searcher.search(query, limit, count=False).hits
        rows = self._searcher.fast_field_values("row", [address for _, address in hits]) if hits else []
        return np.array([score for score, _ in hits], np.float64) / (K1 + 1), np.array(rows, np.int64)

    def _query(self, wanted: Mapping[str, int]) -> tantivy.Query:
        return tantivy.Query.boolean_query([(tantivy.Occur.Should, self._term(t, n)) for t, n in wanted.items()])

    def _term(self, token: str, times: int) -> tantivy.Query:
        term = tantivy.Query.term_query(self._schema, "body", token, "freq")
        return term if times == 1 else tantivy.Query.boost_query(term, float(times))

    def _among(self, query: tantivy.Query, rows: NDArray[np.int64]) -> tantivy.Query:
        these = tantivy.Query.term_set_query(self._schema, "row", rows.tolist())
        must = tantivy.Occur.Must
        return tantivy.Query.boolean_query([(must, query), (must, tantivy.Query.const_score_query(these, 0.0))])


class Scan:
    """The same BM25 over texts read from the store, for when the lexical index cannot be trusted."""

    def __init__(self, texts: Iterable[tuple[int, str]]) -> None:
        self._postings: dict[str, tuple[list[int], list[int]]] = {}
        rows: list[int] = []
        lengths: list[int] = []
        for row, text in texts:
            found = Counter(analysis.tokens(text))
            if not found:
                continue
            for token, times in found.items():
                held = self._postings.setdefault(token, ([], []))
                held[0].append(len(rows))
                held[1].append(times)
            rows.append(row)
            lengths.append(sum(found.values()))
        self._rows = np.array(rows, np.int64)
        mean = np.mean(lengths) if lengths else 1.0
        self._norms = K1 * (1 - B + B * _stored_length(np.array(lengths, np.int64)) / mean)

    def search(self, texts: Sequence[str], k: int, allowed: Mask | None, ids: Sequence[str]) -> list[Ranking]:
        return [self._search(Counter(analysis.tokens(text)), k, allowed, ids) for text in texts]

    def _search(self, wanted: Mapping[str, int], k: int, allowed: Mask | None, ids: Sequence[str]) -> Ranking:
        scores = np.zeros(len(self._rows))
        for token, times in wanted.items():
            places, counts = map(np.array, self._postings.get(token, ((), ())))
            if len(places):
                idf = np.log(1 + (len(self._rows) - len(places) + 0.5) / (len(places) + 0.5))
                scores[places] += times * idf * counts / (counts + self._norms[places])
        kept = scores > 0
        if allowed is not None and len(kept):
            kept &= allowed[self._rows]
        return Ranking(ranked(scores[kept], self._rows[kept], k, ids))


def _stored_length(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths as Lucene and tantivy keep them, in one byte: exact up to 40, then four significant bits."""
    table = np.array([_decoded(byte) for byte in range(256)], np.int64)
    stored: NDArray[np.int64] = table[np.searchsorted(table, lengths, "right") - 1]
    return stored


def _decoded(byte: int) -> int:
    if byte < 24:
        return byte
    bits, shift = (byte - 24) & 7, (byte - 24) >> 3
    return 24 + (bits if shift == 0 else (bits | 8) << (shift - 1))
