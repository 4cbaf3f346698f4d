"""A judged text collection to learn from: documents, queries of one split with a part held out, and a first teacher.

The held-out part (`dev`) is cut by a hash of a query's first relevant document, so that two claims about one paper
never stand on both sides. The first teacher costs no model: BM25 over the whole collection together with the cosines
of the tower that is to be trained, fused as `retrieval.fusion` does: on SciFact well above either alone.

Shapes: Q queries, N documents, V terms.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from encoders.scores import digest
from encoders.studies import write_array
from retrieval.analysis import tokens
from retrieval.errors import InputError
from retrieval.evaluate import evaluate
from retrieval.files import read_source
from retrieval.types import Document, Encoder, Hit, Item, Matrix, Progress, Ranking

K1, B = 1.2, 0.75  # as both lexical indexes have them
BLOCK = 1024  # texts encoded at once
DEPTH = 1000  # to which each leg is scaled, as in a search
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")


class Asked(NamedTuple):
    """A query and the rows of its relevant documents. id: empty for one that was made from a document."""

    id: str
    text: str
    relevant: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents and the queries that teach (`train`) and choose (`dev`)."""

    documents: tuple[Document, ...]
    train: tuple[Asked, ...]
    dev: tuple[Asked, ...]

    @property
    def texts(self) -> list[str]:
        """(N,) what is encoded of each document."""
        return [document.content for document in self.documents]

    @property
    def digest(self) -> str:
        """sha256 over ids, texts and judgments."""
        rows = [[d.id, d.content] for d in self.documents]
        return digest([*rows, *self.train, "dev", *self.dev])


def read_collection(folder: Path, held_out: float, split: str = "train") -> Collection:
    """The collection in a BEIR folder. held_out: share of its judged queries that go to `dev`.

    Raises InputError where the folder, the split or a judged document is missing.
    """
    source = read_source(folder)
    documents = tuple(d for d in source.documents() if isinstance(d, Document) and d.content.strip())
    row = {document.id: n for n, document in enumerate(documents)}
    qrels = source.qrels(split)
    parts: dict[bool, list[Asked]] = {True: [], False: []}
    for query in source.queries():
        judged = sorted(id for id, grade in qrels.get(query.id, {}).items() if grade > 0 and id in row)
        if judged:
            text = " ".join(part.text for part in query.parts if part.text)
            parts[is_held_out(judged[0], held_out)].append(Asked(query.id, text, tuple(row[id] for id in judged)))
    if not parts[False] or (held_out and not parts[True]):
        raise InputError(f"{folder}: split {split!r} has too few judged queries to learn from and to judge by")
    return Collection(documents, tuple(parts[False]), tuple(parts[True]))


def is_held_out(id: str, share: float) -> bool:
    """Whether what is about this document judges instead of teaching."""
    return zlib.crc32(id.encode()) % 1000 < 1000 * share


def made_queries(collection: Collection) -> list[Asked]:
    """What a document may be asked by, made from itself: its title, and the sentence it ends on, mostly its claim."""
    made = []
    for n, document in enumerate(collection.documents):
        sentences = _SENTENCE.split(document.text)
        asked = [document.title, *(sentences[-1:] if len(sentences) > 1 else [])]
        made += [Asked("", text.strip(), (n,)) for text in asked if len(text.split()) > 3]
    return made


class Lexical:
    """BM25 over the collection, by the analysis that both lexical indexes use."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._terms: dict[str, int] = {}
        counts = self._counted(texts, learn=True)  # (N, V)
        lengths = np.asarray(counts.sum(1)).ravel()
        found = np.asarray((counts > 0).sum(0)).ravel()
        idf = np.log(1 + (len(texts) - found + 0.5) / (found + 0.5))
        rows = np.repeat(np.arange(len(texts)), np.diff(counts.indptr))
        damped = counts.data + K1 * (1 - B + B * lengths[rows] / max(lengths.mean(), 1e-9))
        counts.data = counts.data * idf[counts.indices] / damped
        self._weights = counts.T.tocsc()  # (V, N)

    def scores(self, texts: Sequence[str]) -> Matrix:
        """(Q, N)."""
        return np.asarray((self._counted(texts, learn=False) @ self._weights).toarray(), np.float32)

    def _counted(self, texts: Sequence[str], learn: bool) -> sparse.csr_matrix:
        rows, columns = [], []
        for n, text in enumerate(texts):
            for term in tokens(text):
                number = self._terms.setdefault(term, len(self._terms)) if learn else self._terms.get(term)
                if number is not None:
                    rows.append(n)
                    columns.append(number)
        shape = (len(texts), max(1, len(self._terms)))
        counts = sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape).tocsr()
        counts.sum_duplicates()
        return counts


def hybrid(lexical: Matrix, dense: Matrix, weight: float = 0.55) -> Matrix:
    """(Q, N) both legs scaled to [0, 1] within their first thousand, and summed. weight: of the dense leg.

    >>> hybrid(np.float32([[4, 2, 0]]), np.float32([[0.1, 0.9, 0.5]]), 0.5).round(3).tolist()
    [[0.5, 0.75, 0.25]]
    """
    return (1 - weight) * _scaled(lexical) + weight * _scaled(dense)


def _scaled(scores: Matrix) -> Matrix:
    width = scores.shape[1]
    kept = min(DEPTH, width)
    low = np.partition(scores, width - kept, axis=1)[:, width - kept, None]
    high = scores.max(1, keepdims=True)
    out: Matrix = np.clip((scores - low) / np.maximum(high - low, 1e-9), 0, 1).astype(np.float32)
    return out


def reranked(first: Matrix, read: Matrix, top: NDArray[np.int64], weight: float = 0.5) -> Matrix:
    """(Q, N) scores as `retrieval.retrievers.Reranked` fuses them. read: (Q, K) of the documents `top`, (Q, K)."""
    low, high = read.min(1, keepdims=True), read.max(1, keepdims=True)
    scaled = (read - low) / np.maximum(high - low, 1e-9)
    out = (1 - weight) * _scaled(first)
    np.put_along_axis(out, top, np.take_along_axis(out, top, 1) + weight * scaled.astype(np.float32), 1)
    return np.asarray(out, np.float32)


def best(scores: Matrix, k: int) -> NDArray[np.int64]:
    """(Q, K) columns with the highest scores, best first."""
    k = min(k, scores.shape[1])
    some = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1)


def ndcg(scores: Matrix, asked: Sequence[Asked]) -> float:
    """Mean nDCG@10 of (Q, N) scores, by the measure that every result here is reported in."""
    return graded_ndcg(scores, [dict.fromkeys(query.relevant, 1) for query in asked])


def graded_ndcg(scores: Matrix, grades: Sequence[Mapping[int, int]]) -> float:
    """The same for grades by column, one mapping a row."""
    top = best(scores, 10)
    run = {str(q): Ranking(Hit(str(n), float(scores[q, n])) for n in row) for q, row in enumerate(top.tolist())}
    qrels = {str(q): {str(n): grade for n, grade in row.items()} for q, row in enumerate(grades)}
    return evaluate(run, qrels, ["nDCG@10"]).means["nDCG@10"]


def kept_vectors(
    texts: Sequence[str], encoder: Encoder, cache: Path, progress: Progress, *, queries: bool = False
) -> Matrix:
    """(N, D) vectors of the texts, as documents or as queries, computed once and kept under `cache`."""
    key = digest([encoder.digests["text"], "queries" if queries else "documents", *texts])[:16]
    path = cache / f"vectors-{key}.npy"
    encode = encoder.encode_queries if queries else encoder.encode_documents
    if not path.exists():
        blocks = []
        for start in range(0, len(texts), BLOCK):
            progress("encoding texts", start, len(texts))
            blocks.append(encode([Item(text=text) for text in texts[start : start + BLOCK]]))
        write_array(path, np.concatenate(blocks))
    kept: Matrix = np.load(path, allow_pickle=False)
    return kept
