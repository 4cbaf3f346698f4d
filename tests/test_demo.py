from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retrieval.files import read_source
from retrieval.types import Document, Rejected

DEMO = Path(__file__).resolve().parents[1] / "demo"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_build", DEMO / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "corpus.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("Is there evidence of a pneumothorax", "No", "No evidence of a pneumothorax."),
        ("Is there a pleural effusion in this image?", "Yes", "There is a pleural effusion."),
        ("Are there any rib fractures?", "no", "No rib fractures."),
        ("Is there no blunting of the angles?", "yes", "No blunting of the angles."),
        ("Is the heart enlarged?", "yes", "The heart is enlarged."),
        ("Is the size of the ventricle abnormal?", "No", "The size of the ventricle is not abnormal."),
        ("Where is the mass?", "Pancreas", "Location of the mass: pancreas."),
        ("What modality is used in this image?", "CT", "Modality: CT."),
        ("What is abnormal in this image?", "Hydropneumothorax", "Finding: hydropneumothorax."),
        ("How would you describe the lesion?", "Ring-enhancing", "The lesion: ring-enhancing."),
        ("How many kidneys are in this image?", 2, "Number of kidneys: 2."),
        ("Is this a normal image?", "No", ""),
        ("Is there any abnormality in this image?", "Yes", ""),
        ("Are the findings normal?", "No", ""),
        ("How can you tell?", "Not sure", ""),
        ("Is this an axial image?", "no", ""),
    ],
)
def test_a_question_and_its_answer_become_a_statement(
    build: ModuleType, question: str, answer: object, said: str
) -> None:
    assert build.statement(question, answer) == said


def test_every_document_can_be_used(corpus: list[dict[str, Any]]) -> None:
    items = list(read_source(DEMO).documents())
    assert not [item for item in items if isinstance(item, Rejected)]
    assert len(items) == len(corpus) == 557
    assert all(isinstance(item, Document) and item.image is not None and item.text for item in items)


def test_lab_values_are_numbers_and_nothing_is_infinite(corpus: list[dict[str, Any]]) -> None:
    films = [row["metadata"] for row in corpus if row["metadata"]["collection"] == "hannover_cxr"]
    values = [value for meta in films for key, value in meta.items() if key.endswith(("_val", "_offset"))]
    assert len(films) == 243
    assert None in values
    assert all(value is None or (type(value) in (int, float) and abs(value) < 1e6) for value in values)
    assert all(isinstance(meta["patient_id"], str) for meta in films)


def test_queries_ask_for_other_films_of_the_same_patient(corpus: list[dict[str, Any]]) -> None:
    patients = {row["_id"]: row["metadata"].get("patient_id") for row in corpus}
    source = read_source(DEMO)
    qrels = source.qrels("test")
    assert {query.id for query in source.queries()} == set(qrels)
    for query, grades in qrels.items():
        assert query not in grades
        assert {patients[id] for id in grades} == {patients[query]}


def test_no_text_says_an_answer_twice(corpus: list[dict[str, Any]]) -> None:
    for row in corpus:
        sentences = row["text"].split(". ")
        assert len(sentences) == len(set(sentences)), row["_id"]


def test_licences_stand_beside_the_pictures(corpus: list[dict[str, Any]]) -> None:
    for name, licence in (("vqa_rad", "CC0 1.0"), ("hannover_cxr", "CC BY 3.0")):
        assert licence in (DEMO / f"LICENSE-{name}.txt").read_text()
    assert {row["metadata"]["licence"] for row in corpus} == {"CC0-1.0", "CC-BY-3.0"}


def test_the_committed_source_is_what_the_builder_makes(build: ModuleType, data: Path, tmp_path: Path) -> None:
    build.main(data, tmp_path)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        assert (tmp_path / name).read_text() == (DEMO / name).read_text(), f"run python demo/build.py ({name})"
    for picture in DEMO.glob("images/*/*.jpg"):
        assert (tmp_path / picture.relative_to(DEMO)).read_bytes() == picture.read_bytes()
