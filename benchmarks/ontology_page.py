"""The figures of `benchmarks.ontology` as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import ontology_speed as speed
from benchmarks.ontology_reports import FINDINGS

PRODUCT = "ontology, with conventions"
TITLES = {
    "label_reports": "a finding in words finds the reports that have it",
    "phrasings": "the same, in phrasings written before the linker",
    "report_reports": "an abnormal report finds reports with the same findings",
    "absent_reports": "`no X` finds the reports that deny X",
}


def page(found: Mapping[str, Any]) -> str:
    """The Markdown of all figures."""
    parts = (_introduction, _retrieval_part, _labels_part, _assertion_part, _speed_part)
    return "\n".join(part(found) for part in parts)


def _introduction(found: Mapping[str, Any]) -> str:
    return f"""# The ontology leg, measured

`python -m benchmarks.ontology` writes this page. Figures are on the {found["reports"]} unseen reports (the dev part)
of the Indiana collection; everything that was learned was learned on the other four fifths. Intervals are 95 %
bootstrap intervals over queries or reports. Neither UMLS nor MIMIC nor RadGraph-XL is used. Where documents
score alike, each place counts what all orders of the ties come to on average, so no tie-break helps. The judges are
human MeSH codes, not the linker.
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def _retrieval_part(found: Mapping[str, Any]) -> str:
    tasks_found = found["retrieval"]
    rows = []
    for name, task in tasks_found.items():
        whole, words = task["systems"]["whole"], task["systems"]["BM25"]["nDCG@10"]
        cells = [_interval(whole.get(key)) for key in ("nDCG@10", "macro", "rare third")]
        rows.append([f"`{name}`: {TITLES[name]}", str(task["queries"]), *cells, _interval(words)])
    absent = tasks_found["absent_reports"]["systems"]
    parts = []
    for system in (name for name in absent if name != "BM25"):
        cells = [_interval(task["systems"][system]["nDCG@10"]) for task in tasks_found.values()]
        parts.append([system, *cells, f"{absent[system]['contradictions@10'][0]:.3f}"])
    return "\n".join(
        [
            "## Retrieval by concepts alone: nDCG@10",
            "",
            *_table(["task", "queries", "ontology alone", "macro over findings", "rare third", "BM25"], rows),
            "Share of the first ten hits of `no X` that are coded with X: "
            f"{_interval(absent['whole']['contradictions@10'])} (ontology), "
            f"{_interval(absent['BM25']['contradictions@10'])} (BM25). Rare third: {', '.join(_rare(found))}.",
            "",
            "### What each part is worth",
            "",
            *_table(["system", *(f"`{name}`" for name in tasks_found), "contradictions@10"], parts),
            "Gold concepts: the human codes instead of linked mentions, and the concept that a query was written for;",
            "denials stay as linked. No negation: whatever is mentioned counts as affirmed, in reports and queries.",
            "",
            "The linker was never tuned on `phrasings`, but on those of `tests/phrasings_dev.tsv`. Of the last",
            "three batches there, how laymen may put the thirteen findings, 105 of 147, 98 of 118 and 95 of 129 were",
            "linked as asked at first sight; most misses were mended then.",
            "",
        ]
    )


def _rare(found: Mapping[str, Any]) -> list[str]:
    counts = {name: row[0] + row[2] for name, row in found["labels"][PRODUCT]["findings"].items()}
    return [f"{name} ({counts[name]})" for name in sorted(counts, key=lambda name: counts[name])[: len(FINDINGS) // 3]]


def _labels_part(found: Mapping[str, Any]) -> str:
    answers = found["labels"]
    whole = [[name, _interval(row["micro"]), _interval(row["macro"])] for name, row in answers.items()]
    rows = []
    for finding in FINDINGS:
        counts = [row["findings"][finding] for row in answers.values()]
        rows.append([finding, str(counts[0][0] + counts[0][2]), *(f"{row[3]:.3f}" for row in counts)])
    return "\n".join(
        [
            "## Labels: F1 on positive labels, 13 findings",
            "",
            *_table(["labels", "micro", "macro"], whole),
            *_table(["finding", "in gold", *answers], rows),
            "Hernia is written by `lightbox label`, but the gold has none. The baseline is RadText's list of phrases",
            "without bare names of the heart (with them it is worse), under NegEx triggers and RadText's denials.",
            "",
        ]
    )


def _assertion_part(found: Mapping[str, Any]) -> str:
    rows = [
        [trap, f"{mentions}", f"{right:.3f}", f"{f1:.3f}"]
        for trap, (mentions, right, f1) in found["assertion"]["traps"].items()
    ]
    f1, precision, recall = found["assertion"]["reports"]["F1 of denied"]
    share, wrong, denied = found["assertion"]["reports"]["denied but coded"]
    return "\n".join(
        [
            "## Assertion",
            "",
            *_table(["trap", "mentions", "read as marked", "F1 of negated"], rows),
            "The traps are cases of `tests/test_assertion.py`, which the rules were written for: they show what is",
            "covered, not what is to be expected. Of seven batches of sentences written later (now in",
            "`tests/assertion_cases.txt`), 205 of 213, 170 of 173, 134 of 145, 118 of 130, 174 of 184, 174 of 185 and",
            "159 of 171 mentions were read as marked at first sight; the misses were mended then.",
            f"On the unseen reports, denials against those of `absent_reports`: F1 {f1:.3f} (precision",
            f"{precision:.3f}, recall {recall:.3f}); of {denied} denials {wrong} ({100 * share:.1f} %) are of",
            "findings that are coded.",
            "",
        ]
    )


def _speed_part(found: Mapping[str, Any]) -> str:
    row = found["speed"]
    _, right, f1 = found["assertion"]["all traps"]
    readers = [
        [
            "Lightbox, assertions of linked mentions",
            *(f"{rate:.0f}" for rate in row["reading assertions, reports/s"]),
            f"{right:.3f}",
            f"{f1:.3f}",
        ],
        ["Lightbox, linking and assertions", *(f"{rate:.0f}" for rate in row["linking, reports/s"]), "", ""],
        [
            "scispaCy's pipeline and candidates, for the same mentions",
            *(f"{rate:.0f}" for rate in row["scispaCy's candidates, reports/s"]),
            "",
            "",
        ],
    ]
    for name, rival in row["rivals"].items():
        cells = ["not installed", "", "", ""]
        if rival is not None:
            _, right, f1 = rival["traps"]
            cells = [f"{rival['reports/s']:.0f}", "", f"{right:.3f}", f"{f1:.3f}"]
        readers.append([name, *cells])
    queries = [
        [
            kind,
            *(f"{query[key]:.1f}" for key in ("p50", "p95", "core")),
            *(f"{query[key]:.0f}" for key in ("build", "memory")),
        ]
        for kind, query in row["queries"].items()
    ]
    return "\n".join(
        [
            "## Speed",
            "",
            *_table(
                ["reader", "reports/s", "reports per second of one core", "traps read as marked", "F1 of negated"],
                readers,
            ),
            f"The machine has two cores and had {row['load']:.0f} processes waiting for them; the time of one core",
            "does not depend on that.",
            f"Queries are linked at {row['linking, phrases/s'][0]:.0f} a second. medspaCy and negspaCy match fourteen",
            "words only, and the traps were not written for them (negspaCy knows no doubt).",
            "",
            *_table(
                [
                    f"query over {speed.REPORTS:,} reports",
                    "p50 ms",
                    "p95 ms",
                    "p50 ms of one core",
                    "state made in ms",
                    "process at most MB",
                ],
                queries,
            ),
        ]
    )


def _interval(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
