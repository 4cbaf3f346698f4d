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
    "contrastive, first": "contrastive VQ, exact search's first",
    "turned": "turned by the queries, not taught",
    "distill, plain": "Distill-VQ in a plain rotation, no labels",
    "distill, labels": "Distill-VQ, labelled queries",
    "distill": "Distill-VQ, no labels",
}
Results = Mapping[str, Mapping[str, float]]


def write(results: Results, exact: Mapping[str, Mapping[str, Any]]) -> None:
    """One table and one plot a space."""
    lines = ["# Distill-VQ", "", *INTRODUCTION.strip().splitlines(), ""]
    for name, ceiling in exact.items():
        rows = {key: row for key, row in results.items() if key.startswith(f"{name}|")}
        lines += [f"## {name}", "", _about(ceiling), "", *_table(rows, ceiling), ""]
        if len({key.split("|")[1] for key in rows}) > 1:
            _plot(name, rows, ceiling)
            lines += [f"![{name}](distill_vq-{name}.png)", ""]
    OUT.write_text("\n".join(lines))


def _about(ceiling: Mapping[str, Any]) -> str:
    return (
        f"{ceiling['documents']:,} vectors, {ceiling['queries']:,} test queries; exact search reaches "
        f"{ceiling['measure']} {ceiling['score']:.4f}."
    )


def _table(rows: Results, ceiling: Mapping[str, Any]) -> list[str]:
    sizes = sorted({int(key.split("|")[1]) for key in rows})
    out = [
        "| method | " + " | ".join(f"{size} bytes: {ceiling['measure']} | overlap@10" for size in sizes) + " |",
        "|---|" + "---|---|" * len(sizes),
    ]
    for method, label in NAMES.items():
        cells = [_cell(rows, size, method, part) for size in sizes for part in ("score", "overlap")]
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
    for panel, part in zip(panels, ("score", "overlap"), strict=True):
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
   where there is neither they are drawn around the stored vectors, and `lightbox info` says so.
2. Documents are stretched along the directions in which those queries look and queries shrunk, so that every inner
   product stays what it is, and quantizing loses less of what matters.
3. OPQ + IVFPQ is fitted to the stretched documents.
4. Centroids and codewords are trained with the ListNet loss over exact scores. Candidates are what exact search finds
   first (or the labelled document), a sample of its 200 best, and those of the other queries of the batch. Codewords
   are assigned straight-through; stretch, rotation and the centroid of a document are frozen.
5. Documents are assigned anew by the inner product that serves. Where the spec gives no nprobe, it is the least that
   reaches 99 % of the recall of visiting all lists, on queries kept back; the curve is kept with the index, and
   `lightbox info` shows it.

Every figure comes from `python -m benchmarks.distill_vq`: 64 lists, 16 of them visited, and equal bytes of code a
vector; what an index holds besides (a number of 8 bytes a vector, codebooks, a rotation) is the same for all. Mean and
standard deviation over seeds where there are several. The rates were chosen on a quarter of SciFact's train queries;
test queries are used for these tables only.
"""
