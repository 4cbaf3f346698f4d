"""How things look in a shell: progress, hits, tables. Data goes to standard output, all else to standard error."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval.types import Progress

LINE_EVERY_S = 5.0
SNIPPET = 160
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@contextmanager
def progress(total: int | None = None) -> Iterator[Progress]:
    """A bar with rate and time left where standard error is a terminal, plain lines elsewhere.

    total: how many documents the source has, where the work itself cannot know.
    """
    if sys.stderr.isatty():
        with _bars(total) as told:
            yield told
    else:
        lines = _Lines(total)
        yield lines
        lines.close()


@contextmanager
def _bars(documents: int | None) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(_rate(task.speed) if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def told(phase: str, done: int, total: int | None) -> None:
            if phase not in tasks:
                finish()
                tasks[phase] = bars.add_task(phase, total=total or documents)
            bars.update(tasks[phase], completed=done, total=total or documents)

        def finish() -> None:
            for task in bars.tasks:  # a source holds no more than was done, whatever its lines promised
                bars.update(task.id, total=task.completed)

        yield told
        finish()


class _Lines:
    """One line every few seconds and one at the end of each phase."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.phase = ""
        self.began = self.said = 0.0
        self.first = self.done = 0
        self.last = -1  # what was said last
        self.of: int | None = None

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self.close()
            self.phase, self.began, self.said, self.first, self.last = phase, now, now, done, -1
        self.done, self.of = done, total or self.total
        if now - self.said >= LINE_EVERY_S:
            self.said = now
            self._say(now)

    def close(self) -> None:
        if self.phase and (self.done != self.last or self.of not in (None, self.done)):
            self.of = self.of and self.done  # a source holds no more than was done, whatever its lines promised
            self._say(time.monotonic())
        self.phase = ""

    def _say(self, now: float) -> None:
        self.last = self.done
        rate = (self.done - self.first) / max(now - self.began, 1e-3)
        of = f"/{self.of}" if self.of else ""
        left = f", {(self.of - self.done) / rate:.0f} s left" if self.of and rate > 0 and self.of > self.done else ""
        told = f", {_rate(rate)}" if rate > 0 else ""  # a phase told of once has none
        say(f"{self.phase}: {self.done}{of}{told}{left}")


def _rate(per_second: float) -> str:
    """
    >>> _rate(1234.5), _rate(0.42)
    ('1,234/s', '0.42/s')
    """
    return f"{per_second:,.0f}/s" if per_second >= 10 else f"{per_second:.2g}/s"


def say(line: str) -> None:
    """A line on standard error."""
    print(line, file=sys.stderr, flush=True)


def hits(answer: Mapping[str, Any], explain: bool) -> Iterator[str]:
    """The hits of an answer, a few lines each."""
    for rank, hit in enumerate(answer["hits"], 1):
        sure = f"  confidence {hit['confidence']:.2f}" if hit.get("confidence") is not None else ""
        yield f"{rank:3}  {hit['score']:.4f}{sure}  {hit['id']}  {_one_line(hit.get('title') or '')}".rstrip()
        text = _one_line(hit.get("text") or "")
        if text:
            yield f"     {text if len(text) <= SNIPPET else text[: SNIPPET - 1] + '…'}"
        if explain:
            yield from _explained(hit)
    if not answer["hits"]:
        yield "nothing found"
    yield _closing(answer)


def _one_line(text: str) -> str:
    """Without what a terminal would obey: documents come from anywhere."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def _explained(hit: Mapping[str, Any]) -> Iterator[str]:
    for leg, share in hit["parts"].items():
        rank = f"rank {share['rank']}" if share["rank"] else "not found"
        given = share["weight"] * share["normalised"]
        sum_ = f"{given:+.4f} = {share['weight']:.3f} x {share['normalised']:.4f}"
        yield f"       {leg:10} {sum_}  ({rank}, raw {share['raw']:.4f})"
    said = [f"{f['name']} ({f['assertion']})" for f in hit.get("findings", ())]
    if said:
        yield "       says       " + ", ".join(dict.fromkeys(said))


def _closing(answer: Mapping[str, Any]) -> str:
    total = answer["total"]
    more = "at least " if total["relation"] == "gte" else ""
    exact = "exact" if answer["exact"] else f"approximate, recall {answer['recall']:.3f}"
    return f"{more}{total['value']} found, {exact}, {answer['took_ms']['total']:.0f} ms"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they must be, the first to the left, the others to the right.

    >>> print("\\n".join(table(["", "R@10"], [["dense", "0.5"]])))
           R@10
    dense   0.5
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "  ".join(cells).rstrip()


def fields(values: Mapping[str, Any], indent: int = 0) -> Iterator[str]:
    """A JSON object as indented lines."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield f"{' ' * indent}{name}:"
            yield from fields(value, indent + 2)
        else:
            yield f"{' ' * indent}{name}: {'-' if value is None or value == {} else value}"
