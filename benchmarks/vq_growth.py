"""What a `distillvq` side costs as it grows: learning, adding, searching, memory.

``python -m benchmarks.vq_growth [--sizes 10000,100000,1000000] [--bits 8,4]`` adds what is missing to
docs/distill_vq.json; ``python -m benchmarks.distill_vq --draw`` draws it. The vectors are those of 0.14 million real
sentences (384 dimensions) and, beyond them, mixtures of two; stored as int8 rows in shards on disk: 3.9 GB for ten
million. Learning and searching are processes of their own, so that the memory each is charged with is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.distill_vq import known, record
from benchmarks.vq_data import FOLDER, SENTENCES, mixtures, space
from indexers.scan import Stored, nearest, threads
from indexers.vectors import SideIndex, parse_spec
from retrieval.types import Matrix

faiss: Any = untyped_faiss

BYTES, REFINE, K = 24, 100, 10
SHARD = 1 << 18
ASKED = 300  # queries of the search
COMPARED = 1 << 17  # vectors up to which FAISS makes one as well
_IP = untyped_faiss.METRIC_INNER_PRODUCT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--bits", default="8,4", help="of a code; there are as many codes as fill the bytes")
    parser.add_argument("--step", choices=("learn", "search"), help="one step of one size, in this process")
    given = parser.parse_args()
    for size in map(int, given.sizes.split(",")):
        folder = FOLDER / "growth" / str(size)
        for bits in map(int, given.bits.split(",")):
            if given.step:
                print(json.dumps(_learn(folder, size, bits) if given.step == "learn" else _search(folder, bits)))
            elif f"growth|{bits}|{size}" not in known():
                _write_shards(folder, size)
                record(f"growth|{bits}|{size}", {**_apart("learn", size, bits), **_apart("search", size, bits)})


def _apart(step: str, size: int, bits: int) -> dict[str, Any]:
    shape = ["--sizes", str(size), "--bits", str(bits)]
    command = [sys.executable, "-m", "benchmarks.vq_growth", "--step", step, *shape]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(told, end="", flush=True)
    return dict(json.loads(told.splitlines()[-1]))


# --- the vectors -----------------------------------------------------------------------------------


def _asked(*parts: str) -> Matrix:
    asked = space(SENTENCES).asked
    return np.random.default_rng(1).permutation(np.concatenate([asked[part].vectors for part in parts]))


def _write_shards(folder: Path, size: int) -> None:
    """int8 rows; the real vectors first, in random order as they are kept, then mixtures of two of them."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    real = space(SENTENCES).documents
    for at in range(0, size, SHARD):
        count = min(SHARD, size - at)
        rows = real[at : at + count]
        if len(rows) < count:
            rows = np.concatenate([rows, mixtures(real, count - len(rows), rng)])
        largest = np.abs(rows).max(axis=1, keepdims=True)
        np.save(folder / f"{at:09}.npy", np.round(rows * (127 / largest)).astype(np.int8))
    (folder / "done").touch()


def _shards(folder: Path) -> list[NDArray[np.int8]]:
    return [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]


# --- the steps -------------------------------------------------------------------------------------


def _lists(size: int) -> int:
    """Powers of two, near the square root."""
    return int(2 ** round(np.log2(size) / 2))


def _codes(bits: int) -> int:
    return BYTES * 8 // bits


def _learn(folder: Path, size: int, bits: int) -> dict[str, Any]:
    """Seconds of every phase, by the clock and of the processor, and the most memory that was resident."""
    spec = parse_spec(f"distillvq:M={_codes(bits)},nlist={_lists(size)},bits={bits},refine={REFINE}")
    seconds: dict[str, float] = {}
    last = (time.perf_counter(), "train")

    def told(phase: str, done: int, total: int | None) -> None:
        del done, total
        nonlocal last
        now = time.perf_counter()
        seconds[last[1]] = seconds.get(last[1], 0.0) + now - last[0]
        last = (now, phase)

    used, start = time.process_time(), time.perf_counter()
    side = SideIndex.build(_shards(folder), spec, told, _asked("train", "dev"))
    told("", 0, None)
    side.save(folder / str(bits))
    return {
        "spec": str(spec),
        "real": min(size, len(space(SENTENCES).documents)),
        "build_s": round(time.perf_counter() - start, 1),
        "build_cpu_s": round(time.process_time() - used, 1),
        "phases_s": {phase: round(spent, 1) for phase, spent in seconds.items()},
        "build_mb": _most_resident(),
        "code_bytes": round(side.bytes_per_vector, 1),
        "nprobe": side.measured.effort,
        "notes": list(side.measured.notes),
    }


def _search(folder: Path, bits: int) -> dict[str, Any]:
    """One query at a time on one thread; overlap with exact search; the rate beside FAISS's own IVFPQ."""
    asked = np.array(_asked("test")[:ASKED])
    before, _ = _resident()
    chunks = _shards(folder)
    side = SideIndex.load(folder / str(bits), chunks)
    with threads(1):
        side.search(asked[:8], K)
        took, used = [], time.process_time()
        found = []
        for query in asked:
            start = time.perf_counter()
            found.append(side.search(query[None], K).numbers[0])
            took.append(time.perf_counter() - start)
        used = time.process_time() - used
        after, rows = _resident()
    stored = Stored(chunks)
    truth = nearest(stored, asked, K)[1][:, :K]
    overlap = np.mean([len(set(f) & set(t)) / K for f, t in zip(found, truth, strict=True)])
    return {
        "p50_ms": round(1_000 * float(np.median(took)), 2),
        "p95_ms": round(1_000 * float(np.quantile(took, 0.95)), 2),
        "cpu_ms": round(1_000 * used / len(asked), 2),
        "overlap": round(float(overlap), 4),
        "search_mb": round(after - before),
        "rows_mb": round(rows),
        **(_rates(side, stored, asked) if len(stored) <= COMPARED else {}),
    }


def _rates(side: SideIndex, stored: Stored, asked: Matrix) -> dict[str, float]:
    """Queries a second of the processor, codes alone, here and of that form as FAISS trains it; the best of five."""
    assert side._codes is not None
    lists, dim, bits = side.spec.keys["nlist"], stored.dim, side.spec.bits
    form = faiss.IndexIVFPQ if bits == 8 else faiss.IndexIVFPQFastScan
    inverted = form(faiss.IndexFlatIP(dim), dim, lists, _codes(bits), bits, _IP)
    inverted.pq.cp.niter = inverted.cp.niter = 4  # how well it fits is not what is measured
    inverted.pq.cp.min_points_per_centroid = inverted.cp.min_points_per_centroid = 1
    turn = faiss.RandomRotationMatrix(dim, dim)
    turn.init(0)
    theirs = faiss.IndexPreTransform(turn, inverted)
    theirs.train(stored.gather(np.linspace(0, len(stored) - 1, min(len(stored), 32_768)).astype(np.int64)))
    for _, rows in stored.blocks():
        theirs.add(rows)
    inner = faiss.SearchParametersIVF(nprobe=side.measured.effort)
    params = faiss.SearchParametersPreTransform(index_params=inner)
    best = {"rate": 0.0, "faiss_rate": 0.0}
    with threads(1):
        for _ in range(5):
            for name, index in (("rate", side._codes.index), ("faiss_rate", theirs)):
                start = time.process_time()
                index.search(asked, K, params=params)
                best[name] = max(best[name], round(len(asked) / (time.process_time() - start)))
    return best


def _resident() -> tuple[float, float]:
    """Megabytes resident now: all but the mapped shards, and of those, which the system may take back at any time."""
    resident, shard = [0.0, 0.0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            shard = line.endswith(".npy")
        elif name == "Rss:":
            resident[shard] += int(rest[0]) * 1024 / 1e6
    return resident[0], resident[1]


def _most_resident() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    main()
