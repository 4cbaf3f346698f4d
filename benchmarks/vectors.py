"""Vector indexes beside raw FAISS, hnswlib, usearch, LanceDB, Chroma and qdrant-edge, at equal recall.

``python -m benchmarks.vectors [--sizes 10000,100000,1000000] [--no-rivals]`` writes docs/bench/vectors.md and .json.

Vectors are real: titles and texts of the classic collections through the packaged encoder. Where a size needs
more, the rest are mixtures of two of them (weights 0.6 to 0.95 and the rest), and the table says how many. Queries
are the collections' own. Every engine is built in one process and searched in another, one query at a time on one
thread, then in batches of 64 on two. The row of an engine is its cheapest setting that finds 99 % of the true
ten best, or its best one. The filter keeps a hundredth of the vectors, another hundredth for each query.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.collections import BENCH, CLASSICS, data
from benchmarks.rivals import python_with

OUT = Path("docs/bench")
K = 10
QUERIES = 500
ENOUGH = 0.99  # recall at which engines are compared
KINDS = ("flat", "hnsw", "hnsw-sq8", "hnsw-sq4", "hnsw-bin")
OURS = (*(f"lightbox/{kind}" for kind in KINDS), "lightbox/ivfpq:M=48,nlist=256,nprobe=32",
        "lightbox/ivfpq:M=48,nlist=256,nprobe=32,refine=10")  # fmt: skip
RAW = tuple(f"faiss/{kind}" for kind in KINDS)
RIVALS = {
    "hnswlib": ("hnswlib",),
    "usearch/f32": ("usearch",),
    "usearch/i8": ("usearch",),
    "lancedb": ("lancedb", "pyarrow"),
    "chromadb": ("chromadb",),
    "qdrant-edge": ("qdrant-edge-py",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000", help="how many vectors, several by commas")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", default="", help="engines, for example lightbox/hnsw|faiss/hnsw")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    results: dict[str, Any] = {"machine": _machine(), "k": K, "queries": QUERIES, "sizes": {}}
    for size in sizes:
        folder, real = _prepared(size)
        rows: dict[str, Any] = {}
        for name, python in _engines(options.rivals, options.only).items():
            rows[name] = _measured(name, python, folder) if python else {"error": "cannot be installed here"}
            print(size, name, _line(rows[name]), flush=True)
        results["sizes"][str(size)] = {"real": real, "mixed": size - real, "engines": rows}
        _written(results)
        shutil.rmtree(folder)


def _engines(rivals: bool, only: str) -> dict[str, str | None]:
    """Engine -> the interpreter that has it; None where it cannot be installed."""
    names = [*OURS, *RAW, *(RIVALS if rivals else ())]
    wanted = [name for name in names if not only or name in only.split("|")]
    return {
        name: python_with(name.split("/")[0], "numpy", *RIVALS[name]) if name in RIVALS else sys.executable
        for name in wanted
    }


def _measured(name: str, python: str, folder: Path) -> dict[str, Any]:
    store = folder / "store"
    out: dict[str, Any] = {}
    for phase in ("build", "search"):
        command = [python, "-m", "benchmarks.engines.vectors", name, phase, str(folder), str(store)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(store, ignore_errors=True)
            return {"error": f"{phase} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"}
        out |= json.loads(done.stdout.strip().splitlines()[-1])
    shutil.rmtree(store)
    for points, truth in ((out["points"], "truth.npy"), (out["filtered"], "truth_filtered.npy")):
        for point in points:
            point["recall"] = _recall(folder, point.pop("found"), np.load(folder / truth))
    return out | {"best": _best(out["points"]), "best_filtered": _best(out["filtered"])}


def _recall(folder: Path, found: list[list[int]], least: NDArray[np.float32]) -> float:
    """Share of the k best that were found; whatever scores as well as the k-th counts."""
    vectors, queries = np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    reached = 0
    for query, numbers, score in zip(queries, found, least, strict=True):
        known = [number for number in numbers if number >= 0]
        reached += int((vectors[known] @ query >= score - 1e-5).sum())
    return reached / (K * len(found))


def _best(points: list[dict[str, Any]]) -> dict[str, Any] | None:
    enough = [point for point in points if point["recall"] >= ENOUGH]
    if enough:
        return min(enough, key=lambda point: float(point["p50_ms"]))
    return max(points, key=lambda point: float(point["recall"]), default=None)


# --- data ----------------------------------------------------------------------------------------


def _prepared(size: int) -> tuple[Path, int]:
    """A folder with vectors, prices, queries, windows and the true k-th scores; how many vectors are real."""
    real, queries = _encoded()
    rng = np.random.default_rng(0)
    folder = BENCH / "vectors" / str(size)
    folder.mkdir(parents=True, exist_ok=True)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (size, real.shape[1]))
    vectors[: len(real)] = real[rng.permutation(len(real))[:size]]
    for at in range(len(real), size, 65_536):
        vectors[at : at + 65_536] = _mixed(real, min(65_536, size - at), rng)
    vectors.flush()
    price = rng.random(size)
    asked = queries[rng.permutation(len(queries))[:QUERIES]]
    low = rng.random(len(asked)) * 0.99
    windows = np.stack([low, low + 0.01], axis=1)
    whole = np.concatenate([asked @ vectors[at : at + 65_536].T for at in range(0, size, 65_536)], axis=1)
    np.save(folder / "truth.npy", np.partition(whole, size - K, axis=1)[:, size - K])
    for row, (least, most) in enumerate(windows):
        whole[row, (price < least) | (price >= most)] = -np.inf
    np.save(folder / "truth_filtered.npy", np.partition(whole, size - K, axis=1)[:, size - K])
    for name, array in (("price", price), ("queries", asked), ("windows", windows)):
        np.save(folder / f"{name}.npy", array)
    return folder, min(size, len(real))


def _mixed(real: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    weight = rng.uniform(0.6, 0.95, (count, 1)).astype(np.float32)
    rows = (
        weight * real[rng.integers(len(real), size=count)] + (1 - weight) * real[rng.integers(len(real), size=count)]
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows, np.float32)


def _encoded() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of documents and queries of the classic collections, encoded once."""
    kept = BENCH / "vectors" / "real.npz"
    if not kept.exists():
        from encoders.text import text_encoder
        from retrieval.types import Item

        encoder = text_encoder(None, BENCH / "models")
        texts: dict[str, list[Item]] = {"corpus": [], "queries": []}
        for name in ("scifact", *CLASSICS):
            for part, items in texts.items():
                lines = (data() / name / f"{part}.jsonl").read_text().splitlines()[:3_000]
                records = [json.loads(line) for line in lines]
                items += [Item(text=f"{r.get('title', '')} {r['text']}".strip() or "none") for r in records]
        kept.parent.mkdir(parents=True, exist_ok=True)
        documents = encoder.encode_documents(texts["corpus"])
        np.savez(kept, documents=documents, queries=encoder.encode_queries(texts["queries"]))
    with np.load(kept) as arrays:
        return arrays["documents"], arrays["queries"]


# --- report --------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {"cpu": model[0] if model else platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    best = row["best"]
    return f"build {row['build_s']:.1f} s, recall {best['recall']:.3f}, p50 {best['p50_ms']:.3f} ms"


def _written(results: dict[str, Any]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "vectors.json").write_text(json.dumps(results, indent=1) + "\n")
    machine = results["machine"]
    lines = ["# Vector indexes", "", *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    lines += [f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f} when the run began.", ""]
    for size, part in results["sizes"].items():
        lines += [f"## {int(size):,} vectors ({part['real']:,} real, {part['mixed']:,} mixed)", "", HEAD, RULE]
        lines += [_row(name, row) for name, row in part["engines"].items()] + [""]
    (OUT / "vectors.md").write_text("\n".join(lines))


HEAD = (
    "| engine | build s | bytes/vector on disk | open s | memory MB, own + mapped | setting | recall@10 | p50 ms "
    "| p99 ms | batch of 64, ms/query | 1 % filter: recall | p50 ms | p99 ms |"
)
RULE = "|" + "---|" * 13


def _row(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {name} | {row['error']} |" + " |" * 11
    best, under = row["best"], row["best_filtered"]
    cells = [
        name, f"{row['build_s']:.1f}", f"{row['disk_bytes_per_vector']:,.0f}", f"{row['open_s']:.2f}",
        f"{row['own_mb']:.0f} + {row['mapped_mb']:.0f}", str(best["setting"] or "auto"), f"{best['recall']:.3f}",
        f"{best['p50_ms']:.3f}", f"{best['p99_ms']:.2f}", f"{best['batch_ms_per_query']:.3f}",
    ]  # fmt: skip
    cells += [f"{under['recall']:.3f}", f"{under['p50_ms']:.3f}", f"{under['p99_ms']:.2f}"] if under else ["none"] * 3
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
