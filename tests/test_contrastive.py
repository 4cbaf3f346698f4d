from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor

from encoders.contrastive import distribution, gathered, info_nce, kl_loss, same, soft_nce, softened, symmetric
from retrieval.errors import InputError


def _by_loops(scores: Tensor, positive: Tensor, ignore: Tensor, weight: Tensor) -> Tensor:
    """The definition, entry by entry."""
    total, mass = torch.zeros((), dtype=scores.dtype), 0.0
    for i in range(scores.shape[0]):
        wanted = [j for j in range(scores.shape[1]) if positive[i, j]]
        if not wanted:
            continue
        denominator = torch.stack([scores[i, j].exp() for j in range(scores.shape[1]) if not ignore[i, j]]).sum()
        row = torch.stack([-(scores[i, j].exp() / denominator).log() for j in wanted]).sum() / len(wanted)
        total = total + weight[i] * row
        mass += float(weight[i])
    return total / mass


def _case(seed: int, shape: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=draw, dtype=torch.float64) * 3
    positive = torch.rand(shape, generator=draw) < 0.3
    ignore = (torch.rand(shape, generator=draw) < 0.2) & ~positive
    return scores, positive, ignore, torch.rand(shape[0], generator=draw, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_equals_its_definition_and_so_do_its_gradients(seed: int) -> None:
    scores, positive, ignore, weight = _case(seed)
    one, two = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    fast, slow = info_nce(one, positive, ignore, weight), _by_loops(two, positive, ignore, weight)
    torch.testing.assert_close(fast, slow)
    fast.backward()  # type: ignore[no-untyped-call]
    slow.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(one.grad, two.grad)


def test_the_symmetric_loss_is_the_mean_of_both_directions() -> None:
    scores, positive, ignore, rows = _case(9)
    columns = torch.rand(7, dtype=torch.float64)
    across = _by_loops(scores, positive, ignore, rows)
    down = _by_loops(scores.T, positive.T, ignore.T, columns)
    torch.testing.assert_close(symmetric(scores, positive, ignore, rows, columns), (across + down) / 2)


def test_without_targets_the_diagonal_is_meant() -> None:
    scores = _case(3, (4, 4))[0]
    torch.testing.assert_close(symmetric(scores), symmetric(scores, torch.eye(4, dtype=torch.bool)))


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    scores, positive, ignore, weight = _case(1)
    moved = scores + torch.arange(5.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(info_nce(moved, positive, ignore, weight), info_nce(scores, positive, ignore, weight))


def test_an_ignored_pair_gets_no_gradient() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)
    info_nce(scores, torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-0.5, 0.5, 0.0]]


def test_rows_without_a_positive_count_nothing_even_when_all_is_ignored() -> None:
    scores = torch.tensor([[1.0, 0.0], [5.0, 5.0]], requires_grad=True)
    positive, ignore = torch.tensor([[True, False], [False, False]]), torch.tensor([[False, False], [True, True]])
    loss = info_nce(scores, positive, ignore)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    loss.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad[1].tolist() == [0.0, 0.0]


def test_no_positive_at_all_is_a_loss_of_zero() -> None:
    assert info_nce(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).item() == 0.0


def test_copies_of_one_report_share_the_softmax() -> None:
    positive = same(["a", "a", "b"], ["a", "a", "b"])
    equal = torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    alone = torch.tensor([[18.0, 0.0, 0.0], [0.0, 18.0, 0.0], [0.0, 0.0, 18.0]])
    assert symmetric(equal, positive) < symmetric(alone, positive)


def test_descending_it_brings_every_positive_above_every_negative() -> None:
    scores, positive, _, _ = _case(4)
    scores.requires_grad_()
    step = torch.optim.SGD([scores], lr=5.0)
    for _ in range(300):
        step.zero_grad()
        info_nce(scores, positive).backward()  # type: ignore[no-untyped-call]
        step.step()
    for row, wanted in zip(scores.detach(), positive, strict=True):
        if wanted.any():
            assert row[wanted].min() > row[~wanted].max()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 3\) have no diagonal"):
        info_nce(torch.zeros(2, 3))
    with pytest.raises(InputError, match="a matrix"):
        info_nce(torch.zeros(3))
    with pytest.raises(InputError, match=r"positive of shape \(3, 2\)"):
        info_nce(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(InputError, match=r"weight of shape \(3,\)"):
        info_nce(torch.zeros(2, 2), weight=torch.ones(3))
    with pytest.raises(InputError, match="both positive and ignored"):
        info_nce(torch.zeros(2, 2), ignore=torch.eye(2, dtype=torch.bool))


# ---- soft targets


def _target(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, _, ignore, weight = _case(seed)
    ignore[1] = True  # a row that counts nothing
    teacher = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100))
    return scores, teacher, ignore, weight


def _kl_by_loops(student: Tensor, teacher: Tensor, ignore: Tensor, weight: Tensor) -> Tensor:
    total, mass = torch.zeros((), dtype=student.dtype), 0.0
    for i in range(len(student)):
        kept = [j for j in range(student.shape[1]) if not ignore[i, j]]
        if not kept:
            continue
        p = torch.stack([teacher[i, j] for j in kept]).softmax(0)
        q = torch.stack([student[i, j] for j in kept]).softmax(0)
        total = total + weight[i] * sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
        mass += float(weight[i])
    return total / mass


@pytest.mark.parametrize("seed", range(5))
def test_kl_equals_its_definition_and_so_do_its_gradients(seed: int) -> None:
    student, teacher, ignore, weight = _target(seed)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    fast, slow = kl_loss(one, teacher, ignore, weight), _kl_by_loops(two, teacher, ignore, weight)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in ((fast, one), (slow, two))))


def test_soft_targets_give_the_gradient_of_kl_and_hard_ones_info_nce() -> None:
    scores, teacher, ignore, weight = _target(2)
    leaf = scores.requires_grad_()
    soft = soft_nce(leaf, distribution(teacher, ignore), ignore, weight)
    kl = kl_loss(leaf, teacher, ignore, weight)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in (soft, kl)))
    one_hot = torch.eye(5, 7, dtype=torch.float64)
    torch.testing.assert_close(soft_nce(leaf, one_hot), info_nce(leaf, one_hot > 0))


def test_a_distribution_sums_to_one_and_leaves_ignored_pairs_out() -> None:
    _, teacher, ignore, _ = _target(3)
    shares = distribution(teacher, ignore)
    assert shares[ignore].tolist() == [0.0] * int(ignore.sum())
    torch.testing.assert_close(shares.sum(1), (~ignore).any(1).double())


def test_no_gradient_goes_into_the_teacher() -> None:
    teacher = torch.randn(2, 3, requires_grad=True)
    kl_loss(torch.randn(2, 3, requires_grad=True), teacher).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None


def test_softened_targets_share_what_is_left_among_the_positives() -> None:
    positive = torch.tensor([[True, True, False], [False, False, False]])
    soft = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(softened(positive, soft, 0.4), torch.tensor([[0.38, 0.42, 0.2], [0.2, 0.3, 0.5]]))
    assert softened(positive, soft, 0.0)[0].tolist() == [0.5, 0.5, 0.0]
    with pytest.raises(InputError, match="share"):
        softened(positive, soft, 1.5)
    with pytest.raises(InputError, match="shape"):
        softened(positive, soft[:1], 0.5)


def test_soft_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="target of shape"):
        soft_nce(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(InputError, match="both positive and ignored"):
        soft_nce(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]), torch.tensor([[True, False]]))
    with pytest.raises(InputError, match="teacher of shape"):
        kl_loss(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(InputError, match="a matrix"):
        kl_loss(torch.zeros(2), torch.zeros(2))


def _process(rank: int, port: int, vectors: Tensor, out: str) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    own = vectors[rank * 2 : rank * 2 + 2].clone().requires_grad_()
    whole = gathered(own)
    symmetric(whole @ whole.T).backward()  # type: ignore[no-untyped-call]
    torch.save([whole.detach(), own.grad], f"{out}/{rank}.pt")
    distributed.destroy_process_group()


def test_gathered_rows_carry_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    vectors = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, vectors, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    alone = vectors.clone().requires_grad_()
    symmetric(alone @ alone.T).backward()  # type: ignore[no-untyped-call]
    assert alone.grad is not None
    for rank in range(2):
        whole, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(whole, vectors)
        torch.testing.assert_close(gradient, alone.grad[rank * 2 : rank * 2 + 2])


def test_a_single_process_gathers_its_own_rows() -> None:
    vectors = torch.randn(2, 3, requires_grad=True)
    assert gathered(vectors) is vectors
