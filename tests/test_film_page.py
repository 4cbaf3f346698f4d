"""The page of the image tower: what is done to films, and how the figures are written."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.film_page import CHANGES, Changed, page
from retrieval.types import Item, Matrix


def _film(size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(20, 200, size[0]).astype(np.uint8), (size[1], 1)))


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_changed_film_is_a_grey_film(name: str) -> None:
    film = _film()
    changed = CHANGES[name](film.copy())
    assert changed.mode == "L"
    assert changed.width <= film.width
    assert (np.asarray(changed).shape == np.asarray(film).shape and np.array_equal(changed, film)) == (name == "none")


def test_a_quarter_is_covered() -> None:
    covered = np.asarray(CHANGES["a grey box over a quarter of the width and height"](Image.new("L", (80, 80))))
    assert (covered == 128).mean() == pytest.approx(1 / 16, rel=0.15)


class _Means:
    """Encodes a picture as its mean grey."""

    dim = 1

    def encode_documents(self, items: list[Item]) -> Matrix:
        return np.array([[_grey(item)] for item in items], np.float32)


def _grey(item: Item) -> float:
    assert isinstance(item.image, bytes)
    return float(np.asarray(Image.open(io.BytesIO(item.image))).mean())


def test_pictures_are_changed_and_texts_are_not() -> None:
    content = io.BytesIO()
    Image.new("L", (8, 8), 55).save(content, "PNG")
    inverted = Changed(_Means(), CHANGES["black and white exchanged"])  # type: ignore[arg-type]
    assert inverted.encode_documents([Item(image=content.getvalue())]).item() == 200
    assert inverted.dim == 1


def test_the_page_tells_figures_changes_and_examples_good_and_bad() -> None:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    seeds = [{"AUC words, mean of 10": figure, "AUC words, Mass": figure}] * 2
    hit = ["images/vqa_rad/a.jpg", 0.31, "has it"]
    rows = [{"query": q, "having": 4, "films": 9, "auc": a, "hits": [hit]} for q, a in (("scar", 0.9), ("mass", 0.4))]
    text = page({"seeds": seeds, "robustness": {"none": {"cosine": 1.0}}, "examples": rows})
    assert "| AUC words, mean of 10 | 0.500 [0.400, 0.600] | 0.500 | 0.500 ± 0.000 |" in text
    assert "AUC words, Mass" not in text
    assert "| none | 1.000 |" in text
    assert text.count('<img src="../demo/images/vqa_rad/a.jpg" width="180">') == 4
    assert "“mass”, AUC 0.40" in text
