"""Spaces to compress: documents, judged queries and queries to learn from, encoded once below .bench/vq."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.collections import BENCH, CLASSICS, data, tasks
from encoders.text import text_encoder
from indexers.product import spread
from indexers.publish import PICTURES
from indexers.queries import windows
from retrieval.files import read_source
from retrieval.types import Document, Encoder, Item, Matrix, Qrels

FOLDER = BENCH / "vq"
TEXTS = ("scifact", "roco_captions", *(name for name in CLASSICS if name != "adi"))
SENTENCES, MILLION, OVERLAP = "sentences", "million", "overlap@10"
SPACES = ("scifact", "roco_captions", "iu_xray", *TEXTS[2:], SENTENCES, MILLION)
AT_ONCE = 256
WINDOWS = 8_000  # per space; a random choice where there are more
KNOWN_ITEMS = {"train": 2_000, "dev": 500, "test": 1_000}
KEYWORDS = 5


class Asked(NamedTuple):
    """Queries (Q, D) with their judgments; `own[q]` is the document that is the query itself, or -1."""

    vectors: Matrix
    qrels: list[dict[int, int]]  # query -> document number -> grade
    own: NDArray[np.int64]


class Space(NamedTuple):
    """Documents (N, D), windows (W, D) cut from them to learn from, and queries by part: train, dev, test."""

    name: str
    documents: Matrix
    windows: Matrix
    asked: dict[str, Asked]
    measure: str  # nDCG@10 or R@10; overlap@10 where nothing is judged


def space(name: str) -> Space:
    """A space of `SPACES`; encoded where that was not done before."""
    if name == MILLION:
        held = space(SENTENCES)
        more = mixtures(held.documents, 1_000_000 - len(held.documents), np.random.default_rng(0))
        return held._replace(name=name, documents=np.concatenate([held.documents, more]))
    kept = FOLDER / name
    if not (kept / "asked.json").exists():
        kept.mkdir(parents=True, exist_ok=True)
        _encode(name, kept)
    about = json.loads((kept / "asked.json").read_text())
    asked = {
        part: Asked(
            np.load(kept / f"{part}.npy"),
            [{int(d): g for d, g in judged.items()} for judged in entry["qrels"]],
            np.array(entry["own"], np.int64),
        )
        for part, entry in about["asked"].items()
    }
    learned_from = [np.load(kept / file) for file in ("windows.npy", "pictures.npy") if (kept / file).exists()]
    return Space(name, np.load(kept / "documents.npy"), np.concatenate(learned_from), asked, about["measure"])


def mixtures(rows: Matrix, count: int, rng: np.random.Generator) -> Matrix:
    """(count, D) unit vectors between two of the rows (N, D) each, weights 0.6 to 0.95."""
    weights = rng.uniform(0.6, 0.95, (count, 1)).astype(np.float32)
    first, second = (rows[rng.integers(len(rows), size=count)] for _ in range(2))
    made = weights * first + (1 - weights) * second
    unit: Matrix = made / np.linalg.norm(made, axis=1, keepdims=True)
    return unit


class _Query(NamedTuple):
    part: str
    item: Item
    judged: dict[str, int]


def _encode(name: str, kept: Path) -> None:
    encoder: Encoder = text_encoder(None, BENCH / "models")
    if name == "iu_xray":
        from encoders.clip import image_encoder

        encoder = image_encoder(None, encoder, BENCH / "models")
        documents, texts, queries = _films()
    elif name == "roco_captions":
        documents, queries = _captions()
        texts = [document.text for document in documents]
    elif name == SENTENCES:
        documents, queries = _sentences()
        texts = [document.text for document in documents]
    else:
        documents, queries = _judged(name)
        texts = [document.text for document in documents]
    rng = np.random.default_rng(0)
    cut = sorted({window for text in texts for window in windows(text, rng)})
    cut = [cut[n] for n in np.sort(rng.permutation(len(cut))[:WINDOWS])]
    print(f"{name}: {len(documents)} documents, {len(cut)} windows, {len(queries)} queries", flush=True)
    number = {document.id: at for at, document in enumerate(documents)}
    _saved(kept / "documents.npy", encoder.encode_documents, documents)
    about: dict[str, Any] = {}
    for part in ("train", "dev", "test"):
        chosen = [query for query in queries if query.part == part]
        if not chosen:
            continue
        _saved(kept / f"{part}.npy", encoder.encode_queries, [query.item for query in chosen])
        about[part] = {
            "qrels": [{number[d]: g for d, g in query.judged.items() if d in number} for query in chosen],
            "own": [number.get(query.item.id, -1) for query in chosen],
        }
    _saved(kept / "windows.npy", encoder.encode_queries, [Item(text=window) for window in cut])
    if name == "iu_xray":  # as the product learns an index of pictures
        films = np.load(kept / "documents.npy")
        some = films[spread(len(films), len(cut) // PICTURES)]
        np.save(kept / "pictures.npy", encoder.as_queries("image", some))
    measure = {"roco_captions": "R@10", SENTENCES: OVERLAP}.get(name, "nDCG@10")
    (kept / "asked.json").write_text(json.dumps({"measure": measure, "asked": about}))


def _saved(path: Path, encode: Callable[[Sequence[Item]], Matrix], items: Sequence[Item]) -> None:
    """Encodes what is not there yet, a few hundred at a time: what was stopped goes on where it was."""
    if path.exists():
        return
    parts = []
    for at in range(0, len(items), AT_ONCE):
        part = path.with_suffix(f".{at}.npy")
        if not part.exists():
            np.save(part, encode(items[at : at + AT_ONCE]))
        parts.append(part)
    np.save(path, np.concatenate([np.load(part) for part in parts]))
    for part in parts:
        part.unlink()


def _judged(name: str) -> tuple[list[Item], list[_Query]]:
    """A BEIR collection. Of SciFact's train queries a quarter is for choosing, the rest to learn from."""
    source = read_source(data() / name)
    documents = [Item(id=d.id, text=d.content or "none") for d in source.documents() if isinstance(d, Document)]
    texts = {query.id: query.parts[0].text for query in source.queries()}
    out = []
    for split in ("train", "test") if name == "scifact" else ("test",):
        for id, judged in source.qrels(split).items():
            part = "dev" if split == "train" and zlib.crc32(id.encode()) % 4 == 0 else split
            out.append(_Query(part, Item(text=texts[id]), judged))
    return documents, out


def _captions() -> tuple[list[Item], list[_Query]]:
    """ROCO captions; a query is five of a caption's keywords, and finds that caption (every one with its text)."""
    lines = (data() / "roco_captions" / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    same: dict[str, dict[str, int]] = {}
    for row in rows:
        same.setdefault(row["caption"], {})[row["id"]] = 1
    rng = np.random.default_rng(0)
    able = [rows[n] for n in rng.permutation(len(rows)) if len(rows[n]["keywords"]) > KEYWORDS]
    out, at = [], 0
    for part, count in KNOWN_ITEMS.items():
        for row in able[at : at + count]:
            words = rng.permutation(row["keywords"])[:KEYWORDS]
            out.append(_Query(part, Item(text=" ".join(words)), same[row["caption"]]))
        at += count
    return [Item(id=row["id"], text=row["caption"]) for row in rows], out


def _sentences() -> tuple[list[Item], list[_Query]]:
    """Every sentence of the text collections, the captions and the reports; all their queries, without judgments."""
    bodies, queries = [], []
    for name in (*TEXTS, "adi"):
        found, asked = _captions() if name == "roco_captions" else _judged(name)
        bodies += [item.text for item in found]
        queries += [query._replace(judged={}) for query in asked]
    reports = (data() / "iu_xray" / "reports.jsonl").read_text().splitlines()
    for row in map(json.loads, reports):
        bodies += [row[part] for part in ("findings", "impression") if row[part]]
    rng = np.random.default_rng(0)
    cut = sorted({window for body in bodies for window in windows(body, rng)})
    return [Item(text=cut[n]) for n in rng.permutation(len(cut))], queries


def _films() -> tuple[list[Item], list[str], list[_Query]]:
    """Frontal films of the Indiana collection in the space of the image tower.

    A query is an abnormal film, and finds those with the same findings (grade 2) or some of them (1). Windows are cut
    from the reports of the train part; dev films choose on an eighth of the train part.
    """
    source = read_source(tasks("all") / "image_images")
    documents = [Item(id=d.id, image=d.image) for d in source.documents() if isinstance(d, Document)]
    dev = {q.id for q in read_source(tasks("dev") / "image_images").queries()}
    train = read_source(tasks("train") / "report_reports")
    texts = [d.text for d in train.documents() if isinstance(d, Document)]
    qrels: Qrels = source.qrels()
    queries = []
    for query in source.queries():
        eighth = zlib.crc32(query.id.encode()) % 8 == 0
        part = "test" if query.id in dev else "dev" if eighth else "train"
        queries.append(_Query(part, Item(id=query.id, image=query.parts[0].image), qrels[query.id]))
    return documents, texts, queries


def main(names: Sequence[str] = SPACES) -> None:
    for name in names:
        found = space(name)
        print(name, found.documents.shape, found.windows.shape, {p: len(a.qrels) for p, a in found.asked.items()})


if __name__ == "__main__":
    main()
