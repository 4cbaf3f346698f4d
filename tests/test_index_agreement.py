"""Both backends hold the same documents and answer the same: rankings, scores, counts, filters, facets, vectors.

Real documents where the development data are (LIGHTBOX_DATA), made-up ones elsewhere. The filters are random.
"""

from __future__ import annotations

import json
import os
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

from indexers.elastic import connect
from indexers.elastic_build import build_elastic, delete_elastic
from indexers.elastic_index import Place, open_elastic
from indexers.embedded import open_index
from indexers.rebuild import build
from ontology.tversky import Index as Constants
from ontology.tversky import Measure, findings_score
from retrieval.filters import Filter, matches, parse
from retrieval.types import Document, Encoded, Matrix, Part, Prepared, Ranking, Side, Snapshot, SpaceInfo
from server.home import silent
from tests.fakes import WordLinker, words

SIZE, DIM, QUERIES = 5_000, 64, 200
SIDES: Sequence[Sequence[Side]] = (("text",), ("text", "image"))
SPACES = {"text": SpaceInfo("text", DIM, {"text": "words", "image": "titles"})}
KINDS = {"cell": "tissue", "tumor": "disease", "cancer": "disease", "infection": "disease", "protein": "molecule"}
LINKER = WordLinker(["disease", "tissue", "molecule", *KINDS, "gene", "mice", "risk", "age", "heart"])
MEASURE = Measure(Constants(), lambda concept: (), lambda concept: [KINDS[concept]] if concept in KINDS else [])
SCORE = findings_score(MEASURE)


@lru_cache(100_000)
def direction(word: str) -> Matrix:
    return np.random.default_rng(abs(hash_of(word))).standard_normal(DIM).astype(np.float32)


def hash_of(word: str) -> int:
    return int.from_bytes(word.encode()[:8].ljust(8, b"\0"), "big")


def vector(text: str) -> Matrix:
    total = np.sum([direction(word) for word in words(text)] or [direction("nothing")], axis=0)
    return np.asarray(total / np.linalg.norm(total), np.float32)


class Pair(NamedTuple):
    documents: list[Document]
    embedded: Snapshot
    elastic: Snapshot


class ByWords:
    """Text vectors from texts, picture vectors from titles where a document has the field `pictured`."""

    digest = "by words"

    def __call__(self, documents: Sequence[Document]) -> Prepared:
        linked = [replace(d, findings=LINKER.link([d.text])[0]) for d in documents]
        held = {
            "text": {n: vector(d.content) for n, d in enumerate(documents) if words(d.content)},
            "image": {n: vector(d.title) for n, d in enumerate(documents) if d.meta.get("pictured")},
        }
        found = {
            ("text", side): Encoded(np.array(list(some), np.int64), np.stack(list(some.values())))
            for side, some in held.items()
            if some
        }
        return Prepared(linked, found, [])  # type: ignore[arg-type]


def texts() -> list[tuple[str, str]]:
    """(title, text) of real documents, or of made-up ones."""
    corpus = Path(os.environ["LIGHTBOX_DATA"]) / "scifact" / "corpus.jsonl"
    if corpus.is_file():
        rows = [json.loads(line) for line in corpus.read_text().splitlines()[:SIZE]]
        return [(row["title"], row["text"][:600]) for row in rows]
    rng = np.random.default_rng(0)
    vocabulary = [f"w{n}" for n in range(3_000)] + sorted(LINKER.vocabulary) * 20
    draw = rng.zipf(1.3, (SIZE, 60)) % len(vocabulary)
    return [(vocabulary[row[0]], " ".join(vocabulary[n] for n in row)) for row in draw]


def meta(rng: random.Random) -> dict[str, Any]:
    """Every kind of value, often missing, sometimes of another kind than elsewhere."""
    choices: dict[str, Callable[[], Any]] = {
        "year": lambda: rng.choice([rng.randint(1990, 2024), float(rng.randint(1990, 2024)), "2001", None]),
        "score": lambda: rng.choice([rng.uniform(-2, 2), 0, -0.0, 2**53 + 1]),
        "view": lambda: rng.choice(["ap", "pa", "lateral", "Ä", "", True]),
        "tags": lambda: rng.sample(["a", "b", "c", 1, 2.5, None], rng.randint(0, 4)),
        "pictured": lambda: rng.random() < 0.5,
        "lab": lambda: {"crp": rng.randint(0, 9), "unit.name": rng.choice(["mg", "g"])},
    }
    return {name: make() for name, make in choices.items() if rng.random() < 0.7}


def condition(rng: random.Random) -> dict[str, Any]:
    path = rng.choice(["year", "score", "view", "tags", "lab.crp", "lab.unit.name", "nowhere", "pictured"])
    value: Any = rng.choice(
        [2001, 2010.0, "2001", 0, -1.5, 2**53, "ap", "pa", "Ä", "", "a", 1, 2.5, True, False, None]
    )
    operator = rng.choice(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists"])
    if operator == "$exists":
        return {path: {operator: rng.random() < 0.5}}
    if operator in ("$in", "$nin"):
        return {path: {operator: [value, rng.choice([2003, "lateral", None, 5])]}}
    if operator in ("$eq", "$ne"):
        return {path: {operator: value}}
    ordered = value if value is not None and not isinstance(value, bool) else 2005
    return {path: {operator: ordered}}


def where(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    if depth == 0 or rng.random() < 0.4:
        return condition(rng)
    name = rng.choice(["$and", "$or", "$not"])
    if name == "$not":
        return {name: where(rng, depth - 1)}
    return {name: [where(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, elasticsearch: str) -> Iterator[Pair]:
    rng = random.Random(7)
    documents = [Document(id=f"d{n:05d}", title=a, text=b, meta=meta(rng)) for n, (a, b) in enumerate(texts())]
    folder = tmp_path_factory.mktemp("pair")
    asked: Mapping[str, Any] = {"config": {}, "spaces": SPACES, "vector_index": "flat", "progress": silent}
    build(folder / "embedded", documents, ByWords(), **asked)
    cluster = connect(elasticsearch)
    place = Place(cluster, f"agreement-{uuid.uuid4().hex[:12]}", folder / "elastic")
    build_elastic(place, documents, ByWords(), **asked)
    left, right = open_index(folder / "embedded"), open_elastic(place)
    yield Pair(documents, left.snapshot(), right.snapshot())
    left.close()
    delete_elastic(place)
    cluster.close()


def asked(seed: int) -> Iterator[tuple[str, dict[str, Any] | None, Filter | None]]:
    """(words, filter) of random queries; the words are those of some document."""
    rng = random.Random(seed)
    some = texts()
    for _ in range(QUERIES):
        chosen = rng.choice(some)
        found = rng.sample(words(" ".join(chosen)), 3) + rng.sample(sorted(LINKER.vocabulary), 2)
        condition = where(rng) if rng.random() < 0.8 else None
        yield " ".join(found), condition, parse(condition)


def alike(answers: Sequence[Ranking], tolerance: float, said: object) -> None:
    """The same documents in the same order, but for those that are tied."""
    left, right = answers
    assert len(left) == len(right), said
    ours = {hit.id: hit.score for hit in left}
    for a, b in zip(left, right, strict=True):
        assert a.score == pytest.approx(b.score, abs=tolerance), said
        if a.id != b.id and left[-1].score < b.score - tolerance:  # at the cut one of several tied ones may be missing
            assert ours.get(b.id) == pytest.approx(b.score, abs=tolerance), said


def test_filters_let_the_same_documents_through(pair: Pair) -> None:
    for n, (_, said, condition) in enumerate(asked(1)):
        if condition is not None:
            expected = [d.id for d in pair.documents if matches(condition, d.meta)]
            assert n % 5 or pair.elastic.select(condition) == expected, said
            assert pair.elastic.count(condition) == pair.embedded.count(condition) == len(expected), said


def test_exact_vector_search_gives_the_same_rankings(pair: Pair) -> None:
    for k, (query, said, condition) in zip((1, 10, 100, 1000) * QUERIES, asked(2), strict=False):
        rows = vector(query)[None]
        for sides in SIDES:
            answers = [s.search_vectors("text", rows, k, condition, sides)[0] for s in (pair.embedded, pair.elastic)]
            alike(answers, 2e-6, (query, said, k))
            assert answers[1].exact


def test_findings_give_the_same_rankings(pair: Pair) -> None:
    kinds: list[Literal["text", "report"]] = ["text", "report"]
    for k, kind, (query, said, condition) in zip((1, 10, 1000) * QUERIES, kinds * QUERIES, asked(3), strict=False):
        part = Part(text=query, kind=kind, findings=LINKER.link([query])[0])
        answers = [s.search_findings([part], k, condition, SCORE)[0] for s in (pair.embedded, pair.elastic)]
        alike(answers, 2e-6, (query, said, k, kind))


def test_words_give_the_same_scores_on_one_merged_shard(pair: Pair) -> None:
    for k, (query, said, condition) in zip((1, 10, 1000) * QUERIES, asked(4), strict=False):
        answers = [s.search_text([query], k, condition)[0] for s in (pair.embedded, pair.elastic)]
        alike(answers, 1e-3, (query, said, k))


def test_looking_up_gives_the_same(pair: Pair) -> None:
    ids = [d.id for d in pair.documents[::50]] + ["nobody"]
    assert pair.elastic.fetch(ids) == pair.embedded.fetch(ids)
    for field in ("year", "view", "lab.unit.name", "pictured", "nowhere"):
        assert pair.elastic.values(field, ids) == pair.embedded.values(field, ids)
    assert pair.elastic.sides == pair.embedded.sides
    for side in SIDES[1]:
        left, right = (s.vectors("text", side, ids) for s in (pair.embedded, pair.elastic))
        assert left.rows.tolist() == right.rows.tolist()
        np.testing.assert_array_equal(left.matrix, right.matrix)


def test_several_shards_find_nearly_the_same_words(elasticsearch: str, pair: Pair, tmp_path: Path) -> None:
    cluster = connect(elasticsearch)
    place = Place(cluster, f"shards-{uuid.uuid4().hex[:12]}", tmp_path)
    spread: Mapping[str, Any] = {"config": {}, "spaces": SPACES, "vector_index": "flat", "progress": silent}
    build_elastic(place, pair.documents, ByWords(), shards=3, **spread)
    found = open_elastic(place).snapshot()
    overlaps = []
    for query, _, condition in islice(asked(5), 50):
        left, right = (s.search_text([query], 10, condition)[0] for s in (pair.embedded, found))
        if left:
            overlaps.append(len({h.id for h in left} & {h.id for h in right}) / len(left))
    assert np.mean(overlaps) >= 0.98
    delete_elastic(place)
    cluster.close()
