from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from encoders.cprd import cprd_loss, listmle_loss
from retrieval.errors import InputError


def _by_loops(
    student: Tensor, teacher: Tensor, top: int | None, threshold: float | None, tie: float, ignore: Tensor
) -> Tensor:
    """The definition, candidate by candidate; a first column more than the teacher's is the positive."""
    lead = student.shape[1] - teacher.shape[1]
    rows = []
    for s, t, gone in zip(student, teacher.tolist(), ignore.tolist(), strict=True):
        ranked = sorted((k for k in range(len(t)) if not gone[k]), key=lambda k: -t[k])
        chain = [s[0]] * lead + [s[lead + k] for k in ranked]
        targets = list(range(lead))
        for j, k in enumerate(ranked):
            last = j + 1 == len(ranked)
            if last or t[k] - t[ranked[j + 1]] <= tie or (top is not None and j >= top):
                break
            if threshold is not None and t[k] <= threshold:
                break
            targets.append(lead + j)
        if targets:
            rows.append(-sum((chain[j].exp() / sum(c.exp() for c in chain[j:])).log() for j in targets) / len(targets))
    return torch.stack([torch.as_tensor(row) for row in rows]).mean() if rows else student.sum() * 0


def _case(seed: int, lead: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(6, 5 + lead, generator=draw, dtype=torch.float64) * 2
    teacher = torch.randint(0, 6, (6, 5), generator=draw).double()  # ties are frequent
    return student, teacher, torch.rand(6, 5, generator=draw) < 0.2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize(
    ("top", "threshold", "tie"), [(None, None, 0.0), (2, None, 0.0), (None, 2.0, 0.0), (3, 1.0, 1.0)]
)
def test_the_loss_equals_its_definition_and_so_do_its_gradients(
    seed: int, lead: int, top: int | None, threshold: float | None, tie: float
) -> None:
    student, teacher, ignore = _case(seed, lead)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    fast = cprd_loss(one, teacher, top=top, threshold=threshold, tie=tie, ignore=ignore)
    slow = _by_loops(two, teacher, top, threshold, tie, ignore)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in ((fast, one), (slow, two))))


def test_the_gradient_is_the_closed_form() -> None:
    student = torch.tensor([[0.3, -1.2, 0.8, 0.1]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    (got,) = torch.autograd.grad(cprd_loss(student, teacher, top=2), student)
    wanted = torch.zeros(4, dtype=torch.float64)
    for j in range(2):
        wanted[j:] += student[0, j:].detach().softmax(0)
        wanted[j] -= 1
    torch.testing.assert_close(got[0], wanted / 2)


def test_the_gradient_is_what_small_steps_measure() -> None:
    student, teacher, ignore = _case(3, 1)
    assert torch.autograd.gradcheck(
        lambda s: cprd_loss(s, teacher, top=3, ignore=ignore), student.requires_grad_(), raise_exception=True
    )


def test_only_the_order_of_the_teacher_matters() -> None:
    student, teacher = _case(1, 0)[0], torch.rand(6, 5, dtype=torch.float64)
    plain = cprd_loss(student, teacher, top=3)
    for other in (teacher * 100 - 7, teacher.exp(), teacher.argsort(1).argsort(1).double()):
        torch.testing.assert_close(cprd_loss(student, other, top=3), plain)


def test_the_order_in_which_candidates_come_does_not_matter() -> None:
    student, teacher, _ = _case(2, 0)
    places = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        cprd_loss(student[:, places], teacher[:, places]), cprd_loss(student, teacher), check_dtype=False
    )


def test_a_constant_added_to_the_students_row_changes_nothing() -> None:
    student, teacher, _ = _case(4, 0)
    torch.testing.assert_close(cprd_loss(student + 5, teacher), cprd_loss(student, teacher))


def test_ties_are_invalid_and_end_the_prefix() -> None:
    student = torch.tensor([[0.5, 0.1, 0.2, 0.9]], requires_grad=True)
    tied_first = torch.tensor([[2.0, 2.0, 1.0, 0.0]])
    assert cprd_loss(student, tied_first).item() == 0.0
    tied_later = torch.tensor([[3.0, 2.0, 2.0, 1.0]])  # only the first has an order to the rest
    torch.testing.assert_close(cprd_loss(student, tied_later), cprd_loss(student, tied_later, top=1))
    near = torch.tensor([[3.0, 2.95, 1.0, 0.0]])
    assert cprd_loss(student, near, tie=0.1).item() == 0.0


def test_a_saturated_probability_teaches_nothing_where_its_logit_does() -> None:
    student, logits = torch.zeros(1, 3), torch.tensor([[40.0, 30.0, 20.0]])
    assert cprd_loss(student, logits.sigmoid()).item() == 0.0  # all of them are 1 in single precision
    assert cprd_loss(student, logits).item() > 0


def test_cells_that_a_reranker_filled_with_one_constant_are_never_targets() -> None:
    student = torch.tensor([[0.0, 0.0, 3.0, 3.0]], requires_grad=True)
    filled = torch.tensor([[2.0, 1.0, -100.0, -100.0]])
    (gradient,) = torch.autograd.grad(cprd_loss(student, filled), student)
    assert (gradient[0, 2:] > 0).all()


def test_invalid_negatives_only_push_down_and_their_order_means_nothing() -> None:
    student = torch.tensor([[0.0, 0.4, -0.3, 0.2]], requires_grad=True)
    one = cprd_loss(student, torch.tensor([[9.0, 3.0, 2.0, 1.0]]), top=1)
    other = cprd_loss(student, torch.tensor([[9.0, 1.0, 3.0, 2.0]]), top=1)
    torch.testing.assert_close(one, other)
    (gradient,) = torch.autograd.grad(one, student)
    assert gradient[0, 0] < 0
    assert (gradient[0, 1:] > 0).all()


def test_one_valid_negative_is_info_nce_with_it_as_the_positive() -> None:
    student = torch.tensor([[1.0, 0.5, 0.2]])
    loss = cprd_loss(student, torch.tensor([[1.0, 9.0, 0.0]]), top=1)
    assert loss.item() == pytest.approx(-student.log_softmax(1)[0, 1].item())


def test_ignored_candidates_leave_the_list_and_get_no_gradient() -> None:
    student = torch.tensor([[0.2, 5.0, 0.1, -0.4]], requires_grad=True)
    teacher = torch.tensor([[3.0, math.nan, 2.0, 1.0]])
    ignore = torch.tensor([[False, True, False, False]])
    loss = cprd_loss(student, teacher, ignore=ignore)
    torch.testing.assert_close(loss, cprd_loss(student[:, [0, 2, 3]], teacher[:, [0, 2, 3]]))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0, 1] == 0
    whole = cprd_loss(student, teacher, ignore=torch.ones(1, 4, dtype=torch.bool))
    assert torch.autograd.grad(whole, student)[0].tolist() == [[0.0] * 4]


def test_the_positive_in_front_is_pulled_up_and_is_nobodys_competitor() -> None:
    student = torch.zeros(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(cprd_loss(student, torch.tensor([[3.0, 2.0, 1.0]])), student)
    assert gradient[0, 0].item() == pytest.approx((1 / 4 - 1) / 3)  # from its own term alone


@pytest.mark.parametrize("loss", [cprd_loss, listmle_loss])
def test_descending_it_reaches_the_teachers_order(loss: object) -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(4, 6, generator=draw).requires_grad_()
    teacher = torch.rand(4, 6, generator=draw)
    optimiser = torch.optim.Adam([student], lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        loss(student, teacher).backward()  # type: ignore[operator]
        optimiser.step()
    assert student.argsort(1).tolist() == teacher.argsort(1).tolist()


def test_without_ties_and_limits_it_is_listmle() -> None:
    student, teacher = _case(5, 1)[0], torch.rand(6, 5, dtype=torch.float64)
    torch.testing.assert_close(cprd_loss(student, teacher), listmle_loss(student, teacher))


def test_listmle_learns_from_ties_too() -> None:
    assert listmle_loss(torch.zeros(1, 3), torch.zeros(1, 3)).item() == pytest.approx(math.log(6) / 2)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    cprd_loss(student, teacher).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ((2, 3), (2, 5), "need (2, 5), or (2, 6)"),
        ((2, 3), (3,), "a matrix (B, K) is needed"),
        ((3, 3), (2, 3), "need (2, 3)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(student: tuple[int, ...], teacher: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError) as caught:
        cprd_loss(torch.zeros(student), torch.zeros(teacher))
    assert said in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_teacher_score_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="no finite number"):
        cprd_loss(torch.zeros(1, 2), torch.tensor([[bad, 0.0]]))


@pytest.mark.parametrize("given", [{"top": 0}, {"tie": -0.1}])
def test_impossible_limits_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(InputError, match="top="):
        cprd_loss(torch.zeros(1, 2), torch.zeros(1, 2), **given)  # type: ignore[arg-type]
