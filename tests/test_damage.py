"""A flipped byte, a truncated or a missing file, for every kind of file.

Derived parts: noticed, answered exactly from the store, mended by the next writer. The durable truth: right
answers or a clear refusal, never a wrong answer.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from indexers.embedded import Embedded, open_index
from indexers.rebuild import build, rollback
from indexers.shards import Damaged
from retrieval.errors import BackendError
from retrieval.filters import parse
from retrieval.types import Assertion, Document, Encoded, Finding, Item, Part, Picture, Prepared, Side, SpaceInfo
from tests.fakes import HashingEncoder

DIM = 8
ENCODER = HashingEncoder(dim=DIM)
SPACES = {"text": SpaceInfo("text", DIM, ENCODER.digests)}
QUERY = ENCODER.encode_queries([Item(text="word3 word7")])


class Pixels:
    """As much of a PIL image as an index uses."""

    def save(self, file: Any, kind: str) -> None:
        file.write(b"rendered " + kind.encode())


def document(n: int) -> Document:
    findings = (Finding("nodule", Assertion.affirmed, (0, 5)),) if n % 3 == 0 else ()
    image = Picture(f"digest{n}", b"thumbnail", Pixels() if n % 2 else None, None if n % 2 else "x.png")
    return Document(id=f"id{n:03d}", text=f"word{n % 7} word{n % 11}", meta={"n": n}, findings=findings, image=image)


class Preparing:
    digest = "hashing"
    calls = 0

    def __call__(self, documents: Any) -> Prepared:
        self.calls += len(documents)
        return Prepared(list(documents), encodings(documents), [])


def encodings(documents: list[Document]) -> dict[tuple[str, Side], Encoded]:
    matrix = ENCODER.encode_documents([Item(text=d.text) for d in documents])
    return {("text", "text"): Encoded(np.arange(len(documents)), matrix)}


def quiet(phase: str, done: int, total: int | None) -> None: ...


def holders(part: Part, postings: Any) -> Any:
    return np.isin(np.arange(postings.size), postings.rows("nodule", Assertion.affirmed)).astype(np.float32)


def answers(index: Embedded) -> list[Any]:
    """What a user can see of a collection."""
    snapshot, part = index.snapshot(), Part(findings=(Finding("nodule", Assertion.affirmed, (0, 5)),))
    ids = [f"id{n:03d}" for n in range(70)]
    text = snapshot.search_text(["word3 word7", "word1"], 20, parse({"n": {"$gte": 5}}))
    near = snapshot.search_vectors("text", QUERY, 10)[0]
    return [
        len(snapshot),
        snapshot.count(parse({"n": {"$lt": 10}})),
        [d and (d.text, d.meta, d.findings) for d in snapshot.fetch(ids)],
        [[(hit.id, round(hit.score, 5)) for hit in ranking] for ranking in text],
        [(hit.id, round(hit.score, 4)) for hit in near],
        [hit.id for hit in snapshot.search_findings([part], 100, None, holders)[0]],
        snapshot.values("n", ids),
        [snapshot.image(id) for id in ids[:4]],
    ]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where that can be: what is damaged here need not have been on a disk."""
    found = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield found
    shutil.rmtree(found)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A collection of two generations with a graph, a tail and uploads."""
    home = folder / "whole" / "collection"
    for count in (20, 60):
        build(home, [document(n) for n in range(count)], Preparing(), config={}, spaces=SPACES, vector_index="hnsw",
              progress=quiet)  # fmt: skip
    index = open_index(home)
    index.add([document(n) for n in range(60, 65)], encodings([document(n) for n in range(60, 65)]))
    index.publish()
    index.close()
    return home


@pytest.fixture
def home(whole: Path, folder: Path) -> Iterator[Path]:
    copy = Path(tempfile.mkdtemp(dir=folder)) / "collection"
    yield Path(shutil.copytree(whole, copy))
    shutil.rmtree(copy.parent)


@pytest.fixture(scope="module")
def right(whole: Path) -> list[Any]:
    index = open_index(whole)
    found = answers(index)
    assert index.snapshot().sound
    index.close()
    return found


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x20
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Harm(NamedTuple):
    name: str
    do: Callable[[Path], None]


HARMS = [
    Harm("first byte", lambda path: flip(path, 0)),
    Harm("middle byte", lambda path: flip(path, path.stat().st_size // 2)),
    Harm("last byte", lambda path: flip(path, path.stat().st_size - 1)),
    Harm("truncated", truncate),
    Harm("emptied", lambda path: path.write_bytes(b"") and None),
    Harm("missing", lambda path: path.unlink()),
]
DERIVED = ["manifest-*", "rows-*", "columns-*", "lexical-*/*.term", "lexical-*/*.idx", "lexical-*/*.fieldnorm",
           "lexical-*/*.fast", "lexical-*/*.pos", "lexical-*/*.store", "lexical-*/meta.json",
           "lexical-*/.managed.json", "vectors-*/side.json", "vectors-*/index.faiss"]  # fmt: skip


def named(home: Path, pattern: str) -> list[Path]:
    """The files of a kind that the published state uses."""
    found = sorted((home / "generations" / "000002").glob(pattern))
    assert found, pattern
    return [path for path in found if path.stat().st_size]


# What the tests below harm besides: the pointer, the count of writes, vectors, uploads, the store and its log.
OTHERS = ["current", "generations/*/writes", "shards/*", "blobs/*", "generations/*/store.sqlite*"]
EMPTY = ["lock*", "*.lock", "quarantine.jsonl", "generations/*/withdrawn"]  # nothing in them that could be damaged


def test_every_kind_of_file_is_harmed(whole: Path) -> None:
    kinds = [f"generations/*/{kind}" for kind in DERIVED] + OTHERS + EMPTY
    files = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and path.stat().st_size]
    assert [file for file in files if not any(fnmatch(file, kind) for kind in kinds)] == []


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.name)
@pytest.mark.parametrize("kind", DERIVED)
def test_damaged_derived_parts_are_replaced_by_the_store_and_mended(
    home: Path, right: list[Any], kind: str, harm: Harm
) -> None:
    for path in named(home, kind):
        harm.do(path)
    index = open_index(home)
    assert not index.snapshot().sound
    assert answers(index) == right
    index.publish()
    assert set(index.snapshot().parts.values()) == {"ok"}
    assert answers(index) == right
    index.close()
    again = open_index(home)
    assert set(again.snapshot().parts.values()) == {"ok"}
    assert answers(again) == right
    again.close()


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.name)
def test_a_damaged_pointer_is_noticed_and_mended(home: Path, right: list[Any], harm: Harm) -> None:
    before = (home / "current").read_bytes()
    harm.do(home / "current")
    index = open_index(home)
    assert answers(index) == right
    index.publish()
    index.close()
    assert (home / "current").read_bytes() == before


def test_a_lost_pointer_does_not_bring_back_what_was_rolled_back(home: Path) -> None:
    assert rollback(home) == 1
    (home / "current").unlink()
    index = open_index(home)
    assert len(index.snapshot()) == 20
    index.close()


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.name)
def test_a_damaged_count_of_writes_harms_nothing(home: Path, right: list[Any], harm: Harm) -> None:
    harm.do(home / "generations" / "000002" / "writes")
    index = open_index(home)
    assert answers(index) == right
    index.remove(["nobody"])
    assert answers(index) == right
    index.close()


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.name)
def test_damaged_vectors_are_refused(home: Path, harm: Harm) -> None:
    for path in (home / "shards").iterdir():
        harm.do(path)
    with pytest.raises(Damaged, match="roll back, or index the source again"):
        open_index(home)


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.name)
def test_a_damaged_upload_is_refused(home: Path, harm: Harm) -> None:
    for path in (home / "blobs").iterdir():
        harm.do(path)
    index = open_index(home)
    assert index.snapshot().image("id000") == b"thumbnail"
    with pytest.raises(Damaged):
        index.snapshot().image("id001")
    index.close()


@pytest.mark.parametrize("harm", HARMS[3:], ids=lambda harm: harm.name)
def test_a_cut_or_missing_store_is_refused(home: Path, harm: Harm) -> None:
    harm.do(home / "generations" / "000002" / "store.sqlite")
    with pytest.raises(BackendError):
        answers(open_index(home))


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_byte_in_the_store_never_gives_a_wrong_answer(home: Path, right: list[Any], seed: int) -> None:
    store = home / "generations" / "000002" / "store.sqlite"
    choose = random.Random(seed)
    content = bytearray(store.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    store.write_bytes(content)
    if seed % 2:  # nothing derived, so that everything is read from the store
        for path in named(home, "manifest-*"):
            path.unlink()
    with contextlib.suppress(BackendError):
        assert answers(open_index(home)) == right


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.name)
def test_a_log_that_lost_acknowledged_writes_is_refused(home: Path, right: list[Any], harm: Harm) -> None:
    index = open_index(home)
    index.add([document(65)], encodings([document(65)]))
    store = home / "generations" / "000002" / "store.sqlite"
    copy = home.with_name("copy")  # as a crash leaves it: closing would have emptied the log
    shutil.copytree(home, copy)
    index.close()
    log = copy / "generations" / "000002" / (store.name + "-wal")
    assert log.stat().st_size
    harm.do(log)
    with pytest.raises(Damaged, match="lost writes that were acknowledged"):
        open_index(copy)


def test_a_damaged_collection_can_be_indexed_again(home: Path, right: list[Any]) -> None:
    truncate(home / "generations" / "000002" / "store.sqlite")
    for path in (home / "shards").iterdir():
        truncate(path)
    prepare = Preparing()
    build(
        home, [document(n) for n in range(65)], prepare, config={}, spaces=SPACES, vector_index="flat", progress=quiet
    )
    assert prepare.calls == 65
    index = open_index(home)
    assert answers(index) == right
    index.close()
