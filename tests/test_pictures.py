"""Pictures by URL: off by default, and when on, only from listed hosts at public addresses."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from retrieval.errors import InputError, Invalid, NotAnImage, TooLarge
from server import pictures
from server.pictures import Fetch, is_public

PUBLIC, LOOPBACK = "93.184.216.34", "127.0.0.1"
NAMES = {"films.example": [PUBLIC], "other.example": [PUBLIC], "inside.example": [LOOPBACK],
         "both.example": [PUBLIC, "10.0.0.1"]}  # fmt: skip


def fetch_of(answer: Callable[[httpx.Request], httpx.Response], *hosts: str) -> Fetch:
    return Fetch(
        hosts or NAMES, 1000, resolve=lambda host, _: NAMES.get(host, []), transport=httpx.MockTransport(answer)
    )


def never(request: httpx.Request) -> httpx.Response:
    raise AssertionError(f"asked {request.url}")


def leads_to(place: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(302, headers={"location": place})


def test_a_listed_host_is_asked_at_the_address_that_was_checked() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(b"PNG"))

    assert fetch_of(answer)("https://Films.example/a.png?b=1#c", "image") == b"PNG"
    assert str(asked[0].url) == f"https://{PUBLIC}/a.png?b=1"
    assert asked[0].headers["host"] == "films.example"
    assert asked[0].extensions["sni_hostname"] == "films.example"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://inside.example/", "http://both.example/",
        "http://films.example:8080/", "http://films.example:x/", "http://user@films.example/", "ftp://films.example/",
        "http://films.example.evil/", "http://2130706433/", "http://unknown.example/", "http://[", "http://",
        "http://169.254.169.254/latest/meta-data",
    ],
)  # fmt: skip
def test_other_places_are_never_asked(url: str) -> None:
    with pytest.raises(Invalid) as refused:
        fetch_of(never)(url, "query[0].image")
    assert refused.value.field == "query[0].image"


def test_by_default_nothing_is_fetched() -> None:
    with pytest.raises(Invalid, match="fetches no pictures"):
        Fetch((), 1000)("http://films.example/a.png", "image")


@pytest.mark.parametrize("place", ["http://127.0.0.1/", "//inside.example/", "http://nowhere.example/", "file:///etc"])
def test_a_redirect_is_checked_like_the_first_address(place: str) -> None:
    with pytest.raises(Invalid):
        fetch_of(leads_to(place))("http://films.example/", "image")


def test_redirects_come_to_an_end_and_may_lead_to_a_listed_host() -> None:
    with pytest.raises(Invalid, match="redirects"):
        fetch_of(leads_to("/again"))("http://films.example/", "image")

    def answer(request: httpx.Request) -> httpx.Response:
        onward = request.headers["host"] == "films.example"
        return (
            leads_to("//other.example/b.png")(request)
            if onward
            else httpx.Response(200, stream=httpx.ByteStream(b"PNG"))
        )

    assert fetch_of(answer)("http://films.example/a", "image") == b"PNG"


def test_size_time_status_and_silence_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route", request=request)

    cases: list[tuple[Callable[[httpx.Request], httpx.Response], type[InputError]]] = [
        (lambda request: httpx.Response(200, stream=httpx.ByteStream(b"x" * 1001)), TooLarge),
        (lambda request: httpx.Response(404), NotAnImage),
        (failing, NotAnImage),
    ]
    for answer, kind in cases:
        with pytest.raises(kind):
            fetch_of(answer)("http://films.example/", "image")
    monkeypatch.setattr(pictures, "TIMEOUT_S", -1.0)
    with pytest.raises(NotAnImage, match="not sent within"):
        fetch_of(lambda request: httpx.Response(200, stream=httpx.ByteStream(b"x")))("http://films.example/", "image")


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "224.0.0.1", "::1",
     "fe80::1%1", "fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "255.255.255.255"],
)  # fmt: skip
def test_addresses_within_networks_are_not_public(address: str) -> None:
    assert not is_public(address)
