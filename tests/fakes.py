"""Stand-ins with answers that can be checked by eye: no downloads, no patches, no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval.types import Assertion, Document, Finding, Item, Matrix, Side


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _direction(word: str, dim: int) -> Matrix:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


class HashingEncoder:
    """A text is the mean of its words' random directions; a picture the direction of its bytes."""

    def __init__(self, space: str = "text", dim: int = 16, name: str = "hashing") -> None:
        self.space = space
        self.dim = dim
        self.digests: Mapping[Side, str] = {"text": f"{name}-text", "image": f"{name}-image"}

    def handles(self, item: Item) -> bool:
        return bool(words(item.text)) or item.image is not None

    def encode_documents(self, items: Sequence[Item]) -> Matrix:
        out = np.zeros((len(items), self.dim), np.float32)
        for row, item in enumerate(items):
            names = [repr(item.image)] if item.image is not None else words(item.text)
            out[row] = np.sum([_direction(name, self.dim) for name in names], axis=0)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    encode_queries = encode_documents


class OverlapScorer:
    """A cross-encoder that counts shared words."""

    digest = "overlap"

    def score(self, query: Item, documents: Sequence[Document]) -> NDArray[np.float32]:
        wanted = set(words(query.text))
        return np.array([len(wanted & set(words(d.content))) for d in documents], np.float32)


class WordLinker:
    """Every word of a vocabulary is a concept; a "no" right before it denies it."""

    digest = "words"

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = frozenset(vocabulary)

    def link(self, texts: Sequence[str]) -> list[tuple[Finding, ...]]:
        return [tuple(self._findings(text)) for text in texts]

    link_queries = link

    def name(self, concept: str) -> str:
        return concept

    def _findings(self, text: str) -> list[Finding]:
        found = []
        before = ""
        for match in re.finditer(r"\w+", text.lower()):
            if match[0] in self.vocabulary:
                assertion = Assertion.negated if before == "no" else Assertion.affirmed
                found.append(Finding(match[0], assertion, match.span()))
            before = match[0]
        return found
