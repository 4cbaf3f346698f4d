"""Words beside bm25s: indexing and query rate on the same documents, ours with its store, checksums and fsyncs.

``python -m benchmarks.lexical`` writes docs/bench/lexical.md. bm25s runs in a venv of its own, with PyStemmer.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.collections import data
from benchmarks.rivals import python_with
from retrieval.files import read_source
from server.assemble import Config
from server.home import Home, silent
from server.judging import judgments
from server.settings import Settings

OUT = Path("docs/bench/lexical.md")
CORPORA = ("scifact", "npl")
ROUNDS = 3
WORDS_ONLY = Config(text_encoder="none", image_encoder="none", ontology="none")

RIVAL = """
import json, sys, time, bm25s, Stemmer
corpus = [json.loads(line) for line in open(sys.argv[1] + "/corpus.jsonl")]
queries = json.load(open(sys.argv[2]))
texts = [(d.get("title", "") + " " + d.get("text", "")).strip() for d in corpus]
stemmer = Stemmer.Stemmer("english")
start = time.perf_counter()
index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
index.index(bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
index.save(sys.argv[3])
built = time.perf_counter() - start
def ask(texts, k):
    tokens = bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)
    index.retrieve(tokens, k=k, show_progress=False, n_threads=1)
rates = {}
for k in (10, 1000):
    start = time.perf_counter()
    for text in queries:
        ask([text], k)
    rates[f"one {k}"] = len(queries) / (time.perf_counter() - start)
    start = time.perf_counter()
    ask(queries, k)
    rates[f"batch {k}"] = len(queries) / (time.perf_counter() - start)
print(json.dumps({"documents": len(texts) / built, **rates}))
"""
HEAD = ("documents", "one 10", "batch 10", "one 1000", "batch 1000")


def main() -> None:
    rows = []
    for name in CORPORA:
        best = [_fastest(run, data() / name) for run in (_ours, _bm25s)]
        for engine, rates in zip(("Lightbox", "bm25s"), best, strict=True):
            rows.append([f"{name}, {engine}", *(f"{rates[h]:,.0f}" if rates else "not installed" for h in HEAD)])
        if best[1]:
            rows.append([f"{name}, ratio", *(f"{best[0][h] / best[1][h]:.2f}" for h in HEAD)])  # type: ignore[index]
    lines = [["per second", "documents indexed", "queries, k 10", "k 10, in one batch", "k 1,000", "k 1,000, batch"]]
    lines += [["---"] * 6, *rows]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(INTRODUCTION + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    print(OUT.read_text())


def _fastest(run: object, source: Path) -> dict[str, float] | None:
    """The best of several rounds for each figure: the least disturbed one."""
    rounds = [run(source) for _ in range(ROUNDS)]  # type: ignore[operator]
    return None if None in rounds else {key: max(r[key] for r in rounds) for key in HEAD}


def _ours(source: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Settings(home=Path(folder)))
        documents = list(read_source(source).documents())
        start = time.perf_counter()
        home.index("words", documents, WORDS_ONLY, progress=silent)
        rates = {"documents": len(documents) / (time.perf_counter() - start)}
        snapshot = home.engine("words").snapshot()
        texts = _texts(source)
        for k in (10, 1000):
            start = time.perf_counter()
            for text in texts:
                snapshot.search_text([text], k)
            rates[f"one {k}"] = len(texts) / (time.perf_counter() - start)
            start = time.perf_counter()
            snapshot.search_text(texts, k)
            rates[f"batch {k}"] = len(texts) / (time.perf_counter() - start)
        home.close()
        return rates


def _bm25s(source: Path) -> dict[str, float] | None:
    python = python_with("bm25s", "bm25s", "PyStemmer", "numpy<2.3")
    if python is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        queries = Path(folder) / "queries.json"
        queries.write_text(json.dumps(_texts(source)))
        done = subprocess.run(
            [python, "-c", RIVAL, str(source), str(queries), str(Path(folder) / "index")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return rates


def _texts(source: Path) -> list[str]:
    return [query.parts[0].text for query in judgments(source).queries]


INTRODUCTION = """\
`python -m benchmarks.lexical`: rates per second on this machine, best of three rounds each, one thread for queries.
Lightbox writes documents to SQLite with fsync, checksums what it derives, orders ties and returns ids with scores;
bm25s keeps term scores in memory and returns row numbers.

"""

if __name__ == "__main__":
    main()
