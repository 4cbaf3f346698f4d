"""What the Elasticsearch backend does beyond the contract: builds, generations, back-pressure, and bad input."""

from __future__ import annotations

import gc
import json
import shutil
import socket
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexers import elastic, elastic_snapshot, intake
from indexers.elastic import Access, connect
from indexers.elastic_build import build_elastic, delete_elastic, rebuild_elastic, rollback_elastic
from indexers.elastic_documents import _sortable, clause, entry, inner_products, mapping, spec_of, written
from indexers.elastic_index import Place, generations, index_name, open_elastic
from retrieval.errors import BackendError, Conflict, Gone, InputError, Invalid, NotFound, TooLarge
from retrieval.filters import parse
from retrieval.types import Document, Item, Picture, Prepared, Rejected
from server import cli
from server.assemble import Config
from server.home import silent
from tests.conftest import skip_without
from tests.elastic_server import ask
from tests.elastic_stub import Answer, passing, refusing, serving
from tests.small_home import FakeModels, small_home, write_lines, write_source
from tests.test_index_contract import ENCODER, LINKER, SPACES, encoded, ids, near, text, words

# --- without a server ------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(), st.floats(allow_nan=False), st.integers(-(2**70), 2**70), st.just(10**400))


@given(numbers, numbers)
def test_numbers_as_text_are_in_the_order_of_values(a: float, b: float) -> None:
    a, b = a + 0, b + 0
    in_range = all(not isinstance(n, int) or abs(n) < 2**62 * 1000 for n in (a, b))
    left, right = _sortable(a), _sortable(b)
    assert len(left) == len(right)
    if in_range or a != b:
        assert (left <= right) == (a <= b) or abs(a) > 2**1000 or abs(b) > 2**1000
    assert a != b or left == right


def test_zero_has_one_sign_and_whole_numbers_keep_every_digit() -> None:
    assert _sortable(0) == _sortable(-0.0) == _sortable(0.0)
    assert _sortable(1) == _sortable(1.0)
    assert _sortable(2**53) < _sortable(2**53 + 1) < _sortable(2**53 + 2)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5))
def test_a_sent_vector_is_read_back_bit_by_bit(values: list[float]) -> None:
    row = np.array(values, np.float32)
    sent = json.loads(written({"id": "a", "v": row}))
    assert np.array_equal(np.array(sent["v"], np.float32), row)


def test_scores_of_elasticsearch_become_inner_products() -> None:
    products = np.array([1.0, 0.25, 0.0, -0.5, -1.0])
    reported = [1 / (1 - p) if p < 0 else 1 + p for p in products.tolist()]
    np.testing.assert_allclose(inner_products(np.array(reported)), products, atol=1e-12)


def test_documents_without_words_have_no_body() -> None:
    assert entry(Document(id="a", text="the of"), {})["body"] is None
    assert entry(Document(id="a", text="hearts"), {})["body"] == "heart"


def test_a_filter_that_is_nested_too_deep_is_refused() -> None:
    where: dict[str, Any] = {"a": 1}
    for n in range(28):
        where = {"$or": [where, {"b": n}]} if n % 2 else {"$and": [where, {"b": n}]}
    with pytest.raises(Invalid, match="nested deeper"):
        clause(parse(where))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["ivfpq:M=8,nlist=16", "distillvq:M=8,nlist=16", "frob"])
def test_a_vector_index_that_it_lacks_is_refused_with_the_list(spec: str) -> None:
    with pytest.raises(Invalid, match="there are flat, hnsw, hnsw-sq8, hnsw-sq4, hnsw-bin"):
        spec_of(spec)


def test_dimensions_over_the_limits_are_refused() -> None:
    big = {"text": SPACES["text"]._replace(dim=5000)}
    with pytest.raises(Invalid, match="at most 4096"):
        mapping({}, big, "flat")
    with pytest.raises(Invalid, match="at least 64"):
        mapping({}, SPACES, "hnsw-bin")


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:frob", "host:9200"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(Invalid, match="expected 'embedded' or a URL"):
        connect(url)


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(Invalid) as refused:
        connect("https://elastic:secret@host:9200")
    assert "LIGHTBOX_ES_PASSWORD" in str(refused.value)
    assert "secret" not in str(refused.value)


# --- with a server ---------------------------------------------------------------------------------------------------

Build = Callable[..., Any]


class Prepare:
    """Links and encodes with the fakes, and counts how many documents it was given."""

    digest = "fakes"

    def __init__(self) -> None:
        self.count = 0
        self.stop_after = 10**9

    def __call__(self, documents: Sequence[Document]) -> Prepared:
        if self.count >= self.stop_after:
            raise KeyboardInterrupt
        self.count += len(documents)
        linked = [Document(id=d.id, text=d.text, meta=d.meta, findings=LINKER.link([d.text])[0]) for d in documents]
        return Prepared(linked, encoded(linked), [])


@pytest.fixture
def place(elasticsearch: str, tmp_path: Path) -> Iterator[Place]:
    cluster = connect(elasticsearch)
    made = Place(cluster, f"t-{uuid.uuid4().hex[:12]}", tmp_path / "films")
    yield made
    delete_elastic(made)
    cluster.close()


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "BATCH", 10)


def build(place: Place, documents: Sequence[Document | Rejected], prepare: Prepare | None = None, **given: Any) -> Any:
    given = {"config": {"a": 1}, "spaces": SPACES, "vector_index": "flat", "progress": silent, **given}
    return build_elastic(place, documents, prepare or Prepare(), **given)


def films(count: int, words: str = "heart") -> list[Document]:
    return [text(f"d{n:04d}", f"{words} w{n} w{n % 7}", n=n) for n in range(count)]


def test_a_build_that_was_stopped_goes_on_and_nobody_saw_it(place: Place) -> None:
    prepare = Prepare()
    prepare.stop_after = 20
    with pytest.raises(KeyboardInterrupt):
        build(place, films(45), prepare)
    with pytest.raises(NotFound):
        open_elastic(place)
    done = build(place, films(45), again := Prepare())
    assert (done.generation, done.documents, done.added, done.reused) == (1, 45, 25, 20)
    assert again.count == 25
    assert len(open_elastic(place).snapshot()) == 45


def test_the_same_source_again_encodes_nothing_and_a_changed_one_what_changed(place: Place) -> None:
    build(place, films(30))
    changed = [*films(29), text("d0029", "lung"), text("new", "rib")]
    done = build(place, changed[1:], prepare := Prepare())
    assert (done.generation, done.documents, done.added, done.reused) == (2, 30, 2, 28)
    assert prepare.count == 2
    found = open_elastic(place)
    assert words(found, "lung") == ["d0029"]
    assert found.snapshot().fetch(["d0000"]) == [None]
    assert near(found, "rib", 1) == ["new"]


def test_parts_of_a_build_fill_one_generation_side_by_side(place: Place) -> None:
    asked = [{"shard": (n, 3)} for n in range(3)]
    parts = [threading.Thread(target=build, args=(place, films(95)), kwargs=part) for part in asked]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    with pytest.raises(NotFound):
        open_elastic(place)
    done = build(place, films(95), prepare := Prepare())
    assert (done.documents, done.added, done.reused, prepare.count) == (95, 0, 95, 0)
    assert list(generations(place)) == [1]


def test_a_part_with_other_settings_does_not_drop_what_the_others_wrote(place: Place) -> None:
    build(place, films(30), shard=(0, 2))
    with pytest.raises(Conflict, match="other settings is unfinished"):
        build(place, films(30), shard=(1, 2), vector_index="hnsw")
    assert build(place, films(30), vector_index="hnsw").documents == 30


def test_what_left_the_source_while_a_build_was_unfinished_is_not_published(place: Place) -> None:
    build(place, films(40), shard=(0, 1))
    assert build(place, films(25)).documents == 25
    assert len(open_elastic(place).snapshot()) == 25


def test_rollback_goes_back_and_only_to_good_generations(place: Place) -> None:
    for words_ in ("heart", "lung", "rib"):
        build(place, films(3, words_))
    found = open_elastic(place)
    assert list(generations(place)) == [2, 3]
    assert rollback_elastic(place) == 2
    assert len(words(found, "lung")) == 3
    assert found.snapshot().generation == 2
    with pytest.raises(NotFound, match="no earlier generation"):
        rollback_elastic(place)
    assert build(place, films(3, "skin")).generation == 4
    assert rollback_elastic(place) == 2


def test_a_gate_that_refuses_leaves_everything_as_it_was(place: Place) -> None:
    build(place, films(3))

    def gate(snapshot: Any) -> None:
        assert ids(snapshot.search_text(["lung"], 5)[0]) == ["d0000", "d0001", "d0002"]
        raise Conflict("gate: too low")

    with pytest.raises(Conflict, match="too low"):
        build(place, films(3, "lung"), gate=gate)
    assert open_elastic(place).snapshot().generation == 1
    assert words(open_elastic(place), "lung") == []


def test_a_rebuild_carries_over_what_others_wrote_meanwhile(place: Place) -> None:
    build(place, films(30))
    writer = open_elastic(place)

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase == "copy":
            late = [text("late", "rib"), text("d0001", "skin")]
            writer.add(late, encoded(late))
            writer.remove(["d0002"])

    done = rebuild_elastic(place, vector_index="hnsw", progress=progress)
    assert (done.generation, done.documents, done.added) == (2, 30, 0)
    found = open_elastic(place)
    assert sorted(words(found, "rib skin")) == ["d0001", "late"]
    assert found.snapshot().fetch(["d0002"]) == [None]
    assert near(found, "rib", 1) == ["late"]
    writer.add([text("after", "rib")], {})
    writer.publish()
    assert len(found.snapshot()) == 31


def test_writers_wait_for_a_swap_and_find_the_new_generation(place: Place) -> None:
    build(place, films(3))
    block = {"index.blocks.write": True}
    place.cluster.set(index_name(place.name, 1), block)
    timer = threading.Timer(0.5, lambda: place.cluster.set(index_name(place.name, 1), {"index.blocks.write": None}))
    timer.start()
    found = open_elastic(place)
    found.add([text("late", "rib")], {})
    found.publish()
    assert words(found, "rib") == ["late"]
    timer.join()
    place.cluster.set(index_name(place.name, 1), block)
    place.cluster._retry_s = 0.5
    with pytest.raises(Conflict, match="being rebuilt"):
        found.add([text("later", "rib")], {})


@pytest.mark.parametrize("kind", ["hnsw", "hnsw-sq8", "hnsw-sq4"])
def test_approximate_kinds_say_so_and_can_be_exact(place: Place, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_snapshot, "_EXACT_PART", 100)
    documents = films(350)
    build(place, documents, vector_index=kind)
    snapshot = open_elastic(place).snapshot()
    matrix = ENCODER.encode_documents([Item(text=d.content) for d in documents])
    queries = ENCODER.encode_queries([Item(text=f"w{n} w{n % 5}") for n in range(8)])
    fast = snapshot.search_vectors("text", queries, 10)
    exact = snapshot.search_vectors("text", queries, 10, exact=True)
    few = snapshot.search_vectors("text", queries, 10, parse({"n": {"$lt": 50}}))
    assert [r.exact for r in fast] == [False] * 8
    assert all(0.9 <= r.recall <= 1 for r in fast)
    assert all(r.exact and r.recall == 1 for r in exact + few)
    for query, a, b, c in zip(queries, fast, exact, few, strict=True):
        truth = matrix @ query
        assert [h.score for h in b] == pytest.approx(sorted(truth, reverse=True)[:10], abs=1e-5)
        assert [h.score for h in c] == pytest.approx(sorted(truth[:50], reverse=True)[:10], abs=1e-5)
        assert len({h.id for h in a} & {h.id for h in b}) >= 8
    described = snapshot.describe()["spaces"]["text"]["sides"]["text"]
    assert described["kind"] == kind
    assert described["recall"] >= 0.9


def test_pictures_are_kept_on_this_machine_and_come_back(place: Place) -> None:
    build(place, [])
    found = open_elastic(place)
    shot = Picture("digest", b"\x89PNG thumbnail", None, "images/a.png")
    found.add([Document(id="a", image=shot)], {})
    found.publish()
    assert found.snapshot().image("a") == shot.thumbnail
    shutil.rmtree(place.pictures)
    assert found.snapshot().image("a") is None
    fetched = found.snapshot().fetch(["a"])[0]
    assert fetched is not None
    assert fetched.image == shot._replace(thumbnail=b"")


def test_a_point_in_time_that_is_lost_is_opened_again_while_nothing_was_published(place: Place) -> None:
    build(place, films(3))
    found = open_elastic(place)
    snapshot = found.snapshot()
    place.cluster.forget(snapshot._pit[0])
    assert len(snapshot.search_text(["heart"], 5)[0]) == 3
    found.add([text("late", "heart")], {})
    found.publish()
    place.cluster.forget(snapshot._pit[0])
    with pytest.raises(Gone, match="search again"):
        snapshot.search_text(["heart"], 5)
    assert len(found.snapshot().search_text(["heart"], 5)[0]) == 4


def test_a_dropped_snapshot_asks_nothing_and_its_point_in_time_ends_with_the_next(place: Place) -> None:
    build(place, films(3))
    found = open_elastic(place)
    snapshot = found.snapshot()
    snapshot.search_text(["heart"], 1)
    (pit,) = snapshot._pit
    found.close()
    del snapshot
    gc.collect()
    assert pit in place.cluster._unneeded  # beside those of the build
    open_elastic(place).snapshot().search_text(["heart"], 1)
    assert pit not in place.cluster._unneeded


def test_every_second_bulk_refused_loses_nothing(place: Place, elasticsearch: str) -> None:
    through, seen = passing(elasticsearch), [0]

    def busy(method: str, path: str, body: bytes) -> Answer:
        if "_bulk" in path:
            seen[0] += 1
            if seen[0] % 2:
                return refusing(429, "es_rejected_execution_exception")(method, path, body)
        return through(method, path, body)

    with serving(busy) as url:
        done = build(Place(connect(url), place.name, place.folder), films(120))
    assert done.documents == 120
    assert seen[0] > 6
    assert len(open_elastic(place).snapshot()) == 120


def test_items_that_were_refused_are_sent_again_alone(place: Place, elasticsearch: str) -> None:
    build(place, [])
    through, sent = passing(elasticsearch), []

    def half(method: str, path: str, body: bytes) -> Answer:
        answer = through(method, path, body)
        if "_bulk" not in path:
            return answer
        found = json.loads(answer.body)
        sent.append(len(found["items"]))
        if len(sent) == 1:
            busy = {"status": 429, "error": {"type": "es_rejected_execution_exception"}}
            found["items"][::2] = [{"index": busy} for _ in found["items"][::2]]
        return answer._replace(body=json.dumps(found).encode())

    with serving(half) as url:
        found = open_elastic(Place(connect(url), place.name, place.folder))
        found.add(films(20), {})
        found.publish()
    assert sent[0] == 20
    assert sum(sent[1:]) == 10
    assert len(open_elastic(place).snapshot()) == 20


def test_a_cluster_that_stays_busy_is_told_in_one_line(place: Place, elasticsearch: str) -> None:
    build(place, [])
    through, busy = passing(elasticsearch), refusing(429, "circuit_breaking_exception")
    with serving(lambda m, p, b: busy(m, p, b) if "_bulk" in p else through(m, p, b)) as url:
        found = open_elastic(Place(connect(url), place.name, place.folder))
        found.place.cluster._retry_s = 1.0
        with pytest.raises(BackendError, match="kept refusing for 1 s .*circuit_breaking_exception"):
            found.add(films(5), {})


def test_sequences_count_publishes_of_all_processes(place: Place) -> None:
    build(place, films(3))
    one, two = open_elastic(place), open_elastic(place)
    assert one.snapshot().sequence == 1
    writers = [threading.Thread(target=w.publish) for w in (one, two) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert one.snapshot().sequence == two.snapshot().sequence == 7


# --- bad input: one line each, nothing changed -----------------------------------------------------------------------


def said(call: Callable[[], object], kind: type[Exception]) -> str:
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def at(url: str, tmp_path: Path, **access: Any) -> Place:
    return Place(connect(url, Access(**access)), "films", tmp_path / "films")


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert f"no server answers at {url}" in said(lambda: build(at(url, tmp_path), films(3)), BackendError)


def test_a_server_that_is_something_else(tmp_path: Path) -> None:
    with serving(lambda *_: Answer(200, b"<html>", "text/html", product=False)) as url:
        assert "is no Elasticsearch" in said(lambda: build(at(url, tmp_path), films(3)), BackendError)


def test_a_wrong_key_or_password(tmp_path: Path) -> None:
    with serving(refusing(401, "security_exception")) as url:
        for access in ({"api_key": "wrong"}, {"user": "me", "password": "wrong"}):
            message = said(lambda a=access: build(at(url, tmp_path, **a), films(3)), BackendError)  # type: ignore[misc]
            assert "refused our key or password; check LIGHTBOX_ES_API_KEY" in message
            assert "wrong" not in message


def test_a_key_that_may_not(tmp_path: Path) -> None:
    with serving(refusing(403, "security_exception")) as url:
        assert "needs more privileges" in said(lambda: build(at(url, tmp_path), films(3)), BackendError)


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        skip_without("es", "no openssl to make a certificate with")
    pem = tmp_path / "self.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", str(pem), "-out", str(tmp_path / "ca.pem")], check=True, capture_output=True)
    pem.write_text(pem.read_text() + (tmp_path / "ca.pem").read_text())
    with serving(refusing(401, "security_exception"), certificate=pem) as url:
        message = said(lambda: build(at(url, tmp_path), films(3)), BackendError)
        assert "certificate is not trusted; name its authority's PEM file in LIGHTBOX_ES_CA" in message
        message = said(lambda: build(at(url, tmp_path, ca=tmp_path / "ca.pem"), films(3)), BackendError)
        assert "refused our key" in message  # the connection itself is good now
    assert "no file" in said(lambda: at(url, tmp_path, ca=tmp_path / "none.pem"), Invalid)


@pytest.mark.parametrize("shape", ["index", "alias", "generation", "mapping"])
def test_an_index_of_another_tool_under_the_same_name(place: Place, elasticsearch: str, shape: str) -> None:
    other = {"index": place.name, "generation": index_name(place.name, 1)}.get(shape, f"other-{place.name}")
    body: dict[str, Any] = {"aliases": {place.name: {}}} if shape in ("alias", "mapping") else {}
    if shape == "mapping":  # where ours have text it has numbers
        body["mappings"] = {"properties": {"id": {"type": "long"}, "body": {"type": "long"}}}
    ask(elasticsearch, f"/{other}", "PUT", body, timeout=60)
    ask(elasticsearch, f"/{other}/_doc/1?refresh=true", "PUT", {"theirs": 1}, timeout=60)
    try:
        for call in (lambda: build(place, films(3)), lambda: delete_elastic(place), lambda: open_elastic(place)):
            message = said(call, InputError)
            assert "was not made by Lightbox; nothing was changed" in message
        assert ask(elasticsearch, f"/{other}/_count", timeout=60)["count"] == 1
        indices = ask(elasticsearch, f"/_cat/indices/*{place.name}*?format=json", timeout=60)
        assert [row["index"] for row in indices] == [other]
    finally:
        ask(elasticsearch, f"/{other}", "DELETE", timeout=60)


def test_fields_over_the_limits(place: Place) -> None:
    long_id = text("x" * 513, "heart")
    done = build(place, [long_id, text("a", "heart", note="n" * 40_000), text("b", "heart " + "y" * 40_000)])
    assert (done.documents, done.rejected) == (2, 1)
    assert "513 bytes, Elasticsearch takes 512" in done.quarantine.read_text()
    found = open_elastic(place)
    assert found.snapshot().count(parse({"note": "n" * 40_000})) == 1
    assert found.snapshot().count(parse({"note": "n" * 39_999})) == 0
    with pytest.raises(TooLarge):
        found.add([text("good", "rib"), long_id], {})
    found.publish()
    assert words(found, "rib") == []


def test_a_document_that_the_cluster_takes_in_no_request(place: Place, elasticsearch: str) -> None:
    build(place, [])
    through = passing(elasticsearch)
    with serving(lambda m, p, b: Answer(413) if "_bulk" in p and b"enormous" in b else through(m, p, b)) as url:
        found = open_elastic(Place(connect(url), place.name, place.folder))
        with pytest.raises(TooLarge, match="document 'd2': larger than the cluster takes"):
            found.add([text("d1", "a"), text("d2", "enormous"), text("d3", "b")], {})


@pytest.mark.parametrize("name", ["Films", "films-000001", "_films", "fil ms"])
def test_names_that_it_cannot_have(elasticsearch: str, tmp_path: Path, name: str) -> None:
    place = Place(connect(elasticsearch), name, tmp_path)
    assert "lower-case" in said(lambda: build(place, films(3)), Invalid)


def test_a_deleted_collection_does_not_come_back_as_an_index(place: Place, elasticsearch: str) -> None:
    build(place, films(3))
    found = open_elastic(place)
    snapshot = found.snapshot()
    delete_elastic(place)
    with pytest.raises(NotFound):
        found.add(films(1), {})
    with pytest.raises(InputError):
        place.cluster.write(place.name, [elastic.Operation("a", b"{}")], alias=True)
    assert not place.cluster.exists(place.name)
    with pytest.raises(InputError):
        snapshot.search_text(["heart"], 5)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_whole_way_from_the_shell(
    elasticsearch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("encoders", "linker", "findings_score", "scorer", "reader"):
        monkeypatch.setattr(f"server.assemble.Models.{part}", getattr(FakeModels, part))
    source, name = write_source(tmp_path / "source"), f"shell-{uuid.uuid4().hex[:12]}"

    def run(*given: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in given])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out + err

    def told(*given: str | Path) -> Any:
        status, out = run(*given, "--json")
        assert status == 0, out
        return json.loads(out.splitlines()[0])

    for part in ("1/2", "2/2"):
        assert "is encoded" in run("index", name, source, "--backend", elasticsearch, "--shard", part)[1]
    assert run("info", name)[0] == 2
    assert "3 documents (0 encoded, 3 reused" in run("index", name, source, "--backend", elasticsearch)[1]
    assert told("info", name)["index"]["backend"] == elasticsearch
    assert told("info", name)["config"]["vector_index"] == "flat"
    answer = told("search", name, "heart", "--where", '{"year": {"$lt": 2010}}')
    assert [hit["id"] for hit in answer["hits"]] == ["a"]
    assert told("evaluate", name, source, "--retriever", "lexical,ontology")["results"]["lexical"]["nDCG@10"] > 0.5
    write_lines(tmp_path / "more.jsonl", [{"_id": "d", "text": "a broken rib"}])
    assert "1 added" in run("add", name, tmp_path / "more.jsonl")[1]
    assert told("search", name, "rib", "--retriever", "lexical")["hits"][0]["id"] == "d"
    assert "1 removed" in run("remove", name, "d")[1]
    assert "generation 2" in run("rebuild", name, "--vector-index", "hnsw")[1]
    assert told("info", name)["index"]["vector_index"] == "hnsw"
    assert run("rebuild", name, "--vector-index", "ivfpq:M=8,nlist=4")[0] == 2
    assert "back at generation 1" in run("rollback", name)[1]
    assert run("index", name, source, "--backend", "embedded")[0] == 2
    assert "deleted" in run("delete", name)[1]
    assert run("search", name, "heart")[0] == 2
    assert not connect(elasticsearch).exists(name)


def test_a_collection_of_the_home_is_not_moved_unasked(elasticsearch: str, tmp_path: Path) -> None:
    home = small_home(tmp_path)
    home.index("films", films(3), Config(), progress=silent)
    with pytest.raises(Conflict, match="lives at embedded, not at http"):
        home.index("films", films(3), Config(), progress=silent, backend=elasticsearch)
    assert not connect(elasticsearch).exists("films")
