"""The batch job: nothing is encoded twice, nothing is swapped before it is whole, nothing that was good is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexers import intake
from indexers import rebuild as job
from indexers.embedded import open_index, writer_lock
from indexers.rebuild import Summary, build, delete, rebuild, rollback
from retrieval.errors import Conflict, InputError, Invalid, NotFound
from retrieval.types import Document, Encoded, Item, Prepared, Rejected, Snapshot, SpaceInfo
from tests.fakes import HashingEncoder

DIM = 8
ENCODER = HashingEncoder(dim=DIM)
SPACES = {"text": SpaceInfo("text", DIM, ENCODER.digests)}


class Preparing:
    """Counts what it encodes; refuses documents whose text says so; may stop after some batches."""

    def __init__(self, digest: str = "hashing", batches: int = 1_000_000) -> None:
        self.digest = digest
        self.batches = batches
        self.seen: list[str] = []

    def __call__(self, documents: Sequence[Document]) -> Prepared:
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        self.seen += [d.id for d in documents]
        good = [d for d in documents if "bad" not in d.text]
        rejected = [Rejected(None, d.id, "cannot be read") for d in documents if "bad" in d.text]
        rows = [row for row, d in enumerate(good) if d.text]
        matrix = ENCODER.encode_documents([Item(text=good[row].text) for row in rows])
        return Prepared(good, {("text", "text"): Encoded(np.array(rows, np.int64), matrix)} if rows else {}, rejected)


def quiet(phase: str, done: int, total: int | None) -> None: ...


def documents(count: int) -> list[Document]:
    return [Document(id=f"id{n:03d}", text=f"word{n % 5} word{n % 7}", meta={"n": n}) for n in range(count)]


def made(home: Path, source: Any, prepare: Preparing | None = None, **options: Any) -> Summary:
    arguments = {"config": {"name": "test"}, "spaces": SPACES, "vector_index": "flat", "progress": quiet} | options
    return build(home, source, prepare or Preparing(), **arguments)


def ids(home: Path) -> list[str]:
    index = open_index(home)
    try:
        return sorted(index.snapshot().sample(1_000))
    finally:
        index.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "collection"


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH", 10)
    monkeypatch.setattr(intake, "BATCH", 10)


# --- index -----------------------------------------------------------------------------------------


def test_a_collection_becomes_equal_to_its_source(home: Path) -> None:
    done = made(home, documents(25))
    assert (done.generation, done.documents, done.added, done.reused, done.rejected) == (1, 25, 25, 0, 0)
    index = open_index(home)
    assert index.config == {"name": "test"}
    made(home, documents(30)[5:])
    assert sorted(index.snapshot().sample(99)) == [d.id for d in documents(30)[5:]]
    assert index.snapshot().generation == 2
    index.close()


def test_an_empty_source_makes_an_empty_collection(home: Path) -> None:
    assert made(home, []).documents == 0
    assert ids(home) == []


def test_what_a_collection_holds_already_is_not_encoded_again(home: Path) -> None:
    made(home, documents(25))
    prepare = Preparing()
    changed = [*documents(25)[:-1], Document(id="id024", text="other"), Document(id="new", text="word1")]
    done = made(home, changed, prepare)
    assert sorted(prepare.seen) == ["id024", "new"]
    assert (done.added, done.reused, done.documents) == (2, 24, 26)
    assert made(home, changed[::-1], prepare).added == 0
    assert len(prepare.seen) == 2


def test_another_encoder_encodes_everything_again(home: Path) -> None:
    made(home, documents(25))
    prepare = Preparing(digest="another")
    assert made(home, documents(25), prepare).added == 25


def test_an_interrupted_build_goes_on_where_it_stopped(home: Path) -> None:
    made(home, documents(5))
    source = [*documents(5), *(Document(id=f"more{n}", text=f"word{n}") for n in range(95))]
    with pytest.raises(KeyboardInterrupt):
        made(home, source, Preparing(batches=4))
    assert len(ids(home)) == 5
    prepare = Preparing()
    done = made(home, source, prepare)
    assert (done.documents, done.added, done.reused) == (100, 60, 40)
    assert len(prepare.seen) == 60
    assert list((home / "encoded").iterdir()) == []


def test_a_damaged_batch_is_encoded_again(home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(home, documents(30), Preparing(batches=2))
    first, second = sorted((home / "encoded").iterdir())
    first.write_bytes(first.read_bytes()[:-7])
    done = made(home, documents(30))
    assert (done.added, done.reused, done.documents) == (20, 10, 30)
    assert second


def test_shards_are_encoded_apart_and_published_together(home: Path) -> None:
    prepares = [Preparing() for _ in range(4)]
    for shard in range(3):
        done = made(home, documents(65), prepares[shard], shard=(shard, 3))
        assert (done.generation, done.documents) == (0, 0)
        with pytest.raises(NotFound):
            open_index(home)
    done = made(home, documents(65), prepares[3])
    assert (done.documents, done.added, done.reused) == (65, 0, 65)
    assert prepares[3].seen == []
    seen = [id for prepare in prepares for id in prepare.seen]
    assert sorted(seen) == sorted(set(seen))


def test_a_shard_that_is_missing_is_encoded_at_the_end(home: Path) -> None:
    made(home, documents(40), shard=(0, 2))
    done = made(home, documents(40))
    assert (done.added, done.reused) == (20, 20)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_out_of_range_is_refused(home: Path, shard: tuple[int, int]) -> None:
    with pytest.raises(Invalid, match="shard"):
        made(home, documents(3), shard=shard)


def test_bad_items_go_to_the_quarantine_and_the_rest_goes_on(home: Path) -> None:
    source = [
        Rejected(3, None, "invalid JSON"),
        *documents(3),
        Document(id="id001", text="again"),
        Document(id="x", text="bad"),
    ]
    done = made(home, source)
    assert (done.documents, done.rejected) == (3, 3)
    lines = [json.loads(line) for line in done.quarantine.read_text().splitlines()]
    assert [(line["line"], line["id"]) for line in lines] == [(3, None), (None, "id001"), (None, "x")]
    assert all("again" not in line["reason"] for line in lines)
    index = open_index(home)
    fetched = index.snapshot().fetch(["id001"])[0]
    assert fetched is not None
    assert fetched.text == documents(2)[1].text
    index.close()
    assert made(home, source).rejected == 3


def test_documents_that_cannot_be_stored_are_left_out(home: Path) -> None:
    bad = [
        Document(id="\ud800"),
        Document(id=""),
        Document(id="a", text="\udfff"),
        Document(id="b", meta={"n": object()}),
    ]
    done = made(home, [*bad, *documents(3)])
    assert (done.documents, done.rejected) == (3, 4)


@pytest.mark.parametrize("bad", [Rejected(3, None, "invalid JSON"), documents(1)[0], Document(id="x", text="bad")])
def test_strict_stops_at_the_first_bad_item(home: Path, bad: Any) -> None:
    made(home, documents(2))
    with pytest.raises(Invalid):
        made(home, [*documents(12), bad], strict=True)
    assert len(ids(home)) == 2


def test_vectors_of_the_wrong_dimension_are_refused(home: Path) -> None:
    with pytest.raises(Conflict, match="dimensions"):
        made(home, documents(3), spaces={"text": SpaceInfo("text", DIM + 1, ENCODER.digests)})
    with pytest.raises(NotFound):
        open_index(home)


def test_an_unknown_vector_index_is_refused_before_anything_is_done(home: Path) -> None:
    with pytest.raises(InputError):
        made(home, documents(3), vector_index="magic")
    assert not home.exists()


def test_a_gate_keeps_what_it_refuses_from_being_published(home: Path) -> None:
    made(home, documents(3))

    def refuse(snapshot: Snapshot) -> None:
        assert len(snapshot) == 5
        raise Conflict("not good enough")

    for attempt in (
        lambda: made(home, documents(5), gate=refuse),
        lambda: rebuild(home, progress=quiet, gate=lambda _: 1 / 0),
    ):
        with pytest.raises((Conflict, ZeroDivisionError)):
            attempt()  # type: ignore[no-untyped-call]
    assert len(ids(home)) == 3
    assert made(home, documents(5), gate=lambda snapshot: None).added == 0


def test_two_builds_at_once_are_refused_and_readers_are_not(home: Path) -> None:
    made(home, documents(3))

    def greedy() -> Iterator[Document]:
        with pytest.raises(Conflict, match="held by another writer"):
            made(home, documents(4))
        assert len(ids(home)) == 3
        yield from documents(5)

    assert made(home, greedy()).documents == 5


def test_progress_names_phases_and_reaches_the_total(home: Path) -> None:
    heard: list[tuple[str, int, int | None]] = []
    made(home, documents(25), progress=lambda *told: heard.append(told))
    assert heard[:4] == [("encode", 0, 25), ("encode", 10, 25), ("encode", 20, 25), ("encode", 25, 25)]
    assert ("assemble", 3, 3) in heard
    heard.clear()
    made(home, iter(documents(25)), progress=lambda *told: heard.append(told))
    assert heard[0] == ("encode", 0, None)


# --- rebuild, rollback, delete ---------------------------------------------------------------------


def test_a_rebuild_keeps_documents_and_drops_what_was_deleted(home: Path) -> None:
    made(home, documents(25))
    index = open_index(home)
    index.remove(["id003"])
    index.publish()
    before = [index.snapshot().fetch([d.id])[0] for d in documents(25)]
    vectors = index.snapshot().vectors("text", "text", [d.id for d in documents(25)])
    done = rebuild(home, vector_index="hnsw", progress=quiet)
    assert (done.generation, done.documents, done.added) == (2, 24, 0)
    snapshot = index.snapshot()
    assert snapshot.generation == 2
    assert len(snapshot.rows) == 24
    assert [snapshot.fetch([d.id])[0] for d in documents(25)] == before
    again = snapshot.vectors("text", "text", [d.id for d in documents(25)])
    np.testing.assert_array_equal(again.matrix, vectors.matrix)
    assert snapshot.describe()["vector_index"] == "hnsw"
    assert index.config == {"name": "test"}
    index.close()


def test_a_rebuild_can_change_the_configuration(home: Path) -> None:
    made(home, documents(2))
    rebuild(home, config={"name": "other"}, progress=quiet)
    index = open_index(home)
    assert index.config == {"name": "other"}
    index.close()


def test_what_is_written_during_a_rebuild_is_carried_over(home: Path) -> None:
    made(home, documents(25))
    index = open_index(home)
    extra = [Document(id="published", text="word1"), Document(id="id001", text="replaced")]
    pending = [Document(id="pending", text="word2")]

    def encoded(some: list[Document]) -> Any:
        matrix = ENCODER.encode_documents([Item(text=d.text) for d in some])
        return {("text", "text"): Encoded(np.arange(len(some)), matrix)}

    def meanwhile(snapshot: Snapshot) -> None:
        index.add(extra, encoded(extra))
        index.remove(["id002"])
        index.publish()
        index.add(pending, encoded(pending))
        index.remove(["id003", "published"])

    rebuild(home, progress=quiet, gate=meanwhile)
    snapshot = index.snapshot()
    assert snapshot.generation == 2
    assert snapshot.sound
    expected = {d.id: d.text for d in [*documents(25), *extra] if d.id != "id002"}
    assert {d.id: d.text for d in snapshot.fetch(snapshot.sample(99)) if d} == expected
    index.publish()
    snapshot = index.snapshot()
    expected = {id: text for id, text in expected.items() if id not in ("id003", "published")} | {"pending": "word2"}
    assert {d.id: d.text for d in snapshot.fetch(snapshot.sample(99)) if d} == expected
    assert len(snapshot.vectors("text", "text", list(expected)).rows) == len(expected)
    index.close()


def test_readers_that_started_on_the_old_generation_finish_on_it(home: Path) -> None:
    made(home, documents(12))
    index = open_index(home)
    old = index.snapshot()
    made(home, documents(3))
    assert len(index.snapshot()) == 3
    assert len(old) == 12
    assert old.fetch(["id011"])[0] is not None
    assert len(old.search_text(["word1"], 20)[0]) > 1
    index.close()


def test_rollback_goes_back_to_the_last_good_generation(home: Path) -> None:
    made(home, documents(3))
    with pytest.raises(NotFound, match="no earlier generation"):
        rollback(home)
    made(home, documents(5))
    index = open_index(home)
    assert rollback(home) == 1
    assert len(index.snapshot()) == 3
    with pytest.raises(NotFound):
        rollback(home)
    assert made(home, documents(7)).generation == 3
    assert rollback(home) == 1
    assert len(index.snapshot()) == 3
    index.close()


def test_only_the_last_good_generation_and_its_files_are_kept(home: Path) -> None:
    for count in (3, 5, 7, 9):
        made(home, documents(count))
    assert sorted(path.name for path in (home / "generations").iterdir()) == ["000003", "000004"]
    assert len(list((home / "shards").iterdir())) == 2
    assert rollback(home) == 3
    assert len(ids(home)) == 7


def test_what_a_crash_left_is_swept(home: Path) -> None:
    made(home, documents(3))
    (home / "generations" / "000002.partial").mkdir()
    (home / "generations" / "000002.partial" / "store.sqlite").write_bytes(b"half")
    (home / "shards" / ("vectors-" + "0" * 64 + ".safetensors")).write_bytes(b"orphan")
    (home / "current.0.writing").write_bytes(b"half")
    assert len(ids(home)) == 3
    rebuild(home, progress=quiet)
    assert sorted(path.name for path in (home / "generations").iterdir()) == ["000001", "000002"]
    assert list(home.glob("*.writing")) == []
    assert len(list((home / "shards").iterdir())) == 1


def test_a_deleted_collection_is_gone(home: Path) -> None:
    with pytest.raises(NotFound):
        delete(home)
    made(home, documents(3))
    delete(home)
    assert list(home.parent.iterdir()) == []
    with pytest.raises(NotFound):
        open_index(home)
    assert made(home, documents(2)).generation == 1


def test_rebuilding_or_rolling_back_nothing_is_refused(home: Path) -> None:
    for verb in (lambda: rebuild(home, progress=quiet), lambda: rollback(home)):
        with pytest.raises(NotFound):
            verb()  # type: ignore[no-untyped-call]


def test_a_writer_waits_for_its_turn_and_says_so(home: Path) -> None:
    made(home, documents(3))
    with writer_lock(home), pytest.raises(Conflict, match="held by another writer"), writer_lock(home, wait_s=0.05):
        pass
