"""The laws of `retrieval.types.Index` and `Snapshot`, held against every backend.

A backend joins by a function that makes an empty index with the spaces below.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from indexers.elastic import connect
from indexers.elastic_build import build_elastic, delete_elastic
from indexers.elastic_index import Place, open_elastic
from indexers.embedded import open_index
from indexers.rebuild import build
from retrieval.errors import InputError
from retrieval.filters import parse
from retrieval.types import (
    Assertion,
    Document,
    Encoded,
    Encodings,
    Finding,
    Index,
    Item,
    Part,
    Picture,
    Postings,
    Prepared,
    Ranking,
    Side,
    SpaceInfo,
)
from tests.fakes import HashingEncoder, WordLinker

DIM = 16
ENCODER = HashingEncoder(dim=DIM)
LINKER = WordLinker(["effusion", "cardiomegaly", "nodule"])
SPACES = {"text": SpaceInfo("text", DIM, ENCODER.digests)}


class Nothing:
    """Prepares the documents of an empty source."""

    digest = "nothing"

    def __call__(self, documents: Sequence[Document]) -> Prepared:
        return Prepared([], {}, [])


def make_embedded(request: pytest.FixtureRequest) -> Iterator[Index]:
    folder = request.getfixturevalue("tmp_path") / "embedded"
    build(folder, [], Nothing(), config={}, spaces=SPACES, vector_index="flat", progress=lambda *_: None)
    made = open_index(folder)
    yield made
    made.close()


def make_elastic(request: pytest.FixtureRequest) -> Iterator[Index]:
    cluster = connect(request.getfixturevalue("elasticsearch"))
    place = Place(cluster, f"contract-{uuid.uuid4().hex[:12]}", request.getfixturevalue("tmp_path") / "elastic")
    build_elastic(place, [], Nothing(), config={}, spaces=SPACES, vector_index="flat", progress=lambda *_: None)
    made = open_elastic(place)
    yield made
    made.close()
    delete_elastic(place)
    cluster.close()


BACKENDS: dict[str, Callable[[pytest.FixtureRequest], Iterator[Index]]] = {
    "embedded": make_embedded,
    "elastic": make_elastic,
}


@pytest.fixture(params=list(BACKENDS))
def index(request: pytest.FixtureRequest) -> Iterator[Index]:
    yield from BACKENDS[request.param](request)


def encoded(documents: Sequence[Document]) -> Encodings:
    out: dict[tuple[str, Side], Encoded] = {}
    for side in ("text", "image"):
        items = {
            row: Item(text=d.content) if side == "text" else Item(image=d.image)
            for row, d in enumerate(documents)
            if (d.content.strip() if side == "text" else d.image is not None)
        }
        if items:
            matrix = ENCODER.encode_documents(list(items.values()))
            out["text", side] = Encoded(np.array(list(items), np.int64), matrix)
    return out


def add(index: Index, *documents: Document, publish: bool = True) -> None:
    linked = [
        Document(id=d.id, title=d.title, text=d.text, image=d.image, meta=d.meta, findings=LINKER.link([d.text])[0])
        for d in documents
    ]
    index.add(linked, encoded(linked))
    if publish:
        index.publish()


def text(id: str, words: str, **meta: object) -> Document:
    return Document(id=id, text=words, meta=meta)


def picture(name: str) -> Picture:
    return Picture(digest=name, thumbnail=b"\x89PNG " + name.encode(), pixels=None, path=f"images/{name}.png")


def ids(ranking: Ranking) -> list[str]:
    return [hit.id for hit in ranking]


def words(index: Index, query: str, k: int = 10, where: object = None) -> list[str]:
    return ids(index.snapshot().search_text([query], k, parse(where))[0])  # type: ignore[arg-type]


def near(index: Index, query: str, k: int = 10, where: object = None, sides: Sequence[Side] = ("text",)) -> list[str]:
    queries = ENCODER.encode_queries([Item(text=query)])
    return ids(index.snapshot().search_vectors("text", queries, k, parse(where), sides)[0])  # type: ignore[arg-type]


def holds(part: Part, postings: Postings) -> np.ndarray:
    """1 for documents that affirm a finding of the part."""
    scores = np.zeros(postings.size, np.float32)
    for finding in part.findings:
        scores[postings.rows(finding.concept, finding.assertion)] += 1
    return scores


def finding(concept: str, assertion: Assertion = Assertion.affirmed) -> Part:
    return Part(findings=(Finding(concept, assertion, (0, len(concept))),))


# --- adding, replacing, removing, publishing -------------------------------------------------------


def test_an_empty_collection_answers_everything(index: Index) -> None:
    snapshot = index.snapshot()
    assert len(snapshot) == snapshot.count() == 0
    assert snapshot.fetch(["a"]) == [None]
    assert snapshot.image("a") is None
    assert snapshot.values("year", ["a"]) == [None]
    assert snapshot.sample(3) == []
    assert words(index, "heart") == near(index, "heart") == []
    assert snapshot.search_findings([finding("nodule")], 5, None, holds) == [[]]
    assert len(snapshot.vectors("text", "text", ["a"]).rows) == 0


def test_what_was_added_is_visible_after_publish_all_at_once(index: Index) -> None:
    before = index.snapshot()
    add(index, text("a", "heart"), publish=False)
    add(index, text("b", "heart"), publish=False)
    assert len(index.snapshot()) == 0
    assert words(index, "heart") == []
    index.publish()
    assert words(index, "heart") == ["a", "b"]
    assert len(before) == 0
    assert before.search_text(["heart"], 5)[0] == []


def test_a_snapshot_never_changes(index: Index) -> None:
    add(index, text("a", "heart large", year=2001), text("b", "lung clear"))
    before = index.snapshot()
    add(index, text("a", "lung small", year=2002), text("c", "heart"))
    index.remove(["b"])
    index.publish()
    assert ids(before.search_text(["heart"], 5)[0]) == ["a"]
    assert before.values("year", ["a"]) == [2001]
    assert before.count() == 2
    assert ids(before.search_vectors("text", ENCODER.encode_queries([Item(text="lung clear")]), 1)[0]) == ["b"]
    assert [d.text if d else None for d in before.fetch(["a"])] == ["heart large"]
    assert words(index, "heart") == ["c"]


def test_the_same_id_replaces(index: Index) -> None:
    add(index, text("a", "heart"))
    add(index, text("a", "lung"))
    assert len(index.snapshot()) == 1
    assert words(index, "heart") == []
    assert words(index, "lung") == ["a"]
    assert near(index, "lung") == ["a"]


def test_of_equal_ids_in_one_call_the_last_one_stays(index: Index) -> None:
    add(index, text("a", "heart"), text("b", "rib"), text("a", "lung"))
    assert len(index.snapshot()) == 2
    assert words(index, "heart lung rib") == ["a", "b"]
    fetched = index.snapshot().fetch(["a"])[0]
    assert fetched is not None
    assert fetched.text == "lung"
    assert near(index, "lung", 1) == ["a"]
    assert near(index, "rib", 1) == ["b"]


def test_removing_an_unknown_id_is_no_error(index: Index) -> None:
    add(index, text("a", "heart"))
    assert index.remove(["nobody"]) == 0
    assert index.remove(["a", "nobody", "a"]) == 1
    assert index.remove(["a"]) == 0
    assert len(index.snapshot()) == 1
    index.publish()
    assert len(index.snapshot()) == 0
    assert words(index, "heart") == near(index, "heart") == []
    assert index.snapshot().fetch(["a"]) == [None]


def test_a_removed_document_can_come_back(index: Index) -> None:
    add(index, text("a", "heart"))
    index.remove(["a"])
    add(index, text("a", "heart again"))
    assert words(index, "heart") == ["a"]
    assert index.snapshot().count() == 1


def test_publishing_nothing_changes_nothing(index: Index) -> None:
    add(index, text("a", "heart"))
    index.publish()
    index.publish()
    assert words(index, "heart") == ["a"]


def test_adding_nothing_is_no_error(index: Index) -> None:
    index.add([], {})
    assert index.remove([]) == 0
    index.publish()
    assert len(index.snapshot()) == 0


def test_documents_without_text_or_vectors_are_held(index: Index) -> None:
    add(index, Document(id="bare"), Document(id="pictured", image=picture("p")), text("a", "heart"))
    snapshot = index.snapshot()
    assert len(snapshot) == 3
    assert words(index, "heart") == ["a"]
    assert sorted(near(index, "heart", sides=("text", "image"))) == ["a", "pictured"]
    assert snapshot.sides == {("text", "text"): 1, ("text", "image"): 1}


# --- looking up ------------------------------------------------------------------------------------


def test_fetch_keeps_the_order_asked(index: Index) -> None:
    add(index, *(text(id, f"heart {id}") for id in "abc"))
    got = index.snapshot().fetch(["c", "nobody", "a", "c"])
    assert [d.id if d else None for d in got] == ["c", None, "a", "c"]


def test_a_document_comes_back_as_it_went_in(index: Index) -> None:
    meta = {"year": 2010, "view": {"side": "ap"}, "tags": ["a", 1, None, 2.5, True], "ünï": "çödé \u2028"}
    sent = Document(
        id="ü/1", title="Títle", text="no effusion\n\0 but nodule", image=picture("p"), meta=meta,
        findings=(Finding("effusion", Assertion.negated, (3, 11)), Finding("nodule", Assertion.affirmed, (18, 24))),
    )  # fmt: skip
    index.add([sent], encoded([sent]))
    index.publish()
    got = index.snapshot().fetch(["ü/1"])[0]
    assert got is not None
    assert (got.id, got.title, got.text, got.meta, got.findings) == (
        sent.id,
        sent.title,
        sent.text,
        meta,
        sent.findings,
    )
    assert got.image == Picture("p", b"", None, "images/p.png")
    assert index.snapshot().image("ü/1") == b"\x89PNG p"


def test_values_are_found_at_dotted_paths(index: Index) -> None:
    add(index, text("a", "x", view={"side": "ap"}), text("b", "y"))
    assert index.snapshot().values("view.side", ["b", "a", "nobody"]) == [None, "ap", None]


def test_sample_is_spread_and_repeatable(index: Index) -> None:
    add(index, *(text(f"d{i}", "x") for i in range(10)))
    sample = index.snapshot().sample(4)
    assert len(set(sample)) == 4
    assert sample == index.snapshot().sample(4)
    assert len(index.snapshot().sample(100)) == 10


def test_stored_vectors_come_back_with_their_place_in_ids(index: Index) -> None:
    documents = [text("a", "heart"), Document(id="bare"), text("b", "lung")]
    add(index, *documents)
    rows, matrix = index.snapshot().vectors("text", "text", ["b", "bare", "nobody", "a"])
    assert rows.tolist() == [0, 3]
    np.testing.assert_allclose(matrix, ENCODER.encode_documents([Item(text="lung"), Item(text="heart")]), atol=1e-6)


# --- rankings --------------------------------------------------------------------------------------


def test_a_ranking_has_at_most_k_hits_best_first(index: Index) -> None:
    add(index, *(text(f"d{i}", "heart " * (i + 1) + "lung " * (9 - i)) for i in range(9)))
    for k in (1, 3, 9, 50):
        for ranking in (
            index.snapshot().search_text(["heart"], k)[0],
            index.snapshot().search_vectors("text", ENCODER.encode_queries([Item(text="heart")]), k)[0],
        ):
            assert len(ranking) == min(k, 9)
            scores = [hit.score for hit in ranking]
            assert scores == sorted(scores, reverse=True)


def test_ties_go_to_the_smaller_id_also_at_the_cut(index: Index) -> None:
    names = [f"d{i:02d}" for i in range(60)]
    shuffled = [names[(i * 37) % 60] for i in range(60)]
    add(index, *(text(name, "heart nodule") for name in shuffled))
    for k in (1, 5, 60, 100):
        assert words(index, "heart", k) == names[:k]
        assert near(index, "heart", k) == names[:k]
        assert ids(index.snapshot().search_findings([finding("nodule")], k, None, holds)[0]) == names[:k]


def test_a_vector_score_is_the_inner_product(index: Index) -> None:
    add(index, text("a", "heart"), text("b", "lung"))
    queries = ENCODER.encode_queries([Item(text="heart lung")])
    stored = ENCODER.encode_documents([Item(text="heart"), Item(text="lung")])
    got = {hit.id: hit.score for hit in index.snapshot().search_vectors("text", queries, 2)[0]}
    assert got == pytest.approx(dict(zip("ab", (stored @ queries[0]).tolist())), abs=1e-6)


def test_a_document_scores_as_its_best_vector(index: Index) -> None:
    both = Document(id="both", text="heart", image=picture("p"))
    add(index, both, text("other", "rib"))
    image = ENCODER.encode_queries([Item(image=both.image)])
    snapshot = index.snapshot()
    got = snapshot.search_vectors("text", image, 5)[0]
    assert ids(got) == ["both", "other"]
    assert got[0].score == pytest.approx(1.0, abs=1e-6)
    assert ids(snapshot.search_vectors("text", image, 5, sides=("image",))[0]) == ["both"]
    assert snapshot.search_vectors("text", image, 5, sides=("text",))[0][0].score < 0.99


def test_empty_text_or_no_findings_give_an_empty_ranking(index: Index) -> None:
    add(index, text("a", "heart"))
    assert index.snapshot().search_text(["", "the of", "zzz", " \n"], 5) == [[], [], [], []]
    assert index.snapshot().search_findings([Part(text="heart")], 5, None, holds) == [[]]


def test_many_queries_are_answered_as_one_by_one(index: Index) -> None:
    add(index, *(text(f"d{i}", f"w{i % 3} w{i % 5}") for i in range(20)))
    snapshot = index.snapshot()
    queries = ["w1", "w2 w3", "w0 w0 w4"]
    assert snapshot.search_text(queries, 7) == [snapshot.search_text([query], 7)[0] for query in queries]
    matrix = ENCODER.encode_queries([Item(text=query) for query in queries])
    together = snapshot.search_vectors("text", matrix, 7)
    for one, many in zip(matrix, together, strict=True):
        assert ids(snapshot.search_vectors("text", one[None], 7)[0]) == ids(many)
    assert snapshot.search_text([], 7) == []
    assert snapshot.search_vectors("text", matrix[:0], 7) == []


def test_findings_are_kept_apart_by_assertion(index: Index) -> None:
    add(index, text("has", "effusion"), text("denies", "no effusion"), text("none", "clear"))
    score = [
        ids(index.snapshot().search_findings([finding("effusion", says)], 5, None, holds)[0]) for says in Assertion
    ]
    assert score == [["has"], ["denies"], []]


# --- filters ---------------------------------------------------------------------------------------


def test_where_is_applied_before_the_cut(index: Index) -> None:
    add(index, *(text(f"d{i:03d}", "heart " * (1 + i) + "rib " * (200 - i), n=i, odd=i % 2) for i in range(200)))
    for where in ({"n": {"$lt": 3}}, {"$and": [{"n": {"$lte": 2}}, {"n": {"$exists": True}}]}):
        assert sorted(words(index, "heart", 3, where)) == ["d000", "d001", "d002"]
        assert sorted(near(index, "heart", 3, where)) == ["d000", "d001", "d002"]
    assert len(words(index, "heart", 100, {"odd": 1})) == 100
    assert words(index, "heart", 5, {"n": {"$gt": 1000}}) == near(index, "heart", 5, {"n": {"$gt": 1000}}) == []
    assert index.snapshot().count(parse({"odd": {"$ne": 1}})) == 100


def test_filters_see_replaced_metadata(index: Index) -> None:
    add(index, text("a", "heart", year=2001), text("b", "heart", year=2001))
    add(index, text("a", "heart", year=2002))
    index.remove(["b"])
    index.publish()
    assert words(index, "heart", 5, {"year": 2001}) == []
    assert words(index, "heart", 5, {"year": 2002}) == ["a"]
    assert index.snapshot().count(parse({"year": {"$exists": False}})) == 0


def test_filters_hold_for_findings_too(index: Index) -> None:
    add(index, text("a", "nodule", year=1), text("b", "nodule", year=2))
    assert ids(index.snapshot().search_findings([finding("nodule")], 5, parse({"year": 2}), holds)[0]) == ["b"]


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "vectors"),
    [
        ("sound", np.ones((1, DIM), np.float32)),
        ("text", np.ones((1, DIM + 1), np.float32)),
        ("text", np.ones(DIM, np.float32)),
        ("text", np.full((1, DIM), np.nan, np.float32)),
    ],
)
def test_vectors_that_do_not_fit_are_refused_as_queries(index: Index, space: str, vectors: np.ndarray) -> None:
    add(index, text("a", "heart"))
    with pytest.raises(InputError):
        index.snapshot().search_vectors(space, vectors, 5)


@pytest.mark.parametrize(
    "bad",
    [
        {("sound", "text"): Encoded(np.array([0]), np.ones((1, DIM), np.float32) / 4)},
        {("text", "text"): Encoded(np.array([0]), np.ones((1, DIM + 1), np.float32) / 4)},
        {("text", "text"): Encoded(np.array([1]), np.ones((1, DIM), np.float32) / 4)},
        {("text", "text"): Encoded(np.array([0, 0]), np.ones((2, DIM), np.float32) / 4)},
        {("text", "text"): Encoded(np.array([0]), np.full((1, DIM), np.nan, np.float32))},
        {("text", "text"): Encoded(np.array([0]), np.ones((1, DIM), np.float32))},
    ],
)
def test_vectors_that_do_not_fit_are_refused_when_added(index: Index, bad: Encodings) -> None:
    with pytest.raises(InputError):
        index.add([text("a", "heart")], bad)
    index.publish()
    assert len(index.snapshot()) == 0


@pytest.mark.parametrize("bad", [text("", "x"), text("\ud800", "x"), text("a", "\udfff"), text("a", "x", n=object())])
def test_documents_that_cannot_be_stored_are_refused(index: Index, bad: Document) -> None:
    with pytest.raises(InputError):
        index.add([text("good", "x"), bad], {})
    index.publish()
    assert len(index.snapshot()) == 0


def test_k_must_be_at_least_one(index: Index) -> None:
    snapshot = index.snapshot()
    with pytest.raises(InputError):
        snapshot.search_text(["x"], 0)
    with pytest.raises(InputError):
        snapshot.search_vectors("text", np.ones((1, DIM), np.float32), 0)
    with pytest.raises(InputError):
        snapshot.search_findings([finding("nodule")], -1, None, holds)


def test_strange_ids_are_looked_up_without_harm(index: Index) -> None:
    add(index, text("a", "heart"))
    strange = ["", "\ud800", "a\0", "x" * 10_000, "' OR 1=1"]
    assert index.snapshot().fetch(strange) == [None] * len(strange)
    assert index.remove(strange) == 0


def nested(levels: int) -> dict[str, object]:
    meta: dict[str, object] = {}
    for _ in range(levels):
        meta = {"a": [meta]}
    return meta


@pytest.mark.parametrize(
    "meta",
    [
        {"n": 10**30, "m": -(2**63)}, {"n": 1e308 * 10, "m": float("nan")}, {"": 1, "a.b": 2, "a": {"b": 3}, "..": 4},
        {"mixed": [1, "1", True, None, [2, [3]], {"x": 4}]}, {"\ud800": "\udfff"}, nested(20),
        {str(n): n for n in range(2_000)},
    ],
)  # fmt: skip
def test_strange_metadata_do_not_keep_others_from_being_published(index: Index, meta: dict[str, object]) -> None:
    add(index, Document(id="strange", text="heart", meta=meta), text("plain", "heart", n=1))
    assert words(index, "heart", 5, {"n": 1}) == ["plain"]
    got = index.snapshot().fetch(["strange"])[0]
    assert got is not None
    assert repr(got.meta) == repr(meta)
    add(index, text("later", "heart", n=2))
    assert len(index.snapshot()) == 3


@pytest.mark.parametrize("meta", [[1], "text", nested(40), nested(5_000)])
def test_metadata_that_are_no_small_json_object_are_refused(index: Index, meta: object) -> None:
    with pytest.raises(InputError):
        index.add([Document(id="a", meta=meta)], {})  # type: ignore[arg-type]
