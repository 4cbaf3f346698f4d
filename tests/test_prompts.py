"""Queries in several wordings: the mean of them, and what the ontology has to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from encoders.prompts import Prompts
from ontology.linker import Dictionary, load_linker
from ontology.wordings import MOST, wordings
from retrieval.types import Item, Matrix

_VECTORS = {
    "big heart": (1.0, 0.0, 0.0),
    "large heart": (0.8, 0.6, 0.0),
    "enlarged heart": (0.8, 0.6, 0.0),
    "heart, wide": (0.6, 0.8, 0.0),
    "football": (0.0, 0.0, 1.0),
}


class _Table:
    """Texts by a table, counted."""

    space, dim = "text", 3

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode_queries(self, items: Sequence[Item]) -> Matrix:
        self.asked += [item.text for item in items]
        return np.array([_VECTORS.get(item.text, (0, 1, 0)) for item in items], np.float32)


def _prompts(table: _Table, others: Sequence[str]) -> Prompts:
    return Prompts(table, lambda text: others if text == "big heart" else [])  # type: ignore[arg-type]


def test_a_phrase_is_joined_by_the_mean_of_its_wordings_without_the_outlier() -> None:
    prompts = _prompts(_Table(), ["large heart", "enlarged heart", "heart, wide", "football"])
    made = prompts.encode_queries([Item(text="big heart"), Item(text="football")])
    mean = np.sum([_VECTORS[text] for text in ("large heart", "enlarged heart", "heart, wide")], axis=0)
    wanted = np.array([1.0, 0.0, 0.0]) + mean / np.linalg.norm(mean)
    np.testing.assert_allclose(made[0], wanted / np.linalg.norm(wanted), rtol=1e-5)
    np.testing.assert_array_equal(made[1], _VECTORS["football"])


def test_one_wording_is_no_outlier_and_means_are_made_once() -> None:
    table = _Table()
    prompts = _prompts(table, ["heart, wide"])
    first, second = (prompts.encode_queries([Item(text="big heart")]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first[0], np.array([1.6, 0.8, 0]) / np.hypot(1.6, 0.8), rtol=1e-5)
    assert table.asked.count("heart, wide") == 1


def test_pictures_and_all_else_are_the_encoders() -> None:
    table = _Table()
    prompts = _prompts(table, ["heart, wide"])
    picture = Item(text="x", image=b"bytes")
    np.testing.assert_array_equal(prompts.encode_queries([picture])[0], (0, 1, 0))
    assert (prompts.space, prompts.dim) == ("text", 3)


@pytest.fixture(scope="module")
def linker(tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    return load_linker(None, Path(tmp_path_factory.mktemp("ontology")))


def test_a_finding_has_its_names(linker: Dictionary) -> None:
    names = wordings(linker)("fluid in the pleural space")
    assert "pleural effusion" in names
    assert 3 < len(names) <= MOST


@pytest.mark.parametrize(
    "text",
    [
        "no pleural effusion",
        "effusion and cardiomegaly",
        "yellow umbrella",
        "a mass of apples",
        "",
        "pleural effusion " * 5,
    ],
)
def test_what_is_not_one_affirmed_finding_has_none(linker: Dictionary, text: str) -> None:
    assert wordings(linker)(text) == []
