"""docs/distill_vq.md and its plots, from what `benchmarks.distill_vq` measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OUT = Path("docs/distill_vq.md")
NAMES = {
    "ivfpq": "IVFPQ",
    "opq+ivfpq": "OPQ + IVFPQ",
    "rabitq": "RaBitQ after PCA",
    "sq8": "8-bit scalars after PCA",
    "sq4": "4-bit scalars after PCA",
    "contrastive, labels": "contrastive VQ, labelled queries",
    "contrastive, few labels": "contrastive VQ, 64 labelled queries",
    "turned": "turned by the queries, not taught",
    "distill, plain": "Distill-VQ in a plain rotation, no labels",
    "distill, labels": "Distill-VQ, labelled queries",
    "distill, log": "Distill-VQ, those queries without labels",
    "distill, 4 bits": "Distill-VQ, no labels, twice as many codes of 4 bits",
    "distill": "Distill-VQ, no labels",
}
PARTS = ("score", "overlap")
PLAIN = ("opq+ivfpq", "rabitq")
LABELS = {
    "build_cpu_s": "build",
    "p50_ms": "median by the clock",
    "cpu_ms": "mean of the processor",
    "build_mb": "building",
    "search_mb": "searching",
}
GROWN = (
    {
        "real": "of them real",
        "build_cpu_s": "build, processor s",
        "build_s": "build, clock s",
        "build_mb": "most resident, MB",
        "code_bytes": "index bytes a vector",
    },
    {
        "nprobe": "lists visited",
        "p50_ms": "p50, ms",
        "p95_ms": "p95, ms",
        "cpu_ms": "processor, ms",
        "overlap": "overlap@10",
        "search_mb": "resident, MB",
        "rows_mb": "rows mapped, MB",
        "rate": "codes alone, queries/s",
        "faiss_rate": "as FAISS trains it, queries/s",
    },
)
Results = Mapping[str, Mapping[str, float]]


def write(results: Results, exact: Mapping[str, Mapping[str, Any]]) -> None:
    """What it gains, one table and one plot a space, what it costs."""
    lines = ["# Distill-VQ", "", *INTRODUCTION.strip().splitlines(), "", *_gains(results, exact), ""]
    for name, ceiling in exact.items():
        rows = {key: row for key, row in results.items() if key.startswith(f"{name}|")}
        lines += [f"## {name}", "", _about(ceiling), "", *_table(rows, ceiling), ""]
        if len({key.split("|")[1] for key in rows}) > 1:
            _plot(name, rows, ceiling)
            lines += [f"![{name}](distill_vq-{name}.png)", ""]
    OUT.write_text("\n".join([*lines, *_lists(results, exact), *_growth(results)]))


def _gains(results: Results, exact: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Distill-VQ without labels beside the best of the others that learn nothing, size by size."""
    out = [
        "## What it gains",
        "",
        "Distill-VQ without labels beside OPQ + IVFPQ and RaBitQ of as many bytes, and beside exact search; means of",
        "as many seeds as both have. It learned from sentences of the documents' texts (for films: of reports, and a",
        "quarter as many films) or from a log: the train queries, whose labels it does not see.",
        "",
        "| space | bytes | learned from | seeds | to OPQ + IVFPQ | overlap@10 | to RaBitQ | overlap@10 | to exact |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, ceiling in exact.items():
        rows = {key: row for key, row in results.items() if key.startswith(f"{name}|")}
        for size in sorted({int(key.split("|")[1]) for key in rows}):
            for method, source in (("distill", "sentences"), ("distill, log", "a log")):
                ours = _values(rows, size, method, "score")
                if ours:
                    cells = [_gain(rows, size, (method, other), part) for other in PLAIN for part in PARTS]
                    below = f"{100 * (np.mean(ours) / ceiling['score'] - 1):+.1f} %"
                    out.append(f"| {name} | {size} | {source} | {len(ours)} | {' | '.join(cells)} | {below} |")
    return out


def _gain(rows: Results, size: int, methods: tuple[str, str], part: str) -> str:
    """Of the score as a share, of the overlap as a difference; over the seeds that both have."""
    ours, theirs = (
        {key.split("|")[3]: row[part] for key, row in rows.items() if key.split("|")[1:3] == [str(size), method]}
        for method in methods
    )
    both = ours.keys() & theirs.keys()
    if not both:
        return ""
    one, two = (float(np.mean([values[seed] for seed in both])) for values in (ours, theirs))
    return f"{100 * (one / two - 1):+.1f} %" if part == "score" else f"{one - two:+.3f}"


def _lists(results: Results, exact: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What visiting more lists gives at 96 bytes, as a share of what exact search reaches."""
    rows: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for key, row in sorted(results.items()):
        if key.startswith("lists|"):
            rows.setdefault((key.split("|")[1], key.split("|")[2]), []).append(row)
    if not rows:
        return []
    counts = list(next(iter(rows.values()))[0])
    out = [*LISTS.strip().splitlines(), "", f"| space | method | seeds | {' | '.join(counts)} |"]
    out.append("|---|---|---|" + "---|" * len(counts))
    for (name, method), each in rows.items():
        reached = (100 * (np.mean([row[count] for row in each]) / exact[name]["score"] - 1) for count in counts)
        out.append(f"| {name} | {NAMES[method]} | {len(each)} | {' | '.join(f'{r:+.1f} %' for r in reached)} |")
    return [*out, ""]


def _growth(results: Results) -> list[str]:
    rows = {
        (int(size), int(bits)): row
        for growth, bits, size in (key.split("|")[:3] for key in results)
        if growth == "growth"
        for row in [results[f"growth|{bits}|{size}"]]
    }
    if not rows:
        return []
    out = [*GROWTH.strip().splitlines(), ""]
    for heads in GROWN:
        out += ["| vectors | bits | " + " | ".join(heads.values()) + " |", "|---|---|" + "---|" * len(heads)]
        out += [
            f"| {n:,} | {bits} | " + " | ".join(f"{row[key]:,}" if key in row else "" for key in heads) + " |"
            for (n, bits), row in sorted(rows.items())
        ]
        out.append("")
    _plot_growth(rows)
    return [*out, "![growth](distill_vq-growth.png)", ""]


def _plot_growth(rows: Mapping[tuple[int, int], Mapping[str, float]]) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for panel, keys, label in zip(
        panels,
        (("build_cpu_s",), ("p50_ms", "cpu_ms"), ("build_mb", "search_mb")),
        ("seconds of a processor to learn and add", "milliseconds a query", "megabytes resident"),
        strict=True,
    ):
        for bits in sorted({bits for _, bits in rows}):
            sizes = sorted(n for n, of in rows if of == bits)
            for key in keys:
                values = [rows[n, bits][key] for n in sizes]
                panel.plot(sizes, values, marker="o", label=f"{LABELS[key]}, {bits} bits")
        panel.set(xlabel="vectors", xscale="log", yscale="log", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(OUT.with_name("distill_vq-growth.png"), dpi=110)
    plt.close(figure)


def _about(ceiling: Mapping[str, Any]) -> str:
    about = "{documents:,} vectors in {lists} lists, {visited} of them visited; {queries:,} test queries, "
    judged = "exact search reaches {measure} {score:.4f}."
    return (about + (judged if _judged(ceiling) else "which nobody judged here.")).format(**ceiling)


def _judged(ceiling: Mapping[str, Any]) -> bool:
    return bool(ceiling["measure"] != "overlap@10")


def _table(rows: Results, ceiling: Mapping[str, Any]) -> list[str]:
    sizes = sorted({int(key.split("|")[1]) for key in rows})
    parts = PARTS if _judged(ceiling) else ("overlap",)
    named = {"score": ceiling["measure"], "overlap": "overlap@10"}
    heads = [f"{size} bytes: {named[part]}" for size in sizes for part in parts]
    out = [f"| method | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for method, label in NAMES.items():
        cells = [_cell(rows, size, method, part) for size in sizes for part in parts]
        if any(cells):
            out.append(f"| {label} | " + " | ".join(cells) + " |")
    return out


def _values(rows: Results, size: int, method: str, part: str) -> list[float]:
    return [row[part] for key, row in rows.items() if key.split("|")[1:3] == [str(size), method]]


def _cell(rows: Results, size: int, method: str, part: str) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    found = _values(rows, size, method, part)
    if not found:
        return ""
    spread = f" ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""
    return f"{np.mean(found):.4f}{spread}"


def _plot(name: str, rows: Results, ceiling: Mapping[str, Any]) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, part in zip(panels, PARTS, strict=True):
        for method, label in NAMES.items():
            sizes = sorted({int(key.split("|")[1]) for key in rows if key.split("|")[2] == method})
            if sizes:
                means = [float(np.mean(_values(rows, size, method, part))) for size in sizes]
                panel.plot(sizes, means, marker="o", label=label, linewidth=2.5 if method == "distill" else 1.2)
        panel.set(
            xlabel="bytes a vector", xscale="log", ylabel=ceiling["measure"] if part == "score" else "overlap@10"
        )
        panel.set_xticks([16, 24, 32, 48, 96], ["16", "24", "32", "48", "96"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].axhline(ceiling["score"], color="black", linestyle=":", label="exact")
    panels[0].legend(fontsize=7)
    figure.suptitle(name)
    figure.savefig(OUT.with_name(f"distill_vq-{name}.png"), dpi=110)
    plt.close(figure)


INTRODUCTION = """
`distillvq:M=24,nlist=256` is an index of the form OPQ + IVFPQ whose centroids and codewords were taught to score
as the stored vectors do (Xiao et al., SIGIR 2022, arXiv 2204.00185). FAISS searches it as any other.

How it is made:

1. Queries to learn from are cut from the collection's texts and encoded, or are the vectors of the space's other side;
   an index of pictures learns from some of its pictures too, one beside four others. Where there is nothing to ask
   with, queries are drawn around the stored vectors, and `lightbox info` says so.
2. Documents are stretched along the directions in which those queries look and queries shrunk, so that every inner
   product stays what it is, and quantizing loses less of what matters.
3. OPQ + IVFPQ is fitted to the stretched documents.
4. Centroids and codewords are trained with the ListNet loss over exact scores. Candidates are what exact search finds
   first (or the labelled document), a sample of its 200 best, and those of the other queries of the batch. Codewords
   are assigned straight-through; stretch, rotation and the centroid of a document are frozen.
5. Documents are assigned anew by the inner product that serves. Where the spec gives no nprobe, it is the least that
   reaches 99 % of the recall of visiting all lists, on queries kept back; the curve is kept with the index, and
   `lightbox info` shows it.

Every figure comes from `python -m benchmarks.distill_vq`: equal lists, equally many visited, and equal bytes of code a
vector; what an index holds besides (a number of 8 bytes a vector, codebooks, a rotation) is the same for all. Mean and
standard deviation over seeds where there are several. The rates were chosen on a quarter of SciFact's train queries;
test queries are used for these tables only. `sentences` are all those of the text collections, the captions and the
reports; `million` are the same and, beyond them, mixtures of two of them, which no text has. A map of the queries that
learns beside the codes was tried on SciFact's dev queries at 24 bytes and left out: over two seeds, three rates and
two sources of queries nDCG@10 moved by -0.010 to +0.012, and overlap@10 by -0.054 to +0.009.

Read with care: the 3 % that were hoped for at 24 bytes are there on SciFact and on all sentences, not on captions or
films, whose judgments hardly see what overlap@10 sees; and among a million mixtures, which fill the space evenly,
learning gains nothing over an OPQ that FAISS fits to all of them. Labels say more than any teacher where test is like
train: on SciFact, where two of three test claims ask for a paper that a train claim asks for, the contrastive loss
with all of them passes exact search itself from 32 bytes on, and with 64 labelled queries it still has 0.011 nDCG@10
more at 24 bytes than Distill-VQ without labels, which keeps more of the exact neighbours (overlap@10 +0.008). On
captions (R@10 +0.010) and films (nDCG@10 +0.002, overlap@10 +0.014) no labels are better than few. On films, whose
exact search scores 0.190, RaBitQ and the scalars reach 0.23 with a third of its neighbours: PCA takes the films' mean
away, which is near everything (compare `turn.middle` in the [film page](films.md)); that is another ranking, not a
better copy of this one.
"""

LISTS = """
## What the lists lose

`python -m benchmarks.distill_vq --lists`: 96 bytes, to exact search, by how many of 64 lists are visited. The tables
above visit 16 of them whatever the method; where a spec gives no nprobe, the product chooses it (5. above). What the
captions miss at 96 bytes is mostly in lists that were not visited; the codes lose 1.6 %.
"""

GROWTH = """
## What it costs as it grows

`python -m benchmarks.vq_growth`: 24 bytes, as `distillvq:M=24,refine=100` (codes of 8 bits) and as
`M=48,bits=4,refine=100`, over int8 rows in shards on disk, as many lists as the power of two nearest the square root.
The vectors are those of all real sentences and, beyond them, mixtures of two; queries are real. Building reads the
shards, learns from the train and dev queries of all collections, and adds the vectors. Searches are of one query on
one thread, rescored on 1,000 of the stored rows. `resident` is what the index adds to the process, codebooks included;
`rows mapped` are pages of the shards that 300 queries touched, which the system keeps as long as nobody needs the
memory: on a machine without room for them each row that is rescored is a read from the disk instead. Beside it is the
same form as FAISS trains it, both without rescoring. Beside the building of ten million other work ran, which its
clock counts. At four sizes (8 bits; 100,000 at 4 bits) what was learned agreed no better with exact search on unseen
queries than what it began as, the turned OPQ: `lightbox info` says of such an index that its codes stayed as trained.
"""
