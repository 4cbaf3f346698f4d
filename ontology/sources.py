"""Readers of ontologies: OBO, OBO graphs and plain JSON, JSON lines, tables, lay synonyms and UMLS RRF.

Each reader gives a list of terms as its file states them; `ontology.graph` checks and joins them. Files may be
gzipped. Everything that a reader cannot make sense of is an `Invalid` with the file's name and the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from retrieval.errors import Invalid, NotFound

SCOPES = ("EXACT", "NARROW", "BROAD", "RELATED", "LAY")


class Synonym(NamedTuple):
    """Another name. scope: EXACT, NARROW, BROAD, RELATED, or LAY for everyday words (linked in queries only).

    source: place of its source in the order of trust, 0 for the most trusted.
    """

    text: str
    scope: str = "EXACT"
    source: int = 0


class Term(NamedTuple):
    """What one source says of one concept. xrefs: ids of the same concept elsewhere, ``UMLS:C0032227``."""

    id: str
    name: str
    synonyms: tuple[Synonym, ...] = ()
    is_a: tuple[str, ...] = ()
    part_of: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    xrefs: tuple[str, ...] = ()


def readable(folder: Path) -> list[Path]:
    """What there is to read in a folder: the folder itself if it holds UMLS tables, else its files, by name."""
    if (folder / "MRCONSO.RRF").is_file():
        return [folder]
    return sorted(path for path in folder.iterdir() if path.name.removesuffix(".gz").endswith(tuple(_READERS)))


def read(path: Path) -> list[Term]:
    """The terms of one file or RRF folder; the reader goes by the name. Raises NotFound and Invalid."""
    if path.is_dir():
        return read_umls(path)
    if not path.is_file():
        raise NotFound(f"ontology: got no file '{path.name}', expected .obo, .json, .jsonl, .tsv or an RRF folder")
    for ending, reader in _READERS.items():
        if path.name.removesuffix(".gz").endswith(ending):
            try:
                return reader(path)
            except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
                raise Invalid(f"{path.name}: not readable as UTF-8 text; export it again") from error
    raise Invalid(f"{path.name}: expected a name that ends in {', '.join(_READERS)} (or .gz), or an RRF folder")


def read_obo(path: Path) -> list[Term]:
    """OBO 1.2 or 1.4. Obsolete terms are left out; other stanzas than [Term] are skipped."""
    terms: list[Term] = []
    stanza: dict[str, list[str]] | None = None
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if line.startswith("["):
                _close(stanza, terms)
                stanza = {"line": [f"{path.name}:{number}"]} if line == "[Term]" else None
            elif stanza is not None and line and not line.startswith("!"):
                tag, colon, value = line.partition(":")
                if not colon:
                    raise Invalid(f"{path.name}:{number}: got a line without a tag, expected 'tag: value'")
                stanza.setdefault(tag, []).append(value.strip())
    _close(stanza, terms)
    if not terms:
        raise Invalid(f"{path.name}: no [Term] in it, expected an OBO file")
    return terms


_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*([A-Z]+)?')


def _close(stanza: dict[str, list[str]] | None, terms: list[Term]) -> None:
    if stanza is None or stanza.get("is_obsolete") == ["true"]:
        return
    if "id" not in stanza or "name" not in stanza:
        raise Invalid(f"{stanza['line'][0]}: a [Term] without id or name; add them or remove it")
    quoted = (_QUOTED.match(value) for value in stanza.get("synonym", ()))
    synonyms = tuple(Synonym(m[1].replace('\\"', '"'), _scope(m[2])) for m in quoted if m)
    part_of = [v.split()[1] for v in stanza.get("relationship", ()) if v.startswith("part_of ")]
    types = [m[1] for v in stanza.get("property_value", ()) if (m := re.match(r"semantic_type \"?(T\d{3})", v))]
    terms.append(
        Term(
            stanza["id"][0],
            stanza["name"][0],
            synonyms,
            tuple(value.split()[0] for value in stanza.get("is_a", ())),
            tuple(part_of),
            tuple(types),
            tuple(value.split()[0] for value in stanza.get("xref", ()) if value),
        )
    )


def _scope(text: str | None) -> str:
    return text if text in SCOPES else "RELATED"


def read_json(path: Path) -> list[Term]:
    """OBO graphs (obographs JSON), or a list of objects with id, name, synonyms and xrefs."""
    with _opened(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise Invalid(f"{path.name}:{error.lineno}: not JSON ({error.msg})") from error
    if isinstance(content, list):
        return [_plain(entry, f"{path.name}[{n}]") for n, entry in enumerate(content)]
    if isinstance(content, dict) and isinstance(content.get("graphs"), list):
        try:
            return [term for graph in content["graphs"] for term in _graph(graph)]
        except (KeyError, TypeError, AttributeError) as error:
            raise Invalid(f"{path.name}: not an OBO graph (missing or wrong {error}); export it again") from error
    raise Invalid(f"{path.name}: expected a list of terms, or an object with 'graphs'")


def _graph(graph: dict[str, Any]) -> Iterator[Term]:
    parents: dict[str, dict[str, list[str]]] = {}
    for edge in graph.get("edges", ()):
        kind = {"is_a": "is_a", "part_of": "part_of", "BFO_0000050": "part_of"}.get(_local(edge["pred"]))
        if kind:
            parents.setdefault(edge["sub"], {}).setdefault(kind, []).append(_curie(edge["obj"]))
    for node in graph.get("nodes", ()):
        meta = node.get("meta") or {}
        if node.get("type", "CLASS") != "CLASS" or meta.get("deprecated") or not node.get("lbl"):
            continue
        above = parents.get(node["id"], {})
        yield Term(
            _curie(node["id"]),
            node["lbl"],
            tuple(Synonym(s["val"], _scope(s["pred"][3:-7].upper())) for s in meta.get("synonyms", ())),
            tuple(above.get("is_a", ())),
            tuple(above.get("part_of", ())),
            xrefs=tuple(xref["val"] for xref in meta.get("xrefs", ())),
        )


def _local(iri: str) -> str:
    return re.split(r"[/#]", iri)[-1]


def _curie(iri: str) -> str:
    return _local(iri).replace("_", ":", 1) if "/" in iri else iri


def read_jsonl(path: Path) -> list[Term]:
    """One object a line: id, name, synonyms, parents or is_a, part_of, types, umls, xrefs or exact."""
    terms = []
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    raise Invalid(f"{path.name}:{number}: not JSON ({error.msg})") from error
                terms.append(_plain(entry, f"{path.name}:{number}"))
    return [term for term in terms if not term.name.startswith("obsolete ")]


def _plain(entry: Any, where: str) -> Term:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or not isinstance(entry.get("name"), str):
        raise Invalid(f"{where}: expected an object with 'id' and 'name'")
    try:
        synonyms = [
            Synonym(s) if isinstance(s, str) else Synonym(s["text"], s["scope"]) for s in _all(entry, "synonyms")
        ]
        return Term(
            entry["id"],
            entry["name"],
            tuple(synonyms),
            (*_all(entry, "parents"), *_all(entry, "is_a")),
            tuple(_all(entry, "part_of")),
            tuple(_all(entry, "types")),
            (*(f"UMLS:{cui}" for cui in _all(entry, "umls")), *_all(entry, "xrefs"), *_all(entry, "exact")),
        )
    except (KeyError, TypeError) as error:
        raise Invalid(
            f"{where}: synonyms, parents and xrefs must be lists; a synonym is a string or text and scope"
        ) from error


def _all(entry: dict[str, Any], key: str) -> list[Any]:
    value = entry.get(key) or []
    if not isinstance(value, list):
        raise TypeError(key)
    return value


def read_table(path: Path) -> list[Term]:
    """Tab-separated with a header: id, name, types, is_a, part_of, xrefs (commas), synonyms, everyday (bars).

    A table of HPO's lay synonyms (?term, ?term_label, ?layperson) is read too.
    """
    with _opened(path) as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(rows, [])
        if header == ["?term", "?term_label", "?layperson"]:
            return _by_term(_lay(row, f"{path.name}:{number}") for number, row in enumerate(rows, 2))
        missing = {"id", "name"} - set(header)
        if missing:
            raise Invalid(f"{path.name}:1: the header lacks {', '.join(sorted(missing))}")
        return [_row(header, row, f"{path.name}:{number}") for number, row in enumerate(rows, 2) if row]


def _by_term(terms: Iterable[Term]) -> list[Term]:
    """HPO's table has a line for each synonym."""
    found: dict[str, Term] = {}
    for term in terms:
        old = found.get(term.id, term)
        found[term.id] = old._replace(synonyms=tuple(dict.fromkeys(old.synonyms + term.synonyms)))
    return list(found.values())


def _lay(row: list[str], where: str) -> Term:
    if len(row) != 3:
        raise Invalid(f"{where}: got {len(row)} columns, expected 3")
    label, lay = (cell.strip('"') for cell in row[1:])
    return Term(_curie(row[0].strip("<>")), label, (Synonym(lay, "LAY"),))


def _row(header: list[str], row: list[str], where: str) -> Term:
    if len(row) != len(header):
        raise Invalid(f"{where}: got {len(row)} columns, expected the header's {len(header)}")
    cells = dict(zip(header, row))

    def several(column: str, sign: str) -> tuple[str, ...]:
        return tuple(part for cell in cells.get(column, "").split(sign) if (part := cell.strip()))

    names = [Synonym(text) for text in several("synonyms", "|")]
    names += [Synonym(text, "LAY") for text in several("everyday", "|")]
    return Term(
        cells["id"],
        cells["name"],
        tuple(names),
        several("is_a", ","),
        several("part_of", ","),
        several("types", ","),
        several("xrefs", ","),
    )


def read_umls(folder: Path) -> list[Term]:
    """A licensed UMLS subset: MRCONSO.RRF, and MRSTY.RRF and MRREL.RRF where they are there. English, not suppressed.

    MRREL reads "CUI2 has relation REL to CUI1": PAR gives CUI1 the parent CUI2, CHD the reverse; SY is left to
    the synonyms. RB and RN (broader, narrower) are no hierarchy and are left out, as is PAR where it would close a
    cycle: UMLS holds such cycles between vocabularies.
    """
    names: dict[str, list[tuple[bool, str]]] = {}
    for cells in _rrf(folder / "MRCONSO.RRF", 18):
        if cells[1] == "ENG" and cells[16] == "N":
            preferred = cells[2] == "P" and cells[4] == "PF" and cells[6] == "Y"
            names.setdefault(cells[0], []).append((not preferred, cells[14]))
    if not names:
        raise Invalid("MRCONSO.RRF: no English name in it, expected the UMLS's tables")
    types: dict[str, list[str]] = {}
    for cells in _rrf(folder / "MRSTY.RRF", 6, required=False):
        types.setdefault(cells[0], []).append(cells[1])
    parents = _umls_parents(folder, names)
    return [_umls_term(cui, sorted(found), types, parents) for cui, found in names.items()]


def _umls_term(
    cui: str, found: list[tuple[bool, str]], types: dict[str, list[str]], parents: dict[str, list[str]]
) -> Term:
    texts = list(dict.fromkeys(text for _, text in found))
    return Term(
        cui,
        texts[0],
        tuple(map(Synonym, texts[1:])),
        tuple(parents.get(cui, ())),
        types=tuple(types.get(cui, ())),
        xrefs=(f"UMLS:{cui}",),
    )


def _umls_parents(folder: Path, names: dict[str, list[tuple[bool, str]]]) -> dict[str, list[str]]:
    parents: dict[str, list[str]] = {}
    for cells in _rrf(folder / "MRREL.RRF", 16, required=False):
        first, relation, second = cells[0], cells[3], cells[4]
        child, parent = (first, second) if relation == "PAR" else (second, first)
        known = relation in ("PAR", "CHD") and child in names and parent in names
        if known and parent not in parents.get(child, ()) and not _reaches(parent, child, parents):
            parents.setdefault(child, []).append(parent)
    return parents


def _reaches(start: str, goal: str, parents: dict[str, list[str]]) -> bool:
    seen, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        if node == goal:
            return True
        fresh = set(parents.get(node, ())) - seen
        seen |= fresh
        waiting += fresh
    return False


def _rrf(path: Path, columns: int, required: bool = True) -> Iterator[list[str]]:
    if not path.is_file():
        if required:
            raise NotFound(f"UMLS folder: got no {path.name}, expected MRCONSO.RRF (and MRSTY.RRF, MRREL.RRF)")
        return
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("|")
            if len(cells) != columns + 1 or cells[-1] or not re.fullmatch(r"C\d{7}", cells[0]):
                raise Invalid(
                    f"{path.name}:{number}: a broken line, expected a CUI and {columns} columns, each closed by '|'"
                )
            yield cells


def _opened(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


_READERS: dict[str, Callable[[Path], list[Term]]] = {
    ".obo": read_obo,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".tsv": read_table,
}
