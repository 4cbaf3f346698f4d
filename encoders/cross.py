"""Cross-encoders: query and document read together, one score a pair. They rerank, and they teach.

Any sentence-transformers CrossEncoder with one score, by name or path. As with `encoders.text`, the whole model is
converted once, its own activation included, and served without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders import runtime
from encoders.models import configuration, found, loading, model_files
from encoders.text import PROBES
from encoders.tokens import Tokens
from retrieval.errors import InputError
from retrieval.types import Document, Item

TOKENS = 2048  # of one batch, padding included
HEADED = "ForSequenceClassification"  # transformers gives a model a fresh head where its folder holds none
PAIRS = tuple(zip(PROBES, (*PROBES[1:], PROBES[0]), strict=True))


class Cross:
    """A cross-encoder. Implements `retrieval.types.Scorer`."""

    def __init__(self, tower: runtime.Tower, digest: str) -> None:
        self.digest = digest
        self._tower = tower
        self._tokens = Tokens.read(tower.folder, tower.spec["tokens"])

    def score(self, query: Item, documents: Sequence[Document]) -> NDArray[np.float32]:
        """(K,) scores, higher is better, comparable within this query. Only texts are read.

        Raises InputError for a query without text.
        """
        if not query.text.strip():
            raise InputError("a cross-encoder compares texts: the query has none")
        if not documents:
            return np.zeros(0, np.float32)
        rows = self._tokens.rows([(query.text, document.content) for document in documents])
        batches = runtime.budgeted([len(row) for row in rows], TOKENS)
        inputs = (self._tokens.padded([rows[n] for n in batch]) for batch in batches)
        made = [self._tower.one(next(inputs))] if len(batches) == 1 else self._tower.many(inputs, len(rows))
        out = np.empty(len(rows), np.float32)
        for batch, scores in zip(batches, made, strict=True):
            out[batch] = scores[:, 0]
        return out


def cross_encoder(name: str, cache: Path) -> Cross:
    """The cross-encoder of that name or path. Raises InputError where it is none, or gives more than one score."""
    folder = found(name, owner="cross-encoder")
    digest = runtime.Digests(cache).files(model_files(folder, name), {"kind": "cross-encoder"})
    tower = runtime.tower(cache, digest, lambda: _Whole(_loaded(folder, name)), lambda out: _make(folder, name, out))
    return Cross(tower, digest)


def _loaded(folder: Path, name: str) -> Any:
    """The model in PyTorch: one of ours, or sentence-transformers'."""
    config = configuration(folder / "config.json", name)
    if config.get("kind") == "joint":
        from encoders.joint import load_joint

        return load_joint(folder, config, name)
    from sentence_transformers import CrossEncoder

    with loading(name, "cross-encoder"):
        model = CrossEncoder(str(folder), device="cpu", local_files_only=True).float().eval()
        if model.num_labels != 1:
            raise InputError(f"{name!r} gives {model.num_labels} scores a pair; a reranker gives one")
        made = type(getattr(model[0], "model", None)).__name__
        if made.endswith(HEADED) and made not in (config.get("architectures") or [made]):
            raise InputError(
                f"{name!r} is no cross-encoder: it has no head that scores a pair, and one would be random"
            )
    return model


def _make(folder: Path, name: str, out: Path) -> dict[str, Any]:
    model = _loaded(folder, name)
    tokenizer: Any = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{name!r} has no tokenizer that the tokenizers library reads: only text models of that kind")
    probes = [_features(model, PAIRS[:2]), _features(model, PAIRS), _features(model, PAIRS[:1])]
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    tokens = Tokens.spec(tokenizer, list(probes[0]), model.max_length)
    read = Tokens.read(out, tokens)
    ours = read.padded(read.rows(PAIRS))
    if any(not np.array_equal(array, probes[1][key].numpy()) for key, array in ours.items()):
        raise InputError(f"{name!r} reads pairs in a way of its own, which its tokenizer.json does not hold")
    runs = runtime.convert(_Whole(model), out, probes[0], probes, fixed=False, half=False)
    return {"runtime": runs, "tokens": tokens}


def _features(model: Any, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    if hasattr(model, "features"):
        ours: dict[str, Any] = model.features(pairs)
        return ours
    given = model.preprocess([list(pair) for pair in pairs])
    return {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in given}


def _Whole(model: Any) -> Any:
    """The cross-encoder with its activation as one function of token arrays to (B, 1) scores."""
    import torch

    if hasattr(model, "module"):
        return model.module

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            if token_type_ids is not None:
                given["token_type_ids"] = token_type_ids
            return self.model.activation_fn(self.model(given)["scores"]).reshape(-1, 1)

    return Whole().eval()
