from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
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


# --- the real thing, in processes of their own -------------------------------------------------------------------


def lightbox(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *words],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=DEMO.parent,
        env={**os.environ, "LIGHTBOX_HOME": str(home)},
        check=False,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection that `make demo` builds."""
    home = tmp_path_factory.mktemp("demo") / "home"
    done = lightbox(home, "index", "demo", "demo")
    assert done.returncode == 0, done.stderr
    assert "generation 1, 557 documents (557 encoded, 0 reused)" in done.stderr
    return home


def hits(home: Path, *words: str) -> list[dict[str, Any]]:
    done = lightbox(home, "search", "demo", *words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)["hits"]
    return found


@pytest.mark.timeout(900)
def test_words_find_radiographs(home: Path) -> None:
    found = hits(home, "chest x-ray with enlarged heart", "-k", "5")
    assert all(hit["metadata"]["organ"] == "chest" for hit in found)
    assert all("heart" in hit["text"].lower() or "cardiomegaly" in hit["text"].lower() for hit in found)


def test_a_picture_finds_itself_first(home: Path) -> None:
    picture = "demo/images/hannover_cxr/1880e301.jpg"
    assert hits(home, "--image", picture, "-k", "3")[0]["id"] == "hannover-1880e301"


def test_more_like_this_leaves_out_what_was_asked_by(home: Path) -> None:
    found = hits(home, "--like", "hannover-1880e301", "-k", "5")
    assert len(found) == 5
    assert "hannover-1880e301" not in {hit["id"] for hit in found}


def test_filters_hold_for_every_hit(home: Path) -> None:
    found = hits(home, "chest", "--where", '{"projection": "ap", "crp_val": {"$gte": 100}}', "-k", "20")
    assert found
    assert all(hit["metadata"]["projection"] == "ap" and hit["metadata"]["crp_val"] >= 100 for hit in found)


def test_what_is_denied_is_found_by_denial(home: Path) -> None:
    found = hits(home, "no pleural effusion", "--retriever", "ontology", "-k", "5")
    assert all(
        any(f["name"] == "pleural effusion" and f["assertion"] == "negated" for f in hit["findings"]) for hit in found
    )


def test_a_search_loads_neither_torch_nor_spacy(home: Path) -> None:
    code = (
        "import sys; from server import cli\n"
        "try: cli.main(['search', 'demo', 'enlarged heart', '--json'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'open_clip', 'timm', 'spacy', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=DEMO.parent,
        env={**os.environ, "LIGHTBOX_HOME": str(home)},
        check=True,
    )
    assert done.stderr.strip() == "[]"


def test_the_three_searches_to_try_have_answers(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "demo/searches.py"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=DEMO.parent,
        env={**os.environ, "LIGHTBOX_HOME": str(home)},
        check=True,
    )
    assert done.stdout.count("$ lightbox search demo ") == 3
    assert "nothing found" not in done.stdout


def test_the_demo_is_measured_by_films_of_the_same_patient(home: Path) -> None:
    words = ("evaluate", "demo", "demo", "--retriever", "image", "--drop-identical-ids", "--json")
    found = json.loads(lightbox(home, *words).stdout)
    assert found["queries"] == 37
    assert found["results"]["image"]["nDCG@10"] > 0.1
