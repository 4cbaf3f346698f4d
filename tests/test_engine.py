"""One collection in memory: what a search answers, pages, explains and refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.calibrate import calibrate
from retrieval.engine import Engine, Parts
from retrieval.errors import Conflict, Gone, Invalid, NotFound, RetrievalError, TooLarge
from retrieval.ingest import Ingest
from retrieval.request import Request, RequestPart
from retrieval.types import Document, Item, Part, Picture, Query, SpaceInfo
from tests.fakes import HashingEncoder, MemoryIndex, OverlapScorer, WordLinker, shared_concepts

KINDS = ("text", "report", "picture")


def engine(documents: list[Document] | None = None, **parts) -> Engine:
    encoder = HashingEncoder()
    linker = WordLinker(["effusion", "edema"])

    def read(source):
        return Picture(repr(source), b"", source)

    index = MemoryIndex({"text": SpaceInfo("text", encoder.dim, dict(encoder.digests))})
    made = Parts({"text": encoder}, "text", read, Ingest([encoder], linker, read),
                 {kind: dict.fromkeys(("lexical", "dense", "image", "ontology"), 1.0) for kind in KINDS},
                 linker, shared_concepts, **parts)  # fmt: skip
    out = Engine("films", index, made)
    out.add(documents if documents is not None else FILMS)
    return out


FILMS = [
    Document(id="a", text="left effusion", meta={"view": "ap", "study": 1}),
    Document(id="b", text="no effusion", meta={"view": "pa", "study": 1}),
    Document(id="c", title="Heart", text="edema and effusion", meta={"view": "ap", "study": 2}),
    Document(id="d", text="clear lungs", image=b"film", meta={"view": "pa"}),
]


def ask(text: str = "effusion", **request) -> Request:
    return Request(query=[RequestPart(text=text)], **request)


def ids(answer) -> list[str]:
    return [hit["id"] for hit in answer["hits"]]


def test_an_answer_says_where_every_hit_comes_from() -> None:
    answer = engine().search(ask("edema"))
    hit = answer["hits"][0]
    assert hit["id"] == "c"
    assert (hit["title"], hit["metadata"]) == ("Heart", {"view": "ap", "study": 2})
    assert set(hit["parts"]) <= {"lexical", "dense", "image", "ontology"}
    assert sum(p["weight"] * p["normalised"] for p in hit["parts"].values()) == pytest.approx(hit["score"])
    assert hit["findings"][0] == {"concept": "edema", "name": "edema", "assertion": "affirmed", "start": 0, "end": 5}
    assert hit["highlights"] == {"text": [[0, 5]]}
    assert answer["exact"] is True
    assert set(answer["took_ms"]) >= {"encode", "search", "fuse", "total"}


class Film:
    """Whatever is asked for, it is the film of FILMS that is meant."""

    def joined(self, items, vectors):
        return HashingEncoder().encode_queries([Item(image=b"film")] * len(items))


def test_words_ask_for_pictures_in_their_wordings_and_for_texts_as_they_are() -> None:
    searched = {
        leg: engine(wordings=Film()).search(ask("edema and effusion", retriever=leg))["hits"][0]["id"]
        for leg in ("image", "dense")
    }
    assert searched == {"image": "d", "dense": "c"}
    query = Query(id="q", parts=(Part(text="edema and effusion"),))
    for leg, first in searched.items():
        assert engine(wordings=Film()).run([query], leg)["q"][0].id == first
    texts = engine(FILMS[:3], wordings=Film())  # without pictures, `image` reads texts as `dense` does
    assert texts.run([query], "image")["q"][0].id == "c"


def test_a_single_leg_keeps_its_raw_score_and_still_adds_up() -> None:
    hit = engine().search(ask("edema", retriever="lexical"))["hits"][0]
    assert hit["score"] == 1
    assert hit["parts"]["lexical"] == {"rank": 1, "raw": 1, "normalised": 1, "weight": 1}


def test_filters_hold_and_facets_count_what_was_found() -> None:
    answer = engine().search(ask(retriever="lexical", where={"view": "ap"}, facets=["view"]))
    assert ids(answer) == ["a", "c"]
    assert answer["facets"] == {"view": [{"value": "ap", "count": 2}]}
    assert answer["total"] == {"value": 2, "relation": "eq"}


def test_groups_show_their_best_hit_and_their_size() -> None:
    answer = engine().search(ask(retriever="lexical", group_by="study"))
    assert [(h["id"], h["group"]) for h in answer["hits"]] == [
        ("a", {"value": 1, "size": 2}),
        ("c", {"value": 2, "size": 1}),
    ]


def test_a_stored_document_finds_others_and_not_itself() -> None:
    answer = engine().search(Request(query=[RequestPart(id="a")]))
    assert "a" not in ids(answer)
    assert len(ids(answer)) == 3


def test_a_stored_document_asks_with_the_vectors_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a picture asks for what its document says."""
    said = HashingEncoder().encode_queries([Item(text="edema and effusion")])

    def as_queries(_encoder, side, vectors):
        return said if side == "image" else vectors

    monkeypatch.setattr(HashingEncoder, "as_queries", as_queries)
    assert ids(engine().search(Request(query=[RequestPart(id="d")], retriever="image")))[0] == "c"


def test_a_picture_finds_the_same_picture() -> None:
    answer = engine().search(Request(query=[RequestPart(image=b"film")], retriever="image"))
    assert ids(answer)[0] == "d"
    assert answer["hits"][0]["image_url"] == "/v1/collections/films/documents/d/image"


def test_hybrid_leaves_out_image_where_no_document_has_a_picture() -> None:
    answer = engine([FILMS[0]]).search(ask())
    assert set(answer["hits"][0]["parts"]) == {"lexical", "dense", "ontology"}


def test_many_requests_get_one_answer_or_one_error_each() -> None:
    good, bad, other = engine().search_many([ask(), ask(retriever="nope"), ask("edema", where={"view": "ap"})])
    assert ids(good)[0] in "ac"
    assert isinstance(bad, Invalid)
    assert ids(other)[0] == "c"


def test_many_requests_equal_one_at_a_time() -> None:
    e, texts = engine(), ["effusion", "no effusion", "lungs", ""]
    many = e.search_many([ask(t) for t in texts])
    assert [a["hits"] for a in many] == [e.search(ask(t))["hits"] for t in texts]


def test_pages_equal_one_long_page() -> None:
    e = engine([Document(id=f"{n:03}", text="effusion " + "word " * (n % 7)) for n in range(57)])
    long = ids(e.search(ask(k=57)))
    pages, cursor = [], None
    while True:
        answer = e.search(ask(k=10, cursor=cursor))
        pages += ids(answer)
        cursor = answer["cursor"]
        if cursor is None:
            break
    assert pages == long
    assert len(pages) == 57


@given(st.sets(st.integers(0, 19)), st.integers(1, 7))
def test_deleted_documents_vanish_from_later_pages_and_the_rest_keep_their_order(gone: set[int], k: int) -> None:
    e = engine([Document(id=f"{n:02}", text="effusion " + "word " * (n % 5)) for n in range(20)])
    long = ids(e.search(ask(k=20, retriever="lexical")))
    answer = e.search(ask(k=k, retriever="lexical"))
    pages = ids(answer)
    e.remove([f"{n:02}" for n in gone])
    e.add([Document(id="new", text="effusion")])
    while answer["cursor"]:
        answer = e.search(ask(k=k, retriever="lexical", cursor=answer["cursor"]))
        pages += ids(answer)
    removed = {f"{n:02}" for n in gone}
    assert pages == long[:k] + [id for id in long[k:] if id not in removed]


def test_a_document_that_is_erased_while_it_is_found_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine()
    fetch = MemoryIndex.fetch

    def erased(index: MemoryIndex, ids: list[str]) -> list[Document | None]:
        return [None if document and document.id == "b" else document for document in fetch(index, ids)]

    monkeypatch.setattr(MemoryIndex, "fetch", erased)
    answer = e.search(ask(retriever="lexical"))
    assert (sorted(ids(answer)), answer["total"]) == (["a", "c"], {"value": 2, "relation": "eq"})


def test_later_pages_are_ranked_and_judged_as_the_first_was() -> None:
    e = engine([Document(id=f"{n:02}", text=shuffled(n)) for n in range(40)])
    request = ask(" ".join(shuffled(3).split()[:8]), k=40)
    long = e.search(request)
    cursor = e.search(replace(request, k=10))["cursor"]
    learned = e.parts._replace(weights={"text": {"dense": 1.0}}, calibrations=calibrate(e))
    later = replace(e, parts=learned)  # what a home assembles when weights or calibrations were learned anew
    assert later.search(request)["hits"] != long["hits"]
    assert later.search(replace(request, cursor=cursor))["hits"] == long["hits"][10:]
    mixed = later.search_many([request, replace(request, cursor=cursor)])
    assert [len(answer["hits"]) for answer in mixed] == [40, 30]


def test_a_part_of_weight_zero_says_nothing() -> None:
    e = engine()
    silent = RequestPart(text="edema", weight=0)
    assert e.search(Request(query=[silent]))["hits"] == []
    assert e.search(Request(query=[*ask().query, silent]))["hits"] == e.search(ask())["hits"]


def test_a_cursor_of_another_query_is_refused() -> None:
    e = engine()
    cursor = e.search(ask(k=1))["cursor"]
    with pytest.raises(Invalid, match="another query"):
        e.search(ask("edema", k=1, cursor=cursor))


def test_a_cursor_outlives_only_the_last_snapshots() -> None:
    e = engine()
    cursor = e.search(ask(k=1))["cursor"]
    for n in range(9):
        e.add([Document(id=f"n{n}", text="x")])
        e.search(ask())
    with pytest.raises(Gone):
        e.search(ask(k=1, cursor=cursor))


def test_another_encoder_than_the_one_that_built_the_collection_is_refused() -> None:
    e = engine()
    e.parts.encoders["text"].digests = {"text": "other", "image": "other"}  # type: ignore[misc]
    with pytest.raises(Conflict, match="another encoder"):
        e.search(ask())


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (Request(query=[]), Invalid, "query"),
        (Request(query=[RequestPart()]), Invalid, "query[0]"),
        (Request(query=[RequestPart(text="x", id="a")]), Invalid, "query[0]"),
        (Request(query=[RequestPart(text="x", weight=float("nan"))]), Invalid, "query[0].weight"),
        (Request(query=[RequestPart(id="nobody")]), NotFound, "query[0].id"),
        (Request(query=[RequestPart(vector=[1.0, 2.0])]), Conflict, "query[0].vector"),
        (Request(query=[RequestPart(vector=[0.0] * 16)]), Invalid, "query[0].vector"),
        (ask(k=0), Invalid, "k"),
        (ask(k=10**9), TooLarge, "k"),
        (ask(retriever="magic"), Invalid, "retriever"),
        (ask(retriever="hybrid+rerank"), Invalid, "retriever"),
        (ask(retriever="lexical+sort"), Invalid, "retriever"),
        (ask(cursor="%%%"), Invalid, "cursor"),
        (ask(fields=["secrets"]), Invalid, "fields"),
        (ask(weights={"magic": 1.0}), Invalid, "fusion.weights"),
        (ask(where={"view": {"$near": 1}}), Invalid, "where.view.$near"),
    ],
)
def test_bad_requests_are_refused_by_name(request_: Request, error: type[RetrievalError], field: str) -> None:
    with pytest.raises(error) as caught:
        engine().search(request_)
    assert caught.value.field == field  # type: ignore[attr-defined]


def test_a_reranker_answers_for_words() -> None:
    answer = engine(scorer=OverlapScorer()).search(ask("edema and effusion", retriever="lexical+rerank"))
    assert ids(answer)[0] == "c"
    assert set(answer["hits"][0]["parts"]) == {"lexical", "rerank"}


def test_a_run_takes_the_same_path_as_a_search() -> None:
    e = engine()
    run = e.run([Query(id="q", parts=(Part(text="edema"),))], "hybrid")
    assert [hit.id for hit in run["q"]] == ids(e.search(ask("edema", k=4)))


WORDS = "lung heart rib film left right upper lower lobe apex base hilum aorta spine node scar mass".split()


def shuffled(n: int) -> str:
    return " ".join(np.random.default_rng(n).permutation(WORDS)[:12])


def test_confidence_tells_what_is_in_the_collection_from_what_is_not() -> None:
    e = engine([Document(id=f"{n:02}", text=shuffled(n)) for n in range(40)])
    e.parts = e.parts._replace(calibrations=calibrate(e))
    for retriever in ("lexical", "dense", "hybrid"):
        near = e.search(ask(" ".join(shuffled(3).split()[:8]), retriever=retriever))["hits"][0]
        far = e.search(ask("recipe for vegetable curry", retriever=retriever))["hits"]
        assert near["confidence"] > 0.5
        assert all(hit["confidence"] < 0.5 for hit in far)


def test_nothing_relevant_is_an_answer() -> None:
    e = engine([Document(id=f"{n:02}", text=shuffled(n)) for n in range(40)])
    e.parts = e.parts._replace(calibrations=calibrate(e))
    assert ids(e.search(ask("lyrics of a song", min_confidence=0.5))) == []
    assert "03" in ids(e.search(ask(shuffled(3), min_confidence=0.5)))


def test_a_collection_too_small_to_calibrate_gives_no_confidence() -> None:
    e = engine()
    e.parts = e.parts._replace(calibrations=calibrate(e))
    assert e.search(ask())["hits"][0]["confidence"] is None
