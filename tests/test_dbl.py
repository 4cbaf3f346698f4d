from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from encoders.dbl import Momentum, boosted, dbl_absolute, dbl_relative, frozen, hinge_loss, soft_margin
from retrieval.errors import InputError

Loss = Callable[..., Tensor]


def _gather(costs: list[Tensor], hardest: bool, like: Tensor) -> Tensor:
    if not costs:
        return like.sum() * 0
    stacked = torch.stack(costs).clamp(min=0)
    return stacked.max() if hardest else stacked.sum()


def _negatives(alike: Tensor, i: int) -> list[int]:
    return [j for j in range(len(alike)) if j != i and not alike[i, j]]


def _raw(s: Tensor, margin: float, alike: Tensor, hardest: bool) -> Tensor:
    size = len(s)
    rows = [_gather([margin + s[i, j] - s[i, i] for j in _negatives(alike, i)], hardest, s) for i in range(size)]
    columns = [_gather([margin + s[j, i] - s[i, i] for j in _negatives(alike.T, i)], hardest, s) for i in range(size)]
    return (sum(rows) + sum(columns)) / size  # type: ignore[return-value]


def _relative(s: Tensor, a: Tensor, margin: float, alike: Tensor, hardest: bool) -> Tensor:
    total, size = s.sum() * 0, len(s)
    for s_, a_, mask in ((s, a, alike), (s.T, a.T, alike.T)):
        for i in range(size):
            costs = [margin + (a_[i, i] - a_[i, j]) - (s_[i, i] - s_[i, j]) for j in _negatives(mask, i)]
            total = total + _gather(costs, hardest, s)
    return total / size


def _absolute(s: Tensor, a: Tensor, margin: float, alike: Tensor, hardest: bool) -> Tensor:
    total, size, half = s.sum() * 0, len(s), margin / 2
    for i in range(size):
        total = total + 2 * (half + a[i, i] - s[i, i]).clamp(min=0)
        total = total + _gather([half + s[i, j] - a[i, j] for j in _negatives(alike, i)], hardest, s)
        total = total + _gather([half + s[j, i] - a[j, i] for j in _negatives(alike.T, i)], hardest, s)
    return total / size


def _case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    target, anchor = torch.rand(2, 5, 5, generator=draw, dtype=torch.float64) * 2 - 1
    alike = torch.rand(5, 5, generator=draw) < 0.2
    alike[0] = True  # a row without any negative
    return target, anchor, alike


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("name", ["raw", "relative", "absolute"])
def test_each_loss_equals_its_definition_and_so_do_its_gradients(name: str, hardest: bool, seed: int) -> None:
    target, anchor, alike = _case(seed)
    one, two = target.clone().requires_grad_(), target.clone().requires_grad_()
    if name == "raw":
        fast, slow = hinge_loss(one, 0.3, alike=alike, hardest=hardest), _raw(two, 0.3, alike, hardest)
    elif name == "relative":
        fast = dbl_relative(one, anchor, 0.3, alike=alike, hardest=hardest)
        slow = _relative(two, anchor, 0.3, alike, hardest)
    else:
        fast = dbl_absolute(one, anchor, 0.3, alike=alike, hardest=hardest)
        slow = _absolute(two, anchor, 0.3, alike, hardest)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in ((fast, one), (slow, two))))


@pytest.mark.parametrize("loss", [dbl_relative, dbl_absolute])
@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("adapt", [True, False])
def test_the_gradient_is_what_small_steps_measure(loss: Loss, hardest: bool, adapt: bool) -> None:
    target, anchor, alike = _case(7)
    assert torch.autograd.gradcheck(
        lambda s: loss(s, anchor, 0.3, alike=alike, hardest=hardest, adapt=adapt), target.requires_grad_()
    )


def test_the_worst_negative_is_the_one_that_improved_least_not_the_one_that_scores_highest() -> None:
    anchor = torch.tensor([[0.9, 0.8, 0.1], [0.0, 0.9, 0.0], [0.0, 0.0, 0.9]])
    target = anchor.clone()
    target[0, 1], target[0, 2] = 0.6, 0.2  # the hard one fell, the easy one rose
    target.requires_grad_()
    (gradient,) = torch.autograd.grad(dbl_relative(target, anchor), target)
    assert gradient[0, 2] > 0
    assert gradient[0, 1] <= gradient[0, 2] / 2  # only the column through it may pull


@pytest.mark.parametrize("loss", [dbl_relative, dbl_absolute])
def test_a_target_that_is_its_anchor_owes_the_margin_whatever_the_data(loss: Loss) -> None:
    scores = _case(2)[0]
    assert loss(scores, scores, 0.25).item() == pytest.approx(0.5)


def test_only_gaps_count_for_the_relative_form() -> None:
    target, anchor, alike = _case(3)
    torch.testing.assert_close(
        dbl_relative(target + 0.3, anchor - 0.1, alike=alike), dbl_relative(target, anchor, alike=alike)
    )


@pytest.mark.parametrize("loss", [hinge_loss, dbl_relative, dbl_absolute])
def test_two_texts_of_one_picture_are_no_negatives_of_one_another(loss: Loss) -> None:
    target = torch.tensor([[0.5, 0.5], [0.5, 0.5]], requires_grad=True)
    twins = torch.ones(2, 2, dtype=torch.bool)
    given = (target,) if loss is hinge_loss else (target, target.detach())
    (gradient,) = torch.autograd.grad(loss(*given, alike=twins) + target.sum() * 0, target)
    assert gradient[0, 1] == gradient[1, 0] == 0


@pytest.mark.parametrize("loss", [dbl_relative, dbl_absolute])
def test_the_anchor_gets_no_gradient(loss: Loss) -> None:
    target, anchor = torch.rand(2, 4, 4).requires_grad_().unbind()
    leaf = anchor.detach().clone().requires_grad_()
    loss(target, leaf).backward()
    assert leaf.grad is None


@pytest.mark.parametrize("loss", [dbl_relative, dbl_absolute])
def test_descending_it_leads_beyond_the_anchor(loss: Loss) -> None:
    anchor = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    target = anchor.clone().requires_grad_()
    optimiser = torch.optim.Adam([target], lr=0.01)
    for _ in range(300):
        optimiser.zero_grad()
        loss(target, anchor).backward()
        optimiser.step()

    def gap(scores: Tensor) -> Tensor:
        return scores.diagonal()[:, None] - scores

    others = ~torch.eye(4, dtype=torch.bool)
    assert ((gap(target) - gap(anchor))[others] > 0.19).all()


def test_an_anchor_at_the_bound_leaves_a_floor_only_without_adaptation() -> None:
    perfect = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # no cosine can do better
    for loss in (dbl_relative, dbl_absolute):
        assert loss(perfect, perfect, adapt=False).item() == pytest.approx(0.4)
        assert loss(perfect, perfect, adapt=True).item() == pytest.approx(0.0, abs=1e-6)


def test_the_adapted_margin_is_the_published_formula() -> None:
    reference = torch.linspace(-1, 2, 50, dtype=torch.float64)
    wanted = 2 * 0.2 / (1 + torch.exp((2 / 0.2) * (reference - 2.0))) - 0.2
    torch.testing.assert_close(soft_margin(0.2, reference, 2.0), wanted)
    assert soft_margin(0.2, torch.tensor([2.1]), 2.0).item() == 0.0  # rounding above the bound asks for nothing


def test_online_branches_beat_all_before_them_and_learn_only_for_themselves() -> None:
    first, second, third = (_case(seed)[0].requires_grad_() for seed in (1, 2, 3))
    loss = boosted([first, second, third], dbl_relative)
    wanted = dbl_relative(second, first) + (dbl_relative(third, first) + dbl_relative(third, second)) / 2
    torch.testing.assert_close(loss, wanted)
    loss.backward()  # type: ignore[no-untyped-call]
    assert first.grad is None
    with pytest.raises(InputError, match="at least two"):
        boosted([first], dbl_relative)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_the_momentum_anchor_averages_parameters_and_buffers() -> None:
    model = _model()
    momentum = Momentum(model, start=0.75)
    before = {name: value.clone() for name, value in momentum.anchor.state_dict().items()}
    model(torch.randn(8, 3))  # moves the batch statistics
    with torch.no_grad():
        model[0].weight.add_(1.0)
    momentum.update(model)
    after = momentum.anchor.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * value)
        else:
            assert torch.equal(after[name], value)
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])


def test_the_momentum_rises_to_one_along_a_cosine() -> None:
    model = _model()
    momentum = Momentum(model, start=0.9, steps=4)
    seen = []
    for _ in range(6):
        seen.append(round(momentum.momentum, 4))
        momentum.update(model)
    assert seen == [0.9, 0.9146, 0.95, 0.9854, 1.0, 1.0]


def test_an_anchor_learns_nothing_keeps_its_statistics_and_drops_out_as_the_target_does() -> None:
    anchor = frozen(_model().train())
    assert not any(p.requires_grad for p in anchor.parameters())
    assert [module.training for module in anchor] == [False, False, True, False]
    statistics = anchor[1].running_mean.clone()
    anchor(torch.randn(8, 3))
    assert torch.equal(anchor[1].running_mean, statistics)
    assert not any(module.training for module in frozen(_model(), dropout=False).modules())


def test_a_copy_is_not_the_model() -> None:
    model = _model()
    anchor = frozen(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert anchor[0].weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: hinge_loss(torch.zeros(2, 3)), "square matrix"),
        (lambda: dbl_relative(torch.zeros(2, 2), torch.zeros(3, 3)), "anchor of shape"),
        (lambda: dbl_absolute(torch.zeros(2, 2), torch.zeros(2, 2), share=1.5), "share"),
        (lambda: dbl_relative(torch.zeros(2, 2), torch.zeros(2, 2), alike=torch.zeros(1, 2) > 0), "alike of shape"),
        (lambda: Momentum(nn.Linear(1, 1), start=1.5), "momentum"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
