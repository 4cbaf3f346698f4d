"""Sealed files: the name is the checksum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from indexers import shards
from indexers.shards import Damaged, VectorWriter
from retrieval.errors import BackendError

ARRAYS = {
    "ids": np.arange(5, dtype=np.int32),
    "none": np.zeros((0, 3), np.float32),
    "half": np.ones((2, 3), np.float16),
    "alive": np.array([True, False]),
    "wide": np.arange(3, dtype=np.uint64),
}


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    name = shards.write(tmp_path, "some", ARRAYS)
    got = shards.read(tmp_path / name)
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(got[key], array)
        assert got[key].dtype == array.dtype
        assert got[key].shape == array.shape


def test_any_tool_for_safetensors_reads_them(tmp_path: Path) -> None:
    got = load_file(tmp_path / shards.write(tmp_path, "some", ARRAYS))
    np.testing.assert_array_equal(got["ids"], ARRAYS["ids"])


def test_arrays_start_at_cache_lines(tmp_path: Path) -> None:
    got = shards.read(tmp_path / shards.write(tmp_path, "some", ARRAYS))
    assert all(array.ctypes.data % shards.ALIGNMENT == 0 for key, array in got.items() if key in ARRAYS and array.size)


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    first = shards.write(tmp_path, "some", ARRAYS)
    assert shards.write(tmp_path, "some", ARRAYS) == first
    assert [path.name for path in tmp_path.iterdir()] == [first]


def test_vectors_are_cut_into_shards_and_keep_their_order(tmp_path: Path) -> None:
    matrix = np.arange(30, dtype=np.float32).reshape(10, 3)
    writer = VectorWriter(tmp_path, "vectors", 3, rows=4)
    for start in range(0, 10, 3):
        writer.append(matrix[start : start + 3])
    sealed = writer.finish()
    assert [count for _, count in sealed] == [4, 4, 2]
    got = np.concatenate([shards.read(tmp_path / name)["matrix"] for name, _ in sealed])
    np.testing.assert_array_equal(got, matrix)


def test_no_vectors_make_no_shard(tmp_path: Path) -> None:
    writer = VectorWriter(tmp_path, "vectors", 3)
    writer.append(np.zeros((0, 3), np.float32))
    assert writer.finish() == []
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    writer = VectorWriter(tmp_path, "vectors", 3)
    writer.append(np.ones((2, 3), np.float32))
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0, 9, 100, -1])
def test_a_flipped_byte_is_noticed(tmp_path: Path, at: int) -> None:
    path = tmp_path / shards.write(tmp_path, "some", ARRAYS)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged):
        shards.read(path)


def test_a_missing_or_empty_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / shards.write(tmp_path, "some", ARRAYS)
    path.write_bytes(b"")
    for check in (True, False):
        with pytest.raises(Damaged):
            shards.read(path, check)
    path.unlink()
    with pytest.raises(Damaged):
        shards.read(path, check=False)


def test_a_folder_is_checked_file_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "a").write_bytes(b"one")
    sums = shards.checksums(folder)
    shards.verify_folder(folder, sums)
    (folder / "a").write_bytes(b"two")
    with pytest.raises(Damaged, match="part/a"):
        shards.verify_folder(folder, sums)


def test_a_linked_file_is_hashed_once_and_a_copy_is_not_trusted(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for folder in (first, second, third):
        folder.mkdir()
    (first / "segment").write_bytes(b"one")
    (second / "segment").hardlink_to(first / "segment")
    sums = shards.checksums(first)
    assert shards.checksums(second, sums) == sums
    known: set[tuple[int, str]] = set()
    shards.verify_folder(first, sums, known)
    shards.verify_folder(second, sums, known)
    assert len(known) == 1
    (third / "segment").write_bytes(b"two")
    with pytest.raises(Damaged):
        shards.verify_folder(third, sums, known)


def test_sweeping_keeps_what_is_named_and_strangers(tmp_path: Path) -> None:
    kept = shards.write(tmp_path, "kept", ARRAYS)
    shards.write_bytes(tmp_path, "gone", b"x", "png")
    shards.temporary(tmp_path).write_bytes(b"left by a crash")
    (tmp_path / "notes.txt").write_text("a stranger's")
    shards.sweep(tmp_path, [kept])
    assert {path.name for path in tmp_path.iterdir()} == {kept, "notes.txt"}


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="nothing that was there before has changed"):
        shards.write(tmp_path / "nowhere", "some", ARRAYS)
