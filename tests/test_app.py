"""The HTTP service over a small home: every route, and what happens to what should not be sent."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient

from encoders.images import read_picture
from retrieval.files import read_source
from retrieval.request import Request, RequestPart
from retrieval.types import Document
from server.app import _bound
from server.assemble import Config, Models
from server.batching import Searches
from server.home import silent
from server.problems import Refused
from server.settings import ApiKey, Settings
from tests.small_home import PNG, FakeModels, Home, small_app, write_source

HERE = "http://localhost:8000"
FILMS = "/v1/collections/films"


def client_of(folder: Path, **settings: Any) -> Iterator[TestClient]:
    made = Settings(home=folder, **settings)
    home = Home(made, FakeModels(made))
    source = read_source(write_source(folder / "source"))
    home.index("films", source.documents(), Config(image_encoder="none"), progress=silent)
    with TestClient(small_app(made, home), base_url=HERE, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    yield from client_of(tmp_path)


def ask(client: TestClient, text: str = "effusion", **more: Any) -> Any:
    return client.post(f"{FILMS}/search", json={"query": [{"text": text}], **more})


def ids(answer: Any) -> list[str]:
    return [hit["id"] for hit in answer.json()["hits"]]


def refused(response: Any, status: int, field: str | None = None) -> None:
    body = response.json()
    assert response.status_code == status, body
    assert response.headers["content-type"] == "application/problem+json"
    assert set(body) == {"type", "title", "status", "detail", "field", "request_id"}
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert "/tmp" not in body["detail"]
    assert "Traceback" not in body["detail"]
    assert "instance of" not in body["detail"]  # our classes are nothing to a caller
    if field is not None:
        assert body["field"] == field


# --- searching ------------------------------------------------------------------------------------


def test_a_search_answers_with_hits_that_explain_themselves(client: TestClient) -> None:
    answer = ask(client, "large effusion", facets=["projection"], explain=True).json()
    hit = answer["hits"][0]
    assert hit["id"] == "c"
    assert sum(p["weight"] * p["normalised"] for p in hit["parts"].values()) == pytest.approx(hit["score"], abs=1e-6)
    assert hit["highlights"]["text"] == [[2, 7], [8, 16]]
    assert [f["assertion"] for f in hit["findings"]] == ["affirmed"]
    assert answer["facets"]["projection"][0] == {"value": "ap", "count": 2}
    assert answer["exact"] is True
    assert "Fused" in answer["explanation"]["retriever"]
    assert {"encode", "search", "total"} <= set(answer["took_ms"])


def test_filters_retrievers_and_ids_work_as_in_the_shell(client: TestClient) -> None:
    assert ids(ask(client, where={"year": {"$gte": 2011}}, retriever="lexical")) == ["c", "b"]
    like = client.post(f"{FILMS}/search", json={"query": [{"id": "c"}], "k": 1})
    assert ids(like) != ["c"]


def test_pages_follow_the_cursor_to_the_end(client: TestClient) -> None:
    long, pages, cursor = ids(ask(client, k=3)), [], None
    while True:
        answer = ask(client, k=1, cursor=cursor)
        pages += ids(answer)
        cursor = answer.json()["cursor"]
        if cursor is None:
            break
    assert pages == long


def test_a_batch_gives_one_answer_or_one_problem_each(client: TestClient) -> None:
    body = [{"query": [{"text": "effusion"}]}, {"query": []}, {"query": [{"text": "heart"}], "k": 0}, "nonsense"]
    answers = client.post(f"{FILMS}/search/batch", json=body).json()["answers"]
    assert answers[0]["hits"][0]["id"] in "bc"
    assert [answer.get("status") for answer in answers[1:]] == [422, 422, 422]
    assert answers[2]["field"] == "k"


def test_multipart_carries_files_that_the_query_names(tmp_path: Path) -> None:
    made = Settings(home=tmp_path)
    home = Home(made, FakeModels(made))
    with TestClient(small_app(made, home), base_url=HERE) as client:
        assert client.put("/v1/collections/pictures", json={}).status_code == 201
        body = [{"_id": "p", "image": {"base64": base64.b64encode(PNG).decode()}}]
        assert client.post("/v1/collections/pictures/documents", json=body).json()["added"] == 1
        query = json.dumps({"query": [{"image": "film"}], "retriever": "image"})
        answer = client.post(
            "/v1/collections/pictures/search", data={"query": query}, files={"film": ("film.png", PNG, "image/png")}
        )
        assert ids(answer) == ["p"]
        assert client.get(answer.json()["hits"][0]["image_url"]).content == PNG


def test_searches_that_arrive_together_are_answered_together() -> None:
    class Slow:
        def __init__(self) -> None:
            self.sizes: list[int] = []
            self.release = threading.Event()

        def search_many(self, requests: list[Request]) -> list[Any]:
            self.release.wait(5)
            self.sizes.append(len(requests))
            return [{"hits": [r.query[0].text], "took_ms": {}} for r in requests]

    async def scene() -> None:
        engine = Slow()
        searches = Searches(lambda name: engine, limit=8)  # type: ignore[arg-type, return-value]
        requests = [Request(query=[RequestPart(text=str(n))]) for n in range(8)]
        tasks = [asyncio.create_task(searches("films", request)) for request in requests]
        await asyncio.sleep(0.05)
        with pytest.raises(Refused) as full:
            await searches("films", requests[0])
        assert full.value.status_code == 429
        engine.release.set()
        answers = await asyncio.gather(*tasks)
        assert [answer["hits"] for answer in answers] == [[str(n)] for n in range(8)]
        assert engine.sizes == [8]  # they gathered before the first batch was taken
        searches.close()

    asyncio.run(scene())


# --- documents and collections --------------------------------------------------------------------


def test_documents_are_added_shown_and_removed(client: TestClient) -> None:
    lines = [
        '{"_id": "n/1", "text": "an effusion again", "metadata": {"year": 2020}}',
        "{broken",
        '{"_id": "", "text": "x"}',
        '{"_id": "p", "image": "../secret.png"}',
        '{"_id": "n/1", "text": "a pneumothorax"}',
    ]
    sent = client.post(
        f"{FILMS}/documents", content="\n".join(lines), headers={"content-type": "application/x-ndjson"}
    ).json()
    assert (sent["added"], sent["rejected"], sent["documents"]) == (1, 3, 4)
    assert [(item["line"], item["status"]) for item in sent["items"]] == [
        (1, "replaced"), (2, "rejected"), (3, "rejected"), (4, "rejected"), (5, "added")]  # fmt: skip
    shown = client.get(f"{FILMS}/documents/n/1").json()
    assert shown["text"] == "a pneumothorax"
    assert client.delete(f"{FILMS}/documents/n/1").json() == {"deleted": 1}
    refused(client.get(f"{FILMS}/documents/n/1"), 404)


def test_documents_are_removed_by_filter_but_never_by_an_empty_one(client: TestClient) -> None:
    assert client.post(f"{FILMS}/documents/delete", json={"where": {"projection": "ap"}}).json() == {"deleted": 2}
    refused(client.post(f"{FILMS}/documents/delete", json={"where": {}}), 422, "where")


def test_collections_are_made_described_and_dropped(client: TestClient) -> None:
    assert [c["collection"] for c in client.get("/v1/collections").json()["collections"]] == ["films"]
    about = client.get(FILMS).json()
    assert about["documents"] == 3
    assert "hybrid" in about["retrievers"]
    assert about["facets"] == ["projection"]
    assert client.put("/v1/collections/new", json={"image_encoder": "none"}).status_code == 201
    refused(client.put("/v1/collections/new", json={}), 409)
    refused(client.put("/v1/collections/paths", json={"text_encoder": "/etc/passwd"}), 422, "text_encoder")
    assert client.delete("/v1/collections/new").status_code == 204
    refused(client.delete("/v1/collections/new"), 404)
    assert client.put("/v1/collections/new").json()["documents"] == 0
    told = client.get("/v1/collections").json()["collections"][0]
    assert told["spaces"]["text"]["dim"] == 16
    assert told["index"]["spaces"]["text"]["sides"]["text"]["recall"] == 1.0


def test_an_ontology_that_there_is_not_is_refused_when_a_collection_is_made(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeModels, "linker", Models.linker)
    refused(client.put("/v1/collections/new", json={"ontology": "no-such"}), 404)
    refused(client.get("/v1/collections/new"), 404)


def test_methods_of_a_path_are_told_and_head_is_get_without_a_body(client: TestClient) -> None:
    refused(client.patch(FILMS), 405)
    assert client.patch(FILMS).headers["allow"] == "DELETE, GET, PUT"
    for path in ("/", "/livez", FILMS):
        assert client.head(path).status_code == 200


def test_embeddings_have_the_openai_shape(client: TestClient) -> None:
    body = client.post("/v1/embeddings", json={"input": ["left effusion", "heart"], "model": "films"}).json()
    assert [len(item["embedding"]) for item in body["data"]] == [16, 16]
    refused(client.post("/v1/embeddings", json={"input": ["heart", " "], "model": "films"}), 422, "input[1]")
    refused(client.post("/v1/embeddings", json={"input": [1, 2], "model": "films"}), 422, "input")
    asked = {"input": "heart", "model": "films", "encoding_format": "base64", "dimensions": 16}
    [item] = client.post("/v1/embeddings", json=asked).json()["data"]
    assert np.frombuffer(base64.b64decode(item["embedding"]), "<f4").shape == (16,)
    refused(client.post("/v1/embeddings", json={**asked, "dimensions": 8}), 422, "dimensions")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"query": [{"text": "x"}], "k": 0}, 422, "k"),
        ({"query": [{"text": "x"}], "k": 10**9}, 413, "k"),
        ({"query": [{"text": "x"}], "surprise": 1}, 422, "surprise"),
        ({"query": [{"text": "x", "id": "a"}]}, 422, "query[0]"),
        ({"query": [{"id": "nobody"}]}, 404, "query[0].id"),
        ({"query": [{"vector": [1.0, 0.0]}]}, 409, "query[0].vector"),
        ({"query": [{"image": "not base64!"}]}, 422, "query[0].image"),
        ({"query": [{"image": base64.b64encode(b"<html>").decode()}]}, 415, "query[0].image"),
        ({"query": [{"text": "x"}], "where": {"a": {"$near": 1}}}, 422, "where.a.$near"),
        ({"query": [{"text": "x"}], "cursor": "stale"}, 422, "cursor"),
        ({"query": [{"text": "x"}], "retriever": "magic"}, 422, "retriever"),
        ({"query": [{"text": "x"}], "min_confidence": 2}, 422, "min_confidence"),
        ({"query": [{"text": "x"}], "fusion": {"weights": {"lexical": 0}}}, 422, "fusion.weights"),
        ({"query": "x"}, 422, "query"),
        ([], 422, None),
    ],
)
def test_bad_searches_are_refused_with_the_field_at_fault(tmp_path, body: Any, status: int, field: str | None) -> None:
    made = Settings(home=tmp_path)
    home = Home(made, FakeModels(made))
    home.index("films", read_source(write_source(tmp_path / "s")).documents(), Config(), progress=silent)
    with TestClient(small_app(made, home), base_url=HERE, raise_server_exceptions=False) as client:
        refused(client.post(f"{FILMS}/search", json=body), status, field)


def test_bodies_that_cannot_be_parsed_are_told_so(client: TestClient) -> None:
    kind = {"content-type": "application/json"}
    refused(client.post(f"{FILMS}/search", content=b"{", headers=kind), 400)
    refused(client.post(f"{FILMS}/search", content=b'{"query": NaN}', headers=kind), 400)
    refused(client.post(f"{FILMS}/search", content=b"\xff\xfe", headers=kind), 400)
    deep = b'{"query":[{"text":"x"}],"where":' + b'{"$not":' * 10_000 + b"{}" + b"}" * 10_000 + b"}"
    response = client.post(f"{FILMS}/search", content=deep, headers=kind)
    assert response.status_code in (400, 422)
    refused(client.post(f"{FILMS}/search", content=b"x", headers={"content-type": "text/plain"}), 415)


def test_unknown_places_are_not_found(client: TestClient) -> None:
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/collections/none"), 404)
    refused(client.post("/v1/collections/none/search", json={"query": [{"text": "x"}]}), 404)
    refused(client.post("/v1/collections/none/search/batch", json=[{"query": [{"text": "x"}]}, {}]), 404)
    refused(client.post("/v1/collections/none/search/batch", json=[{}]), 404)
    refused(client.get("/v1/collections/..%2F..%2Fetc"), 422, "collection")
    refused(client.get("/v1/jobs/..%2Fsecret"), 404)
    refused(client.get("/v1/collections/a%20b"), 422, "collection")


def test_a_body_over_the_limit_is_refused_however_it_is_sent(tmp_path: Path) -> None:
    for client in client_of(tmp_path, max_body=2000):
        big = json.dumps({"query": [{"text": "x" * 3000}]}).encode()
        kind = {"content-type": "application/json"}
        refused(client.post(f"{FILMS}/search", content=big, headers=kind), 413)
        refused(client.post(f"{FILMS}/search", content=iter([big[:1500], big[1500:]]), headers=kind), 413)


def test_a_backend_error_tells_nothing_of_the_machine(client: TestClient, tmp_path: Path) -> None:
    for path in (tmp_path / "collections" / "films").rglob("*.sqlite*"):
        path.write_bytes(b"damaged")
    response = client.get(f"{FILMS}/documents/a")
    assert response.status_code in (200, 503)  # an open file may still serve it
    assert str(tmp_path) not in response.text


# --- who may ask ----------------------------------------------------------------------------------


def test_other_hosts_and_origins_are_refused_without_keys(client: TestClient) -> None:
    refused(client.get("/v1/collections", headers={"host": "evil.example"}), 403)
    refused(client.get("/v1/collections", headers={"origin": "http://evil.example"}), 403)
    refused(client.get("/v1/collections", headers={"origin": "null"}), 403)
    refused(client.get("/v1/collections", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}), 403)
    assert client.get("/v1/collections", headers={"origin": HERE}).status_code == 200


def test_keys_have_roles(tmp_path: Path) -> None:
    keys = tuple(ApiKey(role, role, hashlib.sha256(role.encode()).hexdigest()) for role in ("read", "write", "admin"))
    for client in client_of(tmp_path, api_keys=keys):

        def as_(role: str) -> dict[str, str]:
            return {"authorization": f"Bearer {role}"}

        refused(client.get("/v1/collections"), 401)
        refused(client.get("/v1/collections", headers=as_("wrong")), 401)
        assert client.get("/v1/collections", headers={"x-api-key": "read"}).status_code == 200
        query = {"query": [{"text": "x"}]}
        assert client.post(f"{FILMS}/search", json=query, headers=as_("read")).status_code == 200
        refused(client.delete(f"{FILMS}/documents/a", headers=as_("read")), 403)
        refused(client.delete(FILMS, headers=as_("write")), 403)
        assert client.get("/").status_code == 200  # the page asks for a key by itself
        assert client.delete(FILMS, headers=as_("admin")).status_code == 204


def test_a_key_that_asks_too_often_waits_and_guessing_keys_is_slow(tmp_path: Path) -> None:
    key = ApiKey("one", "read", hashlib.sha256(b"secret").hexdigest())
    for client in client_of(tmp_path, max_rate=3, api_keys=(key,)):
        statuses = [client.get("/v1/jobs", headers={"x-api-key": "secret"}).status_code for _ in range(6)]
        assert statuses[:3] == [200] * 3
        assert 429 in statuses
        response = client.get("/v1/jobs", headers={"x-api-key": "secret"})
        refused(response, 429)
        assert response.headers["retry-after"] == "1"
        assert 429 in [client.get("/v1/jobs", headers={"x-api-key": "guess"}).status_code for _ in range(6)]
        assert client.get("/livez").status_code == 200


def test_every_answer_carries_the_headers_that_keep_a_browser_safe(client: TestClient) -> None:
    for path in ("/", "/docs", "/v1/collections", "/v1/nothing", "/static/app.js"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "x-request-id" in headers


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for path in (Path(__file__).parents[1] / "server" / "static").iterdir():
        text = path.read_text().replace("http://www.w3.org", "")
        assert "http://" not in text, path.name
        assert "https://" not in text, path.name
        assert "innerHTML" not in text, path.name


# --- jobs -------------------------------------------------------------------------------------------


def test_a_rebuild_is_a_job_that_reports_until_it_is_done(client: TestClient) -> None:
    before = client.get(FILMS).json()["generation"]
    job = client.post(f"{FILMS}/rebuild", json={"vector_index": "hnsw"})
    assert job.status_code == 202
    with client.stream("GET", f"/v1/jobs/{job.json()['id']}/events") as events:
        told = [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")]
    assert told[-1]["state"] == "done", told[-1]
    assert client.get(FILMS).json()["generation"] == before + 1
    assert ids(ask(client, "large effusion"))[0] == "c"
    assert client.get("/v1/jobs").json()["jobs"][0]["id"] == job.json()["id"]
    assert client.post(f"/v1/jobs/{job.json()['id']}/cancel").json()["state"] == "done"


def test_jobs_that_cannot_be_are_refused_before_they_start(client: TestClient) -> None:
    refused(client.post(f"{FILMS}/rebuild", json={"vector_index": "magic"}), 422)
    refused(client.post(f"{FILMS}/evaluations", json={"source": "../etc"}), 404, "source")
    refused(client.post(f"{FILMS}/evaluations", json={}), 422)
    refused(client.get("/v1/jobs/unknown"), 404)


# --- the service describes itself -----------------------------------------------------------------


def test_openapi_names_every_route_of_the_contract(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {
        "/v1/collections", "/v1/collections/{c}", "/v1/collections/{c}/search", "/v1/collections/{c}/search/batch",
        "/v1/collections/{c}/documents", "/v1/collections/{c}/documents/{id}", "/v1/collections/{c}/documents/delete",
        "/v1/collections/{c}/documents/{id}/image", "/v1/collections/{c}/rebuild", "/v1/collections/{c}/evaluations",
        "/v1/jobs", "/v1/jobs/{id}", "/v1/jobs/{id}/cancel", "/v1/jobs/{id}/events", "/v1/embeddings",
        "/livez", "/readyz", "/metrics",
    } <= set(document["paths"])  # fmt: skip
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]


def test_metrics_count_requests_by_route_and_never_by_id(client: TestClient) -> None:
    client.get(f"{FILMS}/documents/a")
    text = client.get("/metrics").text
    assert 'route="/v1/collections/{c}/documents/{id:path}"' in text
    assert "lightbox_stage_seconds" in text


# --- what is easy to get wrong --------------------------------------------------------------------


def test_answers_are_sent_without_waiting_for_the_client_to_acknowledge() -> None:
    async def undelayed() -> bool:
        accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        listening = _bound("127.0.0.1", 0)
        async with await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listening):
            _, client = await asyncio.open_connection(*listening.getsockname())
            server = await accepted
            delay = server.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for writer in (client, server):
                writer.close()
        return bool(delay)

    assert asyncio.run(undelayed())


def test_ids_may_hold_slashes_and_words_of_routes(client: TestClient) -> None:
    names = ["a/b", "x/image", "delete", "y/search", "..", "../z", "50% off?", "é/ü", "#1"]
    body = [{"_id": name, "text": "a heart", "image": {"base64": base64.b64encode(PNG).decode()}} for name in names]
    assert client.post(f"{FILMS}/documents", json=body).json()["added"] == len(names)
    for name in names:
        path = f"{FILMS}/documents/{quote(name, safe='')}"
        if name != "..":  # a client removes such a step from a path before it is sent
            assert client.get(path).json()["id"] == name
            assert client.get(client.get(path).json()["image_url"]).content == PNG
            assert client.delete(path).json() == {"deleted": 1}
    left = client.post(f"{FILMS}/documents/delete", json={"where": {"$not": {"year": {"$exists": True}}}})
    assert left.json() == {"deleted": 1}


def test_a_read_key_removes_nothing_whatever_the_id_is_called(tmp_path: Path) -> None:
    keys = (
        ApiKey("r", "read", hashlib.sha256(b"r").hexdigest()),
        ApiKey("w", "write", hashlib.sha256(b"w").hexdigest()),
    )
    for client in client_of(tmp_path, api_keys=keys):
        client.headers["x-api-key"] = "r"
        for path in ("documents/search", "documents/x%2Fsearch", "documents/x/search", "documents/search/batch", ""):
            refused(client.delete(f"{FILMS}/{path}"), 403)
        for path in ("documents", "documents/delete", "rebuild", "evaluations", "ingestions"):
            refused(client.post(f"{FILMS}/{path}", json={}), 403)
        refused(client.put("/v1/collections/new", json={}), 403)
        client.headers["x-api-key"] = "w"
        refused(client.delete(FILMS), 403)
        refused(client.delete("/v1/collections/a%2Fb"), 403)


def test_every_item_of_an_upload_is_checked_like_a_line_of_a_source(client: TestClient) -> None:
    lines = [
        b'{"_id": "ok", "text": "fine", "metadata": {"note": "<script>alert(1)</script>"}}',
        b'{"_id": "nan", "metadata": {"x": NaN}}',
        b'{"_id": "huge", "metadata": {"x": 1e999}}',
        b'{"_id": "long", "metadata": {"x": 99999999999999999999}}',
        b'{"_id": "half", "text": "\\ud800"}',
        b'{"_id": "control\\u0000"}',
        b'{"_id": "' + b"x" * 600 + b'"}',
        b'{"_id": "deep", "metadata": ' + b'{"a":' * 30 + b"1" + b"}" * 31,
        b'{"_id": "deeper", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"_id": "path", "image": "/etc/passwd"}',
        b'{"_id": "path2", "image": {"path": "/etc/passwd"}}',
        b'{"_id": "url", "image": {"base64": "http://127.0.0.1:1/x.png"}}',
        b'{"_id": "not64", "image": {"base64": "@@@"}}',
        b'{"_id": "notimage", "image": {"base64": "aGVsbG8="}}',
        b'{"_id": "extra", "surprise": 1}',
        b'{"_id": 5}',
        b"[]",
        b"\xff",
    ]
    kind = {"content-type": "application/x-ndjson"}
    response = client.post(f"{FILMS}/documents", content=b"\n".join(lines), headers=kind)
    sent = response.json()
    assert (sent["added"], sent["rejected"]) == (1, len(lines) - 1), sent
    assert all(item["reason"] for item in sent["items"][1:])
    assert "passwd" not in json.dumps([item["reason"] for item in sent["items"]])
    assert client.get(f"{FILMS}/documents/ok").json()["metadata"]["note"] == "<script>alert(1)</script>"
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("depth", [10, 60, 250, 600, 950, 10_000])
def test_filters_of_any_depth_are_answered_or_refused(client: TestClient, depth: int) -> None:
    where = b'{"$not":' * depth + b'{"year":2012}' + b"}" * depth
    kind = {"content-type": "application/json"}
    for path, body in (("search", b'{"query":[{"text":"x"}],"where":' + where + b"}"),
                       ("documents/delete", b'{"where":{"$and":[{"year":1}, ' + where + b"]}}")):  # fmt: skip
        response = client.post(f"{FILMS}/{path}", content=body, headers=kind)
        assert response.status_code in ((200, 422) if depth < 100 else (400, 422)), response.json()


def test_pictures_that_are_none_or_bombs_are_refused(tmp_path: Path) -> None:
    class Reading(FakeModels):
        def reader(self, config: Config) -> Any:
            return lambda image: read_picture(image, max_pixels=10_000)

    made = Settings(home=tmp_path)
    home = Home(made, Reading(made))
    home.create("films", Config())
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    bomb = head + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb += struct.pack(">I", zlib.crc32(bomb[12:])) + b"\0\0\0\0IEND\xaeB`\x82"
    with TestClient(small_app(made, home), base_url=HERE, raise_server_exceptions=False) as client:
        for picture, status in ((b"hello", 415), (b"", 415), (head, 415), (bomb, 413)):
            body = {"query": [{"image": base64.b64encode(picture).decode()}]}
            refused(client.post(f"{FILMS}/search", json=body), status, "query[0].image")
        sent = client.post(
            f"{FILMS}/documents", json=[{"_id": "b", "image": {"base64": base64.b64encode(bomb).decode()}}]
        ).json()
        assert (sent["added"], sent["rejected"]) == (0, 1)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"measures": ["nDCG@0"], "source": "x"}, "measures"),
        ({"measures": ["nonsense"], "source": "x"}, "measures"),
        ({"retrievers": ["magic"], "source": "x"}, "retriever"),
        ({"retrievers": ["hybrid+rerank"], "source": "x"}, "retriever"),
        ({"queries": [{"_id": "q", "text": "x"}], "qrels": {"p": {"a": 1}}}, "qrels"),
        ({"queries": [{"_id": "q"}, {"_id": "q"}], "qrels": {"q": {"a": 1}}}, "queries"),
        ({"queries": [{"_id": "q"}], "qrels": {"q": {"a": -1}}}, "qrels.q.a"),
        ({"source": "x", "queries": [{"_id": "q"}], "qrels": {}}, None),
    ],
)
def test_an_evaluation_is_refused_before_it_starts(client: TestClient, body: Any, field: str | None) -> None:
    refused(client.post(f"{FILMS}/evaluations", json=body), 422, field)
    assert client.get("/v1/jobs").json() == {"jobs": []}


def test_sources_of_the_configured_folder_are_evaluated_and_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "sources" / "more", [{"_id": "new", "text": "a heart"}, {"_id": ""}])
    monkeypatch.setenv("LIGHTBOX_SOURCES", str(tmp_path / "sources"))
    for client in client_of(tmp_path, sources=tmp_path / "sources"):
        jobs = [
            client.post(f"{FILMS}/ingestions", json={"source": "more"}).json(),
            client.post(f"{FILMS}/evaluations", json={"source": "more", "retrievers": ["lexical"]}).json(),
        ]
        added, measured = (ended(client, job["id"]) for job in jobs)
        assert added["result"] == {"documents": 4, "added": 1, "rejected": 1}
        assert added["errors"] == ["line 2: no _id, or an empty one"]
        assert measured["result"]["results"]["lexical"]["RR@10"] == 1.0
        refused(client.post(f"{FILMS}/ingestions", json={"source": "../more"}), 404, "source")
        refused(client.post(f"{FILMS}/evaluations", json={"source": "more", "split": "none"}), 404)


def ended(client: TestClient, id: str) -> Any:
    with client.stream("GET", f"/v1/jobs/{id}/events") as events:
        return [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")][-1]


def test_cursors_are_pinned_to_their_query_their_snapshot_and_their_collection(client: TestClient) -> None:
    cursor = ask(client, k=1).json()["cursor"]
    refused(ask(client, "another", k=1, cursor=cursor), 422, "cursor")
    for n in range(9):  # more published states than are kept
        client.post(f"{FILMS}/documents", json=[{"_id": f"n{n}", "text": "a heart"}])
        ask(client)
    refused(ask(client, k=1, cursor=cursor), 410, "cursor")
    forged = base64.urlsafe_b64encode(b'[1, 1, "x", "y", -5]').decode()
    refused(ask(client, cursor=forged), 422, "cursor")


def test_groups_thresholds_facets_and_fields_are_as_asked(client: TestClient) -> None:
    grouped = ask(client, group_by="projection", facets=["projection"], fields=["title"]).json()
    assert [hit["group"]["value"] for hit in grouped["hits"]] in (["ap", "pa"], ["pa", "ap"])
    assert sum(hit["group"]["size"] for hit in grouped["hits"]) == 3
    assert "text" not in grouped["hits"][0]
    assert ask(client, min_confidence=1.0).json()["hits"] == []  # three documents cannot be calibrated: none is sure
    assert ask(client, highlight=False).json()["hits"][0]["highlights"] == {}


def test_what_another_process_publishes_is_seen(client: TestClient, tmp_path: Path) -> None:
    other = Home(Settings(home=tmp_path), FakeModels(Settings(home=tmp_path)))
    before = client.get(FILMS).json()["generation"]
    other.add("films", [Document(id="theirs", text="a pneumothorax")], silent)
    assert ids(ask(client, "pneumothorax", retriever="lexical")) == ["theirs"]
    other.rebuild("films", progress=silent)
    assert ask(client, "pneumothorax").json()["generation"] == before + 1
    other.index("fresh", [Document(id="x", text="a heart")], Config(), progress=silent)
    assert len(client.post("/v1/collections/fresh/search", json={"query": [{"text": "heart"}]}).json()["hits"]) == 1
    other.delete("fresh")
    refused(client.post("/v1/collections/fresh/search", json={"query": [{"text": "heart"}]}), 404)


def test_the_log_holds_no_word_of_a_query_or_a_report(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ask(client, "secretword", where={"secretword": "secretword"})
    client.post(f"{FILMS}/documents", json=[{"_id": "secretword", "text": "secretword"}])
    client.get(f"{FILMS}/documents/secretword?q=secretword")
    ours = [record for record in caplog.records if record.name.startswith("lightbox")]
    assert len(ours) == 3
    for record in ours:
        assert "secretword" not in json.dumps(vars(record), default=str)


def test_bodies_of_every_route_are_limited_and_strict(tmp_path: Path) -> None:
    kind = {"content-type": "application/json"}
    for client in client_of(tmp_path, max_body=2000):
        for path in ("documents/delete", "evaluations", "rebuild", "documents"):
            big = json.dumps({"x": "y" * 3000}).encode()
            refused(client.post(f"{FILMS}/{path}", content=iter([big[:1500], big[1500:]]), headers=kind), 413)
            refused(client.post(f"{FILMS}/{path}", content=b'{"a": NaN}', headers=kind), 400)
            refused(client.post(f"{FILMS}/{path}", content=b'"\\ud800"', headers=kind), 400)
        for length in ("-1", "x", "9" * 30):
            refused(client.post(f"{FILMS}/search", content=b"{}", headers=kind | {"content-length": length}), 413)
        refused(client.request("BREW", f"{FILMS}/search"), 405)
        refused(client.get("/static/../app.py"), 404)
        refused(client.get("/static/%2e%2e/app.py"), 404)
    assert "BREW" not in client.get("/metrics").text
