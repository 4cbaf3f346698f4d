"""What a machine thinks of asking: thousands of requests from the OpenAPI document, and pages under random weather."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from retrieval.files import read_source
from server.assemble import Config
from server.home import Home, silent
from server.settings import Settings
from tests.small_home import CORPUS, FakeModels, small_app, write_source

HERE = "http://localhost"
FILMS = "/v1/collections/films"
CHECKS = (
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    unsupported_method,
)  # fmt: skip
SEEN = ("films", "nothing", "..", "a/b")
RETRIEVERS = ("hybrid", "lexical", "dense", "image", "ontology", "magic")


def home_of(folder: Path, corpus: Any) -> Home:
    made = Settings(home=folder, max_concurrent=1000, allowed_hosts=("testserver",))
    home = Home(made, FakeModels(made))
    home.index("films", read_source(write_source(folder / "source", corpus)).documents(), Config(), progress=silent)
    return home


# --- requests from the OpenAPI document -----------------------------------------------------------


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = home_of(tmp_path_factory.mktemp("fuzz"), CORPUS)
    return schemathesis.openapi.from_asgi("/openapi.json", small_app(home.settings, home))


def towards_what_exists(case: Any, number: int) -> None:
    """Names drawn at random name nothing: most requests should get further than 404 and 422."""
    if "c" in (case.path_parameters or {}) and case.method != "DELETE":
        case.path_parameters["c"] = SEEN[number % 7] if number % 7 < len(SEEN) else "films"
    for body in case.body if isinstance(case.body, list) else [case.body]:
        if isinstance(body, dict) and "retriever" in body and number % 5:
            body["retriever"] = RETRIEVERS[number % len(RETRIEVERS)]
        if isinstance(body, dict) and "cursor" in body and number % 3:
            body["cursor"] = None


def ask_everything(document: Any, each: int) -> Counter[int]:
    """`each` requests to every operation of the document, checked against it; how often each status came."""
    answers: Counter[int] = Counter()
    turn = itertools.count()
    for found in document.get_all_operations():
        operation = found.ok()

        @settings(max_examples=each, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            towards_what_exists(case, next(turn))
            answers[case.call_and_validate(checks=CHECKS).status_code] += 1

        ask()
    return answers


def test_no_request_of_the_document_breaks_the_service(document: Any) -> None:
    answers = ask_everything(document, 12)
    assert sum(answers.values()) >= 200
    assert answers[200] > 20  # not all were turned away at the door


@pytest.mark.long
def test_no_request_of_thousands_breaks_the_service(document: Any) -> None:
    assert sum(ask_everything(document, 350).values()) >= 5000


# --- pages ----------------------------------------------------------------------------------------

WORDS = ("heart", "effusion", "no effusion", "enlarged", "clear lung", "film")


def many(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "_id": f"d{n:04d}",
            "text": f"{WORDS[n % 6]} and {WORDS[n % 5]} {'again ' * (n % 4)}",
            "metadata": {"year": 2000 + n % 7, "projection": ("ap", "pa", None)[n % 3], "patient": n % 11},
        }
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Home, Iterator[int]]]:
    home = home_of(tmp_path_factory.mktemp("pages"), many(0, 60))
    app = small_app(home.settings, home)
    with TestClient(app, base_url=HERE) as client:
        yield client, home, itertools.count(100)


wheres = st.one_of(
    st.none(),
    st.sampled_from(
        [
            {"projection": "ap"},
            {"year": {"$gte": 2003}},
            {"$or": [{"projection": None}, {"year": {"$lt": 2002}}]},
            {"$not": {"patient": {"$in": [1, 2, 3]}}},
        ]
    ),
)
fusions = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(["minmax", "rrf"]),
            "weights": st.one_of(
                st.none(),
                st.dictionaries(
                    st.sampled_from(["lexical", "dense", "ontology"]), st.sampled_from([0.0, 0.3, 1.0]), min_size=1
                ).filter(lambda weights: any(weights.values())),
            ),
        }
    ),
)
searches = st.fixed_dictionaries(
    {
        "query": st.lists(
            st.fixed_dictionaries({"text": st.sampled_from(WORDS), "weight": st.sampled_from([1.0, 0.5, -0.4])}),
            min_size=1,
            max_size=2,
        ),
        "where": wheres,
        "fusion": fusions,
        "retriever": st.sampled_from(["hybrid", "lexical", "dense", "ontology"]),
        "group_by": st.sampled_from([None, None, "patient", "projection"]),
    }
)
weather = st.lists(st.sampled_from(["nothing", "add", "replace", "rebuild", "remove"]), max_size=5)


def happens(event: str, client: TestClient, home: Home, fresh: Iterator[int]) -> set[str]:
    """Something that others do meanwhile; returns the ids that are gone after it."""
    if event == "add":
        assert client.post(f"{FILMS}/documents", json=many(next(fresh), 2)).json()["added"] == 2
    elif event == "replace":
        replaced = {"_id": "d0007", "text": "an effusion of another kind", "metadata": {"year": 1990}}
        assert client.post(f"{FILMS}/documents", json=[replaced]).json()["added"] == 1
    elif event == "rebuild":
        home.rebuild("films", progress=silent)
    elif event == "remove":
        id = f"d{next(fresh) % 60:04d}"
        client.delete(f"{FILMS}/documents/{id}")
        return {id}
    return set()


def check_pages(paged: Any, asked: dict[str, Any], k: int, events: list[str]) -> None:
    client, home, fresh = paged
    client.post(f"{FILMS}/documents", json=many(0, 60))  # what an earlier example removed
    long = client.post(f"{FILMS}/search", json={**asked, "k": 1000}).json()
    assert "hits" in long, long
    expected = [hit["id"] for hit in long["hits"]]
    scores = {hit["id"]: hit["score"] for hit in long["hits"]}
    found: list[str] = []
    gone: set[str] = set()
    cursor, left = None, iter(events)
    while True:
        answer = client.post(f"{FILMS}/search", json={**asked, "k": k, "cursor": cursor}).json()
        assert "hits" in answer, answer
        assert len(answer["hits"]) <= k
        assert all(hit["score"] == scores[hit["id"]] for hit in answer["hits"])
        found += [hit["id"] for hit in answer["hits"]]
        cursor = answer["cursor"]
        if cursor is None:
            break
        gone |= happens(next(left, "nothing"), client, home, fresh) - set(found)
    assert found == [id for id in expected if id not in gone]


@given(asked=searches, k=st.integers(1, 25), events=weather)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_pages_together_equal_one_long_page(paged: Any, asked: dict[str, Any], k: int, events: list[str]) -> None:
    check_pages(paged, asked, k, events)


@pytest.mark.long
@given(asked=searches, k=st.integers(1, 25), events=weather)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_pages_together_equal_one_long_page_many_times(
    paged: Any, asked: dict[str, Any], k: int, events: list[str]
) -> None:
    check_pages(paged, asked, k, events)
