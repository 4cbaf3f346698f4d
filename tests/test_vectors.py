"""Searches over one side: exact ones are right to the last tie, approximate ones say so."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from indexers.scan import TIE, Stored
from indexers.vectors import Found, SideIndex, merge, parse_spec
from retrieval.errors import BackendError, Conflict, Invalid

SPECS = ["flat", "hnsw", "hnsw-sq8", "hnsw-sq4", "hnsw-bin", "ivfpq:M=8,nlist=16,nprobe=4",
         "ivfpq:M=16,bits=4,nlist=16,nprobe=4"]  # fmt: skip
Array = NDArray[np.float32]
faiss: Any = untyped_faiss


def quiet(phase: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def unit(count: int, dim: int = 32, seed: int = 0) -> Array:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def clustered(count: int, queries: int = 0, dim: int = 32) -> tuple[Array, Array]:
    """Rows and queries of one distribution: a cloud around each of fifty centres."""
    rng = np.random.default_rng(0)
    rows = unit(50, dim)[rng.integers(50, size=count + queries)]
    rows = (rows + 0.12 * rng.standard_normal(rows.shape)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:count], rows[count:]


@cache
def large(spec: str) -> tuple[SideIndex, Array, Array]:
    """An index that is too large to be scanned without need, its rows, and queries."""
    rows, queries = clustered(4_500, 40)
    return built([rows[:2_000], rows[2_000:]], spec), rows, queries


def built(chunks: list[NDArray[Any]], spec: str = "flat") -> SideIndex:
    return SideIndex.build(chunks, parse_spec(spec), quiet)


def brute(queries: Array, rows: Array, k: int, allowed: NDArray[np.bool_] | None = None) -> Array:
    """The k best scores, by definition."""
    scores = queries @ rows.T
    if allowed is not None:
        scores = scores[:, allowed]
    return -np.sort(-scores, axis=1)[:, :k]


# --- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*SPECS, "ivfpq:M=8,nlist=64", "ivfpq:nlist=64,M=8,refine=10", "distillvq:M=8,nlist=4,bits=4"]
)
def test_a_spec_reads_what_it_writes(text: str) -> None:
    assert str(parse_spec(str(parse_spec(text)))) == str(parse_spec(text))


@pytest.mark.parametrize(
    "text",
    ["", "hnsw32", "FLAT", "flat:", "flat:M=2", "hnsw:M=8", "ivfpq", "ivfpq:", "ivfpq:M=8", "ivfpq:nlist=8",
     "ivfpq:M=0,nlist=8", "ivfpq:M=8,nlist=0", "ivfpq:M=8,nlist=8,nprobe=0", "ivfpq:M=-8,nlist=8",
     "ivfpq:M=8,nlist=8,x=1", "ivfpq:M=8,nlist=8.5", "ivfpq:M=8 ,nlist=8", "ivfpq:M=²,nlist=8",
     "ivfpq:M=8,M=16,nlist=8", "ivfpq:M=99999999,nlist=8",
     "ivfpq:M=8,nlist=8,bits=0", "ivfpq:M=8,nlist=8,bits=5", "distillvq:M=8,nlist=8,bits=16", "hnsw:bits=4"],
)  # fmt: skip
def test_an_unknown_spec_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_spec(text)
    assert caught.value.field == "vector_index"
    assert any(said in str(caught.value) for said in ("hnsw-sq8", "M=", "no keys", "at least 1", "4 or 8 bits"))


def test_a_dimension_that_m_does_not_divide_is_refused_with_the_divisors() -> None:
    with pytest.raises(Invalid, match=r"M=5 does not divide the dimension 32; M can be 1, 2, 4, 8, 16, 32"):
        built([unit(300)], "ivfpq:M=5,nlist=4")


def test_eight_bits_go_without_saying() -> None:
    assert str(parse_spec("ivfpq:M=8,bits=8,nlist=16")) == str(parse_spec("ivfpq:M=8,nlist=16"))


# --- exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("share", [None, 0.5, 0.03])
@pytest.mark.parametrize("pieces", [1, 3])
def test_an_exact_search_equals_brute_force(queries: int, share: float | None, pieces: int) -> None:
    rows, asked = unit(700), unit(queries, seed=1)
    allowed = None if share is None else np.random.default_rng(2).random(700) < share
    found = built(np.array_split(rows, pieces)).search(asked, 10, allowed)
    np.testing.assert_allclose(found.scores[:, :10], brute(asked, rows, 10, allowed), atol=1e-6)
    assert found.exact
    assert found.recall == 1.0
    for query, numbers in enumerate(found.numbers[:, :10]):
        np.testing.assert_allclose(rows[numbers] @ asked[query], found.scores[query, :10], atol=1e-6)
        assert allowed is None or allowed[numbers].all()


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_small_stored_types_are_read_as_unit_vectors(dtype: type) -> None:
    rows, asked = unit(400), unit(4, seed=1)
    small = (rows / np.abs(rows).max(axis=1, keepdims=True) * 127).round().astype(np.int8)
    stored = rows.astype(np.float16) if dtype is np.float16 else small
    index = built([stored[:100], stored[100:]])
    decoded = Stored([stored]).gather(np.arange(400))
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-6)
    for allowed in (None, np.arange(400) % 3 == 0):
        found = index.search(asked, 5, allowed)
        np.testing.assert_allclose(found.scores[:, :5], brute(asked, decoded, 5, allowed), atol=1e-6)
    np.testing.assert_allclose(decoded, rows, atol=0.01)
    assert index.bytes_per_vector == 32 * stored.itemsize
    chunked = Stored([stored[:100], stored[100:150], stored[150:]])
    some = np.array([[399, 0, -1, 120], [100, 99, 149, 150]])
    np.testing.assert_array_equal(chunked.gather(some[1]), decoded[some[1]])
    wanted = np.where(some < 0, -np.inf, (asked[:2, None] * decoded[some]).sum(-1))
    np.testing.assert_allclose(chunked.scores(asked[:2], some), wanted, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("mask", [False, True])
def test_everything_tied_with_the_last_one_is_fetched(queries: int, mask: bool) -> None:
    rows = np.concatenate([unit(5), np.repeat(unit(1, seed=3), 300, axis=0)])
    asked = np.repeat(unit(1, seed=3), queries, axis=0)
    allowed = np.arange(305) != 7 if mask else None
    found = built([rows]).search(asked, 2, allowed)
    assert ((found.scores > 1 - 1e-5).sum(axis=1) == 300 - mask).all()


def test_few_dead_vectors_are_left_out_of_a_batch() -> None:
    rows, asked = unit(500), unit(20, seed=1)
    alive = np.ones(500, np.bool_)
    alive[np.argmax(asked @ rows.T, axis=1)] = False  # the best of every query
    found = built([rows]).search(asked, 10, alive, filtered=False)
    np.testing.assert_allclose(found.scores[:, :10], brute(asked, rows, 10, alive), atol=1e-6)


def test_numbers_do_as_well_as_a_mask() -> None:
    rows, asked = unit(500), unit(2, seed=1)
    mask = np.arange(500) % 7 == 0
    index = built([rows])
    by_mask, by_numbers = index.search(asked, 4, mask), index.search(asked, 4, np.flatnonzero(mask))
    assert by_mask.numbers.tolist() == by_numbers.numbers.tolist()


# --- approximate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS[1:])
def test_an_approximate_search_says_so_and_comes_close(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexers.vectors._ROWS_PER_EF", 0)
    index, rows, queries = large(spec)
    found = index.search(queries, 10)
    assert not found.exact
    assert found.recall == index.recall
    reached = Stored([rows]).scores(queries, found.numbers) >= brute(queries, rows, 10)[:, -1:] - TIE
    assert abs(reached.mean() - index.recall) < 0.1
    assert reached.mean() > (0.3 if spec.startswith("ivfpq") else 0.97)
    assert index.search(queries, 10, exact=True).exact


def test_the_recall_said_is_not_that_of_vectors_searched_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph finds what lies among its vectors sooner than what lies between them, and queries lie between them."""
    monkeypatch.setattr("indexers.kinds.EF_SEARCH", (32,))
    monkeypatch.setattr("indexers.vectors._ROWS_PER_EF", 0)
    rng = np.random.default_rng(0)
    centres = unit(100, 64)

    def between(weight: Array) -> Array:
        some, others = centres[rng.integers(100, size=(2, len(weight)))]
        rows = weight * some + (1 - weight) * others
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return np.ascontiguousarray(rows, np.float32)

    rows, queries = between(rng.uniform(0.6, 0.95, (5_000, 1))), between(np.full((200, 1), 0.5))
    index = built([rows], "hnsw-sq8")

    def reached(asked: Array) -> float:
        found = index.search(asked, 10).numbers
        return float((Stored([rows]).scores(asked, found) >= brute(asked, rows, 10)[:, -1:] - TIE).mean())

    assert reached(queries) < index.recall < reached(rows[-256:]) - 0.025


@pytest.mark.parametrize("spec", SPECS)
def test_a_filtered_search_finds_what_brute_force_finds(spec: str) -> None:
    """200 filters, from half of the vectors down to one in a thousand."""
    index, rows, queries = large(spec)
    rng = np.random.default_rng(0)
    for share in np.geomspace(0.5, 0.001, 200):
        allowed = rng.random(len(rows)) < share
        found = index.search(queries[:1], 10, allowed)
        truth = brute(queries[:1], rows, 10, allowed)
        np.testing.assert_allclose(found.scores[:, : truth.shape[1]], truth, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS[1:])
def test_beyond_the_reach_of_a_scan_a_filter_widens_the_search(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cost in ("_SCANNED_WHEN_FILTERED", "_SMALL", "_ROWS_PER_EF"):
        monkeypatch.setattr(f"indexers.vectors.{cost}", 0)
    index, rows, queries = large(spec)
    for share in (0.5, 0.1, 0.01):
        allowed = np.random.default_rng(0).random(len(rows)) < share
        found = index.search(queries, 10, allowed)
        assert allowed[found.numbers[found.numbers >= 0]].all()
        truth = brute(queries, rows, 10, allowed)
        reached = Stored([rows]).scores(queries, found.numbers)[:, :10] >= truth[:, -1:] - TIE
        assert reached.mean() > (0.8 if spec.startswith("ivfpq") else 0.98)


def test_codes_are_searched_however_small_the_collection_is_unless_filtered() -> None:
    rows, queries = clustered(500, 5)
    index = built([rows], "ivfpq:M=4,nlist=4")
    assert not index.search(queries, 3).exact
    alive = np.arange(500) != 3
    assert not index.search(queries, 3, alive, filtered=False).exact
    assert index.search(queries, 3, alive).exact


def test_refine_rescores_on_the_stored_vectors() -> None:
    rows, queries = clustered(1_000, 10)
    plain, refined = (built([rows], f"ivfpq:M=4,nlist=8,nprobe=8,refine={refine}") for refine in (0, 20))
    assert refined.recall > plain.recall + 0.2
    found = refined.search(queries, 5)
    np.testing.assert_allclose(Stored([rows]).scores(queries, found.numbers), found.scores, atol=1e-6)


def test_four_bits_take_half_the_bytes_of_eight_and_are_what_faiss_scans_fast() -> None:
    eight, four = (large(f"ivfpq:M=8,{bits}nlist=16,nprobe=4")[0] for bits in ("", "bits=4,"))
    inner = [faiss.downcast_index(side._codes.index.index) for side in (eight, four) if side._codes]
    assert [type(index) for index in inner] == [faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan]
    assert [index.code_size for index in inner] == [8, 4]
    assert four.bytes_per_vector < eight.bytes_per_vector - 4


def test_a_fast_scan_scores_what_its_codes_stand_for() -> None:
    """Tables of 8 bits cost some thousandths; asking for more lists than there are costs nothing."""
    index, _, queries = large("ivfpq:M=16,bits=4,nlist=16,nprobe=16")
    codes = index._codes
    assert codes is not None
    inner = faiss.downcast_index(codes.index.index)
    inner.make_direct_map()
    decoded = inner.reconstruct_n(0, inner.ntotal)
    turned = codes.index.chain.at(0).apply(queries)
    for lists in (16, 17, 1_000):
        scores, numbers = codes.kind.probe(codes.index, queries, 10, lists, None)
        np.testing.assert_allclose(scores, np.take_along_axis(turned @ decoded.T, numbers, 1), atol=0.02)
        assert (scores[:, -1] >= np.sort(turned @ decoded.T, axis=1)[:, -10] - 0.02).all()


def test_what_a_fast_scan_cannot_tell_apart_is_answered_exactly() -> None:
    """FAISS finds nothing where all codewords score the same: it divides by how far apart they are."""
    spec = "ivfpq:M=16,bits=4,nlist=16,nprobe=4"
    alone = built([unit(1)], spec)
    assert alone.search(unit(1), 10).numbers.tolist() == [[0]]
    assert alone.recall == 1.0
    index, rows, _ = large(spec)
    nowhere = index.search(np.zeros((1, rows.shape[1]), np.float32), 10)
    assert nowhere.exact
    assert (nowhere.numbers[:, :10] >= 0).all()
    assert (nowhere.scores == 0).all()


def test_a_query_that_finds_nothing_leaves_the_rest_of_its_batch_as_it_was() -> None:
    index, _, queries = large("ivfpq:M=16,bits=4,nlist=16,nprobe=4")
    asked = queries[:3].copy()
    alone = index.search(asked[[0, 2]], 10)
    asked[1] = 0
    batch = index.search(asked, 10)
    assert not batch.exact
    np.testing.assert_array_equal(batch.numbers[[0, 2], :10], alone.numbers)
    assert (batch.scores[[0, 2], 10:] == -np.inf).all()
    assert (batch.scores[1] == 0).all()


@pytest.mark.parametrize("count", [2, 3, 9, 20])
def test_a_fast_scan_leaves_out_nothing_of_a_few(count: int) -> None:
    for spec in ("ivfpq:M=8,bits=4,nlist=1", "ivfpq:M=1,bits=4,nlist=2,nprobe=2"):
        found = built([unit(count)], spec).search(unit(50, seed=5), count)
        assert all(sorted(row.tolist()) == list(range(count)) for row in found.numbers)


def test_an_odd_number_of_half_bytes() -> None:
    rows = unit(600, 33)
    index = built([rows], "ivfpq:M=11,bits=4,nlist=4,nprobe=4,refine=10")
    assert (index.search(rows[:50], 1).numbers.ravel() == np.arange(50)).mean() > 0.9


def test_small_collections_are_scanned_whatever_graph_they_have() -> None:
    index = built([unit(100)], "hnsw")
    assert index.search(unit(1), 5).exact


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[str, int, int | None]] = []
    SideIndex.build([unit(5_000, 8)], parse_spec("hnsw"), lambda *told: seen.append(told))
    assert seen[0] == ("train", 0, None)
    assert seen[-1] == ("vectors", 5_000, 5_000)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


# --- degenerate sizes and bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 40, 300])
def test_every_size_builds_saves_loads_and_answers(spec: str, count: int, tmp_path: Path) -> None:
    rows = unit(count)
    index = built([rows], spec)
    index.save(tmp_path / "side")
    for side in (index, SideIndex.load(tmp_path / "side", [rows])):
        found = side.search(unit(2, seed=5), 3)
        assert (found.numbers >= 0).sum(axis=1).tolist() == [min(3, count)] * 2 or not found.exact
        assert side.recall == index.recall
        assert len(side) == count
        exact = side.search(unit(2, seed=5), 3, exact=True)
        assert (exact.numbers >= 0).sum(axis=1).tolist() >= [min(3, count)] * 2


def test_fewer_vectors_than_codewords_is_reported() -> None:
    notes = built([unit(40)], "ivfpq:M=8,nlist=64").measured.notes
    assert any("nlist is" in note for note in notes)
    assert any("codewords" in note for note in notes)


@pytest.mark.parametrize("spec", SPECS)
def test_a_thousand_equal_vectors_are_all_found(spec: str) -> None:
    rows = np.repeat(unit(1), 1_000, axis=0)
    found = built([rows], spec).search(rows[:1], 1_000)
    assert len(set(found.numbers[0].tolist()) - {-1}) == 1_000 or not found.exact


def test_no_chunks_at_all_is_an_empty_side() -> None:
    found = built([]).search(unit(2), 5)
    assert found.scores.shape == (2, 0)
    assert merge([(found, np.empty(0, np.int64))], [], 5) == [[], []]


def test_a_filter_that_allows_nothing_finds_nothing() -> None:
    for spec in SPECS:
        found = built([unit(300)], spec).search(unit(2), 5, np.zeros(300, np.bool_))
        assert found.numbers.shape == (2, 0)


@pytest.mark.parametrize(
    "queries",
    [unit(2, 31), unit(2)[:, ::-1], np.asfortranarray(unit(2)), unit(2).astype(np.float64), unit(1)[0], unit(4)[::2]],
)
def test_queries_that_do_not_fit_are_a_conflict(queries: Any) -> None:
    with pytest.raises(Conflict):
        built([unit(10)]).search(queries, 3)


def test_a_mask_of_another_length_is_a_conflict() -> None:
    with pytest.raises(Conflict, match="mask"):
        built([unit(10)]).search(unit(1), 3, np.ones(11, np.bool_))
    with pytest.raises(Conflict, match="numbers"):
        built([unit(10)]).search(unit(1), 3, np.array([3, 10]))


def test_k_below_one_is_invalid() -> None:
    with pytest.raises(Invalid):
        built([unit(10)]).search(unit(1), 0)


def test_chunks_of_two_dimensions_are_a_conflict() -> None:
    with pytest.raises(Conflict, match="dimension"):
        built([unit(3, 4), unit(3, 5)])


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["hnsw", *SPECS[-2:]])
def test_a_loaded_index_answers_as_the_one_that_was_saved(spec: str, tmp_path: Path) -> None:
    index, rows, asked = large(spec)
    index.save(tmp_path)
    loaded = SideIndex.load(tmp_path, [rows[:10], rows[10:]])
    assert loaded.measured == index.measured
    found, expected = loaded.search(asked, 10), index.search(asked, 10)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.numbers, expected.numbers)


@pytest.mark.parametrize("damage", ["flip", "short", "missing", "card", "card missing", "other rows", "other keys"])
def test_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    rows, _ = clustered(500)
    built([rows], "hnsw").save(tmp_path)
    file, card = tmp_path / "index.faiss", tmp_path / "side.json"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "short":
        file.write_bytes(data[:-100])
    elif damage == "missing":
        file.unlink()
    elif damage == "card":
        card.write_text(card.read_text()[:-20])
    elif damage == "card missing":
        card.unlink()
    elif damage == "other rows":
        rows = rows[:-1]
    else:
        card.write_text(json.dumps({**json.loads(card.read_text()), "spec": "flat:x"}))
    with pytest.raises(BackendError):
        SideIndex.load(tmp_path, [rows])


def test_a_short_file_is_noticed_even_unverified(tmp_path: Path) -> None:
    rows, _ = clustered(500)
    built([rows], "hnsw").save(tmp_path)
    file = tmp_path / "index.faiss"
    file.write_bytes(file.read_bytes()[:-1_000])
    with pytest.raises(BackendError):
        SideIndex.load(tmp_path, [rows], verify=False)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="could not be written"):
        built([unit(10)]).save(tmp_path / "file")


# --- merging ----------------------------------------------------------------------------------------------------


def found(scores: list[float], numbers: list[int], exact: bool = True, recall: float = 1.0) -> Found:
    return Found(np.array([scores], np.float32), np.array([numbers], np.int64), exact, recall)


def test_a_document_scores_as_its_best_vector() -> None:
    texts, pictures = found([0.9, 0.5], [0, 1]), found([0.8, 0.7], [1, 0], exact=False, recall=0.99)
    [ranking] = merge([(texts, np.array([0, 1])), (pictures, np.array([0, 2]))], ["a", "b", "c"], 10)
    assert [(hit.id, round(hit.score, 3)) for hit in ranking] == [("a", 0.9), ("c", 0.8), ("b", 0.5)]
    assert not ranking.exact
    assert ranking.recall == 0.99


def test_ties_go_to_the_smaller_id_also_at_the_cut() -> None:
    scores = [0.9, 0.5, 0.5 - 5e-7, 0.5 - 9e-7, 0.1]
    [ranking] = merge([(found(scores, [0, 1, 2, 3, 4]), np.arange(5))], ["z", "y", "x", "w", "a"], 3)
    assert [hit.id for hit in ranking] == ["z", "w", "x"]


def test_padding_is_no_hit() -> None:
    [ranking] = merge([(found([0.9, -np.inf], [1, -1]), np.array([5, 3]))], list("abcdef"), 3)
    assert [hit.id for hit in ranking] == ["d"]


def test_an_exact_search_over_random_subsets_never_misses_a_tie() -> None:
    """Two sides, many equal vectors: the merged ranking is the sorted list of all documents."""
    rng = np.random.default_rng(0)
    rows = unit(20)[rng.integers(20, size=400)]
    ids = [f"{i:03}" for i in rng.permutation(200)]
    owner = np.arange(400) % 200
    for queries in (1, 10):
        asked = unit(queries, seed=9)
        allowed = rng.random(400) < 0.5
        sides = [(built([rows[at : at + 200]]), at) for at in (0, 200)]
        rankings = merge(
            [(s.search(asked, 15, allowed[at : at + 200]), owner[at : at + 200]) for s, at in sides], ids, 15
        )
        for query, ranking in enumerate(rankings):
            best: dict[str, float] = {}
            for number in np.flatnonzero(allowed):
                score = float(rows[number] @ asked[query])
                best[ids[owner[number]]] = max(score, best.get(ids[owner[number]], -2.0))
            expected = sorted(best, key=lambda id: (-round(best[id], 5), id))[:15]
            assert [hit.id for hit in ranking] == expected
