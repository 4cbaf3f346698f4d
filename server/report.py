"""An evaluation as one HTML file: table with intervals, plots, and every query with its hits. Needs nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.errors import InputError
from retrieval.files import write_run
from retrieval.types import Query
from server.judging import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HITS = 10  # shown of each query and retriever
COLOURS = ("#2f6690", "#d1495b", "#66a182", "#edae49", "#7a5195", "#555b6e")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1c2733; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid }
tbody tr { border-bottom: 1px solid #dde3ea } small { color: #667 } td.best { font-weight: 700 }
details { border-bottom: 1px solid #dde3ea; padding: .35rem 0 } summary { cursor: pointer }
summary b { font-variant-numeric: tabular-nums; margin-right: .6rem }
.hits { display: flex; flex-wrap: wrap; gap: 2rem } ol { padding-left: 2rem }
.good { color: #1d7a46; font-weight: 600 }
svg { max-width: 100%; height: auto } figure { margin: 1rem 0 }
@media (prefers-color-scheme: dark) {
  body { color: #dfe6ee; background: #14191f } tbody tr, details { border-color: #2c3641 }
  .good { color: #6fd09a } small { color: #9aa7b5 } figure { background: #fff; border-radius: 6px }
}
"""


def write(measured: Measured, out: Path) -> None:
    """Writes report.html, results.json and one TREC run per retriever into `out`. Raises InputError if it cannot."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, run in measured.runs.items():
            write_run(out / f"{name}.run", run, name)
        (out / "results.json").write_text(json.dumps(measured.json(), indent=1) + "\n")
        (out / "report.html").write_text(html(measured))
    except OSError as error:
        raise InputError(f"--out: cannot write into '{out}' ({error.strerror}); name another folder") from error


def html(measured: Measured) -> str:
    """The whole page."""
    judged = measured.judgments
    title = escape(f"{measured.collection} on {judged.source}, {judged.split}")
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            f"<p>{len(judged.qrels)} judged queries, rankings to depth {measured.json()['depth']}. "
            "Intervals are 95 % bootstrap over queries.</p>",
            *_table(measured),
            "<figure>" + _svg(_bars(measured)) + "</figure>",
            "<figure>" + _svg(_curves(measured)) + "</figure>",
            f"<h2>Queries, worst first by {escape(_first_measure(measured))}</h2>",
            *_queries(measured),
        ]
    )
    head = f'<meta charset="utf-8"><title>{title}</title><meta name="viewport" content="width=device-width">'
    return f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


# --- the table ---------------------------------------------------------------------------------------------------


def _table(measured: Measured) -> Iterator[str]:
    measures = list(next(iter(measured.evaluations.values())).means)
    best = {m: max(e.means[m] for e in measured.evaluations.values()) for m in measures}
    yield "<table><thead><tr><th>retriever</th>" + "".join(f"<th>{escape(m)}</th>" for m in measures)
    yield "<th>unjudged@10</th><th>unanswered</th></tr></thead><tbody>"
    for name, evaluation in measured.evaluations.items():
        cells = []
        for m in measures:
            low, high = evaluation.intervals[m]
            mark = ' class="best"' if evaluation.means[m] == best[m] else ""
            cells.append(f"<td{mark}>{evaluation.means[m]:.4f}<br><small>{low:.3f} to {high:.3f}</small></td>")
        yield f"<tr><td>{escape(name)}</td>{''.join(cells)}"
        yield f"<td>{evaluation.unjudged:.2f}</td><td>{evaluation.unanswered}</td></tr>"
    yield "</tbody></table>"


# --- the plots ---------------------------------------------------------------------------------------------------


def _bars(measured: Measured) -> Figure:
    """Means with their intervals, one group per measure."""
    from matplotlib.figure import Figure

    measures = list(next(iter(measured.evaluations.values())).means)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(measured.evaluations)
    for n, (name, evaluation) in enumerate(measured.evaluations.items()):
        means = [evaluation.means[m] for m in measures]
        errors = [
            [mean - evaluation.intervals[m][0] for m, mean in zip(measures, means, strict=True)],
            [evaluation.intervals[m][1] - mean for m, mean in zip(measures, means, strict=True)],
        ]
        places = [i + (n - (len(measured.evaluations) - 1) / 2) * width for i in range(len(measures))]
        axes.bar(places, means, width * 0.9, yerr=errors, capsize=3, label=name, color=COLOURS[n % len(COLOURS)])
    axes.set_xticks(range(len(measures)), measures)
    _finish(axes, "")
    return figure


def _curves(measured: Measured) -> Figure:
    """Every query's value, sorted: how many queries fail, and how many are perfect."""
    from matplotlib.figure import Figure

    measure = _first_measure(measured)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for n, (name, evaluation) in enumerate(measured.evaluations.items()):
        values = sorted(evaluation.per_query[measure].values())
        shares = [(i + 0.5) / len(values) for i in range(len(values))]
        axes.plot(shares, values, label=name, color=COLOURS[n % len(COLOURS)])
    axes.set_xlabel("share of queries, worst first")
    _finish(axes, measure)
    return figure


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _svg(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


# --- the queries -------------------------------------------------------------------------------------------------


def _queries(measured: Measured) -> Iterator[str]:
    measure = _first_measure(measured)
    values = {name: evaluation.per_query[measure] for name, evaluation in measured.evaluations.items()}
    words = {query.id: _words(query) for query in measured.judgments.queries}
    for id in sorted(next(iter(values.values())), key=lambda id: (sum(v[id] for v in values.values()), id)):
        reached = " ".join(f"<b>{escape(name)} {of[id]:.3f}</b>" for name, of in values.items())
        yield f"<details><summary>{reached} {escape(words.get(id, id))}</summary><div class='hits'>"
        for name, run in measured.runs.items():
            yield f"<div><h4>{escape(name)}</h4><ol>"
            yield from _hits([hit.id for hit in islice(run.get(id, ()), HITS)], measured.judgments.qrels[id])
            yield "</ol></div>"
        yield "</div></details>"


def _hits(ids: Sequence[str], grades: Mapping[str, int]) -> Iterator[str]:
    for id in ids:
        grade = grades.get(id)
        mark = ' class="good"' if grade is not None and grade > 0 else ""
        yield f"<li{mark}>{escape(id)} <small>{'unjudged' if grade is None else f'grade {grade}'}</small></li>"


def _words(query: Query) -> str:
    text = " + ".join(part.text or "[picture]" for part in query.parts)
    return f"{query.id}: {text}"


def _first_measure(measured: Measured) -> str:
    return next(iter(next(iter(measured.evaluations.values())).means))
