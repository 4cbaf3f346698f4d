"""SciFact, the classic text collections and the seven radiograph tasks, every leg beside the others.

``python -m benchmarks.retrieval`` writes docs/results.md and the same figures as JSON beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.collections import CLASSICS, TASKS, data, home, indexed, tasks
from retrieval.engine import Engine
from retrieval.tune import learn_weights
from server.home import Home, silent
from server.judging import Measured, candidates, judgments, measure

OUT = Path("docs/results.md")
LEGS = ("lexical", "dense", "image", "ontology", "hybrid")
SAME_ID = {"report_reports", "image_images"}  # a query is a document of the collection: not its own answer
MEASURES = {"image_reports": "R@10", "report_images": "R@10"}


def main() -> None:
    at, results = home(), {}
    texts = ["# Results", "", INTRODUCTION, "", "## Text collections, nDCG@10", "", *_texts(at, results)]
    films = ["", "## Radiograph tasks (Indiana, dev part)", "", TASKS_NOTE, "", *_films(at, results)]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join([*texts, *films, ""]))
    OUT.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(OUT.read_text())


def _texts(at: Home, results: dict[str, object]) -> list[str]:
    rows = []
    for name in ("scifact", *CLASSICS):
        indexed(at, name, data() / name, pictures=False)
        legs = ("lexical", "dense", "ontology", "hybrid")
        found = measure(at.engine(name), judgments(data() / name), legs, ("nDCG@10", "R@100"), progress=silent)
        row = [_cell(found, leg, "nDCG@10") for leg in legs]
        results[name] = found.json()
        if name == "scifact":
            tuned = _tuned(at)
            results["scifact tuned"] = tuned.json()
            row.append(_cell(tuned, "hybrid", "nDCG@10"))
        rows.append([f"{name} ({len(found.judgments.qrels)})", *row])
        print(rows[-1], flush=True)
    return table(["collection (queries)", "lexical", "dense", "ontology", "hybrid", "hybrid, tuned on train"], rows)


def _tuned(at: Home) -> Measured:
    """Hybrid with weights learned on the train queries, applied to the test queries once."""
    engine = at.engine("scifact")
    legs, judged = candidates(engine, judgments(data() / "scifact", "train"), silent)
    weights, reached = learn_weights(legs, [judged])
    print("tuned", weights, reached, flush=True)
    return measure(
        engine, judgments(data() / "scifact"), ("hybrid",), ("nDCG@10", "R@100"), weights=weights, progress=silent
    )


def _films(at: Home, results: dict[str, object]) -> list[str]:
    rows = []
    for task in TASKS:
        source = tasks("dev") / task
        indexed(at, corpus_of(task), source)
        name, found = measured(at.engine(corpus_of(task)), source)
        results[task] = found.json()
        rows.append([f"{task} ({len(found.judgments.qrels)})", name, *(_cell(found, leg, name) for leg in LEGS)])
        print(rows[-1], flush=True)
    return table(["task (queries)", "measure", *LEGS], rows)


def corpus_of(task: str) -> str:
    """The collection that answers a radiograph task."""
    return "dev-films" if task in ("label_images", "image_images", "report_images") else "dev-reports"


def measured(engine: Engine, source: Path) -> tuple[str, Measured]:
    """A source's own measure, and every leg of the collection by it."""
    name = MEASURES.get(source.name, "nDCG@10")
    legs = [leg for leg in LEGS if leg == "hybrid" or leg in engine.legs()]
    same = source.name in SAME_ID
    return name, measure(engine, judgments(source), legs, (name,), drop_identical_ids=same, progress=silent)


def _cell(found: Measured, leg: str, name: str) -> str:
    e = found.evaluations[leg]
    low, high = e.intervals[name]
    return f"{e.means[name]:.3f} [{low:.3f}, {high:.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown; short rows are filled up."""
    width = len(head)
    lines = [[*row, *[""] * (width - len(row))] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * width, *lines)]


INTRODUCTION = """\
Every figure comes from `python -m benchmarks.retrieval`, through the path that a search takes, to depth
1,000. In brackets: 95 % bootstrap interval over queries. A judged query without an answer counts as zero. Hybrid uses
the shipped weights, one set for all collections, learned on SciFact train and the Indiana train part together."""
TASKS_NOTE = """\
What they ask is written in `tasks.py` beside the data; the labels come from human coding that is never
indexed. A leg that has nothing to compare (words for a picture) scores 0. The image tower and everything else were
trained and tuned on the train part only."""

if __name__ == "__main__":
    main()
