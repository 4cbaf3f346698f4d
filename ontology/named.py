"""Linkers by name that need weights which Lightbox does not ship: trained scispaCy models, SapBERT.

They find mentions or candidates in another way; concepts, assertions and everything behind them stay the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ontology.lexicon import Mention
from ontology.linker import Dictionary, Span
from ontology.pipeline import import_spacy
from ontology.tables import Tables
from ontology.trigrams import Candidate
from ontology.words import Word
from retrieval.errors import NotFound
from retrieval.types import Encoder, Finding, Item

NEAR = 0.7  # cosine of 3-grams from which a mention of a trained model takes a candidate's concept
SAPBERT_NEAR = 0.85  # cosine of SapBERT vectors


class Trained(Dictionary):
    """Mentions of a trained scispaCy model (`en_core_sci_sm` ...) beside those of the dictionary.

    A mention that the dictionary does not cover is linked to scispaCy's best candidate. Queries go by the tables.
    """

    def __init__(self, tables: Tables, model: str | Any) -> None:
        super().__init__(tables)
        self.model = _load(model) if isinstance(model, str) else model
        meta = self.model.meta
        made_by = f"{self.digest} {meta.get('name')} {meta.get('version')}"
        self.digest = hashlib.sha256(made_by.encode()).hexdigest()

    def link(self, texts: Sequence[str]) -> list[tuple[Finding, ...]]:
        """As `Dictionary.link`, with the model's entities added."""
        out = []
        for text, more in zip(texts, self.pipeline.abbreviations(texts, self._long_form), strict=True):
            spans = [*self._spans(text, self.pipeline.candidates), *more]
            out.append(self._findings(text, spans + self._entities(text, spans)))
        return out

    def _entities(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """The model's mentions outside the spans, each with its best candidate."""
        entities = [(e.start_char, e.end_char) for e in self.model(text).ents]
        free = [e for e in entities if not any(s.start < e[1] and e[0] < s.end for s in spans)]
        near = self.pipeline.candidates([text[start:end].lower() for start, end in free], 5)
        best = [(e, max(c, key=lambda pair: pair[1])) for e, c in zip(free, near, strict=True) if c]
        linked = [(e, self.tables.named[name]) for e, (name, cosine) in best if cosine >= NEAR]
        return [Span(*e, number) for e, number in linked if number not in self.tables.lexicon.anatomy]


class Neighbours(Dictionary):
    """Candidates from an encoder of names, such as SapBERT: nearest by cosine instead of by 3-grams.

    Linked are the words of a clause in which the dictionary finds nothing.
    """

    def __init__(self, tables: Tables, encoder: Encoder) -> None:
        super().__init__(tables)
        self.encoder = encoder
        self.names = list(tables.named)
        self.matrix = encoder.encode_documents([Item(text=name) for name in self.names])
        made_by = f"{self.digest} {sorted(encoder.digests.items())}"
        self.digest = hashlib.sha256(made_by.encode()).hexdigest()

    def nearest(self, texts: Sequence[str], k: int) -> list[list[Candidate]]:
        """The k nearest names of each text with their cosines, best first."""
        if not texts:
            return []
        cosines = self.encoder.encode_queries([Item(text=text) for text in texts]) @ self.matrix.T
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        return [[(self.names[n], float(row[n])) for n in best] for row, best in zip(cosines, order, strict=True)]

    def _meant(self, words: Sequence[Word], named: Sequence[Mention]) -> list[Mention]:
        found = super()._meant(words, named)
        if found or not words:
            return found
        near = self.nearest([" ".join(word.surface for word in words)], 1)[0]
        if near and near[0][1] >= SAPBERT_NEAR:
            number = self.tables.named[near[0][0]]
            if number not in self.tables.lexicon.anatomy:
                found.append(Mention(0, len(words) - 1, number))
        return found


def _load(name: str) -> Any:
    spacy = import_spacy()
    try:
        return spacy.load(name)
    except OSError as error:
        raise NotFound(f"ontology: the model '{name}' is not installed; install its wheel, or use 'chest'") from error
