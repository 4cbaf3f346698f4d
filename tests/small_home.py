"""A home whose collections are assembled from the fakes: no weights, no torch, answers that can be checked by eye."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray

from retrieval.engine import Wordings
from retrieval.errors import NotAnImage
from retrieval.types import Encoder, FindingsScore, ImageSource, Linker, Part, Picture, Postings, Scorer
from server.app import create_app
from server.assemble import NONE, Config, Models
from server.home import Home
from server.jobs import Jobs
from server.settings import Settings
from tests.fakes import HashingEncoder, OverlapScorer, WordLinker

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 16  # looks like a picture to whoever looks only at its head

CORPUS: Sequence[Mapping[str, Any]] = (
    {"_id": "a", "title": "Film A", "text": "the heart is enlarged", "metadata": {"projection": "ap", "year": 2009}},
    {
        "_id": "b",
        "title": "Film B",
        "text": "no effusion and a clear lung",
        "metadata": {"projection": "pa", "year": 2011},
    },
    {"_id": "c", "title": "Film C", "text": "a large effusion", "metadata": {"projection": "ap", "year": 2012}},
)
QUERIES = ({"_id": "q1", "text": "enlarged heart"}, {"_id": "q2", "text": "effusion"})
QRELS = (("q1", "a", 1), ("q2", "c", 2), ("q2", "b", 1))


class FakeModels(Models):
    """Text and pictures in one space of 16 dimensions; `heart` and `effusion` are the concepts."""

    def encoders(self, config: Config) -> tuple[dict[str, Encoder], str | None]:
        if config.text_encoder == NONE:
            return {}, None
        return {"text": HashingEncoder(name=config.text_encoder or "hashing")}, "text"

    def linker(self, config: Config) -> Linker | None:
        return None if config.ontology == NONE else WordLinker(["heart", "effusion"])

    def wordings(self, encoder: Encoder | None, linker: Linker | None) -> Wordings | None:
        return None  # its concepts have no other names

    def findings_score(self, linker: Linker | None) -> FindingsScore | None:
        return None if linker is None else shared_findings

    def scorer(self, config: Config) -> Scorer | None:
        return OverlapScorer() if config.reranker else None

    def reader(self, config: Config) -> Callable[[ImageSource], Picture]:
        return read_picture


def shared_findings(part: Part, postings: Postings) -> NDArray[np.float32]:
    """How many of the query's findings a document has."""
    scores = np.zeros(postings.size, np.float32)
    for finding in part.findings:
        scores[postings.rows(finding.concept, finding.assertion)] += 1
    return scores


def read_picture(source: ImageSource) -> Picture:
    """Any file that starts like a PNG."""
    if isinstance(source, Picture):
        return source
    data = source if isinstance(source, bytes) else source.read_bytes()
    if not data.startswith(PNG[:8]):
        raise NotAnImage("not a picture")
    path = None if isinstance(source, bytes) else str(source)
    return Picture(hashlib.sha256(data).hexdigest(), data, None, path)


def small_home(folder: Path) -> Home:
    settings = Settings(home=folder)
    return Home(settings, FakeModels(settings))


def small_app(settings: Settings, home: Home) -> FastAPI:
    """The service over a small home; the processes of its jobs work over the fakes as well."""
    return create_app(settings, home, Jobs(settings, (sys.executable, "-m", "tests.small_work")))


def write_source(folder: Path, corpus: Sequence[Mapping[str, Any]] = CORPUS) -> Path:
    """A BEIR folder with two judged queries."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(folder / "queries.jsonl", QUERIES)
    rows = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in QRELS)]
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
