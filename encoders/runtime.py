"""Towers for serving: converted to OpenVINO once, cached by digest, run without torch.

`<cache>/towers/<key>/` holds `tower.xml` and `tower.bin` (float16 weights, computed in float32), `tower.json` (what
the encoder must know to feed it) and, for texts, `tokenizer.json`. A folder appears whole or not at all; one that no
longer matches its checksums is made again. Nothing in it is read as code: no pickle.

The one file that imports OpenVINO. A plain ``import openvino`` reports the import over the network; with
``openvino_telemetry`` marked as absent it takes its own silent stand-in.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import BackendError
from retrieval.types import Matrix

FORMAT = 1  # of a converted tower; another number makes it anew
GPU_ROWS = 64  # fewer rows are encoded sooner on the CPU than torch is imported
KERNELS = 128  # kept of what OpenVINO compiles for each shape of a batch: by itself it keeps 5,000, over a gigabyte

Array = NDArray[Any]
Inputs = Mapping[str, Array]  # name of an input -> (B, ...) array
Module = Any  # torch.nn.Module: torch is imported only where a tower is made


# ---- digests


class Digests:
    """sha256 of files, remembered by path, size and time of change: a cold start does not read 90 MB to name them."""

    def __init__(self, cache: Path) -> None:
        self._file = cache / "digests.json"
        self._lock = threading.Lock()
        try:
            known = json.loads(self._file.read_text("utf-8"))
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def file(self, path: Path) -> str:
        """Hex sha256 of the file's bytes. Raises OSError where it cannot be read."""
        state = path.stat()
        now = [state.st_size, state.st_mtime_ns]
        known = self._known.get(str(path))
        if isinstance(known, list) and known[:2] == now and len(known) == 3:
            return str(known[2])
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        with self._lock:
            self._known[str(path)] = [*now, digest]
            self._keep()
        return digest

    def files(self, files: Mapping[str, Path], how: Mapping[str, Any]) -> str:
        """One digest of named files together with `how` they are used."""
        parts = {name: self.file(path) for name, path in files.items()}
        return hashlib.sha256(json.dumps([parts, how], sort_keys=True).encode()).hexdigest()

    def _keep(self) -> None:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not answers
            write(self._file, json.dumps(self._known).encode())


def write(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


# ---- the cache of converted towers


def tower(cache: Path, digest: str, load: Callable[[], Module], make: Callable[[Path], Mapping[str, Any]]) -> Tower:
    """The converted tower of `digest`, made now where the cache does not hold it.

    load: the tower in PyTorch, called only for a GPU, or where it could not be converted.
    make: writes the tower's files into an empty folder (see `convert`) and returns what an encoder must know of it.
    Raises BackendError where the cache cannot be written, and whatever `make` raises.
    """
    folder = cache / "towers" / _key(digest)
    spec = _read(folder, Digests(cache))
    if spec is None:
        _make(folder, make)
        spec = _read(folder, Digests(cache))
    if spec is None:
        raise BackendError("a converted tower cannot be read back: check the disk that holds the cache")
    return Tower(folder, spec, load)


def _key(digest: str) -> str:
    made_by = [digest, FORMAT, importlib.metadata.version("openvino")]
    return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:32]


def _read(folder: Path, digests: Digests) -> dict[str, Any] | None:
    """What `tower.json` says, None where the tower is missing or damaged."""
    try:
        known = json.loads((folder / "tower.json").read_text("utf-8"))
        whole = all(digests.file(folder / name) == digest for name, digest in known["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(known["spec"]) if whole else None


def _make(folder: Path, make: Callable[[Path], Mapping[str, Any]]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(error) from error
    try:
        spec = make(part)
        _seal(part, spec)
        _swap(part, folder)
    except OSError as error:
        raise _unwritable(error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _seal(part: Path, spec: Mapping[str, Any]) -> None:
    digests = {}
    for path in sorted(part.iterdir()):
        with path.open("rb+") as opened:
            digests[path.name] = hashlib.file_digest(opened, "sha256").hexdigest()
            os.fsync(opened.fileno())
    write(part / "tower.json", json.dumps({"files": digests, "spec": dict(spec)}, indent=1).encode())


def _swap(part: Path, folder: Path) -> None:
    """A damaged tower goes; one that another process made meanwhile is the same and may go as well."""
    if folder.exists():
        folder.rename(part.with_name(f"{part.name}-old"))
        shutil.rmtree(part.with_name(f"{part.name}-old"), ignore_errors=True)
    part.chmod(0o755)
    part.rename(folder)


def _unwritable(error: OSError) -> BackendError:
    return BackendError(
        f"the cache of converted towers cannot be written ({error.strerror}); make room, or name a writable folder in "
        "LIGHTBOX_CACHE"
    )


# ---- conversion


def convert(
    module: Module,
    folder: Path,
    example: Mapping[str, Any],
    probes: Sequence[Mapping[str, Any]],
    *,
    fixed: bool,
    half: bool = True,
) -> str:
    """Write `module` as `tower.xml` and `tower.bin`, and say what runs it: `"openvino"`, or `"torch"`.

    example, probes: torch inputs by name, in the order of the module's parameters; the first axis is the batch.
    fixed: the other axes never change. half: weights in float16, for vectors; scores keep float32.
    PyTorch runs what cannot be converted, or gives other vectors afterwards (cosine to the module's own 0.9999 or
    less on any probe): tracing freezes what a module decides while it runs.
    """
    import torch

    with torch.inference_mode(), _silenced():
        try:
            _save(module, folder, example, fixed, half)
            run = Tower(folder, {"runtime": "openvino"}, lambda: module)
            for probe in probes:
                got = run.one({name: tensor.numpy() for name, tensor in probe.items()})
                if not _same(module(**probe).float().numpy(), got):
                    raise RuntimeError("the converted tower gives other vectors")
        except Exception:  # whatever a foreign module trips over
            for path in folder.glob("tower.*"):
                path.unlink()
            return "torch"
    return "openvino"


def _save(module: Module, folder: Path, example: Mapping[str, Any], fixed: bool, half: bool) -> None:
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    openvino = _openvino()
    # The probes check what the trace gives; the tracer's own check would trace a second time, two thirds of the whole.
    traced = TorchScriptPythonDecoder(module, example_input=dict(example), trace_kwargs={"check_trace": False})
    model = openvino.convert_model(traced)
    for port, name in zip(model.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    if fixed:
        model.reshape({name: [-1, *tensor.shape[1:]] for name, tensor in example.items()})
    openvino.save_model(model, folder / "tower.xml", compress_to_fp16=half)


def _same(wanted: NDArray[Any], got: NDArray[Any]) -> bool:
    if wanted.shape != got.shape:
        return False
    cosines = (unit(wanted) * unit(got)).sum(1)
    scale = np.abs(wanted).max() + 1e-6
    return bool((cosines > 0.9999).all() and np.abs(wanted - got).max() < 0.02 * scale)


class _silenced:
    """Tracing prints warnings about every branch that it freezes; the probes tell whether one mattered."""

    def __enter__(self) -> None:
        import logging
        import warnings

        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        import logging

        logging.disable(logging.NOTSET)
        self._caught.__exit__(None, None, None)


# ---- running


class Tower:
    """A tower ready to run. `spec` is what its maker left for the encoder.

    Queries go through one stream that uses every core (least latency), batches of documents through as many streams
    as give the most rows a second. Each way is compiled when it is first used. Safe to share between threads.
    """

    def __init__(self, folder: Path, spec: Mapping[str, Any], load: Callable[[], Module]) -> None:
        self.folder = folder
        self.spec = spec
        self._load = load
        self._compiled: dict[str, Any] = {}
        self._module: Module = None
        self._lock = threading.Lock()
        self._own = threading.local()

    def one(self, inputs: Inputs) -> NDArray[np.float32]:
        """(B, D) of a small batch, as soon as possible."""
        if self.spec["runtime"] == "torch":
            return self._torch(inputs, "cpu")
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._compile("LATENCY").create_infer_request()
        with _foreign():
            request.infer(dict(inputs), share_inputs=True)
        return np.array(request.get_output_tensor().data, np.float32)

    def many(self, batches: Iterable[Inputs], rows: int) -> list[NDArray[np.float32]]:
        """Each batch's (B, D), in order. Batches are drawn while others run, so making them goes on in parallel.

        rows: how many rows all batches hold together.
        """
        if self.spec["runtime"] == "torch" or (rows >= GPU_ROWS and gpu()):
            device = "cuda" if gpu() else "cpu"
            return [self._torch(inputs, device) for inputs in batches]
        compiled = self._compile("THROUGHPUT")
        made: list[NDArray[np.float32]] = []
        running: deque[Any] = deque()  # no callbacks: threads of OpenVINO never touch Python

        def finished() -> Any:
            request = running.popleft()
            request.wait()
            made.append(np.array(request.get_output_tensor().data, np.float32))
            return request

        streams = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        with _foreign():
            for inputs in batches:
                request = finished() if len(running) == streams else compiled.create_infer_request()
                request.start_async(dict(inputs))
                running.append(request)
            while running:
                finished()
        return made

    def _compile(self, hint: str) -> Any:
        with self._lock:
            if hint not in self._compiled:
                with _foreign():
                    # float32 also where the CPU offers less: a query must meet vectors made on another machine.
                    how = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": "f32",
                           "CPU_RUNTIME_CACHE_CAPACITY": str(KERNELS)}  # fmt: skip
                    self._compiled[hint] = _core().compile_model(str(self.folder / "tower.xml"), "CPU", how)
            return self._compiled[hint]

    def _torch(self, inputs: Inputs, device: str) -> NDArray[np.float32]:
        import torch

        with self._lock:
            if self._module is None:
                self._module = self._load().eval().to(device)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(np.ascontiguousarray(a)).to(device) for name, a in inputs.items()}
            out: NDArray[np.float32] = self._module(**tensors).float().cpu().numpy()
        return out


class _foreign:
    """OpenVINO's errors as ours. What they say of shapes and kernels stays in the cause."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise BackendError(
                "a converted tower does not run: delete towers/ in the cache to have it made anew"
            ) from error


def gpu() -> bool:
    """Whether there is a GPU that PyTorch can use. Where the machine shows none, torch is not imported to ask."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return bool(torch.cuda.is_available())


def _openvino() -> Any:
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


_CORE: list[Any] = []


def _core() -> Any:
    if not _CORE:
        _CORE.append(_openvino().Core())
    return _CORE[0]


# ---- batches


def budgeted(lengths: Sequence[int], budget: int, like: float = 0.0) -> list[NDArray[np.int64]]:
    """Row numbers in batches of like length, longest first, each within `budget` tokens once padded.

    like: the least length that a batch takes, as a share of its longest; what is padded is computed for nothing.

    >>> [batch.tolist() for batch in budgeted([1, 5, 2, 5], 10)]
    [[1, 3], [2, 0]]
    >>> [batch.tolist() for batch in budgeted([1, 5, 2, 5], 10, like=0.7)]
    [[1, 3], [2], [0]]
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    falling = -np.asarray(lengths, np.int64)[order]
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        alike = int(np.searchsorted(falling, -like * longest, "right")) - start
        size = min(max(1, budget // max(1, longest)), alike)
        batches.append(order[start : start + size])
        start += size
    return batches


def unit(matrix: NDArray[Any]) -> Matrix:
    """Rows of unit length, float32, C-contiguous; a row of zeros stays.

    >>> unit(np.array([[3.0, 4.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    rows = np.ascontiguousarray(matrix, np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    out: Matrix = rows / np.maximum(lengths, 1e-12)
    return out
