"""What the ontology leg and the labels reach on the unseen Indiana reports.

``python -m benchmarks.ontology`` writes docs/ontology.md and the same figures as JSON beside it. It needs the folder
`iu_xray` under LIGHTBOX_DATA. The legs that need an index (BM25, dense, hybrid) are measured by `lightbox evaluate`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import ontology_labels as labelling
from benchmarks import ontology_retrieval as retrieving
from benchmarks import ontology_speed as speed
from benchmarks.ontology_page import PRODUCT, page
from benchmarks.ontology_reports import FINDINGS, Report, Task, data_folder, documents, reports, tasks
from ontology.assertion import assertions
from ontology.labels import label_documents, load_labels
from ontology.linker import Dictionary, load_linker
from retrieval.types import Assertion
from tests.test_assertion import TRAPS, parse

OUT = Path("docs/ontology.md")


def main() -> None:
    data = data_folder()
    if not data.is_dir():
        raise SystemExit(f"expected the Indiana reports in {data.name} under LIGHTBOX_DATA; nothing measured")
    warnings.filterwarnings("ignore", message=r".*W036.*")
    with TemporaryDirectory() as cache:
        linker = load_linker(None, Path(cache))
        found = measured(data, linker)
    OUT.parent.mkdir(exist_ok=True)
    OUT.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    OUT.write_text(page(found))
    print(OUT.read_text())


def measured(data: Path, linker: Dictionary) -> dict[str, Any]:
    """All figures, as JSON."""
    unseen = reports(data, "dev")
    asked = tasks(data, "dev")
    return {
        "reports": len(unseen),
        "retrieval": {name: _retrieval(unseen, task, linker) for name, task in asked.items()},
        "labels": _labels(data, unseen, linker),
        "assertion": _assertion(unseen, asked["absent_reports"], linker),
        "speed": _speed(unseen, linker, list(asked["phrasings"].queries.values())),
    }


# --- measuring ---------------------------------------------------------------------------------------------------


def _retrieval(unseen: Sequence[Report], task: Task, linker: Dictionary) -> dict[str, Any]:
    ids = [report.id for report in unseen]
    out: dict[str, Any] = {"queries": len(task.queries), "systems": {}}
    for name, system in retrieving.systems(linker, unseen, task).items():
        scores = system.scores(unseen, task)
        values = retrieving.ndcg(scores, task, ids)
        out["systems"][name] = {"nDCG@10": retrieving.mean(values)}
        if task.kind == "text":
            per = retrieving.by_finding(values, task)
            out["systems"][name]["findings"] = per
            out["systems"][name]["macro"] = retrieving.mean(per)
            few = {finding: value for finding, value in per.items() if finding in retrieving.rare(unseen)}
            out["systems"][name]["rare third"] = retrieving.mean(few) if few else None
        if task.name == "absent_reports":
            out["systems"][name]["contradictions@10"] = retrieving.mean(
                retrieving.contradictions(scores, task, unseen)
            )
    words = retrieving.bm25(unseen, task)
    out["systems"]["BM25"] = {"nDCG@10": retrieving.mean(retrieving.ndcg(words, task, ids))}
    if task.name == "absent_reports":
        contradicted = retrieving.contradictions(words, task, unseen)
        out["systems"]["BM25"]["contradictions@10"] = retrieving.mean(contradicted)
    return out


def _labels(data: Path, unseen: Sequence[Report], linker: Dictionary) -> dict[str, Any]:
    gold = [report.gold for report in unseen]
    plain = labelling.baseline(data.parent / "radiology_lexicon")
    answers = {
        PRODUCT: labelling.labelled(unseen, linker, load_labels()),
        "ontology, text alone": labelling.labelled(unseen, linker, load_labels(conventions=False)),
        "two stages as published": labelling.published(unseen, linker, plain),
        "phrases and NegEx": [plain(report.text) for report in unseen],
    }
    return {
        name: {
            "micro": found.micro,
            "macro": found.macro,
            "findings": {finding: [*counts, counts.f1] for finding, counts in found.findings.items()},
        }
        for name, found in ((name, labelling.agreement(gold, answer)) for name, answer in answers.items())
    }


def _assertion(unseen: Sequence[Report], absent: Task, linker: Dictionary) -> dict[str, Any]:
    """On the traps: share read as marked, F1 of "negated". On the reports: denials against the task's own."""
    pairs = {trap: _read(lines) for trap, lines in TRAPS.items()}
    return {
        "traps": {trap: _figures(found) for trap, found in pairs.items()},
        "all traps": _figures([pair for found in pairs.values() for pair in found]),
        "reports": _denials(unseen, absent, linker),
    }


def _read(lines: str) -> list[tuple[str, str]]:
    """What the cases of a trap should read as, and what they do."""
    cases = map(parse, map(str.strip, lines.strip().splitlines()))
    return [pair for text, spans, wanted in cases for pair in zip(wanted, assertions(text, spans), strict=True)]


def _figures(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Mentions, share read as marked, F1 of "negated" (1 where there is nothing to deny and nothing denied)."""
    denied = [(a == Assertion.negated, b == Assertion.negated) for a, b in pairs]
    right, said = sum(a and b for a, b in denied), sum(a + b for a, b in denied)
    return [len(pairs), sum(a == b for a, b in pairs) / len(pairs), 2 * right / said if said else 1.0]


def _rivals(texts: Sequence[str]) -> dict[str, Any]:
    """Speed, and the figures on all traps together."""
    cases = [parse(line.strip()) for lines in TRAPS.values() for line in lines.strip().splitlines()]
    found = speed.rivals(texts, [(text, spans) for text, spans, _ in cases])
    return {
        name: rival
        and {
            "reports/s": rival.rate,
            "traps": _figures(
                [
                    (a, b)
                    for (_, _, wanted), said in zip(cases, rival.readings, strict=True)
                    for a, b in zip(wanted, said, strict=True)
                ]
            ),
        }
        for name, rival in found.items()
    }


def _denials(unseen: Sequence[Report], absent: Task, linker: Dictionary) -> dict[str, list[float]]:
    """Reports said to deny a finding (label 0) against those of `absent_reports`, and against the codes alone."""
    rows = list(label_documents(documents(unseen), linker, load_labels(conventions=False)))
    pairs: list[tuple[bool, bool]] = []
    for query, denying in absent.grades.items():
        finding = absent.finding(query)
        pairs += [
            (report.id in denying, row["labels"][finding] == 0) for report, row in zip(unseen, rows, strict=True)
        ]
    right = sum(a and b for a, b in pairs)
    said, denied = sum(b for _, b in pairs), sum(a for a, _ in pairs)
    against = [
        finding in report.gold
        for report, row in zip(unseen, rows, strict=True)
        for finding in FINDINGS
        if row["labels"][finding] == 0
    ]
    return {
        "F1 of denied": [2 * right / (said + denied), right / said, right / denied],
        "denied but coded": [sum(against) / len(against), sum(against), len(against)],
    }


def _speed(unseen: Sequence[Report], linker: Dictionary, phrases: Sequence[str]) -> dict[str, Any]:
    texts = [report.text for report in unseen]
    findings = linker.link(texts)
    return {
        "load": os.getloadavg()[0],
        "linking, reports/s": speed.rate(speed.fresh(linker.tables).link, texts),
        "reading assertions, reports/s": speed.reading(texts, findings),
        "scispaCy's candidates, reports/s": speed.by_candidates(linker, texts, findings),
        "linking, phrases/s": speed.rate(linker.link_queries, phrases),
        "rivals": _rivals(texts),
        "queries": {kind: query._asdict() for kind, query in speed.asked(linker, findings, phrases).items()},
    }


if __name__ == "__main__":
    main()
