"""The weighted Tversky index: one pair by its definition, whole matrices, and rows of an index agree."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from ontology.tversky import DENIALS, Index, Measure, Profile, findings_score, measure, tversky_matrix
from retrieval.types import Assertion, Finding, Part
from tests.fakes import ListedPostings, WordLinker

PARENTS = {"effusion": ["pleural"], "hemothorax": ["effusion"], "pneumothorax": ["pleural"], "nodule": ["lesion"]}
TYPES = {
    "effusion": ["T047"],
    "hemothorax": ["T046"],
    "pneumothorax": ["T047"],
    "nodule": ["T033"],
    "pleural": ["T033"],
}
YES, NO, MAYBE = Assertion.affirmed, Assertion.negated, Assertion.uncertain


def over(**constants: object) -> Measure:
    return Measure(Index(**constants), lambda c: TYPES.get(c, ()), lambda c: PARENTS.get(c, ()))  # type: ignore[arg-type]


def said(*words: str) -> tuple[Finding, ...]:
    """ "effusion", "-effusion" denied, "?effusion" doubtful."""
    signs = {"-": NO, "?": MAYBE}
    return tuple(Finding(w.lstrip("-?"), signs.get(w[0], YES), (0, 1)) for w in words)


def scores(by: Measure, part: Part, *documents: tuple[Finding, ...]) -> list[float]:
    return [float(score) for score in findings_score(by)(part, ListedPostings(documents))]


def test_with_default_constants_and_no_hierarchy_it_is_the_weighted_dice_index() -> None:
    by = over(decay=0.0, cost=0.0)
    generator = random.Random(0)
    words = [*TYPES, "unknown"]
    for _ in range(200):
        q, d = (dict.fromkeys(generator.sample(words, generator.randint(1, 5)), 1.0) for _ in range(2))
        shared = by.total({c: 1.0 for c in q if c in d})
        dice = 2 * shared / (by.total(q) + by.total(d))
        assert by.similarity(Profile(q, frozenset()), Profile(d, frozenset())) == pytest.approx(dice)


def test_types_weigh_as_in_the_paper_and_uniform_weights_do_not() -> None:
    assert [over().weight(c) for c in ("effusion", "hemothorax", "nodule", "unknown")] == [3, 2, 1, 1]
    assert over(uniform=True).weight("effusion") == 1
    assert over(information={"effusion": 0.7}).weight("effusion") == 0.7


def test_declared_weights_overrule_types() -> None:
    by = Measure(Index(others=0.1), lambda c: TYPES.get(c, ()), lambda _: (), {"nodule": 1.0})
    assert by.weight("nodule") == 1.0
    assert by.weight("effusion") == pytest.approx(0.3)


def test_alpha_moves_between_the_larger_and_the_smaller_difference() -> None:
    q, d = Profile({"a": 1.0, "b": 1.0}, frozenset()), Profile({"a": 1.0}, frozenset())
    contained, strict = (over(alpha=alpha, decay=0).similarity(q, d) for alpha in (1.0, 0.0))
    assert (contained, strict) == (1.0, 0.5)


def test_a_narrower_concept_shares_its_ancestor() -> None:
    effusion, hemothorax, nodule = (over().profile(said(w)) for w in ("effusion", "hemothorax", "nodule"))
    assert 0 < over(decay=0.5).similarity(effusion, hemothorax) < 1
    assert over(decay=0.0).similarity(effusion, hemothorax) == 0
    assert over(decay=0.5).similarity(effusion, nodule) == 0


def test_asserting_what_the_query_denies_costs() -> None:
    by = over(cost=1.0)
    query = by.profile(said("nodule", "-effusion"))
    silent, contrary = (
        by.similarity(query, by.profile(found)) for found in (said("nodule", "mass"), said("nodule", "effusion"))
    )
    plain = over(cost=0.0)
    assert contrary < plain.similarity(query, plain.profile(said("nodule", "effusion")))
    assert contrary < silent


def test_shared_denials_only_break_ties() -> None:
    by = over()
    query = by.profile(said("nodule", "-effusion"))
    same = by.similarity(query, by.profile(said("nodule", "-effusion")))
    assert same - by.similarity(query, by.profile(said("nodule"))) == pytest.approx(DENIALS)


def test_a_report_that_asserts_nothing_is_like_normal_ones() -> None:
    by = over()
    query = by.profile(said("-effusion", "-nodule"))
    normal, ill = by.profile(said("-effusion", "-nodule")), by.profile(said("-effusion", "-nodule", "pneumothorax"))
    assert by.similarity(query, normal) == 1 > by.similarity(query, ill) > 0


def test_strengths_order_what_is_said() -> None:
    by = over()
    found = [said("x"), said("x", "-x"), said("x", "?x"), said("?x"), said("?x", "-x"), said("-x")]
    strengths = [by.profile(f).asserted.get("x", 0.0) for f in found]
    assert strengths[0] == 1
    assert strengths[3] > strengths[4] > strengths[5] == 0
    assert min(strengths[1:3]) > strengths[3]
    assert by.profile(said("-x")).denied == {"x"}


def some_documents(count: int, seed: int) -> list[tuple[Finding, ...]]:
    generator = random.Random(seed)
    words = [sign + word for sign, word in itertools.product(("", "-", "?"), [*TYPES, "unknown", "mass"])]
    return [said(*generator.sample(words, generator.randint(0, 6))) for _ in range(count)]


@pytest.mark.parametrize("constants", [{}, {"decay": 0.3, "depth": 3, "alpha": 0.2, "beta": 2.0}, {"uniform": True}])
def test_matrix_rows_of_an_index_and_single_pairs_agree(constants: dict[str, object]) -> None:
    by = over(**constants)
    queries, documents = some_documents(15, 1), some_documents(40, 2)
    matrix = tversky_matrix(queries, documents, by)
    assert matrix.shape == (15, 40)
    assert matrix.dtype == np.float32
    for q, query in enumerate(queries):
        pairs = [by.similarity(by.profile(query), by.profile(d)) for d in documents]
        np.testing.assert_allclose(matrix[q], pairs, atol=1e-5)
        rows = scores(by, Part(text="q", kind="report", findings=query), *documents)
        np.testing.assert_allclose(rows, pairs, atol=1e-5)


def test_common_concepts_kept_dense_score_like_rare_ones() -> None:
    by = over()
    documents = some_documents(30, 3)
    padded = [*documents, *(() for _ in range(3000))]  # the same concepts are rare here
    for part in (Part(text="q", kind="report", findings=f) for f in some_documents(10, 4)):
        np.testing.assert_allclose(scores(by, part, *padded)[:30], scores(by, part, *documents), atol=1e-6)


def test_a_phrase_finds_those_who_have_it_and_not_those_who_deny_it() -> None:
    part = Part(text="effusion", findings=said("effusion"))
    found = scores(
        over(), part, said("effusion"), said("hemothorax"), said("?effusion"), said("-effusion"), said("nodule")
    )
    assert found[0] > found[1] > found[2] > 0
    assert found[3:] == [0, 0]


def test_a_denial_finds_those_who_deny_and_neither_the_silent_nor_those_who_have_it() -> None:
    part = Part(text="no effusion", findings=said("-effusion"))
    found = scores(over(), part, said("-effusion"), said("effusion"), said("hemothorax"), said("nodule"), ())
    assert found == [1, 0, 0, 0, 0]


def test_a_phrase_is_answered_in_parts() -> None:
    part = Part(text="effusion without pneumothorax", findings=said("effusion", "-pneumothorax"))
    both, one, contrary = scores(
        over(related=0), part, said("effusion", "-pneumothorax"), said("effusion"), said("effusion", "pneumothorax")
    )
    assert both == 1
    assert both > one > contrary == 0


def test_what_a_phrase_asks_for_counts_alike() -> None:
    part = Part(text="effusion and a nodule", findings=said("effusion", "nodule"))
    both, effusion, nodule = scores(over(), part, said("effusion", "nodule"), said("effusion"), said("nodule"))
    assert both == 1
    assert effusion == nodule == 0.5


def test_long_reports_are_not_punished_when_a_phrase_is_asked_for() -> None:
    part = Part(text="nodule", findings=said("nodule"))
    short, long = scores(over(), part, said("nodule"), said("nodule", "mass", "effusion", "pneumothorax"))
    assert short == long == 1


def test_concepts_without_weight_still_answer_a_phrase() -> None:
    by = Measure(Index(), lambda _: ["T023"], lambda _: ())
    assert scores(by, Part(text="lung", findings=said("lung")), said("lung"), said("nodule")) == [1, 0]


def test_a_linker_without_ontology_is_scored_by_concepts_alone() -> None:
    linker = WordLinker(["effusion", "nodule"])
    score = findings_score(linker)
    postings = ListedPostings(linker.link(["effusion", "no effusion", "nodule"]))
    (query,) = linker.link_queries(["effusion"])
    assert score(Part(text="effusion", findings=query), postings).tolist() == [1, 0, 0]


def test_what_was_computed_for_one_state_is_not_used_for_another() -> None:
    score = findings_score()
    part = Part(text="a", findings=said("a"))
    for documents, expected in (([said("a"), said("b")], [1, 0]), ([said("b"), said("a")], [0, 1]), ([], [])):
        assert score(part, ListedPostings(documents)).tolist() == expected


def test_empty_sides_give_empty_matrices_and_zero() -> None:
    by = measure()
    assert tversky_matrix([], [said("a")], by).shape == (0, 1)
    assert tversky_matrix([said("a"), ()], [()], by).tolist() == [[0.0], [0.0]]
