from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from encoders.unime import hard_negative_loss, hard_negatives, tdd_loss
from retrieval.errors import InputError


def _square(seed: int, size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, size, size, generator=draw, dtype=torch.float64) * 2
    alike = torch.rand(size, size, generator=draw) < 0.2
    alike[1] = True  # a row with nothing but copies
    return student, teacher, alike


def _tdd_by_loops(student: Tensor, teacher: Tensor, alike: Tensor) -> Tensor:
    rows = []
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i and not alike[i, j]]
        if not others:
            continue
        p = [teacher[i, j].exp() / sum(teacher[i, k].exp() for k in others) for j in others]
        q = [student[i, j].exp() / sum(student[i, k].exp() for k in others) for j in others]
        rows.append(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))
    return torch.stack([torch.as_tensor(row) for row in rows]).mean()


@pytest.mark.parametrize("seed", range(5))
def test_stage_one_equals_its_definition_and_so_do_its_gradients(seed: int) -> None:
    student, teacher, alike = _square(seed)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    fast, slow = tdd_loss(one, teacher, alike=alike), _tdd_by_loops(two, teacher, alike)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in ((fast, one), (slow, two))))


def test_the_gradient_of_stage_one_is_the_difference_of_the_distributions() -> None:
    student, teacher, _ = _square(1)
    student.requires_grad_()
    own = torch.eye(5, dtype=torch.bool)
    (got,) = torch.autograd.grad(tdd_loss(student, teacher), student)
    q, p = (x.detach().masked_fill(own, -math.inf).softmax(1) for x in (student, teacher))
    torch.testing.assert_close(got, (q - p) / 5)


def test_the_diagonal_says_nothing() -> None:
    student, teacher, _ = _square(2)
    own = torch.eye(5, dtype=torch.float64) * 100
    torch.testing.assert_close(tdd_loss(student + own, teacher - own), tdd_loss(student, teacher))


def test_copies_of_a_text_say_nothing_either() -> None:
    student = torch.zeros(3, 3, requires_grad=True)
    twins = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]) > 0
    (gradient,) = torch.autograd.grad(tdd_loss(student, torch.randn(3, 3), alike=twins), student)
    assert gradient[0, 1] == gradient[1, 0] == 0


def test_teacher_and_student_may_differ_by_a_constant_in_every_row() -> None:
    student, teacher, _ = _square(3)
    assert tdd_loss(student + torch.arange(5.0)[:, None], student).item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(tdd_loss(student, teacher + 4), tdd_loss(student, teacher))


def test_it_is_kl_from_the_teacher_not_to_it() -> None:
    """Where the teacher sees a neighbour that the student does not, the loss must be large."""
    sure, torn = torch.zeros(3, 3), torch.zeros(3, 3)
    sure[0, 1] = 9.0
    assert tdd_loss(sure, torn).item() == pytest.approx((9 / 2 - math.log(2)) / 3, abs=1e-3)
    assert tdd_loss(torn, sure).item() == pytest.approx(math.log(2) / 3, abs=1e-2)


def test_descending_stage_one_reaches_the_teachers_order() -> None:
    student, teacher, _ = _square(4)
    student.requires_grad_()
    optimiser = torch.optim.SGD([student], lr=10.0)
    for _ in range(300):
        optimiser.zero_grad()
        tdd_loss(student, teacher).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    own = torch.eye(5, dtype=torch.bool)
    got, wanted = (x.detach().masked_fill(own, -99).argsort(1) for x in (student, teacher))
    assert got.tolist() == wanted.tolist()


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    tdd_loss(student, teacher).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None


# ---- stage 2


def _hard_by_loops(scores: Tensor, k: int, beta: float, temperature: float, alike: Tensor) -> Tensor:
    rows = []
    for i in range(len(scores)):
        others = [j for j in range(scores.shape[1]) if j != i and not alike[i, j]]
        left = sorted((j for j in others if scores[i, j] <= scores[i, i] + beta), key=lambda j: -scores[i, j].item())
        if not left:
            continue
        taken = [left[n % len(left)] for n in range(k)]
        down = (scores[i, i] / temperature).exp() + sum((scores[i, j] / temperature).exp() for j in taken)
        rows.append(-((scores[i, i] / temperature).exp() / down).log())
    return torch.stack(rows).mean() if rows else scores.sum() * 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("beta", [-0.2, 0.0, 0.3, math.inf])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_stage_two_equals_its_definition_and_so_do_its_gradients(k: int, beta: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 7, generator=draw, dtype=torch.float64)
    alike = torch.rand(5, 7, generator=draw) < 0.2
    alike[1] = True
    one, two = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    fast = hard_negative_loss(one, k=k, beta=beta, temperature=0.3, alike=alike)
    slow = _hard_by_loops(two, k, beta, 0.3, alike)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in ((fast, one), (slow, two))))


def test_too_few_survivors_are_repeated_and_the_positive_never_comes_back() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.8, 0.1]], requires_grad=True)  # two false negatives, one true one
    loss, counts = hard_negative_loss(scores, k=4, beta=0.1, temperature=1.0), hard_negatives(scores, 4, 0.1).counts
    wanted = -(math.exp(0.5) / (math.exp(0.5) + 4 * math.exp(0.1)))
    assert loss.item() == pytest.approx(-math.log(-wanted))
    assert (counts.masked, counts.filtered, counts.duplicated) == (1, 2, 3)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[0, 1] == gradient[0, 2] == 0


def test_where_nothing_survives_a_row_counts_nothing() -> None:
    scores = torch.tensor([[0.5, 0.9], [0.1, 0.5]], requires_grad=True)
    loss, counts = hard_negative_loss(scores, k=2, beta=0.1, temperature=1.0), hard_negatives(scores, 2, 0.1).counts
    assert counts.empty == 1
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[0].tolist() == [0.0, 0.0]
    assert loss.item() == pytest.approx(-math.log(math.exp(0.5) / (math.exp(0.5) + 2 * math.exp(0.1))))


def test_an_exact_copy_of_the_positive_is_removed_by_its_id_which_no_threshold_would_do() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.2], [0.5, 0.5, 0.1], [0.0, 0.0, 0.5]], requires_grad=True)
    copies = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]) > 0
    assert hard_negatives(scores, 1, 0.0).counts.filtered == 0  # equal is not above
    (gradient,) = torch.autograd.grad(hard_negative_loss(scores, k=1, beta=0.0, temperature=1.0, alike=copies), scores)
    assert gradient[0, 1] == gradient[1, 0] == 0


def test_easy_negatives_hardly_move_anything() -> None:
    scores = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) * 0.5
    scores.fill_diagonal_(0.6)
    norms = {}
    for among in ("hard", "random", "easy"):
        leaf = scores.clone().requires_grad_()
        draw = torch.Generator().manual_seed(1)
        hard_negative_loss(leaf, k=4, temperature=0.05, among=among, draw=draw).backward()  # type: ignore[arg-type, no-untyped-call]
        assert leaf.grad is not None
        norms[among] = leaf.grad.norm().item()
    assert norms["hard"] > norms["random"] > 10 * norms["easy"]


def test_without_a_filter_and_with_all_negatives_it_is_info_nce() -> None:
    scores = torch.rand(6, 6, dtype=torch.float64)
    wanted = -(scores / 0.1).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(hard_negative_loss(scores, k=5, beta=math.inf, temperature=0.1), wanted)


def test_descending_stage_two_brings_the_positive_above_all() -> None:
    scores = torch.rand(6, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    optimiser = torch.optim.Adam([scores], lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        hard_negative_loss(scores, k=2, beta=math.inf, temperature=0.1).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert scores.argmax(1).tolist() == list(range(6))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="square matrix"):
        tdd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match="teacher of shape"):
        tdd_loss(torch.zeros(2, 2), torch.zeros(3, 3))
    with pytest.raises(InputError, match="alike of shape"):
        tdd_loss(torch.zeros(2, 2), torch.zeros(2, 2), alike=torch.zeros(1, 2) > 0)
    with pytest.raises(InputError, match="column for each row"):
        hard_negative_loss(torch.zeros(3, 2))
    with pytest.raises(InputError, match="temperature"):
        hard_negative_loss(torch.zeros(2, 2), temperature=0)
    with pytest.raises(InputError, match="k=0"):
        hard_negative_loss(torch.zeros(2, 2), k=0)
