"""A full disk at every step: a clear error, the old state intact, and the same call again once there is room.

The file system is a small tmpfs where mounting is permitted; the same steps under a limit on the size of a
file (which fails in the same places) need no permission.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from indexers.embedded import Embedded, open_index
from indexers.rebuild import build, rebuild
from retrieval.errors import BackendError
from retrieval.files import read_source
from server.assemble import Config
from server.home import silent
from tests.small_home import small_app, small_home, write_source
from tests.test_damage import SPACES, Preparing, answers, document, encodings, quiet

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.test_full_disk"])
SIZE_KIB = 8 * 1024
ROOMS = (0, 4_096, 12_288, 20_480, 40_960, 65_536, 98_304, 131_072, 196_608, 262_144, 524_288, 1 << 20, 2 << 20)


def begin(home: Path) -> None:
    build(home, [document(n) for n in range(40)], Preparing(), config={}, spaces=SPACES, vector_index="hnsw",
          progress=quiet)  # fmt: skip


def add(home: Path, index: Embedded) -> None:
    index.add([document(n) for n in range(40, 65)], encodings([document(n) for n in range(40, 65)]))


def add_and_publish(home: Path, index: Embedded) -> None:
    add(home, index)
    index.publish()


def remove_and_publish(home: Path, index: Embedded) -> None:
    index.remove([f"id{n:03d}" for n in range(10)])
    index.publish()


def rebuild_whole(home: Path, index: Embedded) -> None:
    rebuild(home, vector_index="flat", progress=quiet)


def build_anew(home: Path, index: Embedded) -> None:
    build(home, [document(n) for n in range(20, 65)], Preparing(), config={}, spaces=SPACES, vector_index="hnsw",
          progress=quiet)  # fmt: skip


STEPS: list[Callable[[Path, Embedded], None]] = [add, add_and_publish, remove_and_publish, rebuild_whole, build_anew]


# --- a small file system ---------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount command, so no small file system to fill")
    if done.returncode:
        pytest.skip("mounting a small file system is not permitted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Leaves `left` bytes of room."""
    free = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - left)))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_full_disk_leaves_the_old_state_intact(small: Path, tmp_path: Path, step: Callable[..., None]) -> None:
    fresh = tmp_path / "fresh"
    begin(fresh)
    refused, accepted = 0, 0
    for left in ROOMS:
        home = small / "collection"
        shutil.copytree(fresh, home)
        index = open_index(home)
        before = answers(index)
        fill(small, left)
        try:
            step(home, index)
            accepted += 1
        except BackendError as error:
            refused += "disk" in str(error)
            assert answers(index) == before
            other = open_index(home)
            assert answers(other) == before
            other.close()
            (small / "filler").unlink()
            step(home, index)
        (small / "filler").unlink(missing_ok=True)
        index.publish()
        after = answers(index)
        assert index.snapshot().sound
        assert expected(step) == after
        index.close()
        shutil.rmtree(home)
    assert refused > 2
    assert accepted > 1


_EXPECTED: dict[str, Any] = {}


def expected(step: Callable[..., None]) -> Any:
    """What a collection with room to spare answers after the step."""
    if step.__name__ not in _EXPECTED:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "collection"
            begin(home)
            index = open_index(home)
            step(home, index)
            index.publish()
            _EXPECTED[step.__name__] = answers(index)
            index.close()
    return _EXPECTED[step.__name__]


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def test_over_http_a_full_disk_is_told_and_searches_go_on(small: Path, tmp_path: Path) -> None:
    home = small_home(small / "home")
    home.index("films", read_source(write_source(tmp_path / "source")).documents(), Config(), progress=silent)
    asked = {"query": [{"text": "effusion"}]}
    with TestClient(small_app(home.settings, home), base_url="http://localhost:8000") as client:
        before = client.post("/v1/collections/films/search", json=asked).json()["hits"]
        fill(small, 0)
        big = [{"_id": f"n{n}", "text": "word " * 900} for n in range(40)]
        for path, body in (("documents", big), ("rebuild", None)):
            refused = client.post(f"/v1/collections/films/{path}", json=body)
            assert refused.status_code == 503
            assert refused.headers["content-type"] == "application/problem+json"
            assert str(small) not in refused.text
        assert client.put("/v1/collections/new", json={"image_encoder": "none"}).status_code == 503
        assert client.post("/v1/collections/films/search", json=asked).json()["hits"] == before
        (small / "filler").unlink()
        assert client.post("/v1/collections/films/documents", json=big).json()["added"] == 40


# --- a limit on the size of a file -----------------------------------------------------------------


def limited(home: Path, number: int, most: int, say: Any) -> None:
    """The child: one step with files of at most `most` bytes."""
    index = open_index(home)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        STEPS[number](home, index)
        say.send("done")
    except BackendError as error:
        say.send(str(error))


@pytest.mark.parametrize("number", range(len(STEPS)), ids=lambda number: STEPS[number].__name__)
def test_files_that_cannot_grow_leave_the_old_state_intact(memory: Path, number: int) -> None:
    fresh = memory / "fresh"
    begin(fresh)
    index = open_index(fresh)
    before = answers(index)
    index.close()
    refused = 0
    for most in (0, 100, 700, 2_000, 5_000, 20_000, 60_000, 150_000):
        home = memory / f"limited{most}"
        shutil.copytree(fresh, home)
        listen, say = CHILDREN.Pipe()
        process = CHILDREN.Process(target=limited, args=(home, number, most, say))
        process.start()
        process.join(60)
        said = listen.recv() if listen.poll() else f"nothing, exit status {process.exitcode}"
        index = open_index(home)
        if said != "done":
            assert "disk" in said
            refused += 1
            assert answers(index) == before
            STEPS[number](home, index)
        index.publish()
        assert index.snapshot().sound
        assert answers(index) == expected(STEPS[number])
        index.close()
    assert refused > 1
