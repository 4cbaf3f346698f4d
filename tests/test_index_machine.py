"""A state machine drives the embedded index, through two handles, against a brute-force oracle."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from indexers import embedded, publish
from indexers.embedded import open_index
from indexers.rebuild import build, rebuild, rollback
from retrieval.analysis import tokens
from retrieval.filters import matches, parse
from retrieval.types import Assertion, Document, Encoded, Finding, Item, Part, Prepared, Side, SpaceInfo
from tests.fakes import HashingEncoder

DIM = 8
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing is killed here, so no disk is needed
ENCODER = HashingEncoder(dim=DIM)
SPACES = {"text": SpaceInfo("text", DIM, ENCODER.digests)}
WORDS = ("heart", "lung", "rib", "nodule")
IDS = st.sampled_from([f"id{n}" for n in range(12)])
TEXTS = st.lists(st.sampled_from([*WORDS, "the"]), max_size=4).map(" ".join)
METAS = st.fixed_dictionaries(
    {}, optional={"n": st.integers(0, 3), "tags": st.lists(st.sampled_from("ab"), max_size=2)}
)
DOCUMENTS = st.builds(lambda id, text, meta: Document(id=id, text=text, meta=meta), IDS, TEXTS, METAS)
WHERES: list[dict[str, Any] | None] = [
    None, {"n": 1}, {"n": {"$gte": 2}}, {"tags": "a"}, {"$not": {"n": {"$exists": True}}},
    {"$or": [{"n": 0}, {"tags": "b"}]},
]  # fmt: skip


def linked(document: Document) -> Document:
    at = document.text.find("nodule")
    found = (Finding("nodule", Assertion.affirmed, (at, at + 6)),) if at >= 0 else ()
    return Document(id=document.id, text=document.text, meta=document.meta, findings=found)


def encodings(documents: list[Document]) -> dict[tuple[str, Side], Encoded]:
    rows = [row for row, document in enumerate(documents) if document.text]
    if not rows:
        return {}
    matrix = ENCODER.encode_documents([Item(text=documents[row].text) for row in rows])
    return {("text", "text"): Encoded(np.array(rows, np.int64), matrix)}


class Preparing:
    digest = "hashing"

    def __call__(self, documents: Any) -> Prepared:
        held = [linked(document) for document in documents]
        return Prepared(held, encodings(held), [])


def quiet(phase: str, done: int, total: int | None) -> None: ...


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=MEMORY)) / "collection"
        self.written: dict[str, Document] = {}
        self.shown: dict[str, Document] = {}
        self.earlier: dict[str, Document] | None = None  # what a rollback would show

    @initialize(documents=st.lists(DOCUMENTS, max_size=8), kind=st.sampled_from(["flat", "hnsw"]))
    def begin(self, documents: list[Document], kind: str) -> None:
        self.kind = kind
        self._build(documents)
        self.earlier = None
        self.index = open_index(self.home)
        self.reader = open_index(self.home)

    def _build(self, documents: list[Document]) -> None:
        build(self.home, documents, Preparing(), config={}, spaces=SPACES, vector_index=self.kind, progress=quiet)
        first: dict[str, Document] = {}
        for document in documents:
            first.setdefault(document.id, document)
        self.earlier, self.shown, self.written = self.shown, first, dict(first)

    @rule(documents=st.lists(DOCUMENTS, min_size=1, max_size=10))
    def add(self, documents: list[Document]) -> None:
        held = [linked(document) for document in documents]
        self.index.add(held, encodings(held))
        self.written |= {document.id: document for document in documents}

    @rule(ids=st.lists(IDS, max_size=4))
    def remove(self, ids: list[str]) -> None:
        assert self.index.remove(ids) == len(set(ids) & self.written.keys())
        for id in ids:
            self.written.pop(id, None)

    @rule()
    def publish(self) -> None:
        self.index.publish()
        self.shown = dict(self.written)

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = open_index(self.home)

    @rule(kind=st.sampled_from([None, "flat", "hnsw"]))
    def rebuild(self, kind: str | None) -> None:
        self.kind = kind or self.kind
        rebuild(self.home, vector_index=kind, progress=quiet)
        self.earlier = None  # the generation before goes on to hold what is shown now, but pending writes stay there

    @rule(documents=st.lists(DOCUMENTS, max_size=8))
    def build_anew(self, documents: list[Document]) -> None:
        pending = self.written != self.shown
        self._build(documents)
        if pending:
            self.earlier = None

    @rule()
    def roll_back(self) -> None:
        if self.earlier is not None:
            rollback(self.home)
            self.shown, self.written, self.earlier = self.earlier, dict(self.earlier), None

    @invariant()
    def every_reader_sees_what_was_published(self) -> None:
        if not hasattr(self, "reader"):
            return
        for handle in (self.index, self.reader):
            snapshot = handle.snapshot()
            assert len(snapshot) == len(self.shown)
            assert set(snapshot.parts.values()) == {"ok"}
            for id, got in zip([*self.shown, "nobody"], snapshot.fetch([*self.shown, "nobody"]), strict=True):
                expected = self.shown.get(id)
                assert (got and (got.text, got.meta)) == (expected and (expected.text, expected.meta))

    @rule(
        words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3),
        where=st.sampled_from(WHERES),
        k=st.integers(1, 14),
    )
    def search(self, words: list[str], where: dict[str, Any] | None, k: int) -> None:
        snapshot, filter = self.reader.snapshot(), parse(where)
        allowed = {id: d for id, d in self.shown.items() if filter is None or matches(filter, d.meta)}
        assert snapshot.count(filter) == len(allowed)

        hits = {hit.id for hit in snapshot.search_text([" ".join(words)], 100, filter)[0]}
        assert hits == {id for id, d in allowed.items() if set(tokens(d.text)) & set(tokens(" ".join(words)))}
        assert len(snapshot.search_text([" ".join(words)], k, filter)[0]) == min(k, len(hits))

        query = ENCODER.encode_queries([Item(text=" ".join(words))])
        held = sorted(id for id, d in allowed.items() if d.text)
        matrix = ENCODER.encode_documents([Item(text=allowed[id].text) for id in held]) if held else np.zeros((0, DIM))
        scores = dict(zip(held, (matrix @ query[0]).tolist(), strict=True))
        expected = sorted(held, key=lambda id: (-round(scores[id], 5), id))[:k]
        got = snapshot.search_vectors("text", query, k, filter)[0]
        assert [hit.id for hit in got] == expected
        np.testing.assert_allclose([hit.score for hit in got], [scores[id] for id in expected], atol=1e-5)

        part = Part(findings=(Finding("nodule", Assertion.affirmed, (0, 6)),))
        found = snapshot.search_findings([part], 100, filter, _holders)[0]
        assert [hit.id for hit in found] == sorted(id for id, d in allowed.items() if "nodule" in d.text)

    def teardown(self) -> None:
        if hasattr(self, "reader"):
            self.index.close()
            self.reader.close()
        shutil.rmtree(self.home.parent, ignore_errors=True)  # tantivy's watcher may lock a folder that is just going


def _holders(part: Part, postings: Any) -> Any:
    return np.isin(np.arange(postings.size), postings.rows("nodule", Assertion.affirmed)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few documents are enough to seal tails, to write shards and to rewrite derived parts."""
    monkeypatch.setattr(publish, "SEALED_AT", 6)
    monkeypatch.setattr(embedded, "SHARD_AT", 5)
    monkeypatch.setattr(publish, "_much", lambda changed, total, least: changed > 3)


def test_any_history_equals_the_oracle() -> None:
    machine = IndexMachine.TestCase
    machine.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
    machine("runTest").runTest()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_histories_equal_the_oracle() -> None:
    machine = IndexMachine.TestCase
    machine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
    machine("runTest").runTest()
