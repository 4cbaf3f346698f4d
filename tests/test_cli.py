from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from server import cli
from server.settings import load
from tests.small_home import CORPUS, PNG, FakeModels, write_lines, write_source


class Ran(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Ran]
QUARANTINE = Path("lightbox-data/collections/films/quarantine.jsonl")


@pytest.fixture
def real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command in this process, in the home below `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> Ran:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Ran(int(end.value.code or 0), out, err)

    return call


@pytest.fixture
def run(real_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same, with collections made of the fakes; only pictures are really read."""
    for part in ("encoders", "linker", "findings_score", "scorer"):
        monkeypatch.setattr(f"server.assemble.Models.{part}", getattr(FakeModels, part))
    return real_run


@pytest.fixture
def films(run: Run, tmp_path: Path) -> Run:
    """The same, with the collection `films` built from `source`."""
    done = run("index", "films", write_source(tmp_path / "source"))
    assert done.status == 0, done.err
    return run


# --- what is printed, and where ----------------------------------------------------------------------------------


def test_index_says_what_it_did_on_standard_error(run: Run, tmp_path: Path) -> None:
    done = run("index", "films", write_source(tmp_path / "source"))
    assert (done.status, done.out) == (0, "")
    assert "collection films: generation 1, 3 documents (3 encoded, 0 reused)" in done.err
    assert "encode: 3/3, " in done.err  # plain lines where there is no terminal
    assert " 0/s" not in done.err


def test_indexing_again_encodes_nothing(films: Run) -> None:
    assert "generation 2, 3 documents (0 encoded, 3 reused)" in films("index", "films", "source").err


def test_search_prints_one_json_object_and_nothing_else(films: Run) -> None:
    done = films("search", "films", "enlarged heart", "--json")
    answer = json.loads(done.out)
    assert (done.status, done.err, done.out.count("\n")) == (0, "", 1)
    assert answer["hits"][0]["id"] == "a"
    assert set(answer) >= {"hits", "facets", "total", "exact", "recall", "generation", "cursor", "took_ms"}
    first = answer["hits"][0]
    assert sum(p["weight"] * p["normalised"] for p in first["parts"].values()) == pytest.approx(
        first["score"], abs=1e-6
    )


def test_search_without_json_is_for_people(films: Run) -> None:
    done = films("search", "films", "enlarged heart", "--explain")
    assert done.out.startswith("  1  ")
    assert "the heart is enlarged" in done.out
    assert "lexical" in done.out
    assert "says       heart (affirmed)" in done.out
    assert "found, exact, " in done.out


def test_documents_do_not_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    rows = [{"_id": "a", "title": "one\ntwo\x1b[2J", "text": "the \x1b]0;heart\x07 \x00 is \x9b31m large"}]
    assert run("index", "odd", write_source(tmp_path / "source", rows)).status == 0
    first, second, *_ = run("search", "odd", "heart").out.split("\n")
    assert first.endswith("a  one two\ufffd[2J")
    assert second.strip() == "the \ufffd]0;heart\ufffd \ufffd is \ufffd31m large"


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (["effusion", "--where", '{"projection": "ap"}', "--retriever", "lexical"], ["c"]),
        (["effusion", "--where", '{"year": {"$gte": 2011}}', "--retriever", "lexical", "-k", "1"], ["c"]),
        (["no effusion", "--retriever", "ontology"], ["b"]),
        (["--like", "c", "--retriever", "ontology"], []),  # nothing else has an effusion, and b denies it
        (["effusion", "--weights", '{"ontology": 1}'], ["c"]),
        (["zebra", "--retriever", "lexical"], []),
    ],
)
def test_search_options(films: Run, options: list[str], ids: list[str]) -> None:
    done = films("search", "films", *options, "--json")
    hits = json.loads(done.out)["hits"]
    assert [hit["id"] for hit in hits if hit["score"] > 0] == ids


def test_a_report_and_a_text_are_parts_of_one_query(films: Run, tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("There is a large effusion.")
    done = films("search", "films", "heart", "--report", "report.txt", "--retriever", "lexical", "--json")
    assert {hit["id"] for hit in json.loads(done.out)["hits"]} == {"a", "b", "c"}


def test_nothing_found_is_said(films: Run) -> None:
    done = films("search", "films", "zebra", "--retriever", "lexical")
    assert (done.status, done.out.splitlines()[0]) == (0, "nothing found")


def test_a_field_that_no_document_has_is_said(films: Run) -> None:
    done = films("search", "films", "heart", "--where", '{"projektion": "ap", "$not": {"year": 2009}}')
    assert done.out.startswith("nothing found")
    assert (done.status, done.err) == (0, "lightbox: --where: no document of films has a field 'projektion'\n")
    assert films("search", "films", "heart", "--where", '{"year": 1900}').err == ""


def test_add_remove_rebuild_rollback_delete(films: Run, tmp_path: Path) -> None:
    more = write_source(tmp_path / "more", [{"_id": "d", "text": "pacemaker"}])
    assert "1 added, 4 in all" in films("add", "films", more).err
    assert "1 removed" in films("remove", "films", "d", "unknown").err
    assert "generation 2, 3 documents" in films("rebuild", "films", "--vector-index", "hnsw").err
    assert "back at generation 1" in films("rollback", "films").err
    assert films("delete", "films").status == 0
    assert films("search", "films", "x").status == 2


def test_info_as_lines_and_as_json(films: Run) -> None:
    assert "documents: 3" in films("info", "films").out
    info = json.loads(films("info", "films", "--json").out)
    assert (info["collection"], info["documents"], info["generation"]) == ("films", 3, 1)
    assert info["spaces"]["text"]["dim"] == 16


def test_evaluate_prints_the_contracts_object(films: Run, tmp_path: Path) -> None:
    done = films(
        "evaluate", "films", "source", "--retriever", "lexical,hybrid", "--measures", "nDCG@10 R@10", "--json"
    )
    found = json.loads(done.out)
    assert (found["collection"], found["split"], found["queries"], found["depth"]) == ("films", "test", 2, 1000)
    assert found["results"]["lexical"] == {"nDCG@10": pytest.approx(1.0), "R@10": 1.0}
    low, high = found["intervals"]["hybrid"]["nDCG@10"]
    assert low <= found["results"]["hybrid"]["nDCG@10"] <= high
    assert set(found["unjudged"]) == {"lexical", "hybrid"}


def test_evaluate_as_a_table_and_as_files(films: Run, tmp_path: Path) -> None:
    done = films("evaluate", "films", "source", "--retriever", "lexical", "--out", "out")
    assert "films, split test: 2 queries" in done.out
    assert (tmp_path / "out" / "lexical.run").exists()
    assert (tmp_path / "out" / "report.html").exists()


def test_compare_two_runs(films: Run, tmp_path: Path) -> None:
    films("evaluate", "films", "source", "--retriever", "lexical,dense", "--out", "out")
    words = ("compare", "out/dense.run", "out/lexical.run", "source/qrels/test.tsv", "--measures", "RR@10")
    assert films(*words).out.split()[:4] == ["A", "B", "B", "-"]
    (comparison,) = json.loads(films(*words, "--json").out)["comparisons"]
    assert comparison["wins"] + comparison["losses"] + comparison["ties"] == 2


def test_tune_stores_weights(films: Run) -> None:
    done = films("tune", "films", "source")
    assert done.out.startswith("text: lexical ")
    assert json.loads(films("info", "films", "--json").out)["tuned"] == ["text"]


def test_shards_are_encoded_apart_and_published_together(run: Run, tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    for part in ("1/2", "2/2"):
        assert run("index", "films", "source", "--shard", part).status == 0
    assert run("info", "films").status == 2  # nothing is published yet
    assert "3 documents (0 encoded, 3 reused)" in run("index", "films", "source").err


def test_home_may_stand_before_or_after_the_command(films: Run, tmp_path: Path) -> None:
    films("index", "films", "source", "--home", "elsewhere")
    assert (tmp_path / "elsewhere" / "collections" / "films").is_dir()
    assert films("--home=elsewhere", "info", "films").status == 0


def test_columns_of_a_csv_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("nr,words\n7,an enlarged heart\n")
    done = run("index", "rows", "rows.csv", "--columns", '{"_id": "nr", "text": "words"}')
    assert done.status == 0, done.err
    assert json.loads(run("search", "rows", "heart", "--retriever", "lexical", "--json").out)["hits"][0]["id"] == "7"


def test_progress_ends_at_what_there_was(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,text\na,heart\na,again\nb,lung\n")
    assert "encode: 2/2, " in run("index", "films", "rows.csv").err


def test_label_writes_a_line_for_every_document(run: Run, tmp_path: Path) -> None:
    write_source(tmp_path / "source", [*CORPUS, {"_id": "d", "text": "nothing to say"}, {"_id": ""}])
    done = run("label", "source", "--labels", write_labels(tmp_path / "mine.toml"))
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["_id"], row["labels"]["Heart"]) for row in rows] == [("a", 1), ("b", None), ("c", None), ("d", None)]
    assert rows[1]["findings"] == [
        {"concept": "effusion", "name": "effusion", "assertion": "negated", "start": 3, "end": 11}
    ]
    assert "4 documents labelled, 1 left out" in done.err
    assert run("label", "source", "--labels", "mine.toml", "--out", "labels.jsonl").out == ""
    assert (tmp_path / "labels.jsonl").read_text().splitlines() == done.out.splitlines()


def write_labels(path: Path) -> Path:
    path.write_text('[labels.Heart]\nconcepts = ["heart"]\n')
    return path


# --- bad input: exit status 2, one line, nothing on standard output, nothing changed --------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frob"], "No such command 'frob'"),
        (["search"], "Missing argument 'COLLECTION'"),
        (["search", "films", "x", "--frob"], "No such option"),
        (["search", "films"], "expected TEXT, --image FILE, --like ID or --report FILE"),
        (["search", "nothing", "x"], "nothing"),
        (["search", "../films", "x"], "expected up to 64 letters"),
        (["info", "nothing"], "nothing"),
        (["search", "films", "x", "-k", "0"], "k: got 0"),
        (["search", "films", "x", "-k", "1000000000"], "the limit is 1000"),
        (["search", "films", "x", "-k", "many"], "valid integer"),
        (
            ["search", "films", "x", "--retriever", "magic"],
            "this collection has lexical, dense, image, ontology, hybrid",
        ),
        (["search", "films", "x", "--retriever", "hybrid+rerank"], "index it with --reranker"),
        (["search", "films", "x", "--where", '{"year": {"$foo": 1}}'], "year.$foo"),
        (["search", "films", "x", "--where", "{year: 1}"], "--where: not JSON"),
        (["search", "films", "x", "--where", "[" * 100000], "--where: not JSON"),
        (["search", "films", "x", "--where", "[1]"], "expected a JSON object"),
        (["search", "films", "x", "--weights", '{"lexical": -1}'], "expected a number from 0"),
        (["search", "films", "x", "--weights", '{"magic": 1}'], "magic"),
        (["search", "films", "--like", "unknown"], "unknown"),
        (["search", "films", "--image", "no.png"], "--image: no file 'no.png'"),
        (["search", "films", "--report", "no.txt"], "--report: no file 'no.txt'"),
        (["index", "films", "nowhere"], "nowhere"),
        (["index", "films", "source", "--vector-index", "magic"], "magic"),
        (["index", "films", "source", "--backend", "localhost:9200"], "expected 'embedded' or a URL"),
        (["index", "films", "source", "--shard", "3/2"], "expected I/N"),
        (["index", "films", "source", "--frames", "some"], "expected middle or all"),
        (["index", "a/b", "source"], "expected up to 64 letters"),
        (["evaluate", "films", "source", "--split", "nothing"], "test"),
        (["evaluate", "films", "source", "--measures", "magic@10"], "magic@10"),
        (["evaluate", "films", "source", "--retriever", "magic"], "magic"),
        (["evaluate", "films", "source", "--retriever", " , "], "--retriever: got no name"),
        (["rebuild", "films", "--gate", "source", "--gate-min", "high"], "--gate-min: got 'high'"),
        (["rebuild", "films", "--gate", "source", "--gate-min", ""], "--gate-min: got ''"),
        (["rebuild", "films", "--gate-min", "nDCG@10>=0.9"], "name them with --gate SOURCE"),
        (
            ["rebuild", "films", "--gate", "source", "--gate-min", "nDCG@10>=1.5"],
            "the new generation was not published",
        ),
        (["tune", "films", "source", "--split", "nothing"], "test"),
        (["compare", "no.run", "no.run", "source/qrels/test.tsv"], "no.run"),
        (["rollback", "films"], "no earlier generation"),
        (["label", "source", "--labels", "magic"], "magic"),
        (["label", "source", "--out", "no/folder/labels.jsonl"], "cannot write 'no/folder/labels.jsonl'"),
        (["train", "no.toml"], "no.toml"),
    ],
)
def test_the_callers_fault_is_told_in_one_line(films: Run, words: list[str], message: str) -> None:
    done = films(*words)
    assert (done.status, done.out) == (2, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("lightbox: ")
    assert message in last
    assert "Traceback" not in done.err
    assert json.loads(films("info", "films", "--json").out)["generation"] == 1


def test_bad_items_are_left_out_and_written_down(films: Run, tmp_path: Path) -> None:
    source = write_source(tmp_path / "bad")
    rows = [json.dumps(row) for row in CORPUS]
    html, missing, absolute = (
        json.dumps({"_id": id, "image": image})
        for id, image in (("html", "page.jpg"), ("missing", "gone.png"), ("absolute", "/etc/passwd"))
    )
    (source / "page.jpg").write_text("<html><body>not found</body></html>")
    lines = [rows[0], rows[1], '{"_id": "broken", ', rows[2], rows[0], '{"_id": ""}', html, missing, absolute]
    (source / "corpus.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"_id": "latin", "text": "caf\xe9"}\n')
    done = films("index", "films", source)
    assert done.status == 0
    assert "3 documents" in done.err
    assert "7 left out (see " in done.err
    kept = [json.loads(line) for line in QUARANTINE.read_text().splitlines()]
    assert [item["line"] for item in kept] == [3, 5, 6, 7, 8, 9, 10]
    assert all(set(item) == {"line", "id", "reason"} for item in kept)
    assert films("search", "films", "enlarged heart").status == 0


def test_a_truncated_picture_and_a_bomb_are_left_out(films: Run, tmp_path: Path) -> None:
    from PIL import Image

    source = write_source(tmp_path / "bad", [{"_id": n, "image": f"{n}.png"} for n in ("good", "cut", "bomb", "fake")])
    Image.new("L", (64, 64), 7).save(source / "good.png")
    (source / "cut.png").write_bytes((source / "good.png").read_bytes()[:60])
    Image.new("1", (20_000, 20_000)).save(source / "bomb.png")
    (source / "fake.png").write_bytes(PNG)
    done = films("index", "films", source)
    assert "1 documents (1 encoded, 0 reused, 3 left out" in done.err
    kept = {json.loads(line)["id"] for line in QUARANTINE.read_text().splitlines()}
    assert kept == {"cut", "bomb", "fake"}


def test_a_query_picture_that_is_none_is_refused(films: Run, tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    done = films("search", "films", "--image", "page.jpg")
    assert (done.status, done.out) == (2, "")


def test_strict_stops_at_the_first_bad_item_and_changes_nothing(films: Run, tmp_path: Path) -> None:
    source = write_source(tmp_path / "bad", [{"_id": "x", "text": "x"}, {"_id": ""}])
    done = films("index", "films", source, "--strict")
    assert done.status == 2
    assert "line 2" in done.err.splitlines()[-1]
    assert json.loads(films("info", "films", "--json").out)["generation"] == 1


@pytest.mark.parametrize("corpus", ["", "\n\n", '{"_id": ""}\n'])
def test_an_empty_corpus_changes_nothing(films: Run, tmp_path: Path, corpus: str) -> None:
    (write_source(tmp_path / "empty") / "corpus.jsonl").write_text(corpus)
    done = films("index", "films", "empty")
    assert done.status == 2
    assert "no document" in done.err
    assert json.loads(films("info", "films", "--json").out)["documents"] == 3


def test_a_home_without_write_permission(films: Run) -> None:
    done = films("index", "films", "source", "--home", "/sys/lightbox")
    assert done.status == 2
    assert "cannot write to '/sys/lightbox'; name another folder with --home or LIGHTBOX_HOME" in done.err


def test_a_collection_of_another_encoder_is_refused(films: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fakes import HashingEncoder

    changed = ({"text": HashingEncoder(name="newer")}, "text")
    monkeypatch.setattr("server.assemble.Models.encoders", lambda self, config: changed)
    done = films("search", "films", "heart")
    assert done.status == 2
    assert "made by another encoder" in done.err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--text-encoder", "no/such", "unknown model 'no/such'"),
        ("--text-encoder", "source", "holds no model"),
        ("--image-encoder", "no/such", "unknown image encoder"),
        ("--reranker", "no/such", "unknown model 'no/such'"),
        ("--ontology", "nothing", "expected 'chest' or the path of an ontology"),
    ],
)
def test_an_unknown_model_is_refused_before_any_work(
    real_run: Run, tmp_path: Path, option: str, name: str, message: str
) -> None:
    write_source(tmp_path / "source")
    others = ["--text-encoder", "none", "--image-encoder", "none", "--ontology", "none"]
    kept = [word for pair in zip(others[::2], others[1::2]) if pair[0] != option for word in pair]
    done = real_run("index", "films", "source", option, name, *kept)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert real_run("info", "films").status == 2


def test_our_own_fault_is_exit_status_1_and_one_line(films: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, name: str) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("server.home.Home.info", fail)
    done = films("info", "films")
    assert (done.status, done.out) == (1, "")
    assert done.err == "lightbox: internal error: ZeroDivisionError: division by zero; LIGHTBOX_DEBUG=1 shows where\n"
    monkeypatch.setenv("LIGHTBOX_DEBUG", "1")
    assert "Traceback" in films("info", "films").err


def test_ctrl_c_ends_with_a_line_and_no_traceback(films: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.home.Home.info", interrupted)
    done = films("info", "films")
    assert done.status == 130
    assert done.err == "lightbox: stopped; the same command again goes on from here\n"


# --- in a process of its own -------------------------------------------------------------------------------------


def child(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_starting_the_command_loads_nothing_heavy() -> None:
    heavy = [
        "torch",
        "transformers",
        "faiss",
        "tantivy",
        "openvino",
        "spacy",
        "scipy",
        "matplotlib",
        "fastapi",
        "numpy",
        "rich",
    ]
    code = "import sys, server.cli; print([m for m in sys.modules if m in sys.argv[1:]])"
    loaded = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, timeout=60, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_help_lists_every_command_of_the_contract() -> None:
    text = child("--help").stdout
    commands = "index add remove delete rebuild rollback tune search evaluate compare train label info serve"
    for command in commands.split():
        assert f"  {command} " in text


def test_the_command_alone_shows_its_help() -> None:
    alone = child()
    assert (alone.returncode, alone.stderr) == (0, "")
    assert alone.stdout == child("--help").stdout


def test_a_wrong_option_points_to_the_help_of_its_command() -> None:
    assert child("search", "--frob").stderr.endswith("; 'lightbox search --help' lists what there is\n")
    assert child("search").stderr == (
        "lightbox: Missing argument 'COLLECTION'; 'lightbox search --help' lists what there is\n"
    )


@pytest.mark.parametrize(("closed", "told"), [(">&-", 1), ("2>&-", 0), (">&- 2>&-", 0)])
def test_closed_streams_are_no_error_of_ours(tmp_path: Path, closed: str, told: int) -> None:
    source = write_source(tmp_path / "source")
    line = f"{sys.executable} -m server.cli --home {tmp_path}/home index films {source} {' '.join(BARE)} {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.count("collection films: generation 1, 3 documents") == told


def on_a_terminal(*words: str, home: Path, stop_at: str | None = None) -> tuple[int, str]:
    """Runs a command on a pseudo-terminal; sends Ctrl-C when `stop_at` is shown. Exit status and what was shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["LIGHTBOX_HOME"] = str(home)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a run in the background inherits that Ctrl-C is ignored
        os.execv(sys.executable, [sys.executable, "-m", "server.cli", *words])
    shown = ""
    with contextlib.suppress(OSError):  # how the end of a terminal is told
        while chunk := os.read(terminal, 4096):
            shown += chunk.decode(errors="replace")
            if stop_at is not None and stop_at in shown:
                os.write(terminal, b"\x03")
                stop_at = None
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), shown


BARE = ("--text-encoder", "none", "--image-encoder", "none", "--ontology", "none")


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    status, shown = on_a_terminal("index", "films", str(source), *BARE, home=tmp_path / "home")
    assert status == 0, shown
    assert "3/3" in shown
    assert "━" in shown
    assert "collection films: generation 1, 3 documents" in shown


def test_the_bar_ends_at_what_there_was(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", [*CORPUS, CORPUS[0]])
    status, shown = on_a_terminal("index", "films", str(source), *BARE, home=tmp_path / "home")
    assert status == 0, shown
    last = shown.partition("collection films")[0].rpartition("encode")[2]
    assert ("3/3" in last, "3/4" in last) == (True, False)


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    rows = [{"_id": f"{n}", "text": f"word{n} heart lung"} for n in range(60_000)]
    source = write_source(tmp_path / "source", rows)
    command = ("index", "films", str(source), *BARE)
    status, shown = on_a_terminal(*command, home=tmp_path / "home", stop_at="encode")
    assert status == 130, shown
    assert "stopped; the same command again goes on from here" in shown
    assert "Traceback" not in shown
    write_source(tmp_path / "source", rows[:300])
    done = child(*command, LIGHTBOX_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", CORPUS)
    line = f"{sys.executable} -m server.cli --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_home_comes_from_the_environment(tmp_path: Path) -> None:
    assert child("info", "films", LIGHTBOX_HOME=str(tmp_path)).returncode == 2
    assert load(home=tmp_path).home == tmp_path
