"""How well an image tower finds chest films: `python -m benchmarks.films [--weights DIR] [--part dev] [--json FILE]`.

The tasks of the Indiana collection's held-out fifth (`tasks.py` beside the data), by brute force over the vectors of
the product's own encoders; and the AUC of single findings, scored by the cosine to phrases of the finding
and by the difference of two prototypes, the mean training films with and without it (human labels, used
for this figure alone).
Every figure has its 95 % bootstrap interval, over queries or over studies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from encoders.clip import image_encoder
from encoders.text import text_encoder
from retrieval.evaluate import evaluate
from retrieval.files import read_source
from retrieval.types import Document, Encoder, Hit, Item, Matrix, Query, Ranking, Run
from server.assemble import Config, Models
from server.settings import Settings

TASKS = {"label_images": "nDCG@10", "image_reports": "R@10", "report_images": "R@10", "image_images": "nDCG@10"}
ENOUGH = 5  # studies with a finding, for its AUC to say something
RESAMPLES = 1_000
DEPTH = 1_000


class Figure(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


class Films(NamedTuple):
    """Frontal films with their human labels. labels: (N, F) bool; study: (N,) names."""

    paths: list[Path]
    labels: NDArray[np.bool_]
    study: NDArray[np.str_]


def data_folder() -> Path:
    default = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("LIGHTBOX_DATA", default))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="folder of a trained tower; the shipped one by default")
    parser.add_argument("--part", default="dev", choices=("dev", "train", "all"))
    parser.add_argument("--cache", type=Path, default=Path("runs") / "cache", help="for converted towers")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        tasks = written(Path(folder), given.part)
        encoder = image_encoder(given.weights, text_encoder(None, given.cache), given.cache)
        models = Models(Settings())
        figures = measured(encoder, tasks, models.wordings(encoder, models.linker(Config.given())))
    for name, figure in figures.items():
        print(f"{name:44s} {figure.value:.3f}  [{figure.low:.3f}, {figure.high:.3f}]")
    if given.json:
        given.json.write_text(json.dumps({name: figure._asdict() for name, figure in figures.items()}, indent=1))


def written(folder: Path, part: str) -> Path:
    """The tasks of a part as sources in BEIR layout below `folder`."""
    script = data_folder() / "tasks.py"
    subprocess.run([sys.executable, str(script), str(folder), "--part", part], check=True, capture_output=True)
    return folder


def measured(encoder: Encoder, tasks: Path, asking: Encoder | None = None) -> dict[str, Figure]:
    """Name of a figure -> the figure, for all tasks and findings.

    asking: what makes queries of words in the product, with the ontology's wordings of a finding.
    """
    held: dict[str, Matrix] = {}
    figures = {}
    for task, measure in TASKS.items():
        figures[f"{task} {measure}"] = _task(encoder, tasks / task, measure, held)
    names, dev, asked = questions(encoder, tasks)
    vectors = encoded(encoder, dev)
    figures |= _aucs("AUC words", names, dev, vectors @ asked.T)
    if asking is not None:
        films = {key: vector for key, vector in held.items() if key.endswith(".jpg")}
        figures["label_images nDCG@10 in all wordings"] = _task(asking, tasks / "label_images", "nDCG@10", films)
        _, _, joined = questions(asking, tasks)
        figures |= _aucs("AUC all wordings", names, dev, vectors @ joined.T)
    train = labelled("train", names)
    known = encoded(encoder, train)
    prototypes = np.stack([_contrast(known, train.labels[:, f]) for f in range(len(names))])  # (F, D)
    return figures | _aucs("AUC prototypes", names, dev, vectors @ prototypes.T)


def questions(encoder: Encoder, tasks: Path) -> tuple[list[str], Films, Matrix]:
    """The findings with enough studies, dev's films with those labels, and (F, D) the mean of a finding's phrases."""
    phrases = _phrases(tasks / "label_images")
    dev = labelled("dev", list(phrases))
    enough = [f for f, _ in enumerate(phrases) if len(set(dev.study[dev.labels[:, f]])) >= ENOUGH]
    names = [list(phrases)[f] for f in enough]
    asked = [_mean(encoder.encode_queries([Item(text=p) for p in phrases[name]])) for name in names]
    return names, dev._replace(labels=dev.labels[:, enough]), np.stack(asked)


def _task(encoder: Encoder, folder: Path, measure: str, held: dict[str, Matrix]) -> Figure:
    source = read_source(folder)
    documents = [d for d in source.documents() if isinstance(d, Document)]
    queries = source.queries()
    found = _ranked(
        [d.id for d in documents], queries, _vectors(encoder, documents, held), _asked(encoder, queries, held)
    )
    result = evaluate(found, source.qrels(), [measure], drop_identical_ids=folder.name == "image_images")
    return Figure(result.means[measure], *result.intervals[measure])


def _vectors(encoder: Encoder, items: Sequence[Item], held: dict[str, Matrix]) -> Matrix:
    """(N, D); what several tasks share is encoded once."""
    single = [_alone(item) for item in items]
    keys = [str(item.image or item.text) for item in single]
    fresh = {key: item for key, item in zip(keys, single, strict=True) if key not in held}
    if fresh:
        held.update(zip(fresh, encoder.encode_documents(list(fresh.values())), strict=True))
    return np.stack([held[key] for key in keys])


def _asked(encoder: Encoder, queries: Sequence[Query], held: dict[str, Matrix]) -> Matrix:
    """(Q, D) of queries that are all words or all pictures; pictures are not encoded again."""
    items = [query.parts[0] for query in queries]
    texts = [item for item in items if item.image is None]
    fresh = [item.text for item in texts if item.text not in held]
    if fresh:
        held.update(zip(fresh, encoder.encode_queries([Item(text=text) for text in fresh]), strict=True))
    vectors = _vectors(encoder, items, held)
    return vectors if texts else encoder.as_queries("image", vectors)


def _alone(item: Item) -> Item:
    return Item(image=item.image.resolve()) if isinstance(item.image, Path) else Item(text=item.text)


def _ranked(ids: Sequence[str], queries: Sequence[Query], documents: Matrix, asked: Matrix) -> Run:
    order = np.array(ids)
    run: Run = {}
    for query, row in zip(queries, asked @ documents.T, strict=True):
        best = np.lexsort((order, -row))[:DEPTH]
        run[query.id] = Ranking(Hit(ids[n], float(row[n])) for n in best)
    return run


def _phrases(task: Path) -> dict[str, list[str]]:
    """Finding -> the task's phrases for it."""
    out: dict[str, list[str]] = {}
    for query in read_source(task).queries():
        out.setdefault(query.id.rsplit("-", 1)[0], []).append(query.parts[0].text)
    return out


def encoded(encoder: Encoder, films: Films) -> Matrix:
    """(N, D)."""
    return encoder.encode_documents([Item(image=path) for path in films.paths])


def labelled(part: str, names: Sequence[str]) -> Films:
    """The frontal films of a part that have a report and human labels."""
    folder = data_folder() / "iu_xray"
    paths, labels, study = [], [], []
    for line in (folder / "reports.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kept = bool(row["negbio_gold"]) and (row["findings"] or row["impression"])
        if not kept or (part == "dev") != (zlib.crc32(row["uid"].encode()) % 5 == 0):
            continue
        for image in row["images"]:
            if image["projection"] == "Frontal":
                paths.append(folder / image["file"])
                labels.append([bool(row["negbio_gold"][name]) for name in names])
                study.append(row["uid"])
    return Films(paths, np.array(labels), np.array(study))


def _contrast(vectors: Matrix, has: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(D,) mean film with a finding minus mean film without it."""
    return np.asarray(vectors[has].mean(0) - vectors[~has].mean(0), np.float32)


def _mean(vectors: Matrix) -> NDArray[np.float32]:
    mean = vectors.mean(0)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)


def _aucs(kind: str, names: Sequence[str], films: Films, scores: NDArray[Any]) -> dict[str, Figure]:
    """AUC of each finding and their mean, with intervals over resampled studies. scores: (N, F)."""
    draw = np.random.default_rng(0)
    studies, owner = np.unique(films.study, return_inverse=True)
    table = np.empty((RESAMPLES, len(names)))
    for sample in range(RESAMPLES):
        counts = np.bincount(draw.integers(len(studies), size=len(studies)), minlength=len(studies))[owner]
        table[sample] = [auc(scores[:, f], films.labels[:, f], counts) for f in range(len(names))]
    once = np.ones(len(owner), int)
    values = np.array([auc(scores[:, f], films.labels[:, f], once) for f in range(len(names))])
    bounds = np.nanpercentile(table, (2.5, 97.5), axis=0)  # (2, F)
    macro = np.nanpercentile(np.nanmean(table, axis=1), (2.5, 97.5))
    out = {f"{kind}, mean of {len(names)}": Figure(float(values.mean()), float(macro[0]), float(macro[1]))}
    return out | {
        f"{kind}, {name}": Figure(float(value), float(low), float(high))
        for name, value, (low, high) in zip(names, values, bounds.T, strict=True)
    }


def auc(scores: NDArray[Any], positive: NDArray[np.bool_], counts: NDArray[np.int64]) -> float:
    """Chance that a film with the finding scores above one without it, ties half; each film counts `counts` times.

    >>> auc(np.array([0.1, 0.9, 0.9, 0.2]), np.array([False, True, False, True]), np.ones(4, int))
    0.625
    """
    values, place = np.unique(scores, return_inverse=True)
    with_it = np.bincount(place, weights=counts * positive, minlength=len(values))
    without = np.bincount(place, weights=counts * ~positive, minlength=len(values))
    pairs = with_it.sum() * without.sum()
    if not pairs:
        return float("nan")
    below = np.cumsum(without) - without
    return float((with_it * (below + without / 2)).sum() / pairs)


if __name__ == "__main__":
    main()
