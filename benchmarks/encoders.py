"""What serving without torch gains: `python -m benchmarks.encoders [--rounds N]` writes docs/bench/encoders.md.

Ours and the plain library (sentence-transformers; for films timm in PyTorch) take turns in one run, so that whatever
else the machine does falls on both; a figure is the median of the rounds, and the last column is how many times
better ours is.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from encoders.clip import image_encoder
from encoders.text import Text, packaged, text_encoder
from retrieval.types import Hit, Item, Matrix, Ranking

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "bench" / "encoders.md"
WORDS_OF_130_TOKENS = 85
QUERY = "chest x-ray with enlarged heart"


class Row(NamedTuple):
    """One line of the table. ratio: above 1, ours is better; None where there is nothing to compare with."""

    what: str
    unit: str
    ours: float
    plain: float | None
    ratio: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), given.rounds)
    OUT.write_text(page(rows))
    print(OUT.read_text())


def page(rows: Sequence[Row]) -> str:
    """The table in Markdown."""

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [
        f"| {row.what} | {row.unit} | {number(row.ours)} | {number(row.plain)} | {number(row.ratio, 2)} |"
        for row in rows
    ]
    head = "| | unit | ours | plain | times better |\n| --- | --- | --- | --- | --- |\n"
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end.\n"
    return f"# The runtime beside PyTorch\n\n{__doc__}\n{head}" + "\n".join(lines) + f"\n\n{machine}"


def measure(folder: Path, rounds: int) -> list[Row]:
    from sentence_transformers import SentenceTransformer

    ours = text_encoder(None, folder)
    plain = SentenceTransformer(str(packaged()), device="cpu")
    texts = reports()
    rows = [*text_rows(ours, plain, texts, rounds), *film_rows(folder, rounds), *cold_rows(folder, rounds)]
    return rows + scifact_rows(ours, plain)


def reports() -> list[str]:
    """128 texts of about 130 tokens: SciFact's abstracts cut short, or this project's own words without the data."""
    corpus = data() / "scifact" / "corpus.jsonl"
    if corpus.is_file():
        texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()[:200]]
    else:
        words = re.findall(r"\w+", "\n".join(path.read_text("utf-8") for path in (ROOT / "encoders").glob("*.py")))
        texts = [" ".join(words[n * 40 : n * 40 + 200]) for n in range(200)]
    return [" ".join(text.split()[:WORDS_OF_130_TOKENS]) for text in texts if len(text.split()) > 80][:128]


def data() -> Path:
    return Path(os.environ.get("LIGHTBOX_DATA", ROOT.parent / "shared" / "data"))


def turns(ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of each, taken in turns after one round that does not count."""
    spent: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for which, work in enumerate((ours, plain)):
            start = time.perf_counter()
            work()
            if turn:
                spent[which].append(time.perf_counter() - start)
    return statistics.median(spent[0]), statistics.median(spent[1])


def text_rows(ours: Text, plain: Any, texts: Sequence[str], rounds: int) -> list[Row]:
    items = [Item(text=text) for text in texts]
    query = [Item(text=QUERY)]
    one = turns(lambda: ours.encode_queries(query), lambda: plain.encode([QUERY]), rounds * 10)
    many = turns(lambda: ours.encode_documents(items), lambda: plain.encode(list(texts), batch_size=32), rounds)
    same = (ours.encode_documents(items) * plain.encode(list(texts), normalize_embeddings=True)).sum(1).min()
    return [
        Row("one query", "ms", 1e3 * one[0], 1e3 * one[1], one[1] / one[0]),
        Row("documents of 130 tokens", "1/s", len(texts) / many[0], len(texts) / many[1], many[1] / many[0]),
        Row("least cosine to sentence-transformers", "", float(same), None, None),
    ]


def film_rows(folder: Path, rounds: int) -> list[Row]:
    """The shipped tower beside the same tower in PyTorch, which decodes and then encodes, batch by batch."""
    import torch
    from PIL import Image

    from encoders.clip import WEIGHTS
    from encoders.models import configuration
    from encoders.resize import Resize
    from encoders.towers import load_trained

    film = WEIGHTS / "chest-film"
    if not (film / "model.safetensors").is_file():
        return []
    pair = image_encoder(None, None, folder)
    files = {name: film / name for name in ("config.json", "model.safetensors")}
    loaded = load_trained(files, configuration(files["config.json"], "chest-film"), "chest-film")
    resize, pictures = Resize.of(loaded.resize), films(64)
    items = [Item(image=picture) for picture in pictures]

    def plain() -> None:
        with torch.inference_mode():
            for start in range(0, len(pictures), 16):
                arrays = [resize(Image.open(io.BytesIO(p))) for p in pictures[start : start + 16]]
                loaded.image(torch.from_numpy(np.stack(arrays)))

    spent = turns(lambda: pair.encode_documents(items), plain, rounds)
    one = turns(lambda: pair.encode_queries(items[:1]), lambda: None, rounds * 4)
    return [
        Row("films, decoding included", "1/s", len(items) / spent[0], len(items) / spent[1], spent[1] / spent[0]),
        Row("one film", "ms", 1e3 * one[0], None, None),
    ]


def films(count: int) -> list[bytes]:
    """Films of the data, or smooth noise of their size as JPEG."""
    from PIL import Image

    held = sorted((data() / "iu_xray" / "images").glob("*"))[:count]
    if held:
        return [path.read_bytes() for path in held]
    draw, made = np.random.default_rng(0), []
    for _ in range(count):
        out = io.BytesIO()
        coarse = Image.fromarray(draw.integers(0, 256, (32, 32), np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(out, "JPEG")
        made.append(out.getvalue())
    return made


# ---- fresh processes

# The peak of the process alone: getrusage tells that of the parent, too, from before the program was replaced.
TOLD = """
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([time.perf_counter() - start, int(peak.split()[1]) / 1024]))
"""

FIRST = (
    """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
from encoders.text import text_encoder
from retrieval.types import Item
text_encoder(None, Path(sys.argv[1])).encode_queries([Item(text=sys.argv[2])])
"""
    + TOLD
)

PLAIN = (
    """
import json, sys, time
start = time.perf_counter()
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], device="cpu").encode([sys.argv[2]])
"""
    + TOLD
)


def cold_rows(folder: Path, rounds: int) -> list[Row]:
    def fresh(code: str, place: Path) -> list[float]:
        command = [sys.executable, "-c", code, str(place), QUERY]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
        seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
        return [float(seconds), float(megabytes)]

    times = min(rounds, 3)
    ours = [fresh(FIRST, folder) for _ in range(times + 1)][1:]
    plain = [fresh(PLAIN, packaged()) for _ in range(times)]
    (s, mb), (plain_s, plain_mb) = (np.median(np.array(all_), axis=0).tolist() for all_ in (ours, plain))
    return [
        Row("first vector of a fresh process", "s", s, plain_s, plain_s / s),
        Row("memory of that process, at most", "MiB", mb, plain_mb, plain_mb / mb),
        *shell_rows(times),
    ]


def shell_rows(times: int) -> list[Row]:
    """A cold text search by the command line, over a few texts: what starting up costs."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        source.mkdir()
        lines = [json.dumps({"_id": str(n), "text": text}) for n, text in enumerate(reports())]
        (source / "corpus.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        command = [sys.executable, "-m", "server.cli", "--home", str(Path(place) / "home")]
        quiet: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "timeout": 600}
        if subprocess.run([*command, "index", "cold", str(source)], check=False, **quiet).returncode:
            print("the command line did not index: no figure for a cold search", file=sys.stderr)
            return []
        spent = []
        for _ in range(times + 1):
            start = time.perf_counter()
            subprocess.run([*command, "search", "cold", QUERY, "--json"], check=True, **quiet)
            spent.append(time.perf_counter() - start)
    return [Row("cold text search from the shell", "s", statistics.median(spent[1:]), None, None)]


# ---- quality


def scifact_rows(ours: Text, plain: Any) -> list[Row]:
    """nDCG@10 by exact cosine over the whole corpus with either encoder's vectors."""
    from retrieval.evaluate import evaluate
    from retrieval.files import read_source
    from retrieval.types import Document

    if not (data() / "scifact").is_dir():
        return []
    source = read_source(data() / "scifact")
    documents = [d for d in source.documents() if isinstance(d, Document)]
    qrels = source.qrels("test")
    queries = [q for q in source.queries() if q.id in qrels]
    asked, held = [q.parts[0].text for q in queries], [d.content for d in documents]

    def figure(left: Matrix, right: Matrix) -> float:
        scores = left @ right.T
        best = np.argsort(-scores, axis=1)[:, :100]
        run = {
            query.id: Ranking([Hit(documents[n].id, float(scores[row, n])) for n in best[row]])
            for row, query in enumerate(queries)
        }
        return float(evaluate(run, qrels, ["nDCG@10"]).means["nDCG@10"])

    mine = figure(
        ours.encode_queries([Item(text=text) for text in asked]),
        ours.encode_documents([Item(text=text) for text in held]),
    )
    theirs = figure(
        plain.encode(asked, normalize_embeddings=True), plain.encode(held, normalize_embeddings=True, batch_size=32)
    )
    return [Row("nDCG@10 on SciFact, exact cosine", "", mine, theirs, mine / theirs)]


if __name__ == "__main__":
    main()
