"""The Python client against the service itself, plain and async."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from retrieval.files import read_source
from server import client as module
from server.assemble import Config
from server.client import AsyncClient, Client
from server.home import silent
from server.settings import ApiKey, Settings
from tests.small_home import PNG, FakeModels, Home, small_app, write_source

HERE = "http://localhost:8000"
KEY = ApiKey("writer", "write", hashlib.sha256(b"secret").hexdigest())


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    settings = Settings(home=tmp_path, api_keys=(KEY,))
    home = Home(settings, FakeModels(settings))
    source = read_source(write_source(tmp_path / "source"))
    home.index("films", source.documents(), Config(), progress=silent)
    return small_app(settings, home)


@pytest.fixture
def lightbox(app: FastAPI) -> Iterator[Client]:
    with TestClient(app, base_url=HERE) as running, Client(HERE, "secret") as client:
        running.headers["Authorization"] = "Bearer secret"
        client._http = running
        yield client


def test_it_searches_by_words_pictures_ids_and_pages(lightbox: Client) -> None:
    assert lightbox.search("films", "large effusion", k=1)["hits"][0]["id"] == "c"
    assert [hit["id"] for hit in lightbox.pages("films", "effusion", k=1, retriever="lexical")] == ["c", "b"]
    assert lightbox.add_documents("films", [{"_id": "p/1", "image": PNG}])["added"] == 1
    assert lightbox.search("films", PNG, retriever="image")["hits"][0]["id"] == "p/1"
    mixed = lightbox.search("films", [{"image": PNG, "weight": 2}, {"text": "heart"}], retriever="image")
    assert mixed["hits"][0]["id"] == "p/1"
    assert lightbox.image("films", "p/1") == PNG
    answers = lightbox.search_batch("films", ["heart", {"id": "nobody"}])
    assert [answer.get("status") for answer in answers] == [None, 404]


def test_it_changes_documents_and_follows_jobs(lightbox: Client) -> None:
    documents = [{"_id": f"n{n}", "text": "a heart", "metadata": {"n": n}} for n in range(1001)]
    sent = lightbox.add_documents("films", [*documents, {"_id": ""}])
    assert (sent["added"], sent["rejected"], sent["documents"]) == (1001, 1, 1004)
    assert [item["line"] for item in sent["items"]] == list(range(1, 1003))
    assert lightbox.document("films", "n7")["metadata"] == {"n": 7}
    assert lightbox.delete_document("films", "n7") == 1
    assert lightbox.delete_documents("films", {"n": {"$gte": 0}}) == 1000
    job = lightbox.rebuild("films")
    assert lightbox.wait(job["id"])["state"] == "done"
    assert lightbox.jobs()[0]["id"] == job["id"]
    assert lightbox.collection("films")["generation"] == 2
    assert len(lightbox.embeddings(["a heart"])[0]) == 16


def test_a_refusal_is_a_typed_error(lightbox: Client) -> None:
    with pytest.raises(module.Invalid) as refused:
        lightbox.search("films", "x", k=0)
    assert (refused.value.status, refused.value.field) == (422, "k")
    assert refused.value.request_id
    with pytest.raises(module.NotFound):
        lightbox.document("films", "nobody")
    with pytest.raises(module.Forbidden):
        lightbox.delete_collection("films")
    with pytest.raises(module.Conflict):
        lightbox.create_collection("films")
    with pytest.raises(module.NotFound):
        next(lightbox.job_events("nobody"))
    lightbox._http.headers["Authorization"] = "Bearer wrong"
    with pytest.raises(module.Unauthorized):
        lightbox.collections()


def test_the_async_client_does_the_same(app: FastAPI) -> None:
    async def scene() -> None:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), AsyncClient(HERE, "secret", transport=transport) as lightbox:
            assert (await lightbox.search("films", "large effusion"))["hits"][0]["id"] == "c"
            assert [hit["id"] async for hit in lightbox.pages("films", "heart", k=1, retriever="lexical")] == ["a"]
            assert (await lightbox.add_documents("films", [{"_id": "x"}]))["added"] == 1
            assert await lightbox.delete_document("films", "x") == 1
            job = await lightbox.evaluate(
                "films", queries=[{"_id": "q", "text": "heart"}], qrels={"q": {"a": 1}}, measures=["nDCG@10"]
            )
            done = await lightbox.wait(job["id"])
            assert done["result"]["results"]["hybrid"]["nDCG@10"] == pytest.approx(1.0)
            with pytest.raises(module.NotFound):
                await lightbox.collection("nothing")

    asyncio.run(scene())


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in found if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)


def test_the_client_needs_httpx_and_nothing_else_of_lightbox() -> None:
    code = "import sys, server.client; print([m for m in sys.modules if m.split('.')[0] in " \
           "('fastapi', 'numpy', 'pydantic', 'retrieval', 'indexers', 'torch')])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
