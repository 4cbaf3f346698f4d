"""Distill-VQ: the losses against their definitions, what is learned against what it started from, and odd input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexers.distill_vq import ARMS, Lesson, Recipe, agreement, distill, distill_vq_loss, lesson, taught
from indexers.embedded import open_index
from indexers.kinds import Distilled
from indexers.product import Quantizers, empty_index, face, fitted, other_side, quantizers_of
from indexers.queries import perturbed, windows
from indexers.rebuild import build, rebuild
from indexers.scan import Stored, threads
from indexers.vectors import SideIndex, parse_spec
from retrieval.errors import BackendError, Invalid
from retrieval.types import Document, Encoded, Prepared, Progress, Side, SpaceInfo

Array = NDArray[np.float32]
SPEC = "distillvq:M=4,nlist=8"
HALF = "distillvq:M=8,bits=4,nlist=8"  # as many bytes
QUICK = Recipe(steps=60, lr_ivf=0.03, lr_pq=0.03)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def quiet(phase: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def clustered(count: int, dim: int = 32, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((40, dim))
    rows = (centres[rng.integers(40, size=count)] + 0.6 * rng.standard_normal((count, dim))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def scores(seed: int = 0, rows: int = 3, columns: int = 5) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal((rows, columns)))


# --- the losses ------------------------------------------------------------------------------------


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(x) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def by_definition(arm: str, s: list[float], t: list[float], positive: int) -> float:
    """One query, as methods print it."""
    n, ps, pt = len(s), softmax(s), softmax(t)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    if arm == "listnet":
        return -sum(b * math.log(a) for a, b in zip(ps, pt, strict=True))
    if arm == "kl":
        return sum(a * math.log(a / b) for a, b in zip(ps, pt, strict=True))
    if arm == "mse":
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / n
    if arm == "margin_mse":
        return sum(((t[i] - t[j]) - (s[i] - s[j])) ** 2 for i, j in pairs) / n**2
    if arm == "ranknet":
        ordered = [(i, j) for i, j in pairs if t[i] > t[j]]
        return sum((t[i] - t[j]) * math.log(1 + math.exp(s[j] - s[i])) for i, j in ordered) / n**2
    return -math.log(ps[positive])


@pytest.mark.parametrize("arm", ARMS)
def test_a_loss_equals_its_definition(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, positives = scores(0), scores(1), torch.tensor([1, 4, 0])
    rows = zip(student.tolist(), teacher.tolist(), positives.tolist(), strict=True)
    expected = np.mean([by_definition(arm, s, t, p) for s, t, p in rows])
    assert float(distill_vq_loss(student, teacher, arm, positives)) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("indexers.distill_vq._PAIRS_AT_ONCE", 1)  # one query at a time
    assert float(distill_vq_loss(student, teacher, arm, positives)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("arm", ["listnet", "kl", "mse", "margin_mse"])
def test_the_teachers_own_scores_are_the_minimum(arm: str) -> None:
    teacher = scores(1)
    student = teacher.clone().requires_grad_()
    least = distill_vq_loss(student, teacher, arm)
    torch.autograd.backward(least)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-9
    for seed in range(2, 8):
        assert float(distill_vq_loss(teacher + 0.3 * scores(seed), teacher, arm)) > float(least.detach())
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    assert float(least.detach()) == pytest.approx(float(entropy) if arm == "listnet" else 0.0, abs=1e-9)


@pytest.mark.parametrize("arm", ARMS)
def test_what_a_loss_does_not_see(arm: str) -> None:
    student, teacher, positives = scores(0), scores(1), torch.tensor([1, 4, 0])
    loss = float(distill_vq_loss(student, teacher, arm, positives))
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = torch.tensor([order.tolist().index(p) for p in positives.tolist()])
    assert float(distill_vq_loss(student[:, order], teacher[:, order], arm, moved)) == pytest.approx(loss)
    shifted = float(distill_vq_loss(student + scores(5, 3, 1), teacher, arm, positives))
    assert (shifted == pytest.approx(loss)) == (arm != "mse")  # all but MSE compare within a query


def test_ranknet_falls_as_the_order_becomes_the_teachers() -> None:
    teacher = scores(1)
    losses = [float(distill_vq_loss(scale * teacher, teacher, "ranknet")) for scale in (-1.0, 0.0, 1.0, 3.0)]
    assert losses == sorted(losses, reverse=True)


def test_an_unknown_arm_and_missing_positives_are_refused() -> None:
    with pytest.raises(Invalid, match="there are listnet"):
        distill_vq_loss(scores(), scores(), "cosine")
    with pytest.raises(Invalid, match="positives"):
        distill_vq_loss(scores(), scores(), "contrastive")
    with pytest.raises(Invalid, match="there are listnet"):
        distill(started(), Stored([clustered(300)]), taught_by(300), quiet, Recipe(arm="x"))


# --- learning --------------------------------------------------------------------------------------


def started(count: int = 600, seed: int = 0) -> Quantizers:
    return fitted(clustered(count), 4, 8, seed)


def taught_by(count: int = 600, queries: int = 200) -> Lesson:
    return lesson(Stored([clustered(count)]), clustered(queries, seed=1), 50, quiet)


def test_quantizers_go_into_faiss_and_come_back() -> None:
    start = started()
    for given, held in zip(start, quantizers_of(empty_index(start)), strict=True):
        np.testing.assert_array_equal(given, held)
    np.testing.assert_allclose(start.turn @ start.turn.T, np.eye(32), atol=1e-4)


def test_sixteen_codewords_are_learned_and_go_into_faiss() -> None:
    start, stored = fitted(clustered(600), 8, 8, bits=4), Stored([clustered(600)])
    assert start.codebooks.shape == (8, 16, 4)
    known = taught_by()
    learned = distill(start, stored, known, quiet, replace(QUICK, steps=30))
    assert agreement(learned, stored, known) > agreement(start, stored, known)
    for given, held in zip(learned, quantizers_of(empty_index(learned)), strict=True):
        np.testing.assert_array_equal(given, held)


def test_documents_and_queries_are_turned_so_that_scores_stay() -> None:
    rows, asked = clustered(600), clustered(40, seed=1)
    start = fitted(rows, 4, 8, queries=asked)
    assert np.abs(start.turn @ start.turn.T - np.eye(32)).max() > 0.05  # no turn
    np.testing.assert_allclose((asked @ other_side(start.turn).T) @ (rows @ start.turn.T).T, asked @ rows.T, atol=1e-4)
    index = empty_index(start)
    for _ in range(2):
        face(index)
    np.testing.assert_allclose(quantizers_of(index).turn, start.turn, atol=1e-4)


def test_what_the_student_scores_is_what_faiss_scores() -> None:
    """The loss is computed on the codes and lists that the exported index has."""
    start, rows, queries = started(), clustered(600), clustered(5, seed=1)
    index = empty_index(start)
    index.add(rows)
    turned = rows @ start.turn.T
    coarse = start.centroids[(turned @ start.centroids.T).argmax(1)]
    parts = (turned - coarse).reshape(600, 4, 1, 8)
    codes = ((parts - start.codebooks[None]) ** 2).sum(3).argmin(2)
    decoded = coarse + np.concatenate([start.codebooks[m, codes[:, m]] for m in range(4)], 1)
    import faiss

    wide = faiss.SearchParametersPreTransform(index_params=faiss.SearchParametersIVF(nprobe=8))
    found, numbers = index.search(queries, 10, params=wide)
    ours = (queries @ start.turn.T) @ decoded.T
    np.testing.assert_allclose(found, np.take_along_axis(ours, numbers, 1), atol=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_learning_agrees_better_with_the_teacher_and_leaves_the_turn(arm: str) -> None:
    start, stored, known = started(), Stored([clustered(600)]), taught_by()
    learned = distill(start, stored, known, quiet, replace(QUICK, arm=arm))
    np.testing.assert_array_equal(learned.turn, start.turn)
    assert not np.array_equal(learned.codebooks, start.codebooks)
    assert not np.array_equal(learned.centroids, start.centroids)
    if arm in ("listnet", "kl"):
        assert agreement(learned, stored, known) > agreement(start, stored, known)


def test_equal_seeds_learn_equally_and_a_second_fit_starts_afresh() -> None:
    stored, known = Stored([clustered(600)]), taught_by()
    first, again = (distill(started(), stored, known, quiet, QUICK) for _ in range(2))
    other = distill(started(), stored, known, quiet, replace(QUICK, seed=1))
    np.testing.assert_array_equal(first.codebooks, again.codebooks)
    assert not np.array_equal(first.codebooks, other.codebooks)


def test_chunks_on_disk_teach_as_memory_does(tmp_path: Path) -> None:
    rows = clustered(600)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    chunks = [mapped[:250], mapped[250:]]
    one, two = (distill(started(), Stored(c), taught_by(), quiet, QUICK) for c in ([rows], chunks))
    np.testing.assert_allclose(one.codebooks, two.codebooks, atol=1e-5)


def test_a_cancelled_fit_stops_at_the_step() -> None:
    def stop(phase: str, done: int, total: int | None) -> None:
        if (phase, done) == ("distill", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(started(), Stored([clustered(600)]), taught_by(), stop, QUICK)


def test_a_fit_that_diverges_is_no_index() -> None:
    with pytest.raises(BackendError, match="diverged"):
        distill(started(), Stored([clustered(600)]), taught_by(), quiet, replace(QUICK, tau=0.0))


def test_learning_that_helps_nobody_is_dropped() -> None:
    stored = Stored([clustered(600)])
    harmful = replace(QUICK, lr_ivf=30.0, lr_pq=30.0)
    assert taught(started(), stored, clustered(200, seed=1), quiet, harmful) is None
    assert taught(started(), stored, clustered(1_600, seed=1), quiet, QUICK) is not None


# --- as a vector index -----------------------------------------------------------------------------


def built(rows: Array, spec: str = SPEC, queries: Array | None = None, like: SideIndex | None = None) -> SideIndex:
    return SideIndex.build([rows], parse_spec(spec), quiet, queries, like)


@pytest.fixture(scope="module")
def learned() -> SideIndex:
    return built(clustered(1_200), queries=clustered(1_500, seed=1))


def test_it_finds_more_than_what_it_started_from(learned: SideIndex) -> None:
    rows, asked = clustered(1_200), clustered(200, seed=2)
    truth = np.sort(asked @ rows.T, axis=1)[:, -10:]

    def recall(index: SideIndex) -> float:
        found = index.search(asked, 10)
        assert not found.exact
        return float((np.take_along_axis(asked @ rows.T, found.numbers, 1) >= truth[:, :1] - 1e-6).mean())

    assert recall(learned) > recall(built(rows, "ivfpq:M=4,nlist=8,nprobe=8"))


def test_the_curve_is_kept_and_nprobe_comes_from_it(learned: SideIndex, tmp_path: Path) -> None:
    curve = learned.measured.curve
    assert [point.effort for point in curve] == [1, 2, 4, 8]
    recalls = [point.recall for point in curve]
    assert recalls[-1] > recalls[0]
    # Not always rising: of lists further away come documents whose codes score above those of true neighbours.
    assert all(later > earlier - 0.01 for earlier, later in pairwise(recalls))
    assert all(point.ms > 0 for point in curve)
    chosen = next(point for point in curve if point.effort == learned.measured.effort)
    assert chosen.recall == learned.recall >= 0.99 * max(recalls)
    learned.save(tmp_path)
    opened = SideIndex.load(tmp_path, [clustered(1_200)])
    assert opened.measured == learned.measured
    asked = clustered(5, seed=2)
    np.testing.assert_array_equal(opened.search(asked, 5).numbers, learned.search(asked, 5).numbers)
    assert learned.measured.notes == ()


def test_nprobe_that_was_asked_for_stays() -> None:
    index = built(clustered(600), SPEC + ",nprobe=3", clustered(200, seed=1))
    assert index.measured.effort == 3
    assert [point.effort for point in index.measured.curve] == [3]


def test_without_queries_it_says_what_it_learned_from() -> None:
    assert "drawn around" in built(clustered(600)).measured.notes[0]


def test_stored_vectors_rescore_candidates_where_asked() -> None:
    rows, asked = clustered(600), clustered(20, seed=2)
    refined = built(rows, SPEC + ",refine=20,nprobe=8", clustered(200, seed=1)).search(asked, 5)
    np.testing.assert_allclose(refined.scores, -np.sort(-(asked @ rows.T), axis=1)[:, :5], atol=0.05)


@pytest.mark.parametrize("spec", [SPEC, HALF])
def test_growing_uses_what_was_learned(spec: str) -> None:
    learned = built(clustered(600), spec, clustered(300, seed=1))
    more = built(clustered(1_500), spec, like=learned)
    assert len(more) == 1_500
    assert more._codes is not None
    assert learned._codes is not None
    for old, new in zip(quantizers_of(learned._codes.index), quantizers_of(more._codes.index), strict=True):
        np.testing.assert_allclose(old, new, atol=1e-4)


# --- in a collection --------------------------------------------------------------------------------


class Topics:
    """Encodes texts of the form "t12 ..." as something near the twelfth direction."""

    digests: ClassVar[dict[Side, str]] = {"text": "topics"}
    asked: ClassVar[list[str]] = []

    def documents(self, count: int, first: int = 0) -> tuple[list[Document], Array]:
        made = [Document(id=f"d{n:04d}", text=f"t{n} is seen here. t{n} is not alone.") for n in range(first, count)]
        return made, clustered(count)[first:]

    def ask(self, space: str, asked: Sequence[str] | Array) -> Array:
        assert space == "text"
        if isinstance(asked, np.ndarray):
            return -asked
        self.asked.extend(asked)
        return clustered(len(asked), seed=len(asked))


def indexed(folder: Path, count: int, side: Side = "text") -> Topics:
    topics = Topics()
    documents, vectors = topics.documents(count)

    def prepare(some: Sequence[Document]) -> Prepared:
        rows = [int(d.id[1:]) for d in some]
        return Prepared(list(some), {("text", side): Encoded(np.arange(len(rows)), vectors[rows])}, [])

    prepare.digest = "topics"  # type: ignore[attr-defined]
    spaces = {"text": SpaceInfo("text", 32, {side: "topics"})}
    build(folder, documents, prepare, config={}, spaces=spaces, vector_index="flat", progress=quiet)  # type: ignore[arg-type]
    return topics


def described(folder: Path) -> dict[str, Any]:
    index = open_index(folder)
    found: dict[str, Any] = index.snapshot().describe()["spaces"]["text"]["sides"]["text"]
    index.close()
    return found


def test_a_rebuild_learns_from_the_collections_own_texts(tmp_path: Path) -> None:
    topics = indexed(tmp_path / "c", 400)
    done = rebuild(tmp_path / "c", vector_index=SPEC, progress=quiet, ask=topics.ask)
    assert done.documents == 400
    assert {"t7 is seen here.", "t399 is not alone."} <= set(topics.asked)
    found = described(tmp_path / "c")
    assert found["kind"] == "distillvq:M=4,nlist=8,refine=0"
    assert [point["effort"] for point in found["curve"]] == [1, 2, 4, 8]
    assert found["effort"] in (1, 2, 4, 8)
    assert not any("no queries" in note for note in found["notes"])
    json.dumps(found)


@pytest.mark.parametrize(("side", "share"), [("image", 0.2), ("text", 0.0)])
def test_an_index_of_pictures_learns_from_some_of_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: Side, share: float
) -> None:
    learned_from = []
    teach = Distilled.teach

    def taught_by(kind: Distilled, sample: Array, stored: Stored, queries: Array, progress: Progress) -> Any:
        learned_from.append(queries)
        return teach(kind, sample, stored, queries, progress)

    topics = indexed(tmp_path / "c", 400, side)
    monkeypatch.setattr(Distilled, "teach", taught_by)
    rebuild(tmp_path / "c", vector_index=SPEC, progress=quiet, ask=topics.ask)
    [queries] = learned_from
    stored = {(-row).tobytes() for row in clustered(400)}  # as pictures ask
    own = [row.tobytes() in stored for row in queries]
    assert own.count(True) / len(own) == pytest.approx(share, abs=0.01)  # one beside four others


def test_a_cancelled_rebuild_leaves_the_collection_and_the_same_call_finishes(tmp_path: Path) -> None:
    topics = indexed(tmp_path / "c", 400)

    def cancel(phase: str, done: int, total: int | None) -> None:
        if phase == "distill" and done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebuild(tmp_path / "c", vector_index=SPEC, progress=cancel, ask=topics.ask)
    assert described(tmp_path / "c")["kind"] == "flat"
    assert rebuild(tmp_path / "c", vector_index=SPEC, progress=quiet, ask=topics.ask).documents == 400
    assert described(tmp_path / "c")["kind"].startswith("distillvq")


def test_growth_keeps_what_was_learned_until_the_next_rebuild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexers.publish.SEALED_AT", 50)
    monkeypatch.setattr("indexers.publish._much", lambda changed, total, least: changed > 50)
    topics = indexed(tmp_path / "c", 400)
    rebuild(tmp_path / "c", vector_index=SPEC, progress=quiet, ask=topics.ask)
    monkeypatch.setattr("indexers.distill_vq.taught", lambda *_: pytest.fail("learned again"))
    index = open_index(tmp_path / "c")
    documents, vectors = topics.documents(500, 400)
    index.add(documents, {("text", "text"): Encoded(np.arange(100), vectors)})
    index.publish()
    [stretch] = index.snapshot().stretches["text", "text"]
    assert len(stretch.index) == 500
    assert str(stretch.index.spec).startswith("distillvq")
    index.close()


# --- odd input -------------------------------------------------------------------------------------


def test_codes_of_four_bits_are_saved_searched_and_described(tmp_path: Path) -> None:
    topics = indexed(tmp_path / "c", 400)
    rebuild(tmp_path / "c", vector_index=HALF + ",refine=10", progress=quiet, ask=topics.ask)
    found = described(tmp_path / "c")
    assert found["kind"] == HALF + ",refine=10"
    assert found["recall"] > 0.9
    index = open_index(tmp_path / "c")
    [stretch] = index.snapshot().stretches["text", "text"]
    side = stretch.index
    asked = clustered(20, seed=2)
    everything = side.search(asked, 5, np.ones(400, np.bool_))
    truth = -np.sort(-(asked @ clustered(400).T), axis=1)[:, :5]
    np.testing.assert_allclose(everything.scores[:, :5], truth, atol=1e-3)
    unfiltered = side.search(asked, 5)
    assert not unfiltered.exact
    assert (unfiltered.scores >= truth[:, -1:] - 1e-3).mean() > 0.8
    index.close()


@pytest.mark.parametrize("count", [1, 2, 9, 15])
def test_fewer_vectors_than_sixteen_codewords(count: int) -> None:
    rows = clustered(count)
    index = built(rows, HALF, clustered(20, seed=1))
    assert any("too few to distil" in note for note in index.measured.notes)
    found = index.search(rows, count)
    assert all(sorted(row.tolist()) == list(range(count)) for row in found.numbers)


@pytest.mark.parametrize("count", [1, 2, 9, 40, 120])
def test_fewer_vectors_than_codewords_are_found_and_said(count: int) -> None:
    rows = clustered(count)
    index = built(rows, SPEC + ",nprobe=8", clustered(20, seed=1))
    assert any("too few to distil" in note for note in index.measured.notes)
    found = index.search(rows, 1).numbers.ravel()
    assert (found == np.arange(count)).mean() > 0.95


def test_duplicates_only() -> None:
    rows = np.repeat(clustered(1), 400, axis=0)
    for spec in (SPEC, HALF):
        found = built(rows, spec, clustered(30, seed=1)).search(rows[:1], 5)
        assert len(set(found.numbers[0].tolist())) >= 5
        np.testing.assert_allclose(found.scores, 1, atol=1e-3)


def test_one_cluster() -> None:
    rng = np.random.default_rng(0)
    rows = (clustered(1) + 0.01 * rng.standard_normal((500, 32))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = built(rows, SPEC + ",nprobe=8", rows[:50] + 0)
    assert (index.search(rows[:3], 5).numbers >= 0).all()
    assert index.recall > 0.1


def test_zero_vectors_among_others() -> None:
    rows = clustered(400)
    rows[7] = rows[300] = 0
    found = built(rows, SPEC + ",nprobe=8", clustered(50, seed=1)).search(rows[:3], 5)
    assert np.isfinite(found.scores).all()
    assert built(np.zeros((400, 32), np.float32), SPEC + ",nprobe=8").search(rows[:1], 5).numbers.shape == (1, 5)


def test_queries_of_another_space_are_refused() -> None:
    with pytest.raises(Invalid, match="32 dimensions"):
        built(clustered(400), queries=clustered(50, dim=16))
    broken = clustered(50)
    broken[3, 3] = np.nan
    with pytest.raises(Invalid, match="not finite"):
        built(clustered(400), queries=broken)


def test_a_dimension_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(Invalid, match="M=5 does not divide"):
        built(clustered(400), "distillvq:M=5,nlist=8")


def test_an_empty_log_counts_as_none() -> None:
    assert "drawn around" in built(clustered(400), queries=np.empty((0, 32), np.float32)).measured.notes[0]


# --- queries ---------------------------------------------------------------------------------------


def test_windows_are_sentences_and_pieces_of_what_is_longer() -> None:
    text = "The heart is large. No effusion is seen!\nNormal. " + " ".join(f"w{n}" for n in range(100))
    found = list(windows(text, np.random.default_rng(0)))
    assert found[:2] == ["The heart is large.", "No effusion is seen!"]
    assert "Normal." not in found
    assert " ".join(found[2:]) in text
    assert all(8 <= len(window.split()) <= 32 for window in found[2:-1])


def test_perturbed_vectors_lie_near_all_of_the_stored_ones() -> None:
    rows = clustered(50)
    drawn = perturbed(rows, 200, seed=0)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-5)
    assert len(set((drawn @ rows.T).argmax(1).tolist())) > 40
