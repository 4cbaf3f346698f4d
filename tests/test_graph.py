"""Readers of ontologies and the graph that joins them."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from ontology import graph
from ontology.sources import Synonym, Term, read
from retrieval.errors import Invalid, NotFound

OBO = """format-version: 1.2

[Term]
id: X:1
name: finding

[Term]
id: X:2
name: effusion
synonym: "pleural fluid" EXACT []
synonym: "water" RELATED LAY []
xref: UMLS:C0032227 "Pleural effusion"
is_a: X:1 ! finding
relationship: part_of X:1

[Term]
id: X:3
name: gone
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def names(terms: list[Term]) -> dict[str, str]:
    return {term.id: term.name for term in terms}


def test_obo_gives_synonyms_with_scope_parents_and_cross_references(tmp_path: Path) -> None:
    first, second = read(write(tmp_path, "x.obo", OBO))
    assert first == Term("X:1", "finding")
    assert second.synonyms == (Synonym("pleural fluid"), Synonym("water", "RELATED"))
    assert (second.is_a, second.part_of, second.xrefs) == (("X:1",), ("X:1",), ("UMLS:C0032227",))


def test_files_may_be_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "x.obo.gz"
    path.write_bytes(gzip.compress(OBO.encode()))
    assert names(read(path)) == {"X:1": "finding", "X:2": "effusion"}


def test_an_obo_graph_is_read(tmp_path: Path) -> None:
    iri = "http://purl.obolibrary.org/obo/X_"
    meta = {"synonyms": [{"pred": "hasExactSynonym", "val": "pleural fluid"}], "xrefs": [{"val": "UMLS:C0032227"}]}
    nodes = [
        {"id": f"{iri}1", "type": "CLASS", "lbl": "finding"},
        {"id": f"{iri}3", "type": "CLASS", "lbl": "old", "meta": {"deprecated": True}},
        {"id": f"{iri}2", "type": "CLASS", "lbl": "effusion", "meta": meta},
    ]
    edges = [{"sub": f"{iri}2", "pred": "is_a", "obj": f"{iri}1"}]
    path = write(tmp_path, "x.json", json.dumps({"graphs": [{"nodes": nodes, "edges": edges}]}))
    assert read(path) == [
        Term("X:1", "finding"),
        Term("X:2", "effusion", (Synonym("pleural fluid"),), ("X:1",), xrefs=("UMLS:C0032227",)),
    ]


def test_json_lines_of_the_data_folders_are_read(tmp_path: Path) -> None:
    line = {
        "id": "D:1",
        "name": "pneumonia",
        "synonyms": [{"text": "lung infection", "scope": "BROAD"}],
        "umls": ["C1"],
    }
    line |= {"parents": [], "exact": ["DOID:552"]}
    (term,) = read(write(tmp_path, "terms.jsonl", json.dumps(line) + "\n\n"))
    assert term.synonyms == (Synonym("lung infection", "BROAD"),)
    assert term.xrefs == ("UMLS:C1", "DOID:552")


CONSO = "C{n:07d}|ENG|{pref}|L1|PF|S1|Y|A1||||X|PT|1|{name}|0|N||\n"


def test_umls_tables_give_names_types_and_parents(tmp_path: Path) -> None:
    rows = [CONSO.format(n=1, pref="S", name="pleural fluid"), CONSO.format(n=1, pref="P", name="Effusion")]
    rows += [CONSO.format(n=2, pref="P", name="Finding"), "C0000001|FRE|P|L1|PF|S1|Y|A1||||X|PT|1|Epanchement|0|N||\n"]
    write(tmp_path, "MRCONSO.RRF", "".join(rows))
    write(tmp_path, "MRSTY.RRF", "C0000001|T047|B2.2.1.2.1|Disease or Syndrome|AT1|256|\n")
    relation = "C000000{0}|A1|CUI|{1}|C000000{2}|A2|CUI||R1||X|X||Y|N||\n"
    write(
        tmp_path,
        "MRREL.RRF",
        relation.format(1, "PAR", 2) + relation.format(2, "PAR", 1) + relation.format(1, "SY", 2),
    )
    first, second = read(tmp_path)
    assert (first.name, first.synonyms, first.types) == ("Effusion", (Synonym("pleural fluid"),), ("T047",))
    assert first.is_a == ("C0000002",)
    assert second.is_a == (), "a cycle between vocabularies is left open"
    assert len(graph.load(tmp_path)) == 2


def test_a_broken_rrf_line_is_named_and_not_shown(tmp_path: Path) -> None:
    write(tmp_path, "MRCONSO.RRF", CONSO.format(n=1, pref="P", name="Effusion") + "C0000002|ENG|secret\n")
    with pytest.raises(Invalid, match=r"MRCONSO\.RRF:2") as error:
        read(tmp_path)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.obo", "[Term]\nid: X:1\n"),
        ("x.obo", "[Term]\nid: X:1\nname: a\nrubbish\n"),
        ("x.obo", "no term at all: 1\n"),
        ("x.json", "{"),
        ("x.json", "3"),
        ("x.json", '{"graphs": [{"nodes": [{"lbl": "a"}]}]}'),
        ("x.json", '[{"id": "a"}]'),
        ("x.jsonl", '{"id": "a", "name": "a", "synonyms": "b"}\n'),
        ("x.jsonl", '{"id": "a", "name": "a", "synonyms": [3]}\n'),
        ("x.tsv", "id\n"),
        ("x.tsv", "id\tname\na\n"),
        ("x.txt", "a"),
    ],
)
def test_what_is_no_ontology_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(Invalid):
        read(write(tmp_path, name, text))


def test_bytes_that_are_no_text_and_absent_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.obo"
    path.write_bytes(b"[Term]\nid: \xff\xfe\n")
    with pytest.raises(Invalid, match="UTF-8"):
        read(path)
    (tmp_path / "y.obo.gz").write_bytes(b"no gzip")
    with pytest.raises(Invalid):
        read(tmp_path / "y.obo.gz")
    with pytest.raises(NotFound):
        read(tmp_path / "z.obo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound):
        graph.load(tmp_path / "empty")


def test_one_concept_has_one_node_across_sources() -> None:
    ours = [Term("o:1", "pleural effusion", xrefs=("UMLS:C0032227",))]
    hpo = [Term("HP:1", "Effusion of pleura", xrefs=("UMLS_CUI:C0032227",)), Term("HP:2", "Other")]
    joined = graph.merged([ours, hpo])
    assert list(joined.concepts) == ["o:1", "HP:2"]
    assert joined["HP:1"].id == "o:1"
    assert [(s.text, s.source) for s in joined["o:1"].synonyms] == [("pleural effusion", 0), ("Effusion of pleura", 1)]


def test_two_terms_of_one_source_never_become_one() -> None:
    twins = [Term("a:1", "left", xrefs=("UMLS:C1",)), Term("a:2", "right", xrefs=("UMLS:C1",))]
    other = [Term("b:1", "bridge", xrefs=("UMLS:C1",)), Term("b:2", "second bridge", xrefs=("UMLS:C1",))]
    assert [concept.aliases for concept in graph.merged([twins, other]).concepts.values()] == [
        ("a:1", "b:1"),
        ("a:2", "b:2"),
    ]


def test_the_first_source_with_parents_decides_them() -> None:
    ours = [Term("o:1", "top"), Term("o:2", "effusion", is_a=("o:1",), xrefs=("HP:2",))]
    hpo = [Term("HP:1", "other top"), Term("HP:2", "Effusion", is_a=("HP:1",))]
    assert graph.merged([ours, hpo])["o:2"].parents == ("o:1",)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([Term("a:1", "x"), Term("a:1", "y")], "twice"),
        ([Term("a:1", "x", is_a=("a:9",))], "a:9"),
        ([Term("a:1", "x", part_of=("a:9",))], "a:9"),
        ([Term("a:1", "x", is_a=("a:2",)), Term("a:2", "y", is_a=("a:1",))], "cycle: a:1 -> a:2 -> a:1"),
        ([Term("a:1", "x", is_a=("a:1",))], "cycle"),
    ],
)
def test_faults_of_an_ontology_are_named(terms: list[Term], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        graph.merged([terms])


def test_a_long_chain_is_no_recursion() -> None:
    chain = [Term(f"a:{n}", str(n), is_a=(f"a:{n + 1}",)) for n in range(5000)] + [Term("a:5000", "top")]
    assert graph.merged([chain]).ancestors("a:0")["a:5000"] == 5000


def test_ancestors_take_the_shortest_way() -> None:
    diamond = [Term("a:1", "top"), Term("a:2", "mid", is_a=("a:1",)), Term("a:3", "low", is_a=("a:2", "a:1"))]
    assert graph.merged([diamond]).ancestors("a:3") == {"a:3": 0, "a:2": 1, "a:1": 1}


def test_information_counts_what_is_below() -> None:
    tree = graph.merged([[Term("a:1", "top"), Term("a:2", "low", is_a=("a:1",)), Term("a:3", "never", is_a=("a:1",))]])
    information = tree.information([["a:2"], ["a:1"], ["unknown"]])
    assert information["a:1"] == pytest.approx(-math.log(3 / 4))
    assert information["a:2"] == pytest.approx(-math.log(2 / 4))
    assert information["a:3"] == pytest.approx(-math.log(1 / 4))


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "sources.json", '{"sources": 3}')
    with pytest.raises(Invalid, match=r"sources\.json"):
        graph.load(tmp_path)


def test_the_shipped_ontology_joins_its_sources() -> None:
    chest = graph.load(Path(graph.__file__).parent / "chest")
    effusion = chest["chest:pleural_effusion"]
    assert "HP:0002202" in effusion.aliases
    assert "chest:pleural_abnormality" in effusion.parents
    assert chest["DOID:552"].id == chest["HP:0002090"].id == "chest:pneumonia"
    assert len(chest) > 10_000
