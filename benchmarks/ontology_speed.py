"""How fast texts are linked and read, and a query answered over a hundred thousand reports; in how much memory."""

from __future__ import annotations

import json
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ontology_retrieval import Memory
from benchmarks.rivals import python_with
from ontology.assertion import assertions
from ontology.linker import Dictionary
from ontology.tables import Tables
from ontology.tversky import findings_score
from retrieval.types import Finding, Linker, Part

REPORTS = 100_000
DEPTH = 10
CANDIDATES = 30  # names looked at for a mention, scispaCy's default
SCRIPT = Path(__file__).with_name("engines") / "read_assertions.py"
PINS = {"medspacy": ("numpy<2",)}  # what it is compiled against and does not say


class Query(NamedTuple):
    """Milliseconds of one query over `REPORTS` reports, and of making the state that answers it.

    core: the median in processor time, which other work on the machine does not stretch.
    """

    p50: float
    p95: float
    core: float
    build: float
    memory: float  # megabytes that the process held at most


class Rate(NamedTuple):
    """Texts a second by the clock, and a second of one core's time, which other work does not stretch."""

    clock: float
    core: float


def rate(work: Callable[[Sequence[str]], object], texts: Sequence[str]) -> Rate:
    """After a warm-up."""
    work(texts[:20])
    started, busy = time.perf_counter(), time.process_time()
    work(texts)
    return Rate(len(texts) / (time.perf_counter() - started), len(texts) / (time.process_time() - busy))


def fresh(tables: Tables) -> Dictionary:
    """A linker that remembers no spelling, its index of names loaded: that is done once, when it is made."""
    linker = Dictionary(tables)
    linker.pipeline.candidates(["atelectesis"], 1)
    return linker


def reading(texts: Sequence[str], findings: Sequence[Sequence[Finding]]) -> Rate:
    """Reports a second whose mentions are read as affirmed, denied or doubtful."""
    spans = {text: [finding.span for finding in found] for text, found in zip(texts, findings, strict=True)}
    return rate(lambda batch: [assertions(text, spans[text]) for text in batch], texts)


def by_candidates(linker: Dictionary, texts: Sequence[str], findings: Sequence[Sequence[Finding]]) -> Rate:
    """Reports a second on the path of scispaCy's own linker, which is handed our mentions.

    Its pipeline reads every text, its generator looks up every mention among the names of the ontology.
    """
    mentions = {
        text: [text[slice(*f.span)].lower() for f in found] for text, found in zip(texts, findings, strict=True)
    }

    def work(batch: Sequence[str]) -> None:
        for text in batch:
            linker.pipeline.read(text)
            linker.pipeline.candidates(mentions[text] or ["effusion"], CANDIDATES)

    return rate(work, texts)


def perturbed(findings: Sequence[Sequence[Finding]], seed: int = 0) -> Iterator[tuple[Finding, ...]]:
    """Reports made of real ones: each loses a tenth of its mentions and gains one of another report."""
    rng = np.random.default_rng(seed)
    for number in range(REPORTS):
        found = findings[number % len(findings)]
        kept = [finding for finding, draw in zip(found, rng.random(len(found)), strict=True) if draw > 0.1]
        other = findings[int(rng.integers(len(findings)))]
        yield (*kept, *([other[int(rng.integers(len(other)))]] if other else []))


def asked(linker: Linker, findings: Sequence[Sequence[Finding]], phrases: Sequence[str]) -> dict[str, Query]:
    """Phrases and whole reports as queries, top ten taken."""
    documents = list(perturbed(findings))
    score = findings_score(linker)
    postings = Memory(documents)
    started = time.perf_counter()
    score(Part(findings=documents[0]), postings)
    build = (time.perf_counter() - started) * 1000
    texts = [
        Part(text=text, findings=found) for text, found in zip(phrases, linker.link_queries(phrases), strict=True)
    ]
    wholes = [Part(kind="report", findings=tuple(found)) for found in findings[:50]]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out = {}
    for kind, parts in (("phrase", texts), ("report", wholes)):
        spent = np.array([_milliseconds(score, part, postings) for part in parts])
        p50, p95 = np.percentile(spent[:, 0], [50, 95])
        out[kind] = Query(float(p50), float(p95), float(np.median(spent[:, 1])), build, memory)
    return out


def _milliseconds(score: Callable[[Part, Any], Any], part: Part, postings: Memory) -> tuple[float, float]:
    """By the clock and in processor time."""
    started, busy = time.perf_counter(), time.process_time()
    scores = score(part, postings)
    top = np.argpartition(-scores, DEPTH)[:DEPTH]
    top[np.argsort(-scores[top], kind="stable")]
    return (time.perf_counter() - started) * 1000, (time.process_time() - busy) * 1000


# --- beside it ---------------------------------------------------------------------------------------------------


class Rival(NamedTuple):
    """Another reader: reports a second with its own matching, and what it says of the cases' spans."""

    rate: float
    readings: list[list[str]]


def rivals(texts: Sequence[str], cases: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> dict[str, Rival | None]:
    """medspaCy's ConText and negspaCy's NegEx, each in a venv of its own; None where it cannot be installed."""
    given = json.dumps({"texts": list(texts), "cases": list(cases)})
    found: dict[str, Rival | None] = dict.fromkeys(("medspacy", "negspacy"))
    for name in found:
        python = python_with(name, name, *PINS.get(name, ()))
        if python is not None:
            command = [python, str(SCRIPT), name]
            done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
            answer = json.loads(done.stdout.splitlines()[-1])
            found[name] = Rival(answer["rate"], answer["cases"])
    return found
