"""The page in a real browser: what a reader does with it, and that it never complains."""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, expect, sync_playwright

from encoders.images import read_picture
from retrieval.files import read_source
from retrieval.types import Encoder, ImageSource, Item, Matrix, Picture
from server.assemble import NONE, Config
from server.home import Home, silent
from server.settings import ApiKey, Settings
from tests.conftest import skip_without
from tests.fakes import HashingEncoder
from tests.small_home import FakeModels, small_app, write_source

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
MARKUP = "<img src=x onerror=document.title='broken'> <b>bold</b>"
KEY = "correct horse"


class DigestEncoder(HashingEncoder):
    """A picture is the direction of its bytes' digest, so that the same picture finds itself."""

    def encode_documents(self, items: Sequence[Item]) -> Matrix:
        return super().encode_documents([Item(text=_words(item)) for item in items])

    encode_queries = encode_documents


def _words(item: Item) -> str:
    return f"digest{item.image.digest}" if isinstance(item.image, Picture) else item.text


class PageModels(FakeModels):
    """The fakes, with real pictures."""

    def encoders(self, config: Config) -> tuple[dict[str, Encoder], str | None]:
        return ({}, None) if config.text_encoder == NONE else ({"text": DigestEncoder()}, "text")

    def reader(self, config: Config) -> Callable[[ImageSource], Picture]:
        return lambda source: source if isinstance(source, Picture) else read_picture(source)


def film(number: int) -> bytes:
    """A small picture, another one for each number."""
    image = Image.new("L", (96, 96), 30)
    ImageDraw.Draw(image).ellipse((10 + number, 20, 60 + number, 80), fill=120 + 5 * number)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def corpus(folder: Path) -> Path:
    documents: list[dict[str, Any]] = [
        {
            "_id": f"film/{n:02d}",
            "title": f"Film {n}",
            "text": f"{'no ' if n % 2 else 'a large '}effusion, the heart is enlarged, view {n}",
            "image": f"{n}.png",
            "metadata": {"projection": "ap" if n % 3 else "pa", "year": 2000 + n, "site": "https:no-host"},
        }
        for n in range(15)
    ]
    documents.append({"_id": "markup", "title": MARKUP, "text": MARKUP, "metadata": {"projection": MARKUP}})
    documents.append({"_id": "astral", "text": "𝔸𝔹 a heart 🫀 then an effusion", "metadata": {"projection": "ap"}})
    write_source(folder, documents)
    for n in range(15):
        (folder / f"{n}.png").write_bytes(film(n))
    return folder


class Served:
    """The service in a thread, on a free port."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        made = Settings(home=folder, **settings)
        home = Home(made, PageModels(made))
        home.index("films", read_source(corpus(folder / "source")).documents(), Config(), progress=silent)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(small_app(made, home), log_config=None, lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(15)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(tmp_path_factory.mktemp("page"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        skip_without("browser", "Chromium is not installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    yield from opened(browser, served.url)


def opened(browser: Browser, url: str, path: str = "/", **options: Any) -> Iterator[Page]:
    """A fresh tab at the page; at the end nothing was complained of and nothing came from elsewhere."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not _ours(request.url, url) else None)
    page.goto(url + path)
    yield page
    context.close()
    assert said == []


def _ours(address: str, url: str) -> bool:
    return address.startswith((url, "blob:", "data:"))


def type_in(page: Page, words: str) -> None:
    page.get_by_label("Words to search for").fill(words)
    page.get_by_role("button", name="Search", exact=True).last.click()
    expect(page.locator(".hit").first).to_be_visible()


def drop(page: Page, number: int) -> None:
    """Drops a picture on the page, as from a file manager."""
    page.evaluate(
        """([bytes]) => {
          const files = new DataTransfer();
          files.items.add(new File([new Uint8Array(bytes)], "film.png", { type: "image/png" }));
          document.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
        }""",
        [list(film(number))],
    )


def test_typing_finds_reports_with_their_words_and_findings_marked(page: Page) -> None:
    type_in(page, "large effusion")
    expect(page.locator("#status")).to_contain_text("found in")
    first = page.locator(".hit").first
    expect(first.locator("mark").first).to_have_text("large")
    expect(first.locator(".finding.affirmed").first).to_have_text("effusion")
    expect(page.locator(".hit .finding.negated").first).to_have_css("text-decoration-line", "line-through")
    film = page.locator(".wall img").first
    expect(film).to_have_js_property("complete", True)
    assert film.evaluate("img => img.naturalWidth") > 0


def test_a_film_opens_large_beside_its_report_and_the_arrows_go_on(page: Page) -> None:
    type_in(page, "large effusion")
    film = page.get_by_role("button", name="Film 1: ")
    film.hover()
    expect(page.locator(".hit").first).to_have_class("hit lit")  # the film and its report light up together
    film.click()
    viewer = page.get_by_role("dialog", name="Film")
    expect(viewer.locator("h3")).to_have_text(page.locator(".hit h3").first.inner_text())
    expect(viewer).to_contain_text("1 of")
    page.keyboard.press("ArrowRight")
    expect(viewer).to_contain_text("2 of")
    viewer.get_by_role("button", name="Invert").click()
    expect(viewer.locator("img")).to_have_css("filter", "brightness(1) contrast(1) invert(1)")
    viewer.get_by_role("button", name="Invert").click()
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


def test_the_start_says_how_to_ask_and_gives_examples(page: Page) -> None:
    expect(page.locator("#start")).to_contain_text("Drop a film")
    page.keyboard.press("/")
    expect(page.get_by_label("Words to search for")).to_be_focused()
    page.get_by_role("button", name="enlarged heart, no pleural effusion").click()
    expect(page.locator(".hit").first).to_be_visible()
    expect(page.locator("#start")).to_be_hidden()


def test_a_dropped_picture_finds_itself_and_mixes_with_words(page: Page) -> None:
    drop(page, 4)
    expect(page.locator(".hit h3").first).to_have_text("Film 4")
    type_in(page, "effusion")
    expect(page.get_by_label("Words 1.0")).to_be_visible()
    page.get_by_role("slider", name="film.png").fill("-1")
    expect(page.locator(".hit h3").first).not_to_have_text("Film 4")
    page.get_by_role("button", name="Remove film.png").click()
    expect(page.locator(".part")).to_have_count(0)


def test_filters_narrow_the_answer_and_say_how_many(page: Page) -> None:
    type_in(page, "effusion")
    chip = page.get_by_role("group", name="projection").get_by_role("button", name="pa 5", exact=True)
    chip.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("5 found")
    expect(page.get_by_role("button", name="pa 5", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="pa 5", exact=True)).to_be_focused()  # filtering does not lose the place
    other = page.get_by_role("group", name="projection").get_by_role("button", name="ap ")
    expect(other).not_to_have_text("ap 0")  # what the other value would add, not what the filter leaves of it
    page.keyboard.press("Enter")
    expect(page.locator("#status")).not_to_contain_text("5 found")


def test_pages_go_on_where_they_ended(page: Page) -> None:
    type_in(page, "effusion")
    expect(page.locator(".hit")).to_have_count(12)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".hit")).to_have_count(17)
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    names = page.locator(".hit .id, .hit h3").all_inner_texts()
    assert len(set(names)) == len(names)


def test_more_like_this_leaves_the_film_itself_out(page: Page) -> None:
    type_in(page, "effusion")
    name = page.locator(".hit h3").first.inner_text()
    page.get_by_role("button", name="More like this").first.click()
    expect(page.locator(".part .name")).to_contain_text(name)
    expect(page.locator(".hit h3").first).not_to_have_text(name)
    expect(page.locator("#results")).to_be_focused()


def test_the_explanation_opens_and_adds_up(page: Page) -> None:
    type_in(page, "large effusion")
    why = page.get_by_role("button", name="Why this hit").first
    expect(why).to_have_attribute("aria-expanded", "false")
    why.click()
    expect(why).to_have_attribute("aria-expanded", "true")
    shares = page.locator(".why").first.locator("tbody tr:not(:last-child) td:last-child").all_inner_texts()
    total = page.locator(".why").first.locator("tbody tr:last-child th:last-child").inner_text()
    assert sum(map(float, shares)) == pytest.approx(float(total), abs=0.001)


def test_two_retrievers_stand_side_by_side(page: Page) -> None:
    page.get_by_label("Beside").select_option("lexical")
    type_in(page, "effusion")
    expect(page.locator(".columns h2")).to_have_text(["hybrid", "lexical"])


def test_markup_is_shown_as_what_it_is(page: Page) -> None:
    type_in(page, "bold")
    expect(page.locator(".hit h3", has_text="<b>bold</b>")).to_be_visible()
    assert page.title() == "Lightbox"
    type_in(page, "heart")
    astral = page.locator(".hit", has_text="𝔸𝔹")
    expect(astral.locator("mark").first).to_have_text("heart")  # offsets count characters, not UTF-16 units


def test_a_wrong_request_is_told_in_words(page: Page) -> None:
    page.get_by_role("button", name="Search", exact=True).last.click()
    expect(page.locator("#status")).to_contain_text("Type some words")


def test_a_rebuild_and_an_evaluation_show_their_progress_and_outcome(page: Page) -> None:
    page.get_by_role("button", name="Jobs").click()
    page.get_by_role("button", name="Rebuild this collection").click()
    expect(page.locator("#jobs .job").first).to_contain_text("done", timeout=60_000)
    page.get_by_role("button", name="Measure").click()
    page.get_by_label("Judged queries").fill("large effusion → film/00 film/02")
    page.get_by_role("button", name="Evaluate every retriever").click()
    expect(page.locator("#evaluation table")).to_contain_text("nDCG@10", timeout=60_000)
    for measure in ("nDCG@10", "R@100", "RR@10"):
        expect(page.get_by_role("img", name=f"{measure} of every retriever")).to_be_visible()


def test_it_fits_a_narrow_dark_screen_and_works_by_keyboard(browser: Browser, served: Served) -> None:
    narrow = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
    for page in opened(browser, served.url, **narrow):
        page.get_by_label("Words to search for").press_sequentially("effusion")
        page.keyboard.press("Enter")
        expect(page.locator(".hit").first).to_be_visible()
        page.get_by_role("button", name="Why this hit").first.press("Enter")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        red, green, blue = (int(n) for n in page.locator("body").evaluate(_COLOUR))
        assert red + green + blue < 150


_COLOUR = "body => getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).slice(0, 3)"


def test_every_control_has_a_name(page: Page) -> None:
    type_in(page, "effusion")
    for control in page.locator("button:visible, input, select:visible, textarea:visible").all():
        named = control.evaluate("e => (e.getAttribute('aria-label') || e.innerText || [...(e.labels || [])].length)")
        assert named, control.evaluate("e => e.outerHTML")


def test_the_docs_list_every_route(browser: Browser, served: Served) -> None:
    for page in opened(browser, served.url, "/docs"):
        search = page.locator("details", has_text="/v1/collections/{c}/search").first
        search.locator("summary").click()
        expect(search).to_contain_text("takes: application/json Search")


def test_where_keys_are_set_the_page_asks_for_one_and_keeps_it(browser: Browser, tmp_path: Path) -> None:
    key = ApiKey("reader", "read", hashlib.sha256(KEY.encode()).hexdigest())
    running = Served(tmp_path, api_keys=(key,))
    context = browser.new_context()
    page = context.new_page()
    page.goto(running.url)
    page.get_by_label("Key", exact=True).fill(KEY)
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#status")).to_contain_text("17 documents")
    type_in(page, "effusion")
    expect(page.locator(".wall img").first).to_have_js_property("complete", True)
    page.reload()
    expect(page.locator("#status")).to_contain_text("17 documents")
    context.close()
    running.stop()
