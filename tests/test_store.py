"""The store: rows, deaths, publishes and digests."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from indexers.records import Record, State
from indexers.shards import Damaged
from indexers.store import REPLACED_KEPT, Store
from retrieval.errors import BackendError
from retrieval.types import Assertion, Document, Finding, Picture


@pytest.fixture
def store(tmp_path: Path) -> Store:
    path = tmp_path / "store.sqlite"
    with Store.filling(path, {"config": {"a": 1}}):
        pass
    return Store(path)


def add(store: Store, *ids: str) -> None:
    with store.writing() as writer:
        first = writer.now.next
        records = [Record.of(first + at, Document(id=id, text=f"text of {id}")) for at, id in enumerate(ids)]
        writer.add(records, {first: b"png"})


def publish(store: Store) -> State:
    with store.writing() as writer:
        writer.publish("manifest")
    with store.reading() as reader:
        return reader.state()


def test_rows_are_given_once_and_in_order(store: Store) -> None:
    add(store, "a", "b")
    add(store, "a")
    with store.reading() as reader:
        assert [record.row for record in reader.records(0, 10)] == [0, 1, 2]
        assert reader.rows_of(["a", "b", "c"]) == [2, 1]
        assert reader.deaths(0, 1).tolist() == [0]


def test_a_published_state_is_three_numbers(store: Store) -> None:
    add(store, "a", "b")
    assert publish(store)[:3] == (1, 2, 2)
    add(store, "c")
    with store.writing() as writer:
        assert writer.remove(["a", "nobody"]) == 1
    with store.reading() as reader:
        assert reader.state().documents == 2
        assert reader.state().living == 2
        assert reader.deaths(0, 1).tolist() == []
    state = publish(store)
    assert (state.sequence, state.rows, state.documents) == (2, 3, 2)
    with store.reading() as reader:
        assert reader.deaths(1, 2).tolist() == [0]


def test_a_document_keeps_everything(store: Store) -> None:
    document = Document(
        id="ü", title="T", text="x\0y", image=Picture("digest", b"png", None, "a/b.png"), meta={"n": [1, None]},
        findings=(Finding("c", Assertion.negated, (0, 1)),),
    )  # fmt: skip
    with store.writing() as writer:
        writer.add([Record.of(0, document, "blob", "source")], {0: b"png"})
    with store.reading() as reader:
        record = reader.records_of([0])[0]
        assert record.document() == Document(
            id="ü", title="T", text="x\0y", image=Picture("digest", b"", None, "a/b.png"), meta={"n": [1, None]},
            findings=document.findings,
        )  # fmt: skip
        assert (record.blob, record.source) == ("blob", "source")
        assert reader.thumbnail(0) == b"png"
        assert reader.thumbnail(1) is None


def test_removed_documents_are_erased_by_the_publish_and_replaced_ones_later(store: Store) -> None:
    add(store, "removed", "replaced")
    publish(store)
    add(store, "replaced")
    with store.writing() as writer:
        writer.remove(["removed"])
    publish(store)
    with store.reading() as reader:
        assert sorted(reader.records_of([0, 1, 2])) == [1, 2]
        assert reader.thumbnail(0) is None
    for _ in range(REPLACED_KEPT):
        publish(store)
    with store.reading() as reader:
        assert sorted(reader.records_of([0, 1, 2])) == [2]
        assert reader.deaths(0, 99).tolist() == [0, 1]
    assert b"text of removed" not in store.path.read_bytes()


def test_vectors_go_from_the_tail_to_a_shard(store: Store) -> None:
    matrix = np.eye(3, dtype=np.float32)
    with store.writing() as writer:
        writer.add_tail("text", "image", np.array([0, 1, 5], np.int32), matrix)
    with store.reading() as reader:
        rows, vectors = reader.tail("text", "image", 5)
        assert rows.tolist() == [0, 1]
        np.testing.assert_array_equal(np.stack(vectors), matrix[:2])
        assert reader.tail("text", "text", 9)[0].tolist() == []
    with store.writing() as writer:
        writer.add_shard("text", "image", "name", np.array([0, 1], np.int32))
    with store.reading() as reader:
        assert reader.tail("text", "image", 9)[0].tolist() == [5]
        (shard,) = reader.shards()
        assert (shard.space, shard.side, shard.name, shard.rows.tolist()) == ("text", "image", "name", [0, 1])


def test_a_write_that_fails_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.writing() as writer:
            writer.add([Record.of(0, Document(id="a"))], {})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with store.reading() as reader:
        assert reader.state() == State(writes=1)
        assert list(reader.records(0, 9)) == []
    add(store, "a")


def test_a_reader_sees_one_state_whatever_is_written_meanwhile(store: Store) -> None:
    add(store, "a")
    with store.reading() as reader:
        assert reader.state().next == 1
        add(store, "b")
        assert reader.state().next == 1
        assert len(list(reader.records(0, 9))) == 1


def test_the_version_changes_with_every_write_also_of_other_handles(store: Store) -> None:
    before = store.version()
    assert store.version() == before
    other = Store(store.path)
    add(other, "a")
    after = store.version()
    assert after != before
    add(store, "b")
    assert store.version() != after
    other.close()


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("UPDATE documents SET text = 'other'", lambda reader: list(reader.records(0, 9))),
        ("UPDATE documents SET text = x'00'", lambda reader: list(reader.records(0, 9))),
        ("UPDATE documents SET id = 'b'", lambda reader: reader.records_of([0])),
        ("UPDATE thumbnails SET png = x'00'", lambda reader: reader.thumbnail(0)),
        ("UPDATE thumbnails SET png = 'text'", lambda reader: reader.thumbnail(0)),
        ("UPDATE facts SET value = '{}'", lambda reader: reader.state()),
        ("DELETE FROM facts", lambda reader: reader.about()),
        ("UPDATE tail SET vector = zeroblob(12)", lambda reader: reader.tail("text", "text", 9)),
        ("UPDATE shards SET name = 'other'", lambda reader: reader.shards()),
        ("UPDATE shards SET rows = zeroblob(8)", lambda reader: reader.shards()),
        ("UPDATE deaths SET sequence = 1, replaced = 0", lambda reader: reader.deaths(0, 9)),
    ],
)
def test_every_entry_is_checked_when_it_is_read(store: Store, change: str, read: object) -> None:
    add(store, "a")
    add(store, "a")
    with store.writing() as writer:
        writer.add_tail("text", "text", np.array([0], np.int32), np.ones((1, 3), np.float32))
        writer.add_shard("text", "text", "name", np.array([1], np.int32))
    connection = sqlite3.connect(store.path)
    connection.execute(change)
    connection.commit()
    connection.close()
    with pytest.raises(Damaged), store.reading() as reader:
        read(reader)  # type: ignore[operator]


def test_a_store_that_lost_writes_is_refused(store: Store) -> None:
    add(store, "a")
    store.close()
    counter = store.path.with_name("writes")
    content = counter.read_bytes()
    old = store.path.read_bytes()
    again = Store(store.path)
    add(again, "b")
    again.close()
    assert counter.read_bytes() != content
    store.path.write_bytes(old)
    with pytest.raises(Damaged, match="lost writes"):
        Store(store.path)


def test_a_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="missing"):
        Store(tmp_path / "store.sqlite")


def test_a_store_that_cannot_be_opened_says_what_it_needs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr("indexers.store.sqlite3.connect", refused)
    with pytest.raises(BackendError, match="must be there and writable, also for searches"):
        Store(store.path)
