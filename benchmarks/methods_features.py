"""What the arms of `benchmarks.methods` learn from: vectors of frozen encoders, computed once and kept in .bench.

Files are named by what they depend on, but for the ontology, whose matrix stays as it was when it was first computed.

Shapes: Q queries, N documents (of SciFact) or reports, M films, D dimensions of the frozen encoders.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.collections import BENCH, data
from benchmarks.ontology_reports import FINDINGS, Report
from encoders.clip import image_encoder
from encoders.studies import sentences
from encoders.text import text_encoder
from indexers.lexical import Scan
from ontology.linker import load_linker
from ontology.tversky import measure, tversky_matrix
from retrieval.files import read_source
from retrieval.types import Document, Encoder, Item, Matrix

KEPT = BENCH / "methods"
MODELS = BENCH / "models"
DEPTH = 200  # how far BM25 ranks
BLOCK = 256  # items encoded at once: what a stopped run loses

Array = NDArray[Any]


class Claims(NamedTuple):
    """SciFact. part: per query "fit", "validate" or "test"; the first two are cut from train by a hash of the id."""

    documents: Matrix  # (N, D)
    queries: Matrix  # (Q, D)
    lexical: NDArray[np.float32]  # (Q, N) BM25, 0 beyond the first DEPTH
    grades: NDArray[np.uint8]  # (Q, N)
    part: NDArray[np.str_]  # (Q,)
    texts: list[str]  # of the queries
    contents: list[Document]


class Graded(NamedTuple):
    """Cranfield: another collection, whose grades say how relevant an abstract is; nothing learns from it."""

    documents: Matrix  # (N, D)
    queries: Matrix  # (Q, D)
    grades: NDArray[np.int64]  # (Q, N); -1 where there is none


class Reports(NamedTuple):
    """The Indiana reports. part: "fit" and "validate" are of train, "dev" is the unseen fifth."""

    whole: Matrix  # (N, D)
    findings: Matrix  # (N, D)
    impression: Matrix  # (N, D)
    both: NDArray[np.bool_]  # (N,) has both sections
    keys: list[str]  # equal texts, equal keys
    conclusions: list[str]  # texts of the impressions
    tversky: NDArray[np.float32]  # (N, N) by the ontology, from the texts alone
    gold: NDArray[np.bool_]  # (N, F) human labels: they judge, and never teach
    part: NDArray[np.str_]  # (N,)


class Pictures(NamedTuple):
    """The frontal films of the reports."""

    films: Matrix  # (M, D)
    owner: NDArray[np.int64]  # (M,) the report of each film


def claims() -> Claims:
    source = read_source(data() / "scifact")
    documents = [d for d in source.documents() if isinstance(d, Document)]
    row = {document.id: n for n, document in enumerate(documents)}
    judged = {split: source.qrels(split) for split in ("train", "test")}
    queries = [q for q in source.queries() if any(q.id in found for found in judged.values())]
    texts = [query.parts[0].text for query in queries]
    grades = np.zeros((len(queries), len(documents)), np.uint8)
    for n, query in enumerate(queries):
        for document, grade in (judged["test"].get(query.id) or judged["train"][query.id]).items():
            grades[n, row[document]] = grade
    return Claims(
        documents=_vectors("documents of scifact", [Item(text=d.content) for d in documents]),
        queries=_vectors("claims", [Item(text=t) for t in texts]),
        lexical=_kept("bm25", [texts, list(row)], lambda: _bm25(documents, texts)),
        grades=grades,
        part=np.array(["test" if q.id in judged["test"] else _part(q.id, 5) for q in queries]),
        texts=texts,
        contents=documents,
    )


def cranfield() -> Graded:
    """Grades from 1 up. Each query has one abstract of grade 0 (-1 in the original), which lies nearest of all: it
    looks like the one that the question was made from, and is left out."""
    source = read_source(data() / "cranfield")
    documents = [d for d in source.documents() if isinstance(d, Document) and d.content.strip()]
    row = {document.id: n for n, document in enumerate(documents)}
    judged = source.qrels("test")
    queries = [query for query in source.queries() if query.id in judged]
    grades = np.full((len(queries), len(documents)), -1, np.int64)
    for n, query in enumerate(queries):
        for document, grade in judged[query.id].items():
            if document in row and grade > 0:
                grades[n, row[document]] = grade
    return Graded(
        documents=_vectors("documents of cranfield", [Item(text=d.content) for d in documents]),
        queries=_vectors("queries of cranfield", [Item(text=q.parts[0].text) for q in queries]),
        grades=grades,
    )


def _part(id: str, one_in: int) -> str:
    """Where an item of train goes."""
    return "validate" if zlib.crc32(b"validate" + id.encode()) % one_in == 0 else "fit"


def _bm25(documents: Sequence[Document], texts: Sequence[str]) -> NDArray[np.float32]:
    ids = [document.id for document in documents]
    row = {id: n for n, id in enumerate(ids)}
    out = np.zeros((len(texts), len(ids)), np.float32)
    scan = Scan((n, document.content) for n, document in enumerate(documents))
    for n, ranking in enumerate(scan.search(texts, DEPTH, None, ids)):
        for hit in ranking:
            out[n, row[hit.id]] = hit.score
    return out


def _rows() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (data() / "iu_xray" / "reports.jsonl").read_text("utf-8").splitlines()]
    return [r for r in rows if r["negbio_gold"] and (r["findings"] or r["impression"])]


def pictures() -> Pictures:
    films = [
        (n, data() / "iu_xray" / image["file"])
        for n, row in enumerate(_rows())
        for image in row["images"]
        if image["projection"] == "Frontal"
    ]
    vectors = _vectors("films", [Item(image=path) for _, path in films])
    return Pictures(vectors, np.array([n for n, _ in films]))


def reworded(reports: Reports) -> Matrix:
    """(N, D) the impressions of "fit" in other words; zeros for the others."""
    rows = np.flatnonzero(reports.part == "fit")
    out = np.zeros_like(reports.impression)
    out[rows] = _vectors("reworded impressions", [Item(text=_reworded(reports.conclusions[n])) for n in rows])
    return out


def reports() -> Reports:
    rows = _rows()
    found = [_report(row) for row in rows]
    sections = [[row[name] or "none" for row in rows] for name in ("findings", "impression")]
    held_out = [zlib.crc32(report.id.encode()) % 5 == 0 for report in found]
    texts = [report.text for report in found]
    return Reports(
        whole=_vectors("reports", [Item(text=t) for t in texts]),
        findings=_vectors("findings", [Item(text=t) for t in sections[0]]),
        impression=_vectors("impressions", [Item(text=t) for t in sections[1]]),
        both=np.array([bool(row["findings"] and row["impression"]) for row in rows]),
        keys=texts,
        conclusions=sections[1],
        tversky=_tversky(texts),
        gold=np.array([[finding in report.gold for finding in FINDINGS] for report in found]),
        part=np.array(["dev" if held else _part(r.id, 6) for held, r in zip(held_out, found, strict=True)]),
    )


def _report(row: dict[str, Any]) -> Report:
    text = " ".join(filter(None, (row["findings"], row["impression"]))).strip()
    return Report(row["uid"], text, frozenset(f for f in FINDINGS if row["negbio_gold"][f]))


def _reworded(text: str) -> str:
    """The same said otherwise: sentences in the opposite order, without capitals and stops.

    >>> _reworded("Heart is large. No effusion.")
    'in summary there is: no effusion; heart is large'
    """
    return "in summary there is: " + "; ".join(s.rstrip(".;:").lower() for s in reversed(sentences(text) or [text]))


def _tversky(texts: Sequence[str]) -> NDArray[np.float32]:
    linker = load_linker(None, MODELS)

    def make() -> NDArray[np.float32]:
        found = linker.link(texts)
        return np.asarray(tversky_matrix(found, found, measure(linker)), np.float32)

    return np.asarray(_kept("tversky", [texts, linker.digest], make), np.float32)


def _vectors(name: str, items: Sequence[Item]) -> Matrix:
    """(N, D) by the product's own encoders."""
    encoder = _encoder(image=bool(items[0].image))

    def block(start: int) -> Array:
        some = items[start : start + BLOCK]
        key = [dict(encoder.digests), [str(item.image or item.text) for item in some]]
        return _kept(f"{name} {start}", key, lambda: encoder.encode_documents(some))

    return np.asarray(np.concatenate([block(start) for start in range(0, len(items), BLOCK)]), np.float32)


def _encoder(image: bool) -> Encoder:
    text = text_encoder(None, MODELS)
    return image_encoder(None, text, MODELS) if image else text


def _kept(name: str, key: object, make: Callable[[], Array]) -> Array:
    """An array, made once. The file is named by what it depends on."""
    digest = hashlib.sha256(json.dumps([name, key]).encode()).hexdigest()[:16]
    path = KEPT / f"{name.replace(' ', '-')}-{digest}.npy"
    if not path.exists():
        print(f"making {path.name}", flush=True)
        KEPT.mkdir(parents=True, exist_ok=True)
        made = make()
        part = path.with_suffix(".part.npy")
        np.save(part, made, allow_pickle=False)
        part.replace(path)
    return np.asarray(np.load(path, allow_pickle=False))


if __name__ == "__main__":
    claims(), cranfield(), reworded(reports()), pictures()
