"""An ontology compiled for linking, kept in the cache folder: queries are linked from it without spaCy or torch.

The folder is named by the digest of everything it was made from, written beside its place and renamed into it, so a
half-built one is never seen; one that cannot be read is made again. JSON and plain numpy arrays, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from ontology import graph, trigrams
from ontology.facets import Facets, read_facets
from ontology.lexicon import Lexicon, compiled
from ontology.spelling import SHORTEST, shortened
from ontology.trigrams import Trigrams
from ontology.words import Vocabulary
from retrieval.errors import BackendError, Invalid

CHEST = Path(__file__).parent / "chest"
FORMAT = 11  # of the compiled tables: raise it when what they hold changes
GRAM, LETTERS = 3, 6  # words of a name that is looked for when misspelled, at most; its letters, at least
_ARRAYS = ("idf", "starts", "rows", "weights")


@dataclass(frozen=True)
class Tables:
    """What linking and scoring read.

    `names`, `types` and `parents` go by the numbers of `lexicon.concepts`; `known` are the stems of all names.
    """

    digest: str
    folder: Path
    names: list[str]
    types: list[list[str]]
    parents: list[list[int]]
    lexicon: Lexicon
    facets: Facets
    weights: dict[str, float]
    known: frozenset[str]

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {id: number for number, id in enumerate(self.lexicon.concepts)}

    @cached_property
    def trigrams(self) -> Trigrams:
        """Loaded when a word is first met that no name has."""
        # Mapped, but as plain arrays: every slice of a memmap costs microseconds.
        arrays = {name: np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS}
        return Trigrams(self._spellings["names"], self._spellings["grams"], **arrays)

    @cached_property
    def named(self) -> dict[str, int]:
        """Name as the trigram table spells it -> the number of the concept that the dictionary gives it."""
        return dict(zip(self.trigrams.names, self._spellings["concepts"], strict=True))

    @cached_property
    def trusted(self) -> frozenset[str]:
        """Those of these names that the most trusted source has."""
        return frozenset(name for name, ours in zip(self.named, self._spellings["trusted"], strict=True) if ours)

    @cached_property
    def own(self) -> frozenset[int]:
        """The concepts of the most trusted source, which say what the ontology is about."""
        return frozenset(self.named[name] for name in self.trusted)

    @cached_property
    def near(self) -> frozenset[str]:
        """What the words of trusted names are without any one letter: a word one slip away from one shares it."""
        words = {word for name in self.trusted for word in name.split() if len(word) >= SHORTEST}
        return frozenset(left for word in words for left in shortened(word))

    @cached_property
    def _spellings(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads((self.folder / "trigrams.json").read_text(encoding="utf-8")))


def load_tables(source: Path, cache: Path) -> Tables:
    """The compiled form of the ontology at `source`; compiled now where the cache does not have it.

    Raises NotFound and Invalid for what is no ontology, BackendError where the cache cannot be written.
    """
    digest = _digest(source)
    folder = cache / f"ontology-{digest[:16]}"
    try:
        return _read(folder, digest)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
    ontology = graph.load(source)
    try:
        _write(folder, source, ontology)
    except OSError as error:
        raise BackendError(f"the compiled ontology cannot be kept in the cache: {error.strerror}") from error
    return _read(folder, digest)


def words_file(source: Path) -> Path:
    own = source / "words.json"
    return own if own.is_file() else CHEST / "words.json"


def _digest(source: Path) -> str:
    found = hashlib.sha256(f"{FORMAT}".encode())
    for path in [*graph.files(source), words_file(source)]:
        found.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def _write(folder: Path, source: Path, ontology: graph.Ontology) -> None:
    vocabulary = Vocabulary.read(words_file(source))
    lexicon = compiled(ontology, vocabulary)
    facets = read_facets(source if source.is_dir() else CHEST, vocabulary)
    made = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    made.mkdir(parents=True)
    try:
        numbers = {id: number for number, id in enumerate(lexicon.concepts)}
        concepts = list(ontology.concepts.values())
        content = {
            "concepts": lexicon.concepts,
            "anatomy": sorted(lexicon.anatomy),
            "names": [concept.name for concept in concepts],
            "types": [concept.types for concept in concepts],
            "parents": [[numbers[parent] for parent in concept.parents] for concept in concepts],
            "tables": [lexicon.names, lexicon.lay, lexicon.normal],
            "facets": [[list(key), sorted(held)] for key, held in facets.words.items()],
            "definitions": [[c, sorted(held)] for c, held in facets.definitions if c in numbers],
            "weights": {concept: weight for concept, weight in _weights(source).items() if concept in numbers},
            "known": sorted(_stems(lexicon)),
            "words": json.loads(words_file(source).read_text(encoding="utf-8")),
        }
        _put(made / "lexicon.json", content)
        spelled = _spellings(ontology, lexicon)
        table = trigrams.fitted(list(spelled))
        trusted = _trusted(ontology)
        spellings = {
            "names": table.names,
            "concepts": list(spelled.values()),
            "trusted": [name in trusted for name in table.names],
            "grams": table.grams,
        }
        _put(made / "trigrams.json", spellings)
        for name in _ARRAYS:
            np.save(made / f"{name}.npy", getattr(table, name), allow_pickle=False)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "lexicon.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _trusted(ontology: graph.Ontology) -> set[str]:
    return {_plain(s.text) for c in ontology.concepts.values() for s in c.synonyms if not s.source}


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def _stems(lexicon: Lexicon) -> set[str]:
    """Stems that occur in some name, or have a part of their own in mentions."""
    vocabulary = lexicon.vocabulary
    stems = {
        s for table in (lexicon.names, lexicon.lay, lexicon.normal) for key in table for s in key.lstrip("=").split()
    }
    return stems | vocabulary.modifiers | vocabulary.coordinated | vocabulary.stop


def _weights(source: Path) -> dict[str, float]:
    """Concept -> weight from `weights.tsv`, if there; it overrules the weights by semantic type."""
    path = source / "weights.tsv"
    if not path.is_file():
        return {}
    try:
        pairs = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line]
        return {concept: float(weight) for concept, weight in pairs}
    except ValueError as error:
        raise Invalid("weights.tsv: expected a concept, a tab and a number in every line after the header") from error


def _spellings(ontology: graph.Ontology, lexicon: Lexicon) -> dict[str, int]:
    """Names of six letters and up to three words, in lower case, and the concept that the dictionary gives them.

    What is corrected is a run of as many words at most, so longer names would only make the tables larger.
    """
    names = dict.fromkeys(_plain(text) for concept in ontology.concepts.values() for text, _, _ in concept.synonyms)
    found = {}
    for name in names:
        words = lexicon.vocabulary.words(name)
        short = len(name) >= LETTERS and len(name.split()) <= GRAM
        mentions = lexicon.mentions(words, everyday=True) if short else []
        if len(mentions) == 1 and mentions[0].last - mentions[0].first + 1 == len(words) and not mentions[0].denies:
            found[name] = mentions[0].concept
    return found


def _put(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _read(folder: Path, digest: str) -> Tables:
    content = json.loads((folder / "lexicon.json").read_text(encoding="utf-8"))
    vocabulary = Vocabulary.of(content["words"])
    names, lay, normal = content["tables"]
    lexicon = Lexicon(vocabulary, content["concepts"], frozenset(content["anatomy"]), names, lay, normal)
    facets = Facets(
        {tuple(key): frozenset(held) for key, held in content["facets"]},
        [(concept, frozenset(held)) for concept, held in content["definitions"]],
    )
    lists = content["names"], content["types"], content["parents"]
    return Tables(digest, folder, *lists, lexicon, facets, content["weights"], frozenset(content["known"]))
