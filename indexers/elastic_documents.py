"""What Elasticsearch is told: documents as entries, the mapping of their fields, and filters as queries.

Nothing of a source decides the mapping, so no source can break it. Metadata become keyword tokens, one for every
value at every dotted path: ``"year"n`` and a number written so that text order is number order, ``"view"t`` and a
text. Equality is then a term, an ordering a range of terms, and what they mean is what `retrieval.filters.matches`
means, whatever mixture of kinds a field holds. Words arrive as the tokens of `retrieval.analysis`, joined by blanks.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexers.embedded import check_document
from indexers.records import Record
from indexers.specs import Spec, parse_spec
from retrieval import analysis
from retrieval.errors import Invalid, TooLarge
from retrieval.filters import And, Compare, Exists, Filter, In, Not, Or, Scalar, kind
from retrieval.types import Document, Encodings, Side, SpaceInfo, Vector

Json = dict[str, Any]
Key = tuple[str, Side]

STATE_ID = "lightbox:state"  # the entry that holds the published sequence; no document
MAX_ID_BYTES = 512  # of an entry's name in Elasticsearch
MAX_DIM = 4_096  # of a dense_vector
MAX_VALUE_BYTES = 8_000  # of a text in a token: Lucene refuses terms over 32,766 bytes
MAX_LEVELS = 24  # of nested conditions: Elasticsearch refuses more than 30 levels of bool
ORIGINAL = ["id", "title", "text", "meta", "findings", "picture", "path"]  # what a document is read from
SLOTS = 1 << 16  # a document's slot is a hash: equal shares of a collection, and samples of it
_MOST_QUERY_WORDS = 1_000  # distinct ones; Lucene refuses more than 1,024 clauses
_FIELD = re.compile(r"[^A-Za-z0-9_-]")

# What the common names are here. The second: candidates per result that are rescored on float32 vectors.
KINDS: Mapping[str, tuple[str, float]] = {
    "flat": ("flat", 0.0),
    "hnsw": ("hnsw", 0.0),
    "hnsw-sq8": ("int8_hnsw", 2.0),
    "hnsw-sq4": ("int4_hnsw", 4.0),
    "hnsw-bin": ("bbq_hnsw", 8.0),
}
_LINKS, _EF_BUILD = 32, 100  # as the embedded graphs are built


def spec_of(vector_index: str) -> Spec:
    """A parsed spec that Elasticsearch has; Invalid with the list of those otherwise."""
    spec = parse_spec(vector_index) if vector_index.partition(":")[0] in KINDS else Spec(vector_index)
    if spec.kind not in KINDS:
        raise Invalid(
            f"no vector index '{vector_index}' on Elasticsearch; there are {', '.join(KINDS)}", "vector_index"
        )
    return spec


# --- the mapping -----------------------------------------------------------------------------------


def vector_field(key: Key) -> str:
    """The indexed vectors of a side of a space."""
    return f"vector_{_FIELD.sub('_', key[0])}_{key[1]}"


def keys_of(spaces: Mapping[str, SpaceInfo]) -> list[Key]:
    return [(info.name, side) for info in spaces.values() for side in info.digests]


def mapping(about: Json, spaces: Mapping[str, SpaceInfo], vector_index: str) -> Json:
    """The explicit mapping of a generation; `about` is kept in it.

    Entries are stored whole: what is left out of them, Elasticsearch keeps a second time for its copies.
    """
    spec = spec_of(vector_index)
    properties: Json = {
        "id": {"type": "keyword"},
        "slot": {"type": "integer"},
        "body": {"type": "text", "analyzer": "whitespace", "index_options": "freqs"},
        "tokens": {"type": "keyword", "doc_values": False},
        "concepts": {"type": "keyword"},
    }
    for key in keys_of(spaces):
        dim = spaces[key[0]].dim
        check_dim(spec, dim)
        properties[vector_field(key)] = {
            "type": "dense_vector",
            "dims": dim,
            "similarity": "max_inner_product",  # dot_product refuses lengths that float16 towers give
            "index_options": _index_options(spec),
        }
    return {
        "dynamic": False,
        "_meta": {"lightbox": about},
        "properties": properties,
    }


def check_dim(spec: Spec, dim: int) -> None:
    """Invalid where Elasticsearch cannot hold vectors of `dim` dimensions so."""
    if dim > MAX_DIM:
        raise Invalid(f"vectors of {dim} dimensions: Elasticsearch holds at most {MAX_DIM}", "text_encoder")
    if spec.kind == "hnsw-sq4" and dim % 2:
        raise Invalid(f"hnsw-sq4 needs an even dimension on Elasticsearch, got {dim}", "vector_index")
    if spec.kind == "hnsw-bin" and dim < 64:
        raise Invalid(f"hnsw-bin needs at least 64 dimensions on Elasticsearch, got {dim}", "vector_index")


def _index_options(spec: Spec) -> Json:
    name = KINDS[spec.kind][0]
    return {"type": name} if spec.kind == "flat" else {"type": name, "m": _LINKS, "ef_construction": _EF_BUILD}


# --- documents -------------------------------------------------------------------------------------


def check_entry(document: Document) -> None:
    """Invalid, or TooLarge with the limit, where a document cannot be held here."""
    check_document(document)
    size = len(document.id.encode())
    if size > MAX_ID_BYTES or document.id == STATE_ID:
        raise TooLarge(f"document {document.id!a:.80}: its id has {size} bytes, Elasticsearch takes {MAX_ID_BYTES}")


def entry(document: Document, vectors: Mapping[Key, Vector], source: str | None = None) -> Json:
    """A document as it is sent. source: digest of what it was made from, for builds that go on."""
    record = Record.of(0, document, source=source)
    said = sorted({f"{finding.assertion}:{finding.concept}" for finding in document.findings})
    made: Json = {
        "id": document.id,
        "title": document.title,
        "text": document.text,
        "meta": record.meta,
        "findings": record.findings,
        "picture": record.picture,
        "path": record.path,
        "source": source,
        "slot": slot(document.id),
        "body": " ".join(analysis.tokens(document.content)) or None,  # without words it must not count in averages
        "tokens": sorted(set(_tokens(document.meta))),
        "concepts": said,
    }
    for key, vector in vectors.items():
        made[vector_field(key)] = np.asarray(vector, np.float32)
    return made


def written(made: Json) -> bytes:
    """An entry as JSON. Nine digits name a float32; Python would write seventeen."""
    plain = {name: value for name, value in made.items() if not isinstance(value, np.ndarray)}
    text = json.dumps(plain)
    for name, row in made.items():
        if isinstance(row, np.ndarray):
            numbers = (",%.9g" * len(row)) % tuple(row.tolist())
            text = f'{text[:-1]},"{name}":[{numbers[1:]}]}}'
    return text.encode()


def per_document(encodings: Encodings, documents: int) -> list[dict[Key, Vector]]:
    """The vectors of a batch, by document."""
    out: list[dict[Key, Vector]] = [{} for _ in range(documents)]
    for key, (rows, matrix) in encodings.items():
        for row, vector in zip(rows.tolist(), matrix, strict=True):
            out[row][key] = vector
    return out


def document_of(source: Json) -> Document:
    """The document that an entry was made from; its picture comes without pixels."""
    return Record(0, *(source[name] for name in ORIGINAL)).document()


def vectors_of(source: Json, keys: Sequence[Key]) -> dict[Key, Vector]:
    """The vectors of an entry, bit by bit as they were given."""
    fields = {key: source.get(vector_field(key)) for key in keys}
    return {key: np.array(values, np.float32) for key, values in fields.items() if values is not None}


def slot(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=2).digest(), "little")


def known(ids: Sequence[str]) -> list[str]:
    """Those of `ids`, each once, that could be a document's."""
    return [id for id in dict.fromkeys(ids) if _is_id(id)]


def _is_id(id: str) -> bool:
    return _is_text(id) and 0 < len(id.encode()) <= MAX_ID_BYTES and id != STATE_ID


def _is_text(value: Any) -> bool:
    """False for texts with lone surrogates, which UTF-8 cannot hold and no filter can name."""
    try:
        return not isinstance(value, str) or bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


# --- metadata as tokens ----------------------------------------------------------------------------

_TEXT, _NUMBER, _BOOL, _PRESENT = "t", "n", "b", "e"
_LETTER = {"text": _TEXT, "number": _NUMBER, "bool": _BOOL}


def _tokens(meta: Mapping[str, Any]) -> Iterator[str]:
    stack: list[tuple[str, Any]] = [("", meta)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, Mapping):
            prefix = f"{path}." if path else ""  # a key with an empty part between dots cannot be named by a filter
            stack.extend((prefix + key, below) for key, below in node.items() if all(key.split(".")))
        elif isinstance(node, list | tuple):
            stack.extend((path, below) for below in node)
        elif node is not None:
            place = _place(path)
            if len(place) <= MAX_VALUE_BYTES:  # no filter is so long
                yield place + _PRESENT
                if node == node and _is_text(node):  # NaN is there, but equal to nothing
                    yield place + _LETTER[kind(node)] + _written_value(node)


def _place(path: str) -> str:
    """Quoted as JSON, so that no path is the beginning of another."""
    return json.dumps(path)


def _written_value(value: Scalar) -> str:
    if isinstance(value, str):
        return _short(value)
    if isinstance(value, bool):
        return str(int(value))
    return _sortable(value or 0)


def _short(text: str) -> str:
    """Texts over the limit keep their beginning, for order, and a digest, for equality."""
    content = text.encode()
    if len(content) <= MAX_VALUE_BYTES:
        return text
    return content[:MAX_VALUE_BYTES].decode(errors="ignore") + hashlib.sha256(content).hexdigest()


def _sortable(number: int | float) -> str:
    """A number as text, in the order of values: its nearest float, then how far it is from that."""
    try:
        near = float(number)
    except OverflowError:
        near = float("inf") if number > 0 else float("-inf")
    bits = struct.unpack(">Q", struct.pack(">d", near + 0.0))[0]
    ordered = bits ^ (0xFFFF_FFFF_FFFF_FFFF if bits >> 63 else 1 << 63)
    rest = 0
    if isinstance(number, int):
        rest = number - int(near) if abs(near) < float("inf") else (-1 if number > 0 else 1)
    return f"{ordered:016x}{min(max(rest, -(2**62)), 2**62) + 2**63:016x}"


# --- queries ---------------------------------------------------------------------------------------


def documents(where: Filter | None) -> Json:
    """All documents that a filter lets through; the entry that holds the state is none."""
    return {"bool": {"filter": [{"exists": {"field": "id"}}, *filtered(where)]}}


def filtered(where: Filter | None) -> list[Json]:
    """A filter as the clauses of a query that only documents meet anyway."""
    return [] if where is None else [clause(where)]


def clause(where: Filter, level: int = 1) -> Json:
    """A filter as a query that scores nothing; Invalid where it is nested deeper than Elasticsearch takes."""
    if level > MAX_LEVELS:
        raise Invalid(f"where: nested deeper than the {MAX_LEVELS} levels that Elasticsearch takes", "where")
    match where:
        case And(children):
            return {"bool": {"filter": [clause(child, level + 1) for child in children]}}
        case Or(children):
            return {"bool": {"should": [clause(c, level + 1) for c in children], "minimum_should_match": 1}}
        case Not(child):
            return _without(clause(child, level + 1))
        case Exists(path, present):
            there = _term(_place(path) + _PRESENT)
            return there if present else _without(there)
        case In(path, values):
            return _among(path, values)
        case Compare(path, "eq", value):
            return _among(path, (value,))
        case Compare(path, op, value):
            return _ordered(path, op, value)


def _term(token: str) -> Json:
    return {"term": {"tokens": token}}


def _without(query: Json) -> Json:
    return {"bool": {"must_not": [query]}}


def _among(path: str, values: Sequence[Scalar]) -> Json:
    place = _place(path)
    tokens = [place + _LETTER[kind(v)] + _written_value(v) for v in values if v is not None]
    equal: Json = {"terms": {"tokens": tokens}}
    if None not in values:
        return equal
    missing = _without(_term(place + _PRESENT))
    return {"bool": {"should": [equal, missing], "minimum_should_match": 1}} if tokens else missing


def _ordered(path: str, op: str, value: Scalar) -> Json:
    letter = _LETTER[kind(value)]
    first, beyond = _place(path) + letter, _place(path) + chr(ord(letter) + 1)
    bound = first + _written_value(value)
    ends = {op: bound, "lt": beyond} if op.startswith("g") else {"gte": first, op: bound}
    return {"range": {"tokens": ends}}


def words(counts: Mapping[str, int], where: Filter | None) -> Json:
    """BM25 over tokens that are wanted so many times."""
    most = sorted(counts.items(), key=lambda item: -item[1])[:_MOST_QUERY_WORDS]
    terms = [{"term": {"body": {"value": token, "boost": times}}} for token, times in most]
    return {"bool": {"should": terms, "minimum_should_match": 1, "filter": filtered(where)}}


def inner_products(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """What Elasticsearch made positive, undone: it reports 1 + x for x from 0, and 1 / (1 - x) below."""
    return np.where(scores >= 1, scores - 1, 1 - 1 / np.maximum(scores, np.finfo(np.float64).tiny))
