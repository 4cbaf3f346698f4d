"""A linker that knows a few words, and a two-level ontology: "bat" is an "animal"."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.ontology_reports import FINDINGS
from ontology.assertion import Reading, readings
from ontology.labels import LabelSet, hedge, label_documents, load_labels
from retrieval.errors import Invalid, NotFound
from retrieval.types import Assertion, Document, Finding
from tests.fakes import WordLinker

NAMES = [*FINDINGS, "Hernia"]


class Reader(WordLinker):
    """Links words of its vocabulary and reads them as the shipped linker does."""

    def _findings(self, text: str) -> list[Finding]:
        found = super()._findings(text)
        said = readings(text, [finding.span for finding in found])
        return [finding._replace(assertion=reading.assertion) for finding, reading in zip(found, said, strict=True)]


class Tree(Reader):
    """A reader with an ontology: animal > bat > vampire, and plant."""

    concepts = ("animal", "bat", "vampire", "plant")
    tables = SimpleNamespace(
        numbers={name: at for at, name in enumerate(concepts)},
        parents=[[], [0], [1], []],
        lexicon=SimpleNamespace(concepts=concepts),
    )


def write(folder: Path, labels: str, conventions: str | None = None) -> LabelSet:
    if conventions is not None:
        (folder / "habits.toml").write_text(conventions)
        labels = f'conventions = "habits.toml"\n{labels}'
    path = folder / "mine.toml"
    path.write_text(labels)
    return load_labels(path)


def values(text: str, labels: LabelSet, linker: Reader | None = None) -> dict[str, int | None]:
    linker = linker or Tree(Tree.concepts)
    [row] = label_documents([Document(id="a", text=text)], linker, labels)
    found: dict[str, int | None] = row["labels"]
    return found


ANIMALS = '[labels.Animal]\nconcepts = ["animal"]\n'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("An animal.", 1),
        ("No animal.", 0),
        ("Possible animal.", -1),
        ("Nothing.", None),
        ("", None),
        ("No animal left. Animal right.", 1),
        ("No animal left. Possible animal right.", -1),
        ("Possible animal left. Animal right.", 1),
    ],
)
def test_a_label_is_affirmed_denied_doubted_or_not_there(tmp_path: Path, text: str, value: int | None) -> None:
    assert values(text, write(tmp_path, ANIMALS)) == {"Animal": value}


def test_a_concept_below_carries_the_label(tmp_path: Path) -> None:
    labels = write(tmp_path, ANIMALS)
    assert values("A vampire.", labels)["Animal"] == 1
    assert values("A plant.", labels)["Animal"] is None


def test_without_an_ontology_only_the_concept_itself_does(tmp_path: Path) -> None:
    labels = write(tmp_path, ANIMALS)
    assert values("A vampire.", labels, Reader(Tree.concepts)) == {"Animal": None}
    assert values("An animal.", labels, Reader(Tree.concepts)) == {"Animal": 1}


def test_an_exception_holds_for_what_lies_below_it_unless_named_outright(tmp_path: Path) -> None:
    labels = write(tmp_path, '[labels.Animal]\nconcepts = ["animal", "vampire"]\nexcept = ["bat"]\n')
    assert values("A bat.", labels)["Animal"] is None
    assert values("A vampire.", labels)["Animal"] == 1


def test_conventions_change_what_hedges_and_words_mean(tmp_path: Path) -> None:
    habits = """
        [readings]
        alternative = "present"
        [Animal]
        also = ["plant where rubber"]
        unless = ["toy"]
        [Animal.readings]
        possible = "absent"
    """
    labels = write(tmp_path, ANIMALS, habits)
    assert values("Animal versus shadow.", labels)["Animal"] == 1
    assert values("Possible animal.", labels)["Animal"] == 0
    assert values("Toy animal.", labels)["Animal"] is None
    assert values("Rubber plant.", labels)["Animal"] == 1
    assert values("Green plant.", labels)["Animal"] is None


def test_without_conventions_the_text_alone_speaks(tmp_path: Path) -> None:
    labels = write(tmp_path, ANIMALS)
    assert values("Animal versus shadow.", labels)["Animal"] == -1
    assert values("History of animal.", labels)["Animal"] == 1


def test_a_linker_that_denies_by_other_means_is_believed(tmp_path: Path) -> None:
    class Denier(Reader):
        def _findings(self, text: str) -> list[Finding]:
            return [finding._replace(assertion=Assertion.negated) for finding in super()._findings(text)]

    assert values("An animal.", write(tmp_path, ANIMALS), Denier(["animal"])) == {"Animal": 0}


def test_every_document_gives_a_row_with_its_findings(tmp_path: Path) -> None:
    documents = [Document(id=str(number), text="No bat." if number % 2 else "") for number in range(600)]
    rows = list(label_documents(iter(documents), Tree(Tree.concepts), write(tmp_path, ANIMALS)))
    assert [row["_id"] for row in rows] == [document.id for document in documents]
    assert json.loads(json.dumps(rows[1])) == {
        "_id": "1",
        "findings": [{"concept": "bat", "name": "bat", "assertion": "negated", "start": 3, "end": 6}],
        "labels": {"Animal": 0},
    }
    assert rows[0]["findings"] == []


def test_the_shipped_labels_are_the_fourteen() -> None:
    assert list(load_labels().names) == NAMES
    assert load_labels("chest14") == load_labels()


def test_the_shipped_labels_name_concepts_that_the_shipped_ontology_has() -> None:
    graph = pytest.importorskip("ontology.graph")
    known = graph.load(Path(graph.__file__).parent / "chest")
    assert [concept for concept in load_labels().concepts if concept not in known] == []


def test_a_hedge_has_a_kind() -> None:
    kinds = {"versus": "alternative", "borderline": "borderline", "most likely": "probable", "past": "past"}
    kinds |= {"can not be excluded": "excluded", "may represent": "possible", "evaluate for": "question"}
    for cue, kind in kinds.items():
        assertion = Assertion.affirmed if cue == "past" else Assertion.uncertain
        assert hedge(Reading(assertion, cue)) == kind, cue


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("nonsense", None),
        ("", "labels"),
        ("labels = 3", "labels"),
        ("[labels.A]\nconcepts = 'animal'", "labels.A.concepts"),
        ("[labels.A]\nconcepts = [3]", "labels.A.concepts"),
        ("labels.A = 3", "labels.A.concepts"),
    ],
)
def test_what_is_no_label_set_is_refused(tmp_path: Path, content: str, field: str | None) -> None:
    with pytest.raises(Invalid) as refused:
        write(tmp_path, content)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "habits", ["[readings]\nmaybe = 'present'", "[readings]\npast = 'yes'", "[Ghost]\nalso = ['x']"]
)
def test_conventions_that_mean_nothing_are_refused(tmp_path: Path, habits: str) -> None:
    with pytest.raises(Invalid):
        write(tmp_path, ANIMALS, habits)


def test_an_unknown_label_set_is_told_with_what_there_is() -> None:
    with pytest.raises(NotFound, match="magic.*chest14"):
        load_labels("magic")


def test_conventions_that_are_not_there_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'conventions = "gone.toml"\n{ANIMALS}')
    with pytest.raises(NotFound, match="gone.toml"):
        load_labels(path)


def test_the_labels_of_the_unseen_reports_reach_the_bar(tmp_path_factory: pytest.TempPathFactory) -> None:
    from benchmarks.ontology_labels import labelled, micro
    from benchmarks.ontology_reports import reports
    from ontology.linker import load_linker

    data = Path(os.environ.get("LIGHTBOX_DATA", Path(__file__).parents[2] / "shared" / "data")) / "iu_xray"
    if not data.is_dir():
        pytest.skip("the Indiana reports are not here (LIGHTBOX_DATA)")
    unseen = reports(data, "dev")
    found = labelled(unseen, load_linker(None, tmp_path_factory.mktemp("cache")), load_labels())
    assert micro([report.gold for report in unseen], found).f1 >= 0.92
