"""Vector indexes beside raw FAISS, hnswlib, usearch, LanceDB, Chroma and qdrant-edge, at equal recall.

``python -m benchmarks.vectors [--sizes 10000,100000,1000000] [--only a|b] [--again]`` writes docs/vectors.md, .json
and .svg. What the JSON holds already is not measured again, so a long run can be made in pieces. ``--quick`` builds
nothing and times again what is kept below .bench/vectors, up to 100,000 vectors, and what our own layers cost.

Vectors are real: abstracts of SciFact, captions of ROCO and windows of words cut out of both, through the packaged
encoder, 384 dimensions. Where a size needs more, the rest are mixtures of two of them (weights 0.6 to 0.95 and the
rest), and the table says how many. Queries are the collections' own. Every engine is built in one process and
searched in another, one query at a time on one thread, then in batches of 64 on two. The row of an engine is its
cheapest setting that finds 99 % of the true ten best, or its best one; a setting is asked for a minute at most. The
filter keeps a hundredth of the vectors, another hundredth for each query. Ours are whole collections: store, metadata
and filters with them. The machine was shared: compare processor time (all threads of the engine, median of the
queries), not p50 and p99, which hold the waiting for a core as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.collections import BENCH
from benchmarks.rivals import python_with
from benchmarks.vq_data import space

OUT = Path("docs")
FOLDER = BENCH / "vectors"
SIZES = "10000,100000,1000000"
QUICK_UP_TO = 100_000
K = 10
QUERIES = 500
ENOUGH = 0.99  # recall at which engines are compared
KINDS = ("flat", "hnsw", "hnsw-sq8", "hnsw-sq4", "hnsw-bin")
OURS = (*(f"lightbox/{kind}" for kind in KINDS), "lightbox/ivfpq:M=48,nlist=256,nprobe=32",
        "lightbox/ivfpq:M=48,nlist=256,nprobe=32,refine=10")  # fmt: skip
RAW = tuple(f"faiss/{kind}" for kind in (*KINDS, "ivfpq"))
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
    parser.add_argument("--sizes", default=SIZES, help="how many vectors, several by commas")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", default="", help="engines, for example lightbox/hnsw|faiss/hnsw")
    parser.add_argument("--again", action="store_true", help="also what has been measured already")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--quick", action="store_true", help="time again what is built, and our own layers")
    options = parser.parse_args()
    until = time.monotonic() + options.minutes * 60
    results = _kept()
    if options.quick:
        results["inside"] = _inside()
        _written(results)
    for size in map(int, options.sizes.split(",")):
        if options.quick and size > QUICK_UP_TO:
            continue
        engines = _engines(options.rivals, options.only)
        rows = results["sizes"].setdefault(str(size), {"engines": {}})["engines"]
        wanted = {name: python for name, python in engines.items() if options.again or _wanted(rows, name, options)}
        if not wanted:
            continue
        folder, real = _prepared(size)
        results["sizes"][str(size)] |= {"real": real, "mixed": size - real}
        for name, python in wanted.items():
            if time.monotonic() > until:
                break
            phases = ("search",) if options.quick else ("build", "search")
            row = _measured(name, python, folder, phases) if python else {"error": "cannot be installed here"}
            rows[name] = rows.get(name, {}) | row if options.quick else row
            print(size, name, _line(rows[name]), flush=True)
            _written(results)
    if not results["inside"] and time.monotonic() < until:
        results["inside"] = _inside()
    _written(results)


def _kept() -> dict[str, Any]:
    """What earlier runs found."""
    try:
        results: dict[str, Any] = json.loads((OUT / "vectors.json").read_text())
    except FileNotFoundError:
        results = {"k": K, "queries": QUERIES, "sizes": {}, "inside": {}}
    return results | {"machine": _machine()}


def _wanted(rows: dict[str, Any], name: str, options: argparse.Namespace) -> bool:
    measured = name in rows and "error" not in rows[name]
    return measured if options.quick else not measured


def _engines(rivals: bool, only: str) -> dict[str, str | None]:
    """Engine -> the interpreter that has it; None where it cannot be installed."""
    names = [*OURS, *RAW, *(RIVALS if rivals else ())]
    wanted = [name for name in names if not only or name in only.split("|")]
    return {
        name: python_with(name.split("/")[0], "numpy", *RIVALS[name]) if name in RIVALS else sys.executable
        for name in wanted
    }


def _measured(name: str, python: str, folder: Path, phases: tuple[str, ...]) -> dict[str, Any]:
    store = folder / "stores" / name.replace("/", " ")
    if "build" in phases:
        shutil.rmtree(store, ignore_errors=True)
    elif not store.exists():
        return {}  # keeps what was measured before
    out: dict[str, Any] = {}
    for phase in phases:
        command = [python, "-m", "benchmarks.engines.vectors", name, phase, str(folder), str(store)]
        calm = os.environ | {"OMP_WAIT_POLICY": "passive"}  # waiting threads would count as building
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=calm)
        if done.returncode != 0:
            return {"error": f"{phase} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"}
        out |= json.loads(done.stdout.strip().splitlines()[-1])
    for points, truth in ((out["points"], "truth.npy"), (out["filtered"], "truth_filtered.npy")):
        for point in points:
            point["recall"] = _recall(folder, point.pop("found"), np.load(folder / truth))
    return out | {
        "best": _best(out["points"]),
        "best_filtered": _best(out["filtered"]),
        "load": round(os.getloadavg()[0], 1),
    }


def _inside() -> dict[str, Any]:
    from benchmarks import vectors_inside

    folder, _ = _prepared(vectors_inside.SIZE)
    vectors = np.load(folder / "vectors.npy")
    queries = np.load(folder / "queries.npy")
    found = vectors_inside.measured(folder / "stores", vectors, queries)
    return found | {"load": round(os.getloadavg()[0], 1)}


def _recall(folder: Path, found: list[list[int]], least: NDArray[np.float32]) -> float:
    """Share of the k best that were found; whatever scores as well as the k-th counts."""
    vectors, queries = np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    reached, asked = 0, len(found)  # a slow engine is not asked all
    for query, numbers, score in zip(queries[:asked], found, least[:asked], strict=True):
        known = [number for number in numbers if number >= 0]
        reached += int((vectors[known] @ query >= score - 1e-5).sum())
    return reached / (K * len(found))


def _best(points: list[dict[str, Any]]) -> dict[str, Any] | None:
    enough = [point for point in points if point["recall"] >= ENOUGH]
    if enough:
        return min(enough, key=lambda point: float(point["cpu_ms"]))
    return max(points, key=lambda point: float(point["recall"]), default=None)


# --- data ----------------------------------------------------------------------------------------


def _prepared(size: int) -> tuple[Path, int]:
    """A folder with vectors, prices, queries, windows and the true k-th scores; how many vectors are real."""
    real, queries = _encoded()
    folder = FOLDER / str(size)
    if (folder / "windows.npy").exists():
        return folder, min(size, len(real))
    rng = np.random.default_rng(0)
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
    for name, array in (("price", price), ("queries", asked), ("windows", windows)):  # windows last: all is there
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
    """Vectors of texts and of queries, as `benchmarks.vq_data` keeps them."""
    spaces = [space(name) for name in ("scifact", "roco_captions")]
    texts = np.concatenate([matrix for one in spaces for matrix in (one.documents, one.windows)])
    asked = np.concatenate([part.vectors for one in spaces for part in one.asked.values()])
    return np.unique(texts, axis=0), asked


# --- report --------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {"cpu": model[0] if model else platform.processor(), "cores": os.cpu_count()}


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    best = row["best"]
    return f"build {row['build_cpu_s']:.1f} s, recall {best['recall']:.3f}, p50 {best['p50_ms']:.3f} ms"


def _written(results: dict[str, Any]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "vectors.json").write_text(json.dumps(results, indent=1) + "\n")
    machine = results["machine"]
    lines = ["# Vector indexes", "", *(__doc__ or "").split("\n\n", 2)[1].strip().splitlines(), ""]
    lines += [*(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores.",
        "",
        "![Curves over the number of vectors](vectors.svg)",
        "",
    ]
    for size, part in sorted(results["sizes"].items(), key=lambda item: int(item[0])):
        if part["engines"]:
            lines += [f"## {int(size):,} vectors ({part['real']:,} real, {part['mixed']:,} mixed)", "", HEAD, RULE]
            lines += [_row(name, part["engines"][name]) for name in (*OURS, *RAW, *RIVALS) if name in part["engines"]]
            lines += [""]
    (OUT / "vectors.md").write_text("\n".join(lines + _inside_told(results["inside"])))
    if any(part["engines"] for part in results["sizes"].values()):
        _plotted(results, OUT / "vectors.svg")


OVERHEAD = """\
A search of a snapshot beside bare FAISS, ms of processor time per query, medians of calls in turn. "FAISS" is the
index within the snapshot, asked with the same effort for as many candidates; "refined" is FAISS's own `IndexRefine`
over it, which rescores the same candidates on the same float32 vectors as we do (kinds without refinement: the same
as "FAISS"; flat: an index of its own). "added" and "more" are ours beside "refined"; the load was {load}."""
HEAD = (
    "| engine | build, CPU s | bytes/vector on disk | open s | MB when open | MB after the searches, own + mapped "
    "| setting | recall@10 | CPU ms | p50 ms | p99 ms | batch of 64, CPU ms/query "
    "| 1 % filter: recall | CPU ms | p50 ms | p99 ms | load |"
)
RULE = "|" + "---|" * 17


def _row(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {name} | {row['error']} |" + " |" * 15
    best, under = row["best"], row["best_filtered"]
    cells = [
        name, f"{row['build_cpu_s']:.1f}", f"{row['disk_bytes_per_vector']:,.0f}", f"{row['open_s']:.2f}",
        f"{row['opened_mb']:.0f}", f"{row['own_mb']:.0f} + {row['mapped_mb']:.0f}", str(best["setting"] or "auto"),
        f"{best['recall']:.3f}", *_times(best), f"{best['batch_cpu_ms_per_query']:.3f}",
    ]  # fmt: skip
    cells += [f"{under['recall']:.3f}", *_times(under)] if under else ["none"] * 4
    return "| " + " | ".join([*cells, str(row["load"])]) + " |"


def _times(point: dict[str, Any]) -> list[str]:
    return [f"{point['cpu_ms']:.3f}", f"{point['p50_ms']:.3f}", f"{point['p99_ms']:.2f}"]


def _inside_told(inside: dict[str, Any]) -> list[str]:
    if not inside:
        return []
    lines = [f"## Our own layers, {inside['size']:,} vectors", ""]
    for kind in ("flat", "hnsw"):
        f = inside[f"filtered, {kind}"]
        lines.append(
            f"Filtered search over `{kind}`: recall {f['recall']:.3f} over {f['filters']} random filters from 50 % to "
            f"0.1 %; at 1 %, filter parsed and evaluated, p50 {f['p50_ms']:.3f} ms ({f['p50_cpu_ms']:.3f} ms of "
            f"processor time), p5 {f['p5_ms']:.3f} ms, p99 {f['p99_ms']:.2f} ms."
        )
    lines += ["", OVERHEAD.format(load=inside["load"]), ""]
    lines += ["| kind | one query: FAISS | refined | ours | added | batch of 64: FAISS | refined | ours | more "
              "| batch of 256: FAISS | refined | ours | more |"]  # fmt: skip
    lines += ["|" + "---|" * 13]
    for kind, batches in inside["overhead"].items():
        cells = [kind]
        for batch, took in batches.items():
            cells += [f"{took[name]:.4f}" for name in ("faiss_ms", "refined_ms", "ours_ms")]
            cells += [f"{took['added_ms']:+.3f} ms" if batch == "1" else f"{took['ratio'] - 1:+.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _plotted(results: dict[str, Any], path: Path) -> None:
    """What grows with the number of vectors, one line an engine."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lightbox"
    from matplotlib import pyplot

    panels = {
        "one query, ms of CPU": lambda row: row["best"]["cpu_ms"],
        "recall@10": lambda row: row["best"]["recall"],
        "under a 1 % filter, ms of CPU": lambda row: (row["best_filtered"] or {}).get("cpu_ms"),
        "build, s of CPU": lambda row: row["build_cpu_s"],
        "bytes a vector on disk": lambda row: row["disk_bytes_per_vector"],
        "MB after the searches": lambda row: row["own_mb"] + row["mapped_mb"],
    }
    sizes = sorted((int(size) for size, part in results["sizes"].items() if part["engines"]))
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 8.5), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for axis, (title, value) in zip(axes.flat, panels.items(), strict=True):
        for number, name in enumerate((*OURS, *RAW, *RIVALS)):
            rows = [(size, results["sizes"][str(size)]["engines"].get(name, {"error": ""})) for size in sizes]
            points = [(size, value(row)) for size, row in rows if "error" not in row and value(row) is not None]
            if points:
                style = {"lightbox": "-", "faiss": ":"}.get(name.split("/")[0], "--")
                axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, label=name, color=colours(number % 20))
        axis.set(title=title, xscale="log", xlabel="vectors", **({} if "recall" in title else {"yscale": "log"}))
        axis.grid(alpha=0.25)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
