from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval import filters
from retrieval.errors import BackendError, Conflict, InputError, Invalid, NotFound
from retrieval.files import read_source
from retrieval.request import Request, RequestPart
from retrieval.types import Document, Rejected
from server import judging
from server.assemble import Config
from server.home import Home, silent, usable
from tests.small_home import small_home, write_lines, write_source

DEFAULT = Config()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = small_home(tmp_path / "home")
    indexed(home, write_source(tmp_path / "source"))
    return home


def indexed(home: Home, source: Path, config: Config = DEFAULT) -> None:
    home.index("films", read_source(source).documents(), config, progress=silent)


def found(home: Home, text: str, retriever: str = "hybrid", name: str = "films") -> list[str]:
    answer = home.engine(name).search(Request(query=[RequestPart(text=text)], retriever=retriever))
    return [hit["id"] for hit in answer["hits"]]


def test_what_was_indexed_is_found_by_every_leg(home: Home) -> None:
    for retriever in ("lexical", "dense", "image", "ontology", "hybrid"):
        assert found(home, "enlarged heart", retriever)[0] == "a"
    assert home.names() == ["films"]


def test_an_unknown_collection_is_not_found(home: Home) -> None:
    for call in (home.engine, home.info, home.delete, home.rollback):
        with pytest.raises(NotFound):
            call("nothing")


@pytest.mark.parametrize("name", ["../films", "", "a/b", ".hidden", "x" * 65, "a b", "käse"])
def test_a_name_cannot_lead_out_of_the_home(home: Home, name: str) -> None:
    with pytest.raises(Invalid, match="expected up to 64 letters"):
        home.engine(name)


def test_add_upserts_and_leaves_bad_items_in_quarantine(home: Home, tmp_path: Path) -> None:
    more = write_source(tmp_path / "more", [{"_id": "a", "text": "rib fracture"}, {"_id": "d", "text": "pacemaker"}])
    (more / "corpus.jsonl").open("a").write("{broken\n")
    done = home.add("films", read_source(more).documents(), silent)
    assert (done.documents, done.added, len(done.rejected)) == (4, 2, 1)
    assert found(home, "fracture", "lexical") == ["a"]
    assert found(home, "heart", "lexical") == []
    line = json.loads((home.folder("films") / "quarantine.jsonl").read_text())
    assert line["line"] == 3
    assert "broken" not in line["reason"]


def test_remove_says_how_many_there_were(home: Home) -> None:
    assert home.remove("films", ["a", "unknown"]) == 1
    assert "a" not in found(home, "enlarged heart")


def test_documents_are_removed_by_filter(home: Home) -> None:
    where = filters.parse({"projection": "ap"})
    assert where is not None
    assert home.remove_where("films", where) == 2
    assert home.info("films")["documents"] == 1


def test_the_text_encoder_of_a_collection(home: Home) -> None:
    assert home.text_encoder("films").dim == 16
    indexed(home, home.settings.home.parent / "source", Config(text_encoder="none"))
    with pytest.raises(Invalid, match="without a text encoder"):
        home.text_encoder("films")


def test_another_process_is_followed(home: Home, tmp_path: Path) -> None:
    assert found(home, "pacemaker", "lexical") == []
    other = small_home(tmp_path / "home")
    other.add("films", [Document(id="d", text="pacemaker")], silent)
    assert found(home, "pacemaker", "lexical") == ["d"]


def test_another_processs_change_of_encoders_is_followed(home: Home, tmp_path: Path) -> None:
    assert "dense" in home.engine("films").legs()
    indexed(small_home(tmp_path / "home"), tmp_path / "source", Config(text_encoder="none"))
    assert "dense" not in home.engine("films").legs()
    assert found(home, "enlarged heart")[0] == "a"


def test_a_collection_deleted_and_made_again_elsewhere_is_followed(home: Home, tmp_path: Path) -> None:
    assert found(home, "effusion", "lexical") == ["c", "b"]
    other = small_home(tmp_path / "home")
    other.delete("films")
    with pytest.raises(NotFound):
        home.engine("films")
    indexed(other, write_source(tmp_path / "new", [{"_id": "z", "text": "effusion"}]))
    assert found(home, "effusion", "lexical") == ["z"]


def test_rebuild_and_rollback_keep_the_answers(home: Home) -> None:
    before = found(home, "effusion")
    assert home.rebuild("films", vector_index="hnsw", progress=silent).generation == 2
    assert home.info("films")["config"]["vector_index"] == "hnsw"
    assert found(home, "effusion") == before
    assert home.rollback("films") == 1
    assert found(home, "effusion") == before


def test_a_gate_that_is_missed_leaves_the_old_generation(home: Home, tmp_path: Path) -> None:
    engine = home.engine("films")
    open_gate = judging.gate(engine, tmp_path / "source", "nDCG@10>=0.1", silent)
    home.rebuild("films", gate=open_gate, progress=silent)
    shut = judging.gate(engine, tmp_path / "source", "nDCG@10>=1.1", silent)
    with pytest.raises(Conflict, match=r"nDCG@10 is \d\.\d+ on source, expected at least 1.1; .* not published"):
        home.rebuild("films", gate=shut, progress=silent)
    assert home.info("films")["generation"] == 2


@pytest.mark.parametrize("text", ["nDCG@10", "nDCG@10>=much", "nothing>=0.1", ">=0.1", ""])
def test_a_gate_that_says_nothing_is_refused(home: Home, tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        judging.gate(home.engine("films"), tmp_path / "source", text, silent)


def test_tuned_weights_stay_with_the_collection_until_its_encoders_change(home: Home, tmp_path: Path) -> None:
    source = tmp_path / "source"
    weights, learned = judging.learn(home.engine("films"), judging.judgments(source, "train"), silent)
    assert set(weights) == {"text"}  # nobody asked by report or picture
    assert learned["split"] == "train"
    home.keep_weights("films", {"text": {"lexical": 1.0}}, learned)
    assert home.engine("films").parts.weights["text"] == {"lexical": 1.0}
    assert "dense" in home.engine("films").parts.weights["report"]
    indexed(home, source)
    assert home.info("films")["tuned"] == ["text"]
    indexed(home, source, Config(text_encoder="none"))
    assert home.info("films")["tuned"] == []


def flip(path: Path, byte: bytes) -> None:
    """Turns one bit where `byte` first occurs."""
    content = bytearray(path.read_bytes())
    content[content.index(byte)] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("harm", [lambda path: flip(path, b"0.2"), lambda path: flip(path, b"{"), truncate])
def test_damaged_weights_are_told_with_the_way_out(home: Home, harm: Callable[[Path], None]) -> None:
    home.keep_weights("films", {"text": {"lexical": 0.25}}, {})
    assert home.engine("films").parts.weights["text"] == {"lexical": 0.25}
    harm(home.folder("films") / "weights.json")
    with pytest.raises(BackendError, match="weights.json is damaged; delete the file, or tune again"):
        home.engine("films")


@pytest.mark.parametrize("harm", [lambda path: flip(path, b"0."), lambda path: flip(path, b"{"), truncate])
def test_damaged_calibrations_say_nothing_until_they_are_measured_again(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    home = small_home(tmp_path)
    home.index("many", [Document(id=f"{i:02}", text=f"heart {i} " * 9) for i in range(30)], Config(), progress=silent)
    assert home.engine("many").parts.calibrations
    harm(home.folder("many") / "calibration.json")
    assert not home.engine("many").parts.calibrations
    home.rebuild("many", progress=silent)
    assert home.engine("many").parts.calibrations


def test_a_big_enough_collection_says_how_sure_a_hit_is(tmp_path: Path) -> None:
    home = small_home(tmp_path)
    words = [
        "heart",
        "lung",
        "rib",
        "spine",
        "aorta",
        "nodule",
        "mass",
        "cyst",
        "clear",
        "large",
        "small",
        "left",
        "right",
        "upper",
        "lower",
    ]
    documents = [Document(id=f"{i:02}", text=" ".join(words[(i + j) % 15] for j in range(9))) for i in range(30)]
    home.index("many", documents, Config(), progress=silent)
    answer = home.engine("many").search(Request(query=[RequestPart(text="heart lung rib spine")]))
    assert 0 <= answer["hits"][0]["confidence"] <= 1
    assert home.info("many")["calibrated"]


def test_confidence_is_measured_again_only_where_the_collection_changed(home: Home, tmp_path: Path) -> None:
    phases: list[str] = []

    def told(phase: str, done: int, total: int | None) -> None:
        phases.append(phase)

    documents = list(read_source(tmp_path / "source").documents())
    home.index("films", documents, DEFAULT, progress=told)
    home.rebuild("films", progress=told)
    assert "calibrate" not in phases
    home.add("films", [Document(id=f"{n}", text="rib") for n in range(3)], silent)
    home.rebuild("films", progress=told)
    assert phases.count("calibrate") == 2  # when it starts and when it ends


def test_create_makes_an_empty_collection_once(home: Home) -> None:
    home.create("fresh", Config())
    assert home.info("fresh")["documents"] == 0
    home.add("fresh", [Document(id="a", text="effusion")], silent)
    assert found(home, "effusion", "lexical", "fresh") == ["a"]
    with pytest.raises(Conflict, match="exists already"):
        home.create("fresh", Config())


def test_a_source_without_a_usable_document_changes_nothing(home: Home, tmp_path: Path) -> None:
    write_lines(tmp_path / "source" / "corpus.jsonl", [{"_id": ""}, {"text": 3}])
    with pytest.raises(InputError, match="holds no document; 2 were rejected, the first: "):
        home.index("films", usable(read_source(tmp_path / "source").documents(), "source"), Config(), progress=silent)
    assert found(home, "enlarged heart")[0] == "a"


def test_usable_keeps_the_order_of_what_came_before_the_first_document() -> None:
    items = [Rejected(1, None, "bad"), Document(id="a"), Rejected(3, None, "bad")]
    assert list(usable(items, "source")) == items


@pytest.mark.parametrize("place", ["/sys/lightbox", "file/home"])
def test_a_home_that_cannot_be_written_is_the_callers_fault(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    home = small_home(tmp_path / place)  # an absolute place stands for itself
    with pytest.raises(InputError, match="cannot write to .*; name another folder with --home or LIGHTBOX_HOME"):
        home.index("films", [Document(id="a", text="x")], Config(), progress=silent)


def test_many_threads_open_one_engine(home: Home) -> None:
    fresh = small_home(home.settings.home)
    engines: list[object] = []
    threads = [threading.Thread(target=lambda: engines.append(fresh.engine("films"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, engines))) == 1
