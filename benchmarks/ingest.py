"""Indexing end to end beside txtai: the same documents, the same model, both saved to disk.

``python -m benchmarks.ingest`` writes docs/bench/ingest.md. txtai runs in a venv of its own.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from itertools import islice
from pathlib import Path

from benchmarks.collections import data
from benchmarks.rivals import python_with
from encoders.text import packaged
from retrieval.files import read_source
from retrieval.types import Document
from server.assemble import Config
from server.home import Home, silent
from server.settings import Settings

OUT = Path("docs/bench/ingest.md")
DOCUMENTS = 1000

RIVAL = """
import json, sys, time
from txtai import Embeddings
texts = json.load(open(sys.argv[1]))
index = Embeddings(path=sys.argv[2], content=True, hybrid=True)
index.batchtransform(["warm up"], "query")
start = time.perf_counter()
index.index((str(i), text, None) for i, text in enumerate(texts))
index.save(sys.argv[3])
print(json.dumps(time.perf_counter() - start))
"""


def main() -> None:
    documents = [d for d in islice(read_source(data() / "scifact").documents(), DOCUMENTS) if isinstance(d, Document)]
    rows = [["engine", "documents a second", "ratio"], ["---"] * 3]
    ours, theirs = len(documents) / _ours(documents), _txtai(documents)
    rows.append(["Lightbox, text space, no ontology", f"{ours:.1f}", f"{ours / theirs:.2f}" if theirs else ""])
    rows.append(["txtai, hybrid", f"{theirs:.1f}" if theirs else "not installed", "1.00"])
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(INTRODUCTION + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    print(OUT.read_text())


def _ours(documents: list[Document]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Settings(home=Path(folder), cache=Path(".bench/home/cache")))
        config = Config(image_encoder="none", ontology="none")
        home.index("warm", documents[:1], config, progress=silent)
        start = time.perf_counter()
        home.index("all", documents, config, progress=silent)
        return time.perf_counter() - start


def _txtai(documents: list[Document]) -> float | None:
    python = python_with("txtai", "txtai", "sentence-transformers")
    if python is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.json"
        texts.write_text(json.dumps([document.content for document in documents]))
        done = subprocess.run(
            [python, "-c", RIVAL, str(texts), str(packaged()), str(Path(folder) / "index")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return len(documents) / float(json.loads(done.stdout.splitlines()[-1]))


INTRODUCTION = f"""\
`python -m benchmarks.ingest`: the first {DOCUMENTS:,} documents of SciFact with all-MiniLM-L6-v2, words and vectors,
until everything is on disk. The model is loaded before the clock starts, for both.

"""

if __name__ == "__main__":
    main()
