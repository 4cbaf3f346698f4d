"""One graph from several ontologies: one concept, one node.

Terms of different sources are one node where they share an id, name each other as cross-reference, or share a
UMLS CUI. Sources come in order of trust: the first that knows a concept gives it its id, its name and, if it has
any, its parents; all give synonyms. Two terms of one source never become one node, so that a careless
cross-reference cannot glue a chain of concepts together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ontology.sources import Synonym, Term, read, readable
from retrieval.errors import Invalid, NotFound


class Concept(NamedTuple):
    """A node.

    `synonyms` are all its names, the preferred ones with scope NAME; `parents` are ids of nodes (is-a), `wholes` of
    those that it is part of; `aliases` are the ids of its terms in all sources.
    """

    id: str
    name: str
    synonyms: tuple[Synonym, ...]
    parents: tuple[str, ...]
    wholes: tuple[str, ...]
    types: tuple[str, ...]
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Ontology:
    """Concepts by id, in the order of trust of their sources. Made by `merged`, which checks it."""

    concepts: Mapping[str, Concept]
    denials: Mapping[str, str] = field(default_factory=dict)  # phrase that states the normal -> concept it denies

    def __getitem__(self, id: str) -> Concept:
        """By its own id or by that of any of its terms. Raises NotFound."""
        try:
            return self.concepts[self._known[id]]
        except KeyError:
            raise NotFound(f"concept: got '{id}', which this ontology does not have") from None

    def __contains__(self, id: object) -> bool:
        return id in self._known

    def __len__(self) -> int:
        return len(self.concepts)

    @cached_property
    def _known(self) -> dict[str, str]:
        known = {alias: concept.id for concept in self.concepts.values() for alias in concept.aliases}
        return known | {id: id for id in self.concepts}

    def ancestors(self, id: str) -> dict[str, int]:
        """Every concept above, with its distance in is-a steps; the concept itself at 0.

        >>> tree = merged([[Term("a", "a"), Term("b", "b", is_a=("a",)), Term("c", "c", is_a=("b",))]])
        >>> tree.ancestors("c")
        {'c': 0, 'b': 1, 'a': 2}
        """
        found = {self[id].id: 0}
        level = list(found)
        while level:
            above = dict.fromkeys(p for node in level for p in self.concepts[node].parents if p not in found)
            distance = found[level[0]] + 1
            found |= dict.fromkeys(above, distance)
            level = list(above)
        return found

    def information(self, documents: Iterable[Iterable[str]]) -> dict[str, float]:
        """Information content in nats: -log of the share of documents that hold a concept or one below it.

        One is added to both counts, so that concepts that the corpus lacks have the highest, finite value.
        """
        counts: dict[str, int] = {}
        total = 0
        for concepts in documents:
            total += 1
            for id in {above for concept in concepts if concept in self for above in self.ancestors(concept)}:
                counts[id] = counts.get(id, 0) + 1
        return {id: -math.log((counts.get(id, 0) + 1) / (total + 1)) for id in self.concepts}


def merged(sources: Sequence[Sequence[Term]], denials: Mapping[str, str] | None = None) -> Ontology:
    """One ontology from several, in order of trust. Raises Invalid: duplicate id, missing parent, cycle."""
    for terms in sources:
        _check(terms)
    nodes = _joined([[_placed(term, at) for term in terms] for at, terms in enumerate(sources)])
    home = {term.id: at for at, members in enumerate(nodes) for term in members}
    ids = [members[0].id for members in nodes]
    concepts = {ids[at]: _concept(members, home, ids) for at, members in enumerate(nodes)}
    _refuse_cycles({id: concept.parents for id, concept in concepts.items()})
    for phrase, id in (denials or {}).items():
        if id not in concepts:
            raise Invalid(f"'{phrase}' denies '{id}', which this ontology does not have")
    return Ontology(concepts, denials or {})


def load(folder_or_file: Path) -> Ontology:
    """A file or a folder: UMLS tables, or ontologies in the order of trust that `sources.json` gives, else by name.

    An entry is {"files": [...]} with, if wanted, "root" (only what is below it), "types" (for terms without any).
    """
    manifest = folder_or_file / "sources.json"
    if not manifest.is_file():
        found = readable(folder_or_file) if folder_or_file.is_dir() else [folder_or_file]
        if not found:
            raise NotFound(f"ontology: got '{folder_or_file.name}' without any .obo, .json, .jsonl, .tsv or .RRF file")
        return merged([read(path) for path in found])
    try:
        listed = json.loads(manifest.read_text())
        sources = [_source(folder_or_file, entry) for entry in listed["sources"]]
        denials = _denials(folder_or_file / listed["denials"]) if "denials" in listed else {}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise Invalid(f"sources.json: {error!r}; expected {{'sources': [{{'files': [...]}}]}}") from error
    return merged(sources, denials)


def files(folder_or_file: Path) -> list[Path]:
    """Everything that the ontology is read from, for its digest."""
    if folder_or_file.is_file():
        return [folder_or_file]
    if not folder_or_file.is_dir():
        raise NotFound(f"ontology: got '{folder_or_file.name}', expected 'chest' or the path of a file or folder")
    return sorted(path for path in folder_or_file.iterdir() if path.is_file())


def _source(folder: Path, entry: Mapping[str, Any]) -> list[Term]:
    terms = _same_id([read(folder / name) for name in entry["files"]])
    if "root" in entry:
        terms = _below(terms, entry["root"])
    types = tuple(entry.get("types", ()))
    return [term if term.types else term._replace(types=types) for term in terms]


def _same_id(parts: Sequence[Sequence[Term]]) -> list[Term]:
    """Files of one source complete each other: later ones add synonyms and whatever a term lacks."""
    if len(parts) == 1:
        return list(parts[0])
    for part in parts:
        _refuse_twins(part)
    terms: dict[str, Term] = {}
    for term in (term for part in parts for term in part):
        old = terms.get(term.id)
        terms[term.id] = term if old is None else _completed(old, term)
    return list(terms.values())


def _completed(old: Term, new: Term) -> Term:
    names = old.synonyms + new.synonyms
    if new.name.lower() != old.name.lower():
        names += (Synonym(new.name),)
    return old._replace(
        synonyms=tuple(dict.fromkeys(names)),
        is_a=old.is_a or new.is_a,
        part_of=old.part_of or new.part_of,
        types=old.types or new.types,
        xrefs=tuple(dict.fromkeys(old.xrefs + new.xrefs)),
    )


def _below(terms: Sequence[Term], root: str) -> list[Term]:
    known = {term.id: term for term in terms}
    if root not in known:
        raise Invalid(f"root '{root}' is no term of its source")
    children: dict[str, list[str]] = {}
    for term in terms:
        for parent in term.is_a:
            children.setdefault(parent, []).append(term.id)
    kept, waiting = {root}, [root]
    while waiting:
        fresh = [child for child in children.get(waiting.pop(), ()) if child not in kept]
        kept.update(fresh)
        waiting += fresh
    return [_within(term, kept) for term in terms if term.id in kept]


def _within(term: Term, kept: set[str]) -> Term:
    return term._replace(is_a=tuple(p for p in term.is_a if p in kept))


def _denials(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    pairs = [line.split("\t") for line in lines if line]
    for number, pair in enumerate(pairs, 2):
        if len(pair) != 2:
            raise Invalid(f"{path.name}:{number}: expected a phrase, a tab and a concept")
    return {pair[0]: pair[1] for pair in pairs}


def _check(terms: Sequence[Term]) -> None:
    known = _refuse_twins(terms)
    families = {_prefix(id) for id in known}
    for term in terms:
        for parent in (*term.is_a, *term.part_of):
            if parent not in known and _prefix(parent) in families:
                raise Invalid(f"term '{term.id}' names the parent '{parent}', which is not there; add or remove it")
    _refuse_cycles({term.id: tuple(p for p in term.is_a if p in known) for term in terms})


def _refuse_twins(terms: Sequence[Term]) -> set[str]:
    known: set[str] = set()
    for term in terms:
        if term.id in known:
            raise Invalid(f"term '{term.id}' is there twice; keep one of them")
        known.add(term.id)
    return known


def _prefix(id: str) -> str:
    return id.split(":")[0] if ":" in id else id[:1]


def _refuse_cycles(parents: Mapping[str, Sequence[str]]) -> None:
    done: set[str] = set()
    for start in parents:
        path: dict[str, None] = {}
        stack = [(start, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                path.pop(node, None)
                done.add(node)
            elif node in path:
                ring = list(path)[list(path).index(node) :]
                raise Invalid(f"is-a cycle: {' -> '.join([*ring, node])}; remove one of these links")
            elif node not in done:
                path[node] = None
                stack.append((node, True))
                stack += [(parent, False) for parent in parents.get(node, ())]


def _joined(sources: Sequence[Sequence[Term]]) -> list[list[Term]]:
    """Groups of terms that are one concept, each in order of trust."""
    nodes: list[list[Term]] = []
    by_key: dict[str, list[int]] = {}
    for terms in sources:
        taken: set[int] = set()
        for term in terms:
            keys = [term.id, *map(_normal, term.xrefs)]
            votes: dict[int, int] = {}
            for key in keys:
                for at in by_key.get(key, ()):
                    votes[at] = votes.get(at, 0) + 1
            open_ = [at for at in votes if at not in taken]
            at = min(open_, key=lambda n: (-votes[n], n)) if open_ else len(nodes)
            if at == len(nodes):
                nodes.append([])
            nodes[at].append(term)
            taken.add(at)
        for at in taken:
            for key in _keys(nodes[at][-1]):
                if at not in by_key.setdefault(key, []):
                    by_key[key].append(at)
    return nodes


def _keys(term: Term) -> list[str]:
    return [term.id, *map(_normal, term.xrefs)]


def _normal(xref: str) -> str:
    return xref.replace("UMLS_CUI:", "UMLS:", 1)


def _placed(term: Term, source: int) -> Term:
    """The term with its name among the synonyms, each of which knows where it is from."""
    names = (Synonym(term.name, "NAME"), *term.synonyms)
    return term._replace(synonyms=tuple(synonym._replace(source=source) for synonym in names))


def _concept(members: Sequence[Term], home: Mapping[str, int], ids: Sequence[str]) -> Concept:
    first = members[0]
    unique: dict[str, Synonym] = {}
    for synonym in (s for term in members for s in term.synonyms):
        unique.setdefault(synonym.text.lower(), synonym)

    def linked(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        for group in groups:
            known = dict.fromkeys(ids[home[id]] for id in group if id in home and ids[home[id]] != first.id)
            if known:
                return tuple(known)
        return ()

    types = next((term.types for term in members if term.types), ())
    return Concept(
        first.id,
        first.name,
        tuple(unique.values()),
        linked(term.is_a for term in members),
        linked(term.part_of for term in members),
        types,
        tuple(term.id for term in members),
    )
