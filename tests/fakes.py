"""Stand-ins with answers that can be checked by eye: no downloads, no patches, no torch."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.filters import Filter, matches
from retrieval.types import (
    Assertion,
    Document,
    Encoded,
    Encodings,
    Finding,
    FindingsScore,
    Hit,
    Item,
    Matrix,
    Part,
    Ranking,
    Side,
    SpaceInfo,
)


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

    def as_queries(self, side: Side, vectors: Matrix) -> Matrix:
        return vectors


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


class MemoryIndex:
    """The laws of `retrieval.types.Snapshot` done the slow and obvious way: the oracle for every backend."""

    generation = 1

    def __init__(self, spaces: Mapping[str, SpaceInfo] | None = None) -> None:
        self.spaces: Mapping[str, SpaceInfo] = spaces or {}
        self.sequence = 0
        self._fresh: dict[str, tuple[Document, dict[tuple[str, Side], Matrix]]] = {}
        self._published: dict[str, tuple[Document, dict[tuple[str, Side], Matrix]]] = {}

    def snapshot(self) -> MemoryIndex:
        pinned = MemoryIndex(self.spaces)
        pinned.sequence = self.sequence
        pinned._published = self._published
        return pinned

    def add(self, documents: Sequence[Document], encodings: Encodings) -> None:
        for row, document in enumerate(documents):
            vectors = {
                key: matrix[list(rows).index(row)] for key, (rows, matrix) in encodings.items() if row in list(rows)
            }
            self._fresh[document.id] = (document, vectors)

    def remove(self, ids: Sequence[str]) -> int:
        return sum(self._fresh.pop(id, None) is not None for id in ids)

    def publish(self) -> None:
        self._published = dict(sorted(self._fresh.items()))
        self.sequence += 1

    def close(self) -> None:
        pass

    @property
    def sides(self) -> dict[tuple[str, Side], int]:
        return dict(Counter(key for _, vectors in self._published.values() for key in vectors))

    def __len__(self) -> int:
        return len(self._published)

    def fetch(self, ids: Sequence[str]) -> list[Document | None]:
        return [self._published[id][0] if id in self._published else None for id in ids]

    def image(self, id: str) -> bytes | None:
        return None

    def sample(self, n: int) -> list[str]:
        return list(self._published)[:: max(1, -(-len(self) // n))]

    def values(self, field: str, ids: Sequence[str]) -> list[Any]:
        out: list[Any] = []
        for id in ids:
            value: Any = self._published[id][0].meta
            for step in field.split("."):
                value = value.get(step) if isinstance(value, Mapping) else None
            out.append(value)
        return out

    def count(self, where: Filter | None = None) -> int:
        return len(self._allowed(where))

    def vectors(self, space: str, side: Side, ids: Sequence[str]) -> Encoded:
        held = [(row, self._published[id][1]) for row, id in enumerate(ids) if id in self._published]
        found = [(row, vectors[space, side]) for row, vectors in held if (space, side) in vectors]
        matrix = np.stack([v for _, v in found]) if found else np.zeros((0, self.spaces[space].dim), np.float32)
        return Encoded(np.array([row for row, _ in found], np.int64), matrix)

    def search_text(self, texts: Sequence[str], k: int, where: Filter | None = None) -> list[Ranking]:
        """Shared distinct words; not BM25, but lexical all the same."""
        scorer = OverlapScorer()
        documents = self._allowed(where)
        return [self._top(documents, scorer.score(Item(text=text), documents), k) for text in texts]

    def search_vectors(
        self,
        space: str,
        vectors: Matrix,
        k: int,
        where: Filter | None = None,
        sides: Sequence[Side] = ("text", "image"),
        exact: bool = False,
    ) -> list[Ranking]:
        out = []
        for vector in vectors:
            best: dict[str, float] = {}
            for document in self._allowed(where):
                held = [self._published[document.id][1].get((space, side)) for side in sides]
                scores = [float(v @ vector) for v in held if v is not None]
                if scores:
                    best[document.id] = max(scores)
            hits = sorted((Hit(id, score) for id, score in best.items()), key=lambda h: (-round(h.score, 6), h.id))
            out.append(Ranking(hits[:k]))
        return out

    def search_findings(
        self, parts: Sequence[Part], k: int, where: Filter | None, score: FindingsScore
    ) -> list[Ranking]:
        documents = self._allowed(where)
        postings = ListedPostings([document.findings for document in documents])
        return [self._top(documents, score(part, postings), k) if part.findings else Ranking() for part in parts]

    def describe(self) -> dict[str, Any]:
        return {"documents": len(self)}

    def _allowed(self, where: Filter | None) -> list[Document]:
        return [d for d, _ in self._published.values() if where is None or matches(where, d.meta)]

    def _top(self, documents: Sequence[Document], scores: Sequence[float] | NDArray[np.float32], k: int) -> Ranking:
        hits = (Hit(d.id, float(s)) for d, s in zip(documents, scores, strict=True) if s > 0)
        return Ranking(sorted(hits, key=lambda hit: (-round(hit.score, 6), hit.id))[:k])


class ListedPostings:
    """Postings over findings that are simply listed, one tuple per row."""

    def __init__(self, findings: Sequence[Sequence[Finding]]) -> None:
        self.size = len(findings)
        self._rows: dict[tuple[str, Assertion], list[int]] = {}
        for row, found in enumerate(findings):
            for key in dict.fromkeys((f.concept, f.assertion) for f in found):
                self._rows.setdefault(key, []).append(row)

    def concepts(self) -> Iterable[tuple[str, Assertion]]:
        return self._rows

    def rows(self, concept: str, assertion: Assertion) -> NDArray[np.int32]:
        return np.array(self._rows.get((concept, assertion), ()), np.int32)


def shared_concepts(part: Part, postings: Any) -> NDArray[np.float32]:
    """A findings score to check by eye: how many (concept, assertion) pairs of the part a row holds."""
    scores = np.zeros(postings.size, np.float32)
    for concept, assertion in dict.fromkeys((f.concept, f.assertion) for f in part.findings):
        scores[postings.rows(concept, assertion)] += 1
    return scores
