"""Text towers that learned, through the product's own index and evaluation, on SciFact or on reports.

``python -m benchmarks.students NAME=ENCODER[+RERANKER] ...`` indexes SciFact with each encoder (a name or a path),
measures it and adds the figures to docs/students.json; docs/students.md is written from them. Without arguments only
the page is. Rates are comparable among the encoders of one call. A reranker reads a hundred abstracts for each of 417
claims: three quarters of an hour on two cores. With ``--reports`` the encoders are measured on the radiograph tasks
that reports answer.

An encoder named `NAME, seed N` is one of several of a recipe. Values by query are kept in .bench/students, and where
an arm and the one without its teacher (`Suite.against`) are there with the same seeds, their difference is measured
too.

Three sets of claims: the test split; those of its queries whose papers no train claim asks for; and the train claims
that recipes hold out, whose papers no training claim asks for either.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.collections import BENCH, data, home, tasks
from benchmarks.methods_measure import difference
from encoders.collection import is_held_out
from retrieval.evaluate import evaluate
from retrieval.files import read_source
from retrieval.types import Document, Item, Qrels, Run
from server.assemble import Config
from server.home import Home, silent
from server.judging import judgments, measure

FIGURES, PAGE = Path("docs/students.json"), Path("docs/students.md")
HELD_OUT = 0.15  # as the recipes have it
MEASURE = "nDCG@10"
SEED = ", seed "
TIMED, ROUNDS = 256, 7  # documents that the encoding rate is taken over, and how often
Values = dict[str, dict[str, float]]  # retriever -> query -> value


class Suite(NamedTuple):
    """What encoders are measured on. sets: of queries, with their number. against: arm -> that without a teacher."""

    name: str
    sets: Mapping[str, int]
    retrievers: Sequence[str]
    against: Mapping[str, str]

    @property
    def kept(self) -> Path:
        """Where the values by query lie."""
        return BENCH / self.name


CLAIMS = Suite(
    "students",
    {"held out of train": 117, "test": 300, "test, papers unseen": 104},
    ("dense", "hybrid", "hybrid+rerank"),  # the last where there is a reranker
    {"scifact-cprd": "scifact-cprd without its teacher"},
)
REPORTS = Suite(
    "students-reports",
    {"report_reports": 150, "label_reports": 26, "absent_reports": 9},
    ("dense", "hybrid"),
    {"chest-text": "chest-text without its teacher"},
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoders", nargs="*", metavar="NAME=ENCODER[+RERANKER]")
    parser.add_argument("--reports", action="store_true", help="measure the radiograph tasks that reports answer")
    given = parser.parse_args(arguments)
    figures: dict[str, Any] = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}
    named = {name: encoder or name for name, _, encoder in (argument.partition("=") for argument in given.encoders)}
    if named:
        suite = REPORTS if given.reports else CLAIMS
        part = figures.setdefault("reports", {}) if given.reports else figures
        add(part, suite, named)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(figures), encoding="utf-8")


def add(figures: dict[str, Any], suite: Suite, named: Mapping[str, str]) -> None:
    """What is measured of the encoders, put beside what was there."""
    at, encoders = home(), figures.setdefault("encoders", {})
    alone: dict[str, str] = {}  # what has a rate of its own
    for name, given in named.items():
        encoder, _, reranker = given.partition("+")
        encoders[name] = measured(at, suite, name, encoder, reranker or "none")
        print(name, json.dumps(encoders[name]), flush=True)
        if suite is CLAIMS and not reranker and SEED not in name:
            alone[name] = encoder
    for name, rate in rates(at, alone).items():
        encoders[name]["documents_per_second"] = rate
    figures["against"] = figures.get("against", {}) | differences(suite)


def measured(at: Home, suite: Suite, name: str, encoder: str, reranker: str) -> dict[str, Any]:
    """Figures of one encoder by set of queries and retriever; their values by query are kept."""
    collection = f"{suite.name}-{name.replace(', ', '-').replace(' ', '-')}"
    source = data() / "scifact" if suite is CLAIMS else tasks("dev") / "report_reports"
    if collection not in at.names():
        ontology = "none" if suite is CLAIMS else None
        config = Config(text_encoder=encoder, image_encoder="none", ontology=ontology, reranker=reranker)
        at.index(collection, read_source(source).documents(), config, progress=silent)
    retrievers = [leg for leg in suite.retrievers if leg != "hybrid+rerank" or reranker != "none"]
    values = dict(_claims(at, collection, retrievers) if suite is CLAIMS else _reports(at, collection, retrievers))
    suite.kept.mkdir(parents=True, exist_ok=True)
    (suite.kept / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    means = {
        part: {leg: round(statistics.mean(v.values()), 4) for leg, v in legs.items()} for part, legs in values.items()
    }
    return {"where": "through the product", "figures": means}


def _claims(at: Home, collection: str, retrievers: Sequence[str]) -> Iterator[tuple[str, Values]]:
    folder = data() / "scifact"
    test, train = judgments(folder, "test"), judgments(folder, "train")
    unseen = {d for grades in train.qrels.values() for d in grades}
    held_out = {q: g for q, g in train.qrels.items() if _held_out(g)}
    train = train._replace(queries=[query for query in train.queries if query.id in held_out])
    runs = {
        judged.split: measure(at.engine(collection), judged, retrievers, [MEASURE], progress=silent).runs
        for judged in (test, train)
    }
    yield "test", _by_retriever(runs["test"], test.qrels)
    yield (
        "test, papers unseen",
        _by_retriever(runs["test"], {q: g for q, g in test.qrels.items() if unseen.isdisjoint(g)}),
    )
    yield "held out of train", _by_retriever(runs["train"], held_out)


def _reports(at: Home, collection: str, retrievers: Sequence[str]) -> Iterator[tuple[str, Values]]:
    for task in REPORTS.sets:
        judged, same = judgments(tasks("dev") / task), task == "report_reports"
        found = measure(at.engine(collection), judged, retrievers, [MEASURE], drop_identical_ids=same, progress=silent)
        yield task, {leg: e.per_query[MEASURE] for leg, e in found.evaluations.items()}


def _held_out(grades: Mapping[str, float]) -> bool:
    """As `encoders.collection.read_collection` cuts it: by the first relevant document."""
    return is_held_out(min(id for id, grade in grades.items() if grade > 0), HELD_OUT)


def _by_retriever(runs: Mapping[str, Run], qrels: Qrels) -> Values:
    asked = {name: {q: ranking for q, ranking in run.items() if q in qrels} for name, run in runs.items()}
    return {name: evaluate(run, qrels, [MEASURE]).per_query[MEASURE] for name, run in asked.items()}


def differences(suite: Suite) -> dict[str, Any]:
    """Arm -> set of queries -> retriever -> its difference from the arm without a teacher, over the seeds of both."""
    out: dict[str, Any] = {}
    kept = {path.stem: json.loads(path.read_text("utf-8")) for path in suite.kept.glob("*.json")}
    for arm, plain in suite.against.items():
        seeds = sorted(name.partition(SEED)[2] for name in kept if name.startswith(arm + SEED))
        seeds = [seed for seed in seeds if plain + SEED + seed in kept]
        for part in suite.sets if seeds else ():
            for leg in suite.retrievers[:2]:
                queries = sorted(kept[arm + SEED + seeds[0]][part][leg])
                ours, theirs = (
                    np.array([[kept[name + SEED + seed][part][leg][query] for query in queries] for seed in seeds])
                    for name in (arm, plain)
                )
                found = difference(ours, theirs)._asdict() | {"seeds": len(seeds)}
                out.setdefault(arm, {}).setdefault(part, {})[leg] = found
    return out


def rates(at: Home, encoders: Mapping[str, str]) -> dict[str, float]:
    """Documents a second of each, the median of rounds in which they take turns: a busy neighbour is everybody's."""
    from encoders.text import text_encoder

    documents = [d for d in read_source(data() / "scifact").documents() if isinstance(d, Document)][:TIMED]
    items = [Item(text=document.content) for document in documents]
    towers = {name: text_encoder(encoder, at.settings.caches) for name, encoder in encoders.items()}
    spent: dict[str, list[float]] = {name: [] for name in towers}
    for _ in range(1 + ROUNDS):
        for name, tower in towers.items():
            began = time.perf_counter()
            tower.encode_documents(items)
            spent[name].append(time.perf_counter() - began)
    return {name: round(len(items) / statistics.median(taken[1:]), 1) for name, taken in spent.items()}


def page(figures: Mapping[str, Any]) -> str:
    """docs/students.md, from what was measured and nothing else; a dash where nothing was."""
    lines = ["# Text towers that learned", "", _ABOUT, "", *_measured(figures, CLAIMS), _READING]
    if "reports" in figures:
        lines += ["", "## Reports", "", _ABOUT_REPORTS, "", *_measured(figures["reports"], REPORTS), _READING_REPORTS]
    return "\n".join(lines) + "\n"


def _measured(figures: Mapping[str, Any], suite: Suite) -> list[str]:
    """The table of a suite, its seeds, and what the teachers are worth."""
    columns = [(part, retriever) for part in suite.sets for retriever in suite.retrievers]
    heads = ["encoder", "measured", *(f"{part} ({suite.sets[part]}), {retriever}" for part, retriever in columns)]
    timed = any("documents_per_second" in told for told in figures["encoders"].values())
    heads += ["documents/s"] * timed
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, told in figures["encoders"].items():
        cells = [_cell(told["figures"].get(part, {}).get(retriever)) for part, retriever in columns]
        cells += [str(told.get("documents_per_second", "–"))] * timed
        lines.append(f"| {name} | {told['where']} | {' | '.join(cells)} |")
    return [*lines, "", *_seeds(figures["encoders"], suite), *_against(figures.get("against", {}), suite)]


def _cell(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.3f}"


def _seeds(encoders: Mapping[str, Any], suite: Suite) -> list[str]:
    """Mean and standard deviation over the seeds of one recipe, of those measured in one way."""
    alike: dict[tuple[str, str], list[Any]] = {}
    for name, told in encoders.items():
        if SEED in name:
            alike.setdefault((name.partition(SEED)[0], told["where"]), []).append(told["figures"])
    lines = []
    for (recipe, where), rows in alike.items():
        parts = []
        for part, leg in ((part, leg) for part in suite.sets for leg in suite.retrievers):
            found = [row[part][leg] for row in rows if leg in row.get(part, {})]
            if len(found) > 1:
                parts.append(f"{part}, {leg} {statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}")
        if parts:
            lines += [f"{len(rows)} seeds of `{recipe}`, {where}, mean ± standard deviation: {'; '.join(parts)}.", ""]
    return lines


def _against(against: Mapping[str, Any], suite: Suite) -> list[str]:
    """What the teacher is worth, with the interval of a paired bootstrap over queries."""
    lines = []
    for arm, parts in against.items():
        told = [
            f"{part}, {leg} {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] ({d['wins']} of {d['seeds']} seeds)"
            for part, legs in parts.items()
            for leg, d in legs.items()
        ]
        lines += [
            f"`{arm}` against `{suite.against[arm]}`, mean over seeds with a 95 % paired bootstrap interval over "
            "queries: " + "; ".join(told) + ".",
            "",
        ]  # fmt: skip
    return lines


_ABOUT = """SciFact, 5,183 abstracts, nDCG@10; written by `python -m benchmarks.students`. `hybrid` is BM25 and the
tower with the default weights; `hybrid+rerank` has its hundred best read again by the cross-encoder of the row.
Measured *through the product*: its own index and evaluation. Measured *on the GPU*: with the tower in PyTorch and the
same fusion (`encoders.collection`), right after training.

`scifact-text` comes from `encoders/recipes/scifact-text.toml` with the seed in its name: no teacher's scores are
distilled.

`scifact-cprd` comes from `encoders/recipes/scifact-cprd.toml`: two of six layers learn, in ten minutes on one core,
from the same claims, and a teacher, the hybrid of BM25 and the untouched tower, orders three mined abstracts of each.
`scifact-cprd without its teacher` is the same recipe with `cprd = 0.0`. The held-out claims chose it, one run each
with three layers learning: no teacher 0.669, KL to the hybrid beside the labels 0.668, KL alone (three epochs, not
two) 0.675, CPRD 0.675, among the candidates that training judges by.

`scifact-cross` is the tower `scifact-text` with the cross-encoder of that name behind it
(`encoders/recipes/scifact-cross.toml`, one seed): three layers read claim and abstract apart, three together.

`minilm-cut` does have a teacher: three of the base's six layers, a sixth of their hidden units left out, taught to
give the base's vectors of the collection's texts and their relations (UniME's first stage;
`encoders/recipes/minilm-cut.toml`, one seed). A linear map fitted at the end brings test from 0.622 to 0.631; its
ridge was chosen on train claims, no other judgment was read. It keeps 97.9 % of dense test, 98.8 % held out, 96.1 %
where papers are unseen, at 2.2 times the rate."""
_READING = """End to end the teacher's order is not shown to help a tower of equal size. On the test claims dense
stands 0.012 lower, and one seed makes all of that: of the second the held-out claims chose the untouched tower itself
(what is released lies where they are best between the tower that was begun with and the trained one), while the other
two even out. In the hybrid it is 0.006 lower, with every seed. On the claims whose papers are unseen nothing is shown.

Read the columns apart. The test split shares papers with the train split: for two of three test claims,
a train claim asks for the same paper, and a tower that learned from train claims has met it. The claims whose papers
are unseen, and the held-out ones, tell what to expect of a tower in a collection that it did not learn from. The
held-out claims also chose the epoch, so theirs is a little too good.

The cross-encoder's best epoch is its first, over 976 made and foreign queries of five documents each, without any
SciFact label. As its training measures, the hybrid's forty best read again, the 117 held-out claims went from 0.748 to
0.752 (0.728 by the cross-encoder's order alone); after a second such epoch they stood at 0.750, and after one over the
692 labelled claims at 0.737. Through the product, where a hundred are read, it gives the held-out claims 0.007 and the
test claims 0.001, and takes 0.005 from those of them whose papers are unseen: nothing to rely on, at six seconds a
query on two cores, and short of the 0.77 that it was made for. An earlier one with full interaction, begun as
all-MiniLM-L6-v2 on a GPU, took its hybrid from 0.725 to 0.746 in the same way; its weights are lost."""

_ABOUT_REPORTS = """The radiograph tasks that reports answer (Indiana, dev part, nDCG@10), through the product;
written by `python -m benchmarks.students --reports`. `dense` is the tower alone, `hybrid` BM25, tower and ontology
with the default weights.

`chest-text` comes from `encoders/recipes/chest-text.toml`: two of MiniLM's six layers learn, in ten minutes on one
core, from 2,218 reports of the train part. Their teacher is the ontology: a weighted Tversky index over the findings
that the linker reads in whole reports, in single sentences and in names of findings (UniME's first stage).
`chest-text without its teacher` is the same recipe with `relations = 0.0` and `contrast = 1.0`: the findings of a
report find its impression. Neither reads a label; the tasks are judged by human coding that neither was shown."""
_READING_REPORTS = """By itself the tower finds reports with the same findings three times as well as the one that it
began as, and the teacher makes most of that: the same texts without it give two fifths of the gain. Findings asked for
by name follow it too; what the baseline learns about them is within its spread. On findings that should be absent
(nine queries) nothing is shown: cosines see what a text is about more than what it denies, before and after.

In the hybrid the ontology itself searches, with BM25 beside it, and has found nearly all there is to find: the best
that can be said there is that the tower takes nothing away. It is for places where the tower is alone, and it costs
SciFact 0.076 of dense nDCG@10."""


if __name__ == "__main__":
    main()
