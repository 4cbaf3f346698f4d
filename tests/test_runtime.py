"""Converted towers: made once, checked, mended, and run without torch and without the network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders import runtime
from encoders.runtime import Digests, Tower, budgeted, convert, tower, unit
from encoders.text import packaged, text_encoder
from retrieval.errors import BackendError, InputError
from retrieval.types import Item

ROOT = Path(__file__).resolve().parents[1]


# ---- digests


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "weights", tmp_path / "cache"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    first = Digests(cache).file(path)
    assert first == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read again"))
    assert Digests(cache).file(path) == first
    monkeypatch.undo()
    path.write_bytes(b"two")
    assert Digests(cache).file(path) == hashlib.sha256(b"two").hexdigest()


def test_a_digest_of_files_knows_names_contents_and_use(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    a, b = tmp_path / "a", tmp_path / "b"
    digests = Digests(tmp_path / "cache")
    seen = [
        digests.files({"x": a}, {}),
        digests.files({"x": b}, {}),
        digests.files({"y": a}, {}),
        digests.files({"x": a, "y": b}, {}),
        digests.files({"x": a}, {"pooling": "cls"}),
    ]
    assert len(set(seen)) == 5
    assert digests.files({"x": a}, {}) == seen[0]


@pytest.mark.parametrize("damage", ["", "[1]", '{"x": 1}', "\0"])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    (tmp_path / "digests.json").write_text(damage)
    assert Digests(tmp_path).file(path) == hashlib.sha256(b"one").hexdigest()
    assert json.loads((tmp_path / "digests.json").read_text())[str(path)][2] == Digests(tmp_path).file(path)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert Digests(path / "no" / "folder").file(path) == hashlib.sha256(b"one").hexdigest()


# ---- batches


def test_batches_hold_every_row_once_and_stay_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(0, 300, 500).tolist()
    batches = budgeted(lengths, 2048)
    assert sorted(n for batch in batches for n in batch) == list(range(500))
    assert all(len(batch) * max(lengths[n] for n in batch) <= 2048 for batch in batches)
    assert [batch.tolist() for batch in budgeted([5000], 2048)] == [[0]]  # too long alone: still encoded
    assert budgeted([], 2048) == []


def test_rows_get_unit_length_and_zeros_stay() -> None:
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]


# ---- towers


def scaled(factor: float, branching: bool = False) -> Any:
    import torch

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([[factor, 0.0], [0.0, 1.0]]))

        def forward(self, x: Any) -> Any:
            out = x @ self.weight
            return -out.flip(1) if branching and float(x.sum()) > 100 else out

    return Scaled().eval()


def made(folder: Path, module: Any) -> dict[str, Any]:
    import torch

    probes = [{"x": torch.ones(2, 2)}, {"x": torch.full((3, 2), 50.0)}]
    return {"runtime": convert(module, folder, probes[0], probes, fixed=True)}


class Maker:
    """Counts how often a tower is made."""

    def __init__(self, factor: float = 2.0) -> None:
        self.module = scaled(factor)
        self.times = 0

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.times += 1
        return made(folder, self.module)


ONES = {"x": np.ones((1, 2), np.float32)}


def test_a_tower_is_made_once(tmp_path: Path) -> None:
    make = Maker()
    for _ in range(2):
        ready = tower(tmp_path, "digest", lambda: make.module, make)
        assert ready.one(ONES).tolist() == [[2, 1]]
    assert (make.times, ready.spec) == (1, {"runtime": "openvino"})
    assert tower(tmp_path, "other", lambda: make.module, make).one(ONES).tolist() == [[2, 1]]
    assert make.times == 2


def test_many_batches_come_back_in_order(tmp_path: Path) -> None:
    make = Maker()
    ready = tower(tmp_path, "digest", lambda: make.module, make)
    batches = [{"x": np.full((n % 5 + 1, 2), n, np.float32)} for n in range(40)]
    out = ready.many(iter(batches), 120)
    assert [batch[-1].tolist() for batch in out] == [[2 * n, n] for n in range(40)]
    assert ready.many([], 0) == []


def test_an_error_while_batches_are_made_comes_through(tmp_path: Path) -> None:
    make = Maker()
    ready = tower(tmp_path, "digest", lambda: make.module, make)

    def broken() -> Any:
        yield ONES
        raise InputError("a picture is damaged")

    with pytest.raises(InputError, match="a picture is damaged"):
        ready.many(broken(), 2)
    with pytest.raises(BackendError, match="does not run"):
        ready.one({"x": np.ones((1, 3), np.float32)})
    assert ready.one(ONES).tolist() == [[2, 1]]


@pytest.mark.parametrize("name", ["tower.bin", "tower.xml", "tower.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_tower_is_made_again(tmp_path: Path, name: str, damage: str) -> None:
    make = Maker()
    path = tower(tmp_path, "digest", lambda: make.module, make).folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.unlink()
    if damage != "remove":
        path.write_bytes(content if damage == "flip" else content[:-3])
    assert tower(tmp_path, "digest", lambda: make.module, make).one(ONES).tolist() == [[2, 1]]
    assert make.times == 2
    assert [p.name for p in (tmp_path / "towers").iterdir() if p.name.startswith(".")] == []


def test_a_failure_while_a_tower_is_made_leaves_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> Mapping[str, Any]:
        (folder / "tower.bin").write_bytes(b"half")
        raise InputError("no such weights")

    with pytest.raises(InputError):
        tower(tmp_path, "digest", lambda: None, broken)
    assert list((tmp_path / "towers").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="LIGHTBOX_CACHE") as caught:
        tower(tmp_path / "file", "digest", lambda: None, Maker())
    assert str(tmp_path) not in str(caught.value)


def test_a_module_that_decides_while_it_runs_is_left_to_pytorch(tmp_path: Path) -> None:
    module = scaled(2.0, branching=True)
    assert made(tmp_path, module) == {"runtime": "torch"}
    assert list(tmp_path.iterdir()) == []
    ready = Tower(tmp_path, {"runtime": "torch"}, lambda: module)
    large = {"x": np.full((1, 2), 60.0, np.float32)}
    assert ready.one(large).tolist() == ready.many([large], 1)[0].tolist() == [[-60, -120]]


def test_without_a_gpu_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(sys.modules, "torch", None)  # an import would fail
    assert not runtime.gpu()


# ---- a process that only asks


WARM = """
import json, sys
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith("socket.") else None)
from pathlib import Path
from encoders.clip import image_encoder
from encoders.text import text_encoder
from retrieval.types import Item
cache, film, picture = map(Path, sys.argv[1:])
text = text_encoder(None, cache)
pair = image_encoder(str(film), text, cache)
first = pair.encode_queries([Item(text="small left effusion"), Item(image=picture)])
text.encode_documents([Item(text=f"a report of {n} words " * n) for n in range(60)])
heavy = ["torch", "transformers", "sentence_transformers", "open_clip", "timm", "huggingface_hub", "scipy", "pydicom"]
loaded = [name for name in heavy if name in sys.modules]
json.dump({"vectors": first.tolist(), "digests": dict(pair.digests), "loaded": loaded, "sockets": sockets}, sys.stdout)
"""


def test_a_warm_cache_needs_neither_torch_nor_the_network(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.test_clip import PICTURES, saved_film

    cache = tmp_path_factory.getbasetemp() / "encoders"
    folder = tmp_path_factory.mktemp("warm")
    film = saved_film(folder)
    (folder / "picture").write_bytes(PICTURES[0])
    from encoders.clip import image_encoder

    pair = image_encoder(str(film), text_encoder(None, cache), cache)  # makes what is missing
    here = pair.encode_queries([Item(text="small left effusion"), Item(image=PICTURES[0])])
    asked = subprocess.run(
        [sys.executable, "-c", WARM, str(cache), str(film), str(folder / "picture")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    there = json.loads(asked.stdout)
    assert (there["loaded"], there["sockets"]) == ([], [])
    assert there["digests"] == dict(pair.digests)  # a query knows by which towers it was made
    np.testing.assert_allclose(there["vectors"], here, atol=1e-5)


GROWTH = """
import sys
from pathlib import Path
import numpy as np
from encoders import runtime

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

runtime.KERNELS = int(sys.argv[2]) or runtime.KERNELS
ready = runtime.Tower(Path(sys.argv[1]), {"runtime": "openvino"}, lambda: None)
for rows in range(1, 26):
    for length in range(1, 41):
        ready.one({"x": np.ones((rows, length, 64), np.float32)})
    if rows == 5:
        before = own()
print(own() - before)
"""


def test_shapes_that_were_never_seen_do_not_fill_the_memory(tmp_path: Path) -> None:
    """A process grew by a megabyte with each new shape of a batch while a reranker worked."""
    import torch

    class Attending(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = torch.relu(layer(torch.softmax(x @ x.transpose(1, 2), -1) @ x))
            return x.mean(1)

    example = {"x": torch.ones(2, 7, 64)}
    assert convert(Attending().eval(), tmp_path, example, [example], fixed=False) == "openvino"

    def grown(kernels: int) -> float:
        child = [sys.executable, "-c", GROWTH, str(tmp_path), str(kernels)]
        done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert grown(0) < 0.75 * grown(5_000)  # what OpenVINO would keep by itself


def test_the_packaged_weights_are_found_without_importing_their_package() -> None:
    assert (packaged() / "model.safetensors").is_file()
