"""Retrievers over the in-memory oracle: small worlds whose answers can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval.retrievers import Dense, Fused, Lexical, Ontological, Reranked, query_kind
from retrieval.types import Document, Encoded, Hit, Item, Part, Query, SpaceInfo
from tests.fakes import HashingEncoder, MemoryIndex, OverlapScorer, WordLinker, shared_concepts

AXES = np.eye(4, dtype=np.float32)
LINKER = WordLinker(["effusion", "edema"])


class AxisEncoder(HashingEncoder):
    """The text "0" is the first axis, "1" the second, and so on."""

    def encode_documents(self, items):
        return np.stack([AXES[int(item.text)] for item in items])

    encode_queries = encode_documents


def unit(*values: float) -> np.ndarray:
    vector = np.array(values, np.float32)
    return vector / np.linalg.norm(vector)


@pytest.fixture
def index() -> MemoryIndex:
    texts = {"a": "effusion on the left", "b": "no effusion", "c": "edema and effusion", "d": "clear lungs"}
    documents = [Document(id=id, text=t, findings=LINKER.link([t])[0]) for id, t in texts.items()]
    text = Encoded(np.arange(4), np.stack([unit(1, 0, 0, 0), unit(1, 1, 0, 0), unit(0, 1, 0, 0), unit(0, 0, 1, 0)]))
    image = Encoded(np.array([2, 3]), np.stack([unit(1, 0, 0, 0), unit(0, 1, 1, 0)]))
    out = MemoryIndex({"text": SpaceInfo("text", 4, {})})
    out.add(documents, {("text", "text"): text, ("text", "image"): image})
    out.publish()
    return out


def ask(*parts: Part) -> list[Query]:
    return [Query(parts=parts)]


def test_dense_ranks_by_inner_product(index) -> None:
    (ranking,) = Dense(index, AxisEncoder(dim=4))(ask(Part(text="0")), 2)
    assert [(h.id, round(h.score, 3)) for h in ranking] == [("a", 1.0), ("b", 0.707)]


def test_a_negative_part_pushes_documents_away(index) -> None:
    (ranking,) = Dense(index, AxisEncoder(dim=4))(ask(Part(text="0"), Part(text="1", weight=-1)), 4)
    assert [(h.id, round(h.score, 3)) for h in ranking] == [("a", 1), ("b", 0), ("d", 0), ("c", -1)]


def test_image_scores_a_document_by_its_best_vector_for_each_part(index) -> None:
    (ranking,) = Dense(index, AxisEncoder(dim=4), ("text", "image"))(ask(Part(text="0"), Part(text="1")), 4)
    scores = {h.id: round(h.score, 3) for h in ranking}
    assert scores == {"a": 1, "b": 1.414, "c": 2, "d": 0.707}  # c: picture on axis 0, text on axis 1
    assert ranking.exact


def test_parts_that_cancel_have_nothing_to_say(index) -> None:
    (ranking,) = Dense(index, AxisEncoder(dim=4))(ask(Part(text="0"), Part(text="0", weight=-1)), 4)
    assert ranking == []


def test_vectors_that_a_part_brings_are_not_encoded_again(index) -> None:
    class Refusing(AxisEncoder):
        def encode_queries(self, items):
            raise AssertionError("nothing is left to encode")

    part = Part(text="x", vectors={("text", "text"): AXES[2], ("text", "image"): AXES[0]})
    assert Dense(index, Refusing(dim=4))(ask(part), 1)[0][0].id == "d"
    assert Dense(index, Refusing(dim=4), ("text", "image"))(ask(part), 1)[0][0].id == "a"


def test_lexical_sums_parts(index) -> None:
    (ranking,) = Lexical(index)(ask(Part(text="effusion"), Part(text="no", weight=-2)), 4)
    assert [h.id for h in ranking] == ["a", "c", "b"]


def test_an_empty_text_gives_an_empty_ranking(index) -> None:
    assert Lexical(index)(ask(Part(text="")), 4) == [[]]
    assert Dense(index, HashingEncoder(dim=4))(ask(Part(text="")), 4) == [[]]


def test_ontological_finds_what_is_said_and_what_is_denied(index) -> None:
    retriever = Ontological(index, LINKER, shared_concepts)
    assert [h.id for h in retriever(ask(Part(text="effusion")), 4)[0]] == ["a", "c"]
    assert [h.id for h in retriever(ask(Part(text="no effusion")), 4)[0]] == ["b"]


def test_concept_ties_are_ordered_by_meaning_and_never_overturned(index) -> None:
    ties = Dense(index, AxisEncoder(dim=4))
    part = Part(text="effusion", vectors={("text", "text"): AXES[1]})
    (ranking,) = Ontological(index, LINKER, shared_concepts, ties)(ask(part), 4)
    assert [h.id for h in ranking] == ["c", "a"]
    assert ranking[0].score == pytest.approx(1, abs=1e-3)


def test_understood_is_a_power_of_the_share_of_words_inside_mentions(index) -> None:
    retriever = Ontological(index, LINKER, shared_concepts)
    assert retriever.understood(ask(Part(text="left effusion"))) == [1 / 8]
    assert retriever.understood(ask(Part(text="left effusion", kind="report"))) == [1 / 4]
    assert retriever.understood(ask(Part(text="no effusion"))) == [1.0]


def test_fused_weighs_a_leg_by_how_much_it_understood(index) -> None:
    legs = {"lexical": Lexical(index), "ontology": Ontological(index, LINKER, shared_concepts)}
    fused = Fused(legs, {"text": {"lexical": 0.5, "ontology": 0.5}})
    (ranking,) = fused(ask(Part(text="left effusion")), 4)
    assert ranking[0].id == "a"
    assert ranking[0].parts["ontology"].weight == pytest.approx(1 / 9)
    assert repr(fused).startswith("Fused(legs={'lexical': Lexical()")


@pytest.mark.parametrize("text", ["left effusion", "nothing of the kind"])
def test_a_query_is_read_by_the_linker_once(index, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(LINKER, "link_queries", lambda texts: read.extend(texts) or LINKER.link(texts), raising=False)
    legs = {"lexical": Lexical(index), "ontology": Ontological(index, LINKER, shared_concepts)}
    Fused(legs, {"text": {"lexical": 0.5, "ontology": 0.5}})(ask(Part(text=text)), 4)
    assert read == [text]


def test_reranked_parts_still_add_up_and_keep_the_legs(index) -> None:
    legs = {"lexical": Lexical(index), "dense": Dense(index, HashingEncoder(dim=4))}
    first = Fused(legs, {"text": {"lexical": 0.5, "dense": 0.5}})
    (ranking,) = Reranked(first, OverlapScorer(), index)(ask(Part(text="edema and effusion")), 4)
    assert ranking[0].id == "c"
    assert set(ranking[0].parts) == {"lexical", "dense", "rerank"}
    for hit in ranking:
        assert sum(s.weight * s.normalised for s in hit.parts.values()) == pytest.approx(hit.score, abs=1e-6)


def test_reranking_needs_words(index) -> None:
    retriever = Reranked(Dense(index, AxisEncoder(dim=4)), OverlapScorer(), index)
    assert retriever(ask(Part(vectors={("text", "text"): AXES[0]})), 1)[0] == [Hit("a", 1.0)]


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (Part(text="x"), "text"),
        (Part(text="x", kind="report"), "report"),
        (Part(image=b"x"), "picture"),
        (Part(vectors={("text", "text"): AXES[0]}), "picture"),
    ],
)
def test_the_kind_of_a_query_is_told_by_its_parts(part: Part, kind: str) -> None:
    assert query_kind(Query(parts=(part,))) == kind


def test_a_fake_encoder_gives_unit_vectors() -> None:
    matrix = HashingEncoder().encode_queries([Item(text="left effusion"), Item(image=b"png")])
    assert np.allclose(np.linalg.norm(matrix, axis=1), 1)
