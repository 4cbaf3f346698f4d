"""The Indiana reports with their human labels, and the retrieval tasks over them (`tasks.py` beside the data)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from retrieval.files import read_source
from retrieval.types import Document

_NAMES = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema Emphysema "
    "Fibrosis Pleural_Thickening"
)
FINDINGS = _NAMES.split()  # Hernia has no gold
TASKS = ("label_reports", "report_reports", "absent_reports")
PHRASINGS = Path(__file__).with_name("ontology_phrasings.tsv")


class Report(NamedTuple):
    """One report and the findings that it is coded with."""

    id: str
    text: str
    gold: frozenset[str]


class Task(NamedTuple):
    """Queries against reports. grades: query -> id -> grade."""

    name: str
    kind: str
    queries: Mapping[str, str]
    grades: Mapping[str, Mapping[str, int]]

    def finding(self, query: str) -> str:
        """The finding that a query of words is about."""
        return query.removeprefix("no-").split("-")[0]


def data_folder() -> Path:
    default = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("LIGHTBOX_DATA", default)) / "iu_xray"


def reports(data: Path, part: str) -> list[Report]:
    """The coded reports with a text of the part `dev`, `train` or `all`, cut as `tasks.py` cuts them."""
    found = []
    for line in (data / "reports.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["negbio_gold"] and (row["findings"] or row["impression"]) and _in_part(row["uid"], part):
            text = " ".join(filter(None, (row["findings"], row["impression"]))).strip()
            found.append(Report(row["uid"], text, frozenset(f for f in FINDINGS if row["negbio_gold"][f])))
    return found


def _in_part(uid: str, part: str) -> bool:
    return part == "all" or (part == "dev") == (zlib.crc32(uid.encode()) % 5 == 0)


def tasks(data: Path, part: str) -> dict[str, Task]:
    """The three report tasks, and `phrasings`: label_reports asked in words written before the linker was."""
    with TemporaryDirectory() as folder:
        script = [sys.executable, str(data.parent / "tasks.py"), folder, "--data", str(data), "--part", part]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        found = {name: _task(Path(folder) / name, name) for name in TASKS}
    found["phrasings"] = _phrasings(found["label_reports"])
    return found


def _task(folder: Path, name: str) -> Task:
    source = read_source(folder)
    queries = {query.id: query.parts[0].text for query in source.queries()}
    return Task(name, "report" if name == "report_reports" else "text", queries, source.qrels("test"))


def _phrasings(asked: Task) -> Task:
    rows = [line.split("\t") for line in PHRASINGS.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    queries = {f"{finding}-p{number}": phrase for number, (finding, phrase) in enumerate(rows)}
    answers = {asked.finding(query): grades for query, grades in asked.grades.items()}
    known = {query: phrase for query, phrase in queries.items() if asked.finding(query) in answers}
    return Task("phrasings", "text", known, {query: answers[asked.finding(query)] for query in known})


def documents(found: Sequence[Report]) -> list[Document]:
    return [Document(id=report.id, text=report.text) for report in found]
