"""What the image tower sees, as docs/films.md: `python -m benchmarks.film_page [FIGURES.json ...]`.

The figures are those of `benchmarks.films --json`, one file a seed. Robustness is measured here, on the unseen films
of the Indiana collection, each changed before the tower reads it. Examples come from VQA-RAD's chest films, which lie
in `demo/` and were never trained on: a finding is asked for in words, and what the linker reads in the statements
that go with a film says whether it is there.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from benchmarks.films import _task, _vectors, auc, questions, written
from encoders.clip import image_encoder
from encoders.images import pixels
from encoders.text import text_encoder
from retrieval.errors import InputError
from retrieval.types import Assertion, Encoder, Item, Linker, Matrix
from server.assemble import Config, Models
from server.settings import Settings

ROOT = Path(__file__).parents[1]
PAGE, FIGURES = ROOT / "docs" / "films.md", ROOT / "docs" / "films.json"
QUERIES = (
    "cardiomegaly", "pleural effusion", "pneumothorax", "pneumonia", "consolidation", "atelectasis", "pulmonary edema",
    "lung mass", "pulmonary nodule", "emphysema", "elevated hemidiaphragm", "rib fracture", "sternotomy", "pacemaker",
)  # fmt: skip
SHOWN = 3  # films of a query, and queries at either end
FEW = 3  # films with a finding, for it to be shown

Change = Callable[[Image.Image], Image.Image]


class Example(NamedTuple):
    """One query over the chest films: AUC of those that have it, and its first hits."""

    query: str
    having: int
    films: int
    auc: float
    hits: list[tuple[str, float, str]]  # picture below demo/, score, what the collection says


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("seeds", nargs="*", type=Path, help="figures by seed; the first is the shipped one")
    parser.add_argument("--cache", type=Path, default=Path("runs") / "cache")
    parser.add_argument("--keep", action="store_true", help="keep the robustness that docs/films.json holds")
    given = parser.parse_args(arguments)
    encoder = image_encoder(None, text_encoder(None, given.cache), given.cache)
    models = Models(Settings())
    linker = models.linker(Config.given())
    asking = models.wordings(encoder, linker)
    if linker is None or asking is None:
        raise InputError("the examples need an ontology, and an image encoder that reads texts")
    found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if given.seeds:
        found["seeds"] = [json.loads(path.read_text()) for path in given.seeds]
    if not given.keep:
        with TemporaryDirectory() as folder:
            found["robustness"] = robustness(encoder, written(Path(folder), "dev"))
    found["examples"] = [example._asdict() for example in examples(asking, linker)]
    FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


# ---- robustness


def robustness(encoder: Encoder, tasks: Path) -> dict[str, dict[str, float]]:
    """Change -> figures on the films of `tasks`, and how near a changed film's vector is to its own."""
    plain: dict[str, Matrix] = {}
    names, films, asked = questions(encoder, tasks)
    items = [Item(image=path.resolve()) for path in films.paths]
    out = {}
    for name, change in CHANGES.items():
        seen = Changed(encoder, change)
        held = {key: vector for key, vector in plain.items() if not key.endswith(".jpg")}  # texts do not change
        label = _task(seen, tasks / "label_images", "nDCG@10", held)
        report = _task(seen, tasks / "image_reports", "R@10", held)
        vectors = _vectors(seen, items, held)
        plain = plain or held
        scores, once = vectors @ asked.T, np.ones(len(vectors), int)
        areas = [auc(scores[:, f], films.labels[:, f], once) for f in range(len(names))]
        near = (vectors * _vectors(encoder, items, plain)).sum(1).mean()
        out[name] = {
            "label_images nDCG@10": label.value,
            "image_reports R@10": report.value,
            "AUC words": float(np.mean(areas)),
            "cosine": float(near),
        }
    return out


class Changed:
    """An encoder whose pictures are changed before it reads them."""

    def __init__(self, encoder: Encoder, change: Change) -> None:
        self.encoder, self.change = encoder, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode_documents(self, items: Sequence[Item]) -> Matrix:
        return self.encoder.encode_documents([self._changed(item) for item in items])

    def _changed(self, item: Item) -> Item:
        if item.image is None:
            return item
        picture = self.change(pixels(item.image).convert("L"))
        content = io.BytesIO()
        picture.save(content, "PNG")
        return Item(image=content.getvalue())


def _covered(share: float) -> Change:
    draw = np.random.default_rng(0)

    def change(film: Image.Image) -> Image.Image:
        side = [round(share * edge) for edge in film.size]
        left, top = (int(draw.integers(edge - part + 1)) for edge, part in zip(film.size, side, strict=True))
        ImageDraw.Draw(film).rectangle((left, top, left + side[0], top + side[1]), fill=128)
        return film

    return change


def _jpeg(quality: int) -> Change:
    def change(film: Image.Image) -> Image.Image:
        content = io.BytesIO()
        film.save(content, "JPEG", quality=quality)
        return Image.open(content)

    return change


def _contrast(gain: float) -> Change:
    return lambda film: film.point([min(255, max(0, round(128 + gain * (v - 128)))) for v in range(256)])


def _cropped(share: float) -> Change:
    def change(film: Image.Image) -> Image.Image:
        edge_x, edge_y = (round((1 - share) / 2 * edge) for edge in film.size)
        return film.crop((edge_x, edge_y, film.width - edge_x, film.height - edge_y))

    return change


CHANGES: Mapping[str, Change] = {
    "none": lambda film: film,
    "a grey box over a quarter of the width and height": _covered(0.25),
    "a grey box over half of the width and height": _covered(0.5),
    "JPEG, quality 30": _jpeg(30),
    "JPEG, quality 10": _jpeg(10),
    "contrast × 0.5": _contrast(0.5),
    "contrast × 1.5": _contrast(1.5),
    "the middle 90 %": _cropped(0.9),
    "the middle 75 %": _cropped(0.75),
    "turned by 10°": lambda film: film.rotate(10, Image.Resampling.BILINEAR),
    "left and right exchanged": lambda film: ImageOps.mirror(film),
    "black and white exchanged": lambda film: ImageOps.invert(film),
}


# ---- examples


def examples(encoder: Encoder, linker: Linker) -> list[Example]:
    """Every query that some films have, best first."""
    rows = [json.loads(line) for line in (ROOT / "demo" / "corpus.jsonl").read_text().splitlines()]
    chest = [
        row for row in rows
        if row["metadata"]["collection"] == "vqa_rad" and row["title"].startswith("Chest x-ray")
    ]  # fmt: skip
    films = encoder.encode_documents([Item(image=ROOT / "demo" / row["image"]) for row in chest])
    said = linker.link([row["text"] for row in chest])
    told = [{finding.concept: finding.assertion for finding in findings} for findings in said]
    out = []
    for query, vector in zip(QUERIES, encoder.encode_queries([Item(text=q) for q in QUERIES]), strict=True):
        concept = linker.link_queries([query])[0][0].concept
        states = [findings.get(concept) for findings in told]
        has = np.array([state is Assertion.affirmed for state in states])
        scores = films @ vector
        hits = [
            (chest[n]["image"], float(scores[n]), _says(states[n])) for n in np.argsort(-scores, kind="stable")[:SHOWN]
        ]
        if has.sum() >= FEW:
            area = auc(scores, has, np.ones(len(has), int))
            out.append(Example(query, int(has.sum()), len(has), area, hits))
    return sorted(out, key=lambda example: -example.auc)


def _says(state: Assertion | None) -> str:
    return {Assertion.affirmed: "has it", Assertion.negated: "denied", Assertion.uncertain: "in doubt"}.get(
        state, "not mentioned"
    )  # type: ignore[arg-type]


# ---- the page


def page(found: Mapping[str, Any]) -> str:
    parts = [
        _HEAD,
        *_figures(found.get("seeds", [])),
        *_robust(found.get("robustness", {})),
        *_shown(found["examples"]),
    ]
    return "\n".join(parts)


_HEAD = """# What the image tower sees

Written by `python -m benchmarks.film_page`; the tower is the shipped `encoders/weights/chest-film`, whose
[card](../encoders/weights/chest-film/README.md) says what it learned from and what it cannot do.
It is no diagnostic device.
"""


def _figures(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    if not seeds:
        return []
    names = [name for name in seeds[0] if "," not in name or ", mean" in name]
    lines = [
        "## Figures", "",
        f"614 unseen frontal films, {len(seeds)} runs of the recipe that differ in their seed; the first is shipped. "
        "Intervals are 95 % bootstrap intervals over queries or studies. Films that ask lose a share of the training "
        "films' mean, which is kept for the shipped weights alone (see the card).", "",
        f"| figure | shipped | {' | '.join(f'seed {n}' for n in range(1, len(seeds)))} | mean ± deviation |",
        "|---" * (len(seeds) + 2) + "|",
    ]  # fmt: skip
    for name in names:
        first, values = seeds[0][name], [seed[name]["value"] for seed in seeds if name in seed]
        cells = [f"{first['value']:.3f} [{first['low']:.3f}, {first['high']:.3f}]"]
        cells += [f"{seed[name]['value']:.3f}" if name in seed else "not measured" for seed in seeds[1:]]
        spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) == len(seeds) > 1 else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {spread} |")
    return [*lines, ""]


def _robust(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not rows:
        return []
    kinds = list(next(iter(rows.values())))
    lines = [
        "## Robustness", "",
        "The same films, each changed before the tower reads it. Cosine: to the vector of the unchanged film.", "",
        f"| change | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|",
    ]  # fmt: skip
    lines += [f"| {name} | {' | '.join(f'{row[kind]:.3f}' for kind in kinds)} |" for name, row in rows.items()]
    return [*lines, ""]


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    films = rows[0]["films"] if rows else 0
    lines = [
        "## Examples", "",
        f"{films} chest films of VQA-RAD (CC0), another collection than the tower learned from. A finding is asked "
        "for as the product does, in all wordings that the ontology has. A film has it where the statements that go "
        "with it affirm it; most statements are silent on most findings, so a hit that is not mentioned may still be "
        "right. AUC: of the films that have it.",
        "", "| query | films that have it | AUC |", "|---|---|---|",
        *(f"| {row['query']} | {row['having']} | {row['auc']:.2f} |" for row in rows), "",
    ]  # fmt: skip
    for title, some in (("The best", rows[:SHOWN]), ("The worst", rows[-SHOWN:])):
        lines += [f"### {title}", ""]
        for row in some:
            pictures = " | ".join(f'<img src="../demo/{image}" width="180">' for image, _, _ in row["hits"])
            told = " | ".join(f"{score:.2f}, {says}" for _, score, says in row["hits"])
            lines += [f"“{row['query']}”, AUC {row['auc']:.2f}", ""]
            lines += [
                f"| {' | '.join(str(n + 1) for n in range(len(row['hits'])))} |",
                "|---" * len(row["hits"]) + "|",
            ]
            lines += [f"| {pictures} |", f"| {told} |", ""]
    return lines


if __name__ == "__main__":
    main()
