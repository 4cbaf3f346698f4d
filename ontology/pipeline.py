"""spaCy and scispaCy over our tables. The one file that imports spaCy.

scispaCy's own index builder refuses newer scipy releases, so the 3-gram vectors are ours and the nmslib graph over
them is built here, with a degree that takes seconds instead of minutes at the same recall.
"""

from __future__ import annotations

import re
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ontology.tables import Tables
from ontology.trigrams import Candidate

if TYPE_CHECKING:
    from ontology.linker import Span

_EXPLAINED = re.compile(r"\w \((?!X+\))(?=[^()]*[A-Z])[\w-]{2,10}\)")
_PIECE = 10_000  # letters: the detector's effort grows with the square of a text
DEGREE, BREADTH, EFFORT = 16, 100, 200  # nmslib: M, efConstruction, efSearch


def import_spacy() -> Any:
    """spaCy without torch, which it would import where it is installed: seconds and a gigabyte for nothing.

    The entry that blocks it must go at once: scipy looks at it and breaks on None.
    """
    held = sys.modules.get("torch")
    if held is None:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import spacy
    finally:
        if held is None:
            del sys.modules["torch"]
    import scispacy.abbreviation  # noqa: F401  registers the detector; after the block, for it imports scipy

    return spacy


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """A text in pieces that end at white space, with their offsets."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1 or end
        yield start, text[start:end]
        start = end


class Pipeline:
    """Blank English with a sentence splitter and an abbreviation detector, and scispaCy's candidates."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        spacy = import_spacy()
        self.nlp = spacy.blank("en")
        self.nlp.add_pipe("sentencizer")
        self.nlp.add_pipe("abbreviation_detector")
        self.nlp.max_length = sys.maxsize  # nothing here needs memory in proportion to a document

    def abbreviations(self, texts: Sequence[str], concept: Callable[[str], int | None]) -> list[list[Span]]:
        """Places where an abbreviation stands that the text itself has explained."""
        from ontology.linker import Span

        found: list[list[Span]] = []
        for text in texts:
            spans: list[Span] = []
            for start, piece in _pieces(text) if _EXPLAINED.search(text) else ():
                for short in self.read(piece)._.abbreviations:
                    number = concept(short._.long_form.text)
                    if number is not None:
                        spans.append(Span(start + short.start_char, start + short.end_char, number))
            found.append(spans)
        return found

    def read(self, text: str) -> Any:
        """scispaCy's reading of a text: a spaCy document with sentences and abbreviations."""
        with warnings.catch_warnings():  # the detector's matcher is empty until it has met an abbreviation
            warnings.filterwarnings("ignore", message=r"\[W036\]")
            return self.nlp(text)

    def candidates(self, texts: Sequence[str], k: int) -> list[list[Candidate]]:
        """scispaCy's candidates as names with cosines, best first."""
        out = []
        for concepts in self.generator(list(texts), k):
            near = {n: s for c in concepts for n, s in zip(c.aliases, c.similarities, strict=True)}
            out.append(sorted(near.items(), key=lambda candidate: (-round(candidate[1], 5), candidate[0])))
        return out

    @cached_property
    def generator(self) -> Any:
        """`scispacy.candidate_generation.CandidateGenerator` over our names."""
        from scispacy.candidate_generation import CandidateGenerator
        from scispacy.linking_utils import Entity, KnowledgeBase

        table = self.tables.trigrams
        aliases: dict[str, list[str]] = {}
        for name, number in self.tables.named.items():
            aliases.setdefault(self.tables.lexicon.concepts[number], []).append(name)
        entities = [Entity(id, names[0], names, []) for id, names in aliases.items()]
        return CandidateGenerator(self._index(), self._vectorizer(), list(table.names), KnowledgeBase(entities))

    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        table = self.tables.trigrams
        vectorizer = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(3, 3), dtype=np.float32, vocabulary=dict(table.grams)
        )
        vectorizer.idf_ = np.asarray(table.idf)
        return vectorizer

    def _index(self) -> Any:
        import nmslib

        index = nmslib.init(method="hnsw", space="cosinesimil_sparse", data_type=nmslib.DataType.SPARSE_VECTOR)
        kept = self.tables.folder / f"nmslib-{DEGREE}-{BREADTH}.bin"
        index.addDataPointBatch(self.tables.trigrams.matrix())
        if kept.is_file():
            index.loadIndex(str(kept))
        else:
            index.createIndex({"M": DEGREE, "efConstruction": BREADTH, "post": 0}, print_progress=False)
            made = kept.with_name(f"{kept.name}.{uuid.uuid4().hex}")
            index.saveIndex(str(made))
            made.replace(kept)
        index.setQueryTimeParams({"efSearch": EFFORT})
        return index
