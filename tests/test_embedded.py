"""What only the embedded index promises: several processes, tails and shards, derived parts, uploads."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexers import embedded, generation, publish
from indexers.embedded import Embedded, open_index, writer_lock
from indexers.rebuild import build, rebuild
from retrieval.errors import Invalid, NotFound
from retrieval.filters import parse
from retrieval.types import Document, Encoded, Encodings, Item, Picture, Prepared, SpaceInfo
from tests.fakes import HashingEncoder

DIM = 8
ENCODER = HashingEncoder(dim=DIM)
SPACES = {"text": SpaceInfo("text", DIM, ENCODER.digests)}
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.test_embedded"])


def quiet(phase: str, done: int, total: int | None) -> None: ...


def encodings(documents: Sequence[Document]) -> Encodings:
    matrix = ENCODER.encode_documents([Item(text=document.text) for document in documents])
    return {("text", "text"): Encoded(np.arange(len(documents)), matrix)}


class Preparing:
    digest = "hashing"

    def __call__(self, documents: Sequence[Document]) -> Prepared:
        return Prepared(list(documents), encodings(documents), [])


def documents(start: int, stop: int) -> list[Document]:
    return [Document(id=f"id{n:04d}", text=f"word{n % 5} word{n % 7}", meta={"n": n}) for n in range(start, stop)]


def made(home: Path, count: int = 20, vector_index: str = "flat") -> Embedded:
    source = documents(0, count)
    build(home, source, Preparing(), config={}, spaces=SPACES, vector_index=vector_index, progress=quiet)
    return open_index(home)


def add(index: Embedded, some: Sequence[Document]) -> None:
    index.add(some, encodings(some))


def check_vectors(index: Embedded, expected: Sequence[Document], k: int = 7) -> None:
    """Vector searches equal brute force over `expected`, with and without a filter."""
    query = ENCODER.encode_queries([Item(text="word1 word2")])
    for where in (None, {"n": {"$lt": 15}}):
        held = [d for d in expected if where is None or d.meta["n"] < 15]
        scores = np.sort(ENCODER.encode_documents([Item(text=d.text) for d in held]) @ query[0])[::-1][:k]
        got = index.snapshot().search_vectors("text", query, k, parse(where))[0]
        np.testing.assert_allclose([hit.score for hit in got], scores, atol=1e-5)


# --- processes and threads -------------------------------------------------------------------------


def write_elsewhere(home: Path, start: int, stop: int) -> None:
    index = open_index(home)
    for n in range(start, stop):
        add(index, documents(n, n + 1))
        index.publish()
    index.close()


def run_children(*arguments: tuple[Any, ...]) -> None:
    children = [CHILDREN.Process(target=write_elsewhere, args=each) for each in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0


def test_readers_follow_what_other_processes_publish(tmp_path: Path) -> None:
    index = made(tmp_path / "c")
    before = index.snapshot()
    run_children((tmp_path / "c", 20, 22))
    assert len(before) == 20
    assert len(index.snapshot()) == 22
    assert index.snapshot().sequence == before.sequence + 2
    index.close()


def test_two_processes_write_in_turn_and_nothing_is_lost(tmp_path: Path) -> None:
    index = made(tmp_path / "c")
    run_children((tmp_path / "c", 20, 26), (tmp_path / "c", 40, 46))
    assert len(index.snapshot()) == 32
    assert index.snapshot().sound
    check_vectors(index, [*documents(0, 26), *documents(40, 46)])
    index.close()


def test_readers_never_wait_for_a_writer(tmp_path: Path) -> None:
    index = made(tmp_path / "c")
    with writer_lock(tmp_path / "c"):
        waiting = threading.Thread(target=add, args=(index, documents(20, 21)))
        waiting.start()
        assert len(index.snapshot()) == 20  # a reader that waited would wait for ever
        assert len(index.snapshot().search_text(["word1"], 5)[0]) == 5
        other = open_index(tmp_path / "c")
        assert len(other.snapshot()) == 20
        assert waiting.is_alive()
        other.close()
    waiting.join()
    index.publish()
    assert len(index.snapshot()) == 21
    index.close()


def test_threads_read_while_another_writes(tmp_path: Path) -> None:
    index = made(tmp_path / "c")
    failures: list[BaseException] = []
    over = threading.Event()

    def read() -> None:
        try:
            while not over.is_set():
                snapshot = index.snapshot()
                hits = snapshot.search_text(["word1 word2 word3 word4 word0"], 1_000)[0]
                assert len(hits) == len(snapshot)
                assert all(snapshot.fetch([hit.id for hit in hits]))
                query = ENCODER.encode_queries([Item(text="word1")])
                assert len(snapshot.search_vectors("text", query, 1_000)[0]) == len(snapshot)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for n in range(20, 32, 2):
        add(index, documents(n, n + 2))
        add(index, documents(3, 5))
        index.publish()
    over.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(index.snapshot()) == 32
    index.close()


# --- tails, shards and derived parts ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_fresh_vectors_are_searched_exactly_and_sealed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(publish, "SEALED_AT", 8)
    index = made(tmp_path / "c", 30, kind)
    add(index, documents(30, 35))
    index.publish()
    (stretches,) = [s for key, s in index.snapshot().stretches.items() if key == ("text", "text")]
    assert [len(stretch.rows) for stretch in stretches] == [30, 5]
    check_vectors(index, documents(0, 35))
    add(index, documents(35, 40))
    index.remove(["id0031"])
    index.publish()
    assert len(list((tmp_path / "c" / "shards").iterdir())) == 2
    rest = [*documents(0, 31), *documents(32, 40)]
    check_vectors(index, rest)
    index.close()
    index = open_index(tmp_path / "c")
    check_vectors(index, rest)
    index.close()


def test_a_large_write_gets_a_shard_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "SHARD_AT", 10)
    index = made(tmp_path / "c")
    add(index, documents(20, 22))
    add(index, documents(22, 40))
    assert len(index.snapshot()) == 20
    index.publish()
    with index._generation.store.reading() as reader:
        assert [len(shard.rows) for shard in reader.shards()] == [20, 18]
        assert reader.tail("text", "text", 99)[0].tolist() == [20, 21]
    check_vectors(index, documents(0, 40))
    index.close()


def test_an_index_over_vectors_is_made_anew_once_much_is_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "SEALED_AT", 8)
    monkeypatch.setattr(publish, "_much", lambda changed, total, least: changed > 15)
    index = made(tmp_path / "c", 30, "hnsw")
    for start in (30, 40, 50):
        add(index, documents(start, start + 10))
        index.publish()
        check_vectors(index, documents(0, start + 10))
    first = index.snapshot().stretches["text", "text"][0]
    assert str(first.index.spec) == "hnsw"
    assert len(first.rows) == 50
    index.close()


def test_large_parts_are_verified_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "c", 30, "hnsw").close()
    monkeypatch.setattr(generation, "BACKGROUND_BYTES", 1)
    go_on = threading.Event()
    check = generation.Generation._check

    def slowly(self: Any, path: Path, files: Any) -> None:
        if files is not None:
            assert go_on.wait(20)
        check(self, path, files)

    monkeypatch.setattr(generation.Generation, "_check", slowly)
    index = open_index(tmp_path / "c")
    assert index.snapshot().parts["lexical"] == "verifying"
    assert len(index.snapshot().search_text(["word1"], 5)[0]) == 5
    go_on.set()
    until = time.monotonic() + 20
    while not index.snapshot().settled and time.monotonic() < until:
        time.sleep(0.01)
    assert set(index.snapshot().parts.values()) == {"ok"}
    index.close()


def test_damage_found_in_the_background_takes_the_part_out_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "c", 30).close()
    monkeypatch.setattr(generation, "BACKGROUND_BYTES", 1)
    (norms,) = (tmp_path / "c").glob("generations/*/lexical-*/*.fieldnorm")
    norms.write_bytes(b"\x01" + norms.read_bytes()[1:])
    index = open_index(tmp_path / "c")
    until = time.monotonic() + 20
    while not index.snapshot().settled and time.monotonic() < until:
        time.sleep(0.01)
    assert "missing or altered" in index.snapshot().parts["lexical"]
    assert len(index.snapshot().search_text(["word1"], 5)[0]) == 5
    index.publish()
    assert index.snapshot().sound
    index.close()


def test_a_reader_that_is_overtaken_while_it_opens_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = made(tmp_path / "c")
    reader = open_index(tmp_path / "c")
    add(writer, documents(20, 21))
    writer.publish()
    once = iter([True])
    words = generation.Generation._words

    def overtaken(self: Any, manifest: Any, parts: Any) -> Any:
        if self is reader._generation and next(once, False):
            for n in (21, 22):  # files are kept for one publish
                add(writer, documents(n, n + 1))
                writer.publish()
        return words(self, manifest, parts)

    monkeypatch.setattr(generation.Generation, "_words", overtaken)
    assert reader.snapshot().sound
    assert len(reader.snapshot()) == 23
    for index in (reader, writer):
        index.close()


def test_what_a_publish_leaves_behind_is_two_states(tmp_path: Path) -> None:
    index = made(tmp_path / "c")
    for n in range(20, 26):
        add(index, documents(n, n + 1))
        index.publish()
    names = [path.name.partition("-")[0] for path in (tmp_path / "c" / "generations" / "000001").iterdir()]
    assert names.count("manifest") == 2
    assert names.count("lexical") == 2
    assert names.count("rows") == names.count("columns") == 1
    index.close()


# --- pictures --------------------------------------------------------------------------------------


class Pixels:
    """As much of a PIL image as an index uses."""

    def save(self, file: Any, kind: str) -> None:
        file.write(b"rendered " + kind.encode())


def test_uploads_are_kept_rendered_and_source_pictures_as_thumbnails(tmp_path: Path) -> None:
    index = made(tmp_path / "c", 0)
    upload = Document(id="upload", image=Picture("d1", b"small", Pixels()))
    stays = Document(id="stays", image=Picture("d2", b"thumbnail", Pixels(), "images/x.png"))
    index.add([upload, stays, Document(id="none")], {})
    index.publish()
    snapshot = index.snapshot()
    assert [snapshot.image(id) for id in ("upload", "stays", "none", "nobody")] == [
        b"rendered PNG",
        b"thumbnail",
        None,
        None,
    ]
    (blob,) = (tmp_path / "c" / "blobs").iterdir()
    assert blob.read_bytes() == b"rendered PNG"
    rebuild(tmp_path / "c", progress=quiet)
    assert index.snapshot().image("upload") == b"rendered PNG"
    assert index.snapshot().image("stays") == b"thumbnail"
    index.remove(["upload"])
    index.publish()
    for _ in range(2):
        rebuild(tmp_path / "c", progress=quiet)
    assert list((tmp_path / "c" / "blobs").iterdir()) == []
    index.close()


def test_a_picture_that_was_not_decoded_is_refused(tmp_path: Path) -> None:
    index = made(tmp_path / "c", 0)
    with pytest.raises(Invalid, match="not decoded"):
        index.add([Document(id="a", image=b"bytes")], {})
    index.close()


# --- opening ---------------------------------------------------------------------------------------


def test_what_was_never_published_is_not_found(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(NotFound):
            open_index(folder)
    (tmp_path / "c" / "generations" / "000001.partial").mkdir(parents=True)
    with pytest.raises(NotFound):
        open_index(tmp_path / "c")


def test_description_names_counts_kinds_and_states(tmp_path: Path) -> None:
    index = made(tmp_path / "c", 30, "hnsw")
    described = index.snapshot().describe()
    assert (described["documents"], described["generation"], described["vector_index"]) == (30, 1, "hnsw")
    side = described["spaces"]["text"]["sides"]["text"]
    assert side["vectors"] == 30
    assert side["kind"] == "hnsw"
    assert side["bytes_per_vector"] > 0
    assert side["recall"] == 1.0
    assert described["parts"] == {"manifest": "ok", "rows": "ok", "lexical": "ok", "vectors text/text": "ok"}
    index.close()
