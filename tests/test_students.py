"""Text towers and cross-encoders in training: a tiny BERT, a collection of a dozen made-up abstracts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from encoders.collection import (
    Asked,
    Lexical,
    best,
    hybrid,
    is_held_out,
    made_queries,
    ndcg,
    read_collection,
    reranked,
)
from encoders.report_course import report_course
from encoders.student import Student
from encoders.studies import read_studies
from encoders.train import train
from ontology.tversky import Index, Measure, tversky_matrix
from retrieval.errors import BackendError, InputError
from tests.fakes import WordLinker
from tests.test_text import tiny_bert

QUERY = "encoder.layer.1.attention.self.query.weight"
WORDS = ["left", "lung", "effusion", "clear"]


def quiet(phase: str, done: int, total: int | None) -> None:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of two small layers, pooled by their mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("base")
    BertModel(**tiny_bert(folder / "bert")).save_pretrained(folder / "bert")
    body = Transformer(str(folder / "bert"), max_seq_length=16)
    SentenceTransformer(modules=[body, Pooling(32, pooling_mode="mean"), Normalize()]).save_pretrained(
        str(folder / "model")
    )
    return folder / "model"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the collection `tiny`: 24 documents, a query for each."""
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    draw = np.random.default_rng(0)
    documents, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for n in range(24):
        words = " ".join(draw.choice(WORDS, 6))
        documents.append({"_id": f"d{n}", "title": f"{words} .", "text": f"{words} clear . Left lung is {words} ."})
        queries.append({"_id": f"q{n}", "text": f"{words} query"})
        qrels.append(f"q{n}\td{n}\t1")
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "train.tsv").write_text("\n".join(qrels) + "\n")
    monkeypatch.setenv("LIGHTBOX_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(place: Path, base: Path, kind: str, more: str = "", student: str = "frozen = 1") -> Path:
    path = place / f"{kind}.toml"
    data = 'sources = ["tiny"]' if kind == "cut" else 'source = "tiny"\nheld_out = 0.3'
    path.write_text(
        f'kind = "{kind}"\n[data]\n{data}\n[student]\nbase = "{base}"\n{student}\n{more}\n'
        "[schedule]\nepochs = [2]\nbatch = 4\nrate = 1e-3\n"
    )
    return path


def lineage(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "lineage.json").read_text())
    return read


# ---- what is learned from


def test_bm25_is_that_of_the_definition() -> None:
    scores = Lexical(["left lung", "lung lung effusion"]).scores(["lung effusion", "clear"])
    average = 2.5
    idf = {"lung": np.log(1 + 0.5 / 2.5), "effusion": np.log(1 + 1.5 / 1.5)}

    def part(term: str, count: int, length: int) -> float:
        return float(idf[term] * count / (count + 1.2 * (0.25 + 0.75 * length / average)))

    wanted = [[part("lung", 1, 2), part("lung", 2, 3) + part("effusion", 1, 3)], [0, 0]]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_the_hybrid_and_the_rereading_are_those_of_a_search() -> None:
    from retrieval.fusion import fuse
    from retrieval.types import Hit, Ranking

    lexical, dense = np.float32([[5, 3, 1, 0]]), np.float32([[0.2, 0.9, 0.1, 0.4]])
    ours = hybrid(lexical, dense, 0.55)[0]

    def ranking(scores: np.ndarray) -> Ranking:
        return Ranking(Hit(str(n), float(scores[n])) for n in np.argsort(-scores))

    legs = {"a": ranking(lexical[0]), "b": ranking(dense[0])}
    wanted = {hit.id: hit.score for hit in fuse(legs, {"a": 0.45, "b": 0.55}, 4)}
    np.testing.assert_allclose(ours, [wanted[str(n)] for n in range(4)], rtol=1e-5)
    top, read = np.array([[1, 0]]), np.float32([[7.0, 9.0]])
    again = reranked(ours[None], read, top, 0.5)[0]
    legs = {"first": ranking(ours), "rerank": Ranking([Hit("0", 9.0), Hit("1", 7.0)])}
    wanted = {hit.id: hit.score for hit in fuse(legs, {"first": 0.5, "rerank": 0.5}, 4)}
    np.testing.assert_allclose(again, [wanted[str(n)] for n in range(4)], rtol=1e-5)


def test_two_queries_about_one_document_stand_on_one_side(place: Path) -> None:
    with (place / "tiny" / "queries.jsonl").open("a") as queries, (place / "tiny/qrels/train.tsv").open("a") as qrels:
        for n in range(24):
            queries.write(json.dumps({"_id": f"again{n}", "text": "left lung"}) + "\n")
            qrels.write(f"again{n}\td{n}\t1\n")
    read = read_collection(place / "tiny", 0.3)
    sides = [{row for query in part for row in query.relevant} for part in (read.train, read.dev)]
    assert sides[0].isdisjoint(sides[1])
    assert len(read.dev) == 2 * sum(is_held_out(f"d{n}", 0.3) for n in range(24)) > 0


def test_a_document_is_asked_by_its_title_and_its_last_sentence(place: Path) -> None:
    made = made_queries(read_collection(place / "tiny", 0.3))
    assert len(made) == 48
    assert made[1].text.startswith("Left lung is")
    assert made[0].relevant == made[1].relevant == (0,)


def test_ndcg_ranks_by_score() -> None:
    assert ndcg(np.float32([[0.1, 0.9]]), [Asked("q", "", (1,))]) == 1
    assert ndcg(np.float32([[0.9, 0.1]]), [Asked("q", "", (1,))]) == pytest.approx(1 / np.log2(3))
    assert best(np.float32([[0.1, 0.9, 0.5]]), 2).tolist() == [[1, 2]]


def test_a_collection_without_judged_queries_is_refused(place: Path) -> None:
    (place / "tiny" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tnone\t1\n")
    with pytest.raises(InputError, match="too few judged queries"):
        read_collection(place / "tiny", 0.3)


# ---- the tower


def test_a_student_that_has_not_learned_gives_the_vectors_of_its_base(base: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["left lung clear .", "effusion", "left lung effusion clear . " * 6]
    wanted = SentenceTransformer(str(base), device="cpu").encode(texts)
    for how in ({}, {"frozen": 1}, {"head": True}):
        np.testing.assert_allclose(Student(str(base), **how).encode(texts), wanted, atol=2e-3)


def test_frozen_layers_learn_nothing_and_read_a_text_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student(str(base), frozen=1)
    assert student.body is not None
    student.vectors(["left lung"]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in student.body.layers[0].parameters())
    assert all(p.grad is not None for p in student.body.layers[1].parameters())
    monkeypatch.setattr(student.body, "embedded", None)
    student.vectors(["left lung"])


def test_what_frozen_layers_made_is_kept_on_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["left lung", "effusion clear clear"]
    first = Student(str(base), frozen=1)
    first.keep(texts, tmp_path, quiet)
    second = Student(str(base), frozen=1)
    assert second.body is not None
    monkeypatch.setattr(second.body, "embedded", None)
    second.keep(texts, tmp_path, quiet)
    np.testing.assert_allclose(second.encode(texts), first.encode(texts), atol=1e-6)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"frozen": 3}, "frozen is 3 of 2 layers"),
        ({"layers": (1, 0)}, "rising numbers"),
        ({"layers": (0, 7)}, "0 to 1"),
    ],
)
def test_impossible_layers_are_refused(base: Path, student: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Student(str(base), **student)


def test_a_recipe_under_which_nothing_learns_is_refused(place: Path, base: Path) -> None:
    with pytest.raises(InputError, match="one must learn, or a head"):
        train(recipe(place, base, "text", student="frozen = 2"), place / "out", quiet)


# ---- the courses


def test_a_text_tower_learns_and_drops_into_a_collection(place: Path, base: Path) -> None:
    from encoders.text import text_encoder
    from retrieval.types import Item

    more = "[loss]\ndistil = 1.0\ncprd = 0.1\nnegatives = 2\ndepth = 5"
    folder = train(recipe(place, base, "text", more), place / "out", quiet)
    told = lineage(folder)
    assert {"data_digest", "recipe_digest", "base_digest", "teacher_digest", "commit", "seed"} <= set(told)
    assert told["queries"]["dev"] + told["queries"]["train"] == 24
    assert told["dev_by_share"][str(told["share"])] == max(told["dev_by_share"].values())
    assert [set(epoch) >= {"loss", "dev"} for epoch in told["epochs"]] == [True, True]
    encoder = text_encoder(str(folder), place / "cache")
    assert encoder.encode_queries([Item(text="left lung")]).shape == (1, 32)


def test_a_head_alone_learns_from_the_whole_collection(place: Path, base: Path) -> None:
    from encoders.text import text_encoder
    from retrieval.types import Item

    folder = train(recipe(place, base, "text", student="frozen = 2\nhead = true"), place / "out", quiet)
    moved = text_encoder(str(folder), place / "cache").encode_queries([Item(text="left lung")])
    still = text_encoder(str(base), place / "cache").encode_queries([Item(text="left lung")])
    assert (lineage(folder)["share"] > 0) == bool(np.abs(moved - still).max() > 1e-3)


def test_a_cut_student_nears_its_teacher(place: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from encoders import cut_course

    monkeypatch.setattr(cut_course, "HELD_OUT", 8)
    path = recipe(place, base, "cut", student="layers = [1]")
    path.write_text(path.read_text().replace("epochs = [2]", "epochs = [4]").replace("batch = 4", "batch = 16"))
    folder = train(path, place / "out", quiet)
    told = lineage(folder)
    figures = [epoch["dev"] for epoch in told["epochs"]]
    assert figures[-1] > figures[0]
    assert told["straightened"]["dev"] > figures[-1]
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 1


def test_a_narrow_student_loses_what_varies_least(base: Path) -> None:
    from encoders.cut_course import narrow

    texts = [" ".join(draw) for draw in np.random.default_rng(0).choice(WORDS, (40, 8))]
    student, whole = Student(str(base), layers=(0, 1)), Student(str(base), layers=(0, 1))
    dead = [3, 40, 51]  # units that always give the same: nothing is lost without them
    for layer in (*student.body.layers, *whole.body.layers):
        with torch.no_grad():
            layer.intermediate.dense.weight[dead] = 0.0
            layer.intermediate.dense.bias[dead] = 1.0
    narrow(student, 61, texts)
    assert [layer.intermediate.dense.weight.shape[0] for layer in student.body.layers] == [61, 61]
    np.testing.assert_allclose(student.encode(texts), whole.encode(texts), atol=1e-5)
    narrow(student, 30, texts)
    assert np.abs(student.encode(texts) - whole.encode(texts)).max() > 1e-4
    with pytest.raises(InputError, match="the layers of the base are 30 wide"):
        narrow(student, 31, texts)


def test_a_narrow_student_is_saved_as_it_is(place: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from encoders import cut_course
    from encoders.text import text_encoder
    from retrieval.types import Item

    monkeypatch.setattr(cut_course, "HELD_OUT", 8)
    folder = train(recipe(place, base, "cut", student="layers = [1]\nwidth = 40"), place / "out", quiet)
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 40
    made = text_encoder(str(folder), place / "cache").encode_queries([Item(text="left lung")])
    np.testing.assert_allclose(Student(str(folder)).encode(["left lung"]), made, atol=1e-4)
    with pytest.raises(InputError, match="none may be frozen"):
        train(recipe(place, base, "cut", student="layers = [1]\nwidth = 40\nfrozen = 1"), place / "other", quiet)


ALIKE = partial(tversky_matrix, by=Measure(Index(), lambda concept: (), lambda concept: ()))


@pytest.fixture
def reports(place: Path, base: Path) -> Path:
    """A recipe over 240 studies of two sections; what they say of three of the words is all that is alike in them."""
    draw, rows = np.random.default_rng(0), []
    for n in range(240):
        sections = [" ".join(draw.choice(WORDS, 2)) + "." for _ in range(2)]
        films = [{"file": f"{n}.png", "projection": "Frontal"}]
        rows.append({"uid": f"u{n}", "findings": sections[0], "impression": sections[1], "images": films})
    folder = place / "films"
    folder.mkdir()
    (folder / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = place / "reports.toml"
    path.write_text(
        f'kind = "reports"\n[data]\nsource = "films"\n[student]\nbase = "{base}"\nfrozen = 1\n[loss]\n'
        "relations = 1.0\n[schedule]\nepochs = [8]\nbatch = 32\nrate = 1e-2\n"
    )
    return path


def test_a_tower_for_reports_learns_which_are_alike(reports: Path, place: Path) -> None:
    untouched = report_course(reports, WordLinker(WORDS[1:]), ALIKE).judge()["dev"]
    folder = train(reports, place / "out", quiet, linker=WordLinker(WORDS[1:]), alike=ALIKE)
    told = lineage(folder)
    assert told["epochs"][-1]["dev"] > untouched + 0.05
    assert told["reports"] + told["dev_reports"] == len(read_studies(place / "films"))
    again = train(reports, place / "again", quiet, linker=WordLinker(WORDS[1:]), alike=ALIKE)
    assert lineage(again)["epochs"][-1]["dev"] == told["epochs"][-1]["dev"]
    other = train(reports, place / "other", quiet, linker=WordLinker(WORDS[:-1]), alike=ALIKE)
    assert not np.array_equal(*(load_file(f / "model.safetensors")[QUERY] for f in (folder, other)))  # it is taught


def test_a_tower_for_reports_learns_without_a_teacher_too(reports: Path, place: Path) -> None:
    reports.write_text(reports.read_text().replace("relations = 1.0", "relations = 0.0\ncontrast = 1.0"))
    folders = [train(reports, place / str(n), quiet, linker=WordLinker(WORDS[n : n + 3]), alike=ALIKE) for n in (0, 1)]
    losses = [[epoch["loss"] for epoch in lineage(folder)["epochs"]] for folder in folders]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_findings_without_an_impression_have_nothing_to_be_compared_with(reports: Path, place: Path) -> None:
    reports.write_text(reports.read_text().replace("relations = 1.0", "relations = 0.0\ncontrast = 1.0"))
    path = place / "films" / "reports.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for kept in (1, 0):  # of 240 reports: a batch may have none
        halves = [row | {"impression": row["impression"] if n < kept else None} for n, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in halves))
        if kept:
            train(reports, place / "out", quiet, linker=WordLinker(WORDS), alike=ALIKE)
            continue
        with pytest.raises(InputError, match="no report has both"):
            train(reports, place / "none", quiet, linker=WordLinker(WORDS), alike=ALIKE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("relations = 1.0", "relations = 0.0", "both 0; nothing would be learned"),
        ("relations = 1.0", "relations = 1.0\nteacher = 0", r"loss\.teacher is 0; it must lie between"),
        ('source = "films"', 'source = "nowhere"', r"no reports\.jsonl in .*nowhere"),
        ('source = "films"', 'source = "films"\npart = "dev"', r"data\.part is 'dev'; it must be one of train, all"),
        ("batch = 32", "batch = 512", "reports to learn from and .* to judge by"),
        ("frozen = 1", "frozen = 2", "one must learn"),
        ('"films"', '"silent"', "nothing to judge by"),
    ],
)
def test_a_bad_recipe_for_reports_is_refused(reports: Path, place: Path, old: str, new: str, message: str) -> None:
    reports.write_text(reports.read_text().replace(old, new))
    lines = (place / "films" / "reports.jsonl").read_text()
    (place / "silent").mkdir()
    (place / "silent" / "reports.jsonl").write_text(re.sub("lung|left|effusion|clear", "nothing", lines))
    with pytest.raises(InputError, match=message):
        train(reports, place / "out", quiet, linker=WordLinker(WORDS), alike=ALIKE)
    assert not (place / "out").exists()


def test_a_tower_for_reports_needs_what_reads_them(reports: Path, place: Path) -> None:
    with pytest.raises(InputError, match="needs a linker"):
        train(reports, place / "out", quiet)


def test_chunks_give_the_gradient_of_the_whole_batch_dropout_included(base: Path) -> None:
    from encoders.chunks import Chunked

    texts = ["left lung", "effusion", "clear clear left", "lung", "effusion left"]
    gradients = []
    for size in (0, 2):
        student = Student(str(base), frozen=1)
        student.module.train()
        for part in student.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # all at once and in chunks, dropout draws in another order
        chunked = Chunked(student.vectors, size)
        vectors = chunked(texts)
        ((vectors @ vectors.T).logsumexp(1).sum()).backward()
        chunked.backward()
        gradients.append([p.grad.clone() for p in student.module.parameters() if p.grad is not None])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


def test_a_chunk_draws_the_second_time_what_it_drew_the_first() -> None:
    from encoders.chunks import Chunked

    weight = torch.ones(4, requires_grad=True)

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return torch.nn.functional.dropout(weight, 0.5)[None].expand(len(texts), 4)

    torch.manual_seed(0)
    chunked = Chunked(encode, 1)
    vectors = chunked(["a", "b", "c"])
    vectors.sum().backward()  # type: ignore[no-untyped-call]
    chunked.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, vectors.detach().sum(0))  # 2 where kept, in both passes


# ---- what goes wrong


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("text", "[schedule]", "[schedule]\nhurry = 1", r"unknown key schedule\.hurry"),
        ("text", "frozen = 1", "frozen = 1\nwidth = 3", r"unknown key student\.width; known here: .*frozen"),
        ("text", "held_out = 0.3", "held_out = 1.5", r"data\.held_out is 1\.5; it must lie between 0 and 0\.9"),
        ("text", "batch = 4", "batch = 1", r"schedule\.batch is 1; it must lie between"),
        ("text", "[schedule]", "[loss]\ncontrast = 0.0\n[schedule]", "nothing would be learned"),
        ("text", "[schedule]", "[loss]\ncprd = 1.0\n[schedule]", r"loss\.negatives must be 2 or more"),
        ("text", 'kind = "text"', 'kind = "poem"', r"kind is 'poem'; it must be one of"),
        ("cross", "[schedule]", "[loss]\nnegatives = 0\n[schedule]", "learns by comparing"),
        ("cross", "[schedule]", "[loss]\nmade = 1.0\n[schedule]", r"schedule\.epochs needs a second one"),
        ("cut", "frozen = 1", "frozen = 0", "names no layer"),
        ("text", "frozen = 1", "head = 1", r"student\.head is 1; needed is bool"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_key(
    place: Path, base: Path, kind: str, old: str, new: str, message: str
) -> None:
    path = recipe(place, base, kind)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        train(path, place / "out", quiet)


def test_a_loss_that_is_no_number_stops_the_run(place: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from encoders import text_course

    monkeypatch.setattr(text_course, "info_nce", lambda *_, **__: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(BackendError, match=r"loss is nan in epoch 1: lower schedule\.rate"):
        train(recipe(place, base, "text"), place / "out", quiet)
    assert not (place / "out" / "model.safetensors").exists()


def test_an_interrupted_run_ends_as_if_it_had_not_been(place: Path, base: Path) -> None:
    path = recipe(place, base, "text")
    whole = load_file(train(path, place / "whole", quiet) / "model.safetensors")

    def stop(phase: str, done: int, total: int | None) -> None:
        if phase.startswith("epoch 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(path, place / "halted", stop)
    assert not (place / "halted" / "model.safetensors").exists()
    for name, value in load_file(train(path, place / "halted", quiet) / "model.safetensors").items():
        assert torch.equal(value, whole[name]), name


def test_a_full_disk_leaves_no_half_saved_model(place: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentence_transformers

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sentence_transformers.SentenceTransformer, "save_pretrained", refuse)
    with pytest.raises(BackendError, match=r"cannot be written: .*No space left"):
        train(recipe(place, base, "text"), place / "out", quiet)
    assert not (place / "out" / "model.safetensors").exists()
    assert (place / "out" / "checkpoint.safetensors").exists()  # the same command goes on from here


# ---- cross-encoders


@pytest.fixture
def cross(place: Path, base: Path) -> Path:
    more = "[teacher]\ndepth = 8\n[loss]\nnegatives = 3\ndepth = 6"
    return train(recipe(place, base, "cross", more), place / "cross", quiet)


def test_a_cross_encoder_learns_reranks_and_teaches(place: Path, base: Path, cross: Path) -> None:
    from encoders.cross import cross_encoder
    from encoders.joint import load_joint
    from encoders.models import configuration
    from retrieval.types import Document, Item

    told = lineage(cross)
    assert told["best_epoch"] in (1, 2)
    assert {"dev", "alone"} <= set(told["epochs"][0])
    ours = cross_encoder(str(cross), place / "cache")
    documents = [
        Document(id=str(n), text=text) for n, text in enumerate(["left lung", "clear .", "effusion left " * 30])
    ]
    scores = ours.score(Item(text="left effusion"), documents)
    model = load_joint(cross, configuration(cross / "config.json", "cross"), "cross")
    with torch.no_grad():
        wanted = model.module(**model.features([("left effusion", d.content) for d in documents]))[:, 0]
    np.testing.assert_allclose(scores, wanted, atol=1e-3)
    more = f'[teacher]\ncross = "{cross}"\ndepth = 4\n[loss]\ndistil = 1.0'
    folder = train(recipe(place, base, "text", more), place / "taught", quiet)
    assert lineage(folder)["teacher_digest"] == ours.digest


def test_a_cross_encoder_warms_up_on_what_costs_no_judge(place: Path, base: Path) -> None:
    """All layers read both sides; made queries and another collection first, labelled queries after."""
    from encoders.cross import cross_encoder
    from encoders.joint import load_joint
    from encoders.models import configuration
    from retrieval.types import Document, Item

    more = "[loss]\nnegatives = 3\ndepth = 6\nmade = 1.0"
    path = recipe(place, base, "cross", more, student="frozen = 0")
    text = path.read_text().replace("held_out = 0.3", 'held_out = 0.3\nothers = ["tiny"]\nshare = 0.5')
    path.write_text(text.replace("epochs = [2]", "epochs = [1, 1]"))
    folder = train(path, place / "warm", quiet)
    told = lineage(folder)
    assert told["queries"]["warm"] == 48 + 24
    assert len(told["epochs"]) == 2
    assert "others_digest" in told
    config = configuration(folder / "config.json", "warm")
    assert config["separate"] == 0
    model = load_joint(folder, config, "warm")
    with torch.no_grad():
        wanted = model.module(**model.features([("left", "effusion lung")]))[:, 0]
    scores = cross_encoder(str(folder), place / "cache").score(
        Item(text="left"), [Document(id="d", text="effusion lung")]
    )
    np.testing.assert_allclose(scores, wanted, atol=1e-3)


def test_what_a_document_is_asked_by_is_cut_out_of_it(place: Path, base: Path) -> None:
    from encoders.cross_course import made_questions
    from encoders.text import text_encoder
    from encoders.text_course import Lesson
    from encoders.text_recipe import Teacher

    collection = read_collection(place / "tiny", 0.3)
    lesson = Lesson(collection, text_encoder(str(base), place / "cache"), Teacher(), True, place / "cache", quiet)
    asked = made_questions(lesson, 5)
    assert len(asked) == 48
    for question, made in zip(asked, lesson.made, strict=True):
        own = lesson.texts[made.relevant[0]]
        assert question.text in own
        assert len(question.relevant[0]) < len(own)
        assert own not in question.mined
        assert len(question.mined) == 5


def test_the_two_ways_through_a_joint_encoder_agree(base: Path) -> None:
    """Padded sides from memory, as in training, and whole rows of tokens, as in a search."""
    from encoders.joint import Joint, Loaded, pair_tokenizer
    from encoders.student import padded

    student = Student(str(base), frozen=1)
    joint = Joint(student.model[0].model, 1).eval()
    pairs = [("left", "effusion clear"), ("lung effusion left", "clear")]
    with torch.no_grad():
        sides = [padded(student.below(list(side))) for side in zip(*pairs, strict=True)]
        apart = joint.scored(sides[0][0].float(), sides[0][1], sides[1][0].float(), sides[1][1])
        whole = joint(**Loaded(joint, pair_tokenizer(student.model.tokenizer), 16).features(pairs))[:, 0]
    torch.testing.assert_close(apart, whole, atol=2e-3, rtol=0)


def test_an_untrained_joint_encoder_of_separate_layers_scores_by_the_dual_encoders_cosine(base: Path) -> None:
    from encoders.joint import Joint
    from encoders.student import padded

    student = Student(str(base), frozen=2)
    joint = Joint(student.model[0].model, 2).eval()
    with torch.no_grad():
        joint.head.scales.copy_(torch.tensor([1.0, 0.0]))
        query, document = padded(student.below(["left"])), padded(student.below(["lung clear"]))
        score = joint.scored(query[0].float(), query[1], document[0].float(), document[1])
    vectors = student.encode(["left", "lung clear"])
    assert score.item() == pytest.approx(float(vectors[0] @ vectors[1]), abs=2e-3)


# ---- what ships


def test_the_shipped_text_tower_loads_and_tells_where_it_comes_from(tmp_path: Path) -> None:
    from encoders.models import WEIGHTS
    from encoders.text import text_encoder
    from encoders.text_recipe import read_text
    from retrieval.types import Item

    folder = WEIGHTS / "scifact-text"
    assert lineage(folder)["recipe_digest"] == read_text(WEIGHTS.parent / "recipes" / "scifact-text.toml").digest
    card = (folder / "README.md").read_text("utf-8")
    for word in ("CC BY 4.0", "ODC-By", "lightbox train", "196 of the 300"):
        assert word in card
    assert (folder / "model.safetensors").stat().st_size < 60_000_000
    encoder = text_encoder("scifact-text", tmp_path)
    assert encoder.dim == 384
    near, far = "Statins lower cholesterol in adults.", "Zebrafish fins grow back after they are cut."
    vectors = encoder.encode_documents([Item(text=near), Item(text=far)])
    scores = vectors @ encoder.encode_queries([Item(text="Cholesterol is reduced by statins.")])[0]
    assert scores[0] > scores[1] + 0.3


def test_the_shipped_tower_for_reports_loads_and_tells_where_it_comes_from(tmp_path: Path) -> None:
    from encoders.models import WEIGHTS
    from encoders.text import text_encoder
    from encoders.text_recipe import read_reports
    from retrieval.types import Item

    folder = WEIGHTS / "chest-text"
    assert lineage(folder)["recipe_digest"] == read_reports(WEIGHTS.parent / "recipes" / "chest-text.toml").digest
    card = (folder / "README.md").read_text("utf-8")
    for word in ("CC BY-NC-ND 4.0", "lightbox train", "not for commercial use"):
        assert word in card
    texts = [
        "Heart size is enlarged. Lungs are clear.",
        "There is cardiomegaly without focal airspace disease.",
        "Heart size is normal. Lungs are clear.",
    ]
    scores = []
    for name in ("chest-text", None):
        vectors = text_encoder(name, tmp_path).encode_documents([Item(text=text) for text in texts])
        scores.append(vectors[0] @ vectors[1:].T)
    (same, other), untouched = scores
    assert same > other  # what they say
    assert untouched[0] < untouched[1] - 0.3  # how they say it
