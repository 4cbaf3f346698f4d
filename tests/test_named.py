"""Linkers that need weights of their own, on tiny stand-ins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ontology.named import Neighbours, Trained
from ontology.pipeline import import_spacy
from ontology.radgraph import RadGraph
from ontology.tables import Tables, load_tables
from retrieval.errors import BackendError, NotFound
from retrieval.types import Assertion, Finding
from tests.fakes import HashingEncoder

TABLE = """id\tname\ttypes\tsynonyms
my:1\tpleural effusion\tT047\teffusion
my:2\tzebra sign\tT033\tstriped pattern
my:3\tleft lung\tT023\t
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.tsv").write_text(TABLE)
    return load_tables(folder / "mine.tsv", folder / "cache")


def test_a_trained_model_adds_mentions_that_no_name_covers(tables: Tables) -> None:
    nlp = import_spacy().blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "ENTITY", "pattern": "zebra signage"}, {"label": "ENTITY", "pattern": "effusion"}])
    linker = Trained(tables, nlp)
    text = "No effusion. Zebra signage. Gibberish."
    assert linker.link([text.replace("Zebra", "zebra")])[0] == (
        Finding("my:1", Assertion.negated, (3, 11)),
        Finding("my:2", Assertion.affirmed, (13, 26)),
    )


def test_an_encoder_of_names_links_what_the_dictionary_does_not(tables: Tables) -> None:
    class Ordered(HashingEncoder):
        """Word order does not matter to it, so that it finds names that the dictionary does not."""

    linker = Neighbours(tables, Ordered(dim=64))
    assert linker.link_queries(["pattern striped"])[0] == (Finding("my:2", Assertion.affirmed, (0, 15)),)
    assert linker.link_queries(["no effusion"])[0] == (Finding("my:1", Assertion.negated, (3, 11)),)
    assert linker.link_queries(["nothing of the kind", ""]) == [(), ()]


def annotate(texts: Sequence[str]) -> dict[str, Any]:
    """What RadGraph says of "Small left effusion . No zebra sign"."""
    entity: dict[str, Any] = {"relations": []}
    entities = {
        "1": entity | {"tokens": "left", "label": "Anatomy::definitely present", "start_ix": 1, "end_ix": 1},
        "2": entity | {"tokens": "effusion", "label": "Observation::definitely present", "start_ix": 2, "end_ix": 2,
                       "relations": [["located_at", "1"]]},
        "3": entity | {"tokens": "zebra sign", "label": "Observation::definitely absent", "start_ix": 5, "end_ix": 6},
        "4": entity | {"tokens": "thing", "label": "Observation::uncertain", "start_ix": 0, "end_ix": 0},
    }  # fmt: skip
    return {str(n): {"text": "Small left effusion . No zebra sign", "entities": entities} for n in range(len(texts))}


def test_radgraphs_observations_are_linked_and_keep_its_assertion(tables: Tables) -> None:
    text = "Small left effusion. No zebra sign"
    assert RadGraph(tables, annotate).link([text, " "]) == [
        (Finding("my:1", Assertion.affirmed, (11, 19)), Finding("my:2", Assertion.negated, (24, 34))),
        (),
    ]


def test_an_answer_of_another_shape_is_a_backend_error(tables: Tables) -> None:
    with pytest.raises(BackendError):
        RadGraph(tables, lambda texts: {"0": {"nothing": texts}}).link(["effusion"])


def test_radgraph_that_is_not_installed_is_named(tables: Tables) -> None:
    with pytest.raises(NotFound, match="radgraph"):
        RadGraph(tables)


def test_each_has_a_digest_of_its_own(tables: Tables, tmp_path: Path) -> None:
    linkers = [
        RadGraph(tables, annotate),
        Neighbours(tables, HashingEncoder()),
        Trained(tables, import_spacy().blank("en")),
    ]
    assert len({linker.digest for linker in linkers}) == 3
