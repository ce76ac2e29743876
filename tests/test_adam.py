import math

import pytest
import torch
from small_problems import (
    adam_direction_of,
    assert_identical,
    make_net,
    nesterov_direction_of,
    net_loss,
    parameter_group,
    single,
)
from torch import nn

from hf_alsals.adam import AdamDirection, NesterovAdamDirection
from hf_alsals.path_slope import path_slopes

FORMULAS = [(AdamDirection, adam_direction_of), (NesterovAdamDirection, nesterov_direction_of)]


def update(groups, state, kind=AdamDirection):
    direction = kind(groups, state)
    direction.update()
    return direction


@pytest.mark.parametrize(("kind", "formula"), FORMULAS)
def test_it_is_the_formula_with_the_betas_and_eps_of_each_group(kind, formula):
    settings = [{"betas": (0.5, 0.9), "eps": 0.1}, {"betas": (0.9, 0.99), "eps": 1e-8}, {"betas": (0.0, 0.0)}]
    params = [single([1.0, 2.0]), single([[3.0], [-1.0]]), single([5.0])]
    groups = [parameter_group([p], **group) for p, group in zip(params, settings)]
    state = {p: {} for p in params}
    histories = [[] for _ in params]
    for k in range(6):
        for p, history in zip(params, histories):
            p.grad = torch.sin(k + p.detach() ** 2)
            history.append(p.grad.clone())
        before = [p.detach().clone() for p in params]
        direction = update(groups, state, kind)
        slopes, preconditioned = direction.slope(), direction.slope(momentum=False)
        with torch.no_grad():
            direction.move(0.01)
        for i, (p, history, group) in enumerate(zip(params, histories, groups)):
            expected = formula(history, *group["betas"], group["eps"])
            torch.testing.assert_close(p.detach(), before[i] - 0.01 * expected, rtol=1e-12, atol=1e-12)
            assert slopes[i].item() == pytest.approx((history[-1] * expected).sum().item(), rel=1e-10)
            without = adam_direction_of(history, 0.0, group["betas"][1], group["eps"])
            assert preconditioned[i].item() == pytest.approx((history[-1] * without).sum().item(), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probes", [0, 2])
def test_a_step_is_that_of_adamw_to_the_bit_whatever_was_probed(dtype, probes):
    nets = [make_net(dtype), make_net(dtype)]
    settings = {2: {"weight_decay": 0.1}, 1: {"weight_decay": 0.02, "betas": (0.8, 0.99), "eps": 1e-4}}
    groups, adamw_groups = (
        [
            parameter_group([p for p in net.parameters() if p.ndim == ndim], **{"lr": 0.01} | settings[ndim])
            for ndim in settings
        ]
        for net in nets
    )
    state = {p: {} for p in nets[0].parameters()}
    is_fused = probes == 0 and dtype == torch.float32
    adamw = torch.optim.AdamW(adamw_groups, fused=is_fused, foreach=not is_fused)
    for k in range(30):
        for net in nets:
            net.zero_grad()
            net_loss(net, k).backward()
        direction = update(groups, state) if probes else AdamDirection(groups, state)
        with torch.no_grad():
            if probes:
                direction.save()
            for probe in range(probes):
                direction.move(0.7 + probe)
            direction.step(1.0)
        adamw.step()
        for p, q in zip(nets[0].parameters(), nets[1].parameters()):
            assert_identical(p.detach(), q.detach())


@pytest.mark.parametrize("lr", [0.01, 0.0])
def test_a_step_without_a_search_is_the_fused_one_whatever_the_layout_of_the_gradients(lr):
    """One parameter has a gradient of another layout, one a multiplier, one no gradient at first, one no elements."""
    torch.manual_seed(0)
    shapes = [(1100, 500), (3,), (64, 64), (0,), (5, 4, 3, 3)]
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, math.prod(s)).reshape(s)) for s in shapes] for _ in range(2))
    groups = [{"params": [p]} for p in theirs]
    groups[2] |= {"lr": 3 * lr, "weight_decay": 0.01 / 3}  # a multiplier is none of weight decay
    adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01, fused=True)
    state = {p: {} for p in ours}
    for k in range(4):
        for i, (one, other) in enumerate(zip(ours, theirs)):
            gradient = torch.randn(one.shape)
            other.grad = None if i == 1 and k == 0 else gradient.clone()
            one.grad = None if other.grad is None else gradient.clone()
            if i == 4:
                one.grad = gradient.to(memory_format=torch.channels_last)
        direction = AdamDirection([parameter_group(ours, lr=lr, weight_decay=0.01)], state)
        direction.multipliers = {ours[2]: 3.0}
        with torch.no_grad():
            direction.step(1.0)
        adamw.step()
    for i, (one, other) in enumerate(zip(ours, theirs)):
        if i == 4:  # another layout is not for the kernel
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        else:
            assert_identical(one.detach(), other.detach())
        if one.numel():
            assert state[one]["step"] == adamw.state[other]["step"]
            for name in AdamDirection.buffer_names:
                torch.testing.assert_close(state[one][name], adamw.state[other][name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("step_size", [0.01, 1e-36])
def test_a_step_after_its_first_probe_is_the_fused_one_and_the_slope_that_of_the_formula(step_size):
    torch.manual_seed(0)
    starts = [torch.randn(1100, 500), torch.randn(3), torch.randn(500, 700).t()]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    groups = [{"params": theirs[:2]}, {"params": theirs[2:], "lr": 3 * step_size}]
    adamw = torch.optim.AdamW(groups, lr=step_size, weight_decay=0.0, fused=True)
    state = {p: {} for p in ours}
    histories = [[] for _ in ours]
    for _ in range(4):
        for one, other, history in zip(ours, theirs, histories):
            history.append(torch.randn_like(one).detach())  # in the layout of the parameter
            one.grad, other.grad = history[-1].clone(), history[-1].clone()
        direction = AdamDirection([parameter_group(ours)], state)
        direction.multipliers = {ours[2]: 3.0}
        with torch.no_grad():
            (slope,) = direction.first_move(step_size)
            direction.step(step_size)
        adamw.step()
        formulas = [adam_direction_of([g.double() for g in history], 0.9, 0.999, 1e-8) for history in histories]
        parts = [(d * history[-1]).sum().item() for d, history in zip(formulas, histories)]
        assert slope.item() == pytest.approx(parts[0] + parts[1] + 3 * parts[2], rel=1e-5)
        for one, other in zip(ours, theirs):
            assert_identical(one.detach(), other.detach())


def test_pieces_of_large_parameters_and_what_cannot_be_cut_move_as_in_adamw():
    torch.manual_seed(0)
    starts = [torch.randn(1100, 500), torch.randn(500, 1100).t(), torch.randn(3), torch.randn(0), torch.randn(64, 64)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    adamw = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01, eps=1e-8)
    state = {p: {} for p in ours}
    for _ in range(3):
        for one, other in zip(ours, theirs):
            gradient = torch.randn(one.shape)
            one.grad, other.grad = gradient.clone(), gradient.clone()
        gradients = [p.grad.double() for p in ours]
        direction = update([parameter_group(ours, weight_decay=0.01)], state)
        slope = sum(slope.item() for slope in direction.slope())
        with torch.no_grad():
            direction.save()
            direction.move(0.3)
            direction.move(0.2)
            direction.step(0.1)
        before = [p.detach().double() for p in theirs]
        adamw.step()
        for one, other in zip(ours, theirs):
            assert_identical(one.detach(), other.detach())
        moved = [start * (1 - 0.001) - p.detach().double() for start, p in zip(before, theirs)]
        expected = sum((gradient * move).sum().item() / 0.1 for gradient, move in zip(gradients, moved))
        assert slope == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.3, 0.0])
@pytest.mark.parametrize("probes", [0, 1, 2])
def test_nesterov_steps_are_those_of_the_formula_however_they_are_made(beta1, probes):
    """Fused from beta1 = 0.5 on; one parameter has a multiplier, one no gradient at first, one another layout."""
    torch.manual_seed(0)
    starts = [torch.randn(1100, 500), torch.randn(3), torch.randn(500, 700).t(), torch.randn(0), torch.randn(64, 64)]
    ours = [nn.Parameter(start.clone()) for start in starts]
    expected = [start.double() for start in starts]
    state = {p: {} for p in ours}
    adamw = torch.optim.AdamW([nn.Parameter(start.clone()) for start in starts], betas=(beta1, 0.999))
    multipliers = [1.0, 1.0, 3.0, 1.0, 1.0]
    lr, decay = 0.01, 0.1
    histories = [[] for _ in ours]
    for k in range(4):
        for i, (p, history) in enumerate(zip(ours, histories)):
            history.append(torch.randn(p.shape))
            p.grad = None if i == 1 and k < 2 else history[-1].clone()
        for p, other in zip(ours, adamw.param_groups[0]["params"]):
            other.grad = None if p.grad is None else p.grad.clone()
        adamw.step()
        group = parameter_group(ours, lr=lr, weight_decay=decay, betas=(beta1, 0.999))
        direction = NesterovAdamDirection([group], state)
        direction.multipliers = {ours[2]: 3.0}
        with torch.no_grad():
            if probes:
                (slope,) = direction.first_move(0.5)
            for probe in range(1, probes):
                direction.move(0.5 / 2**probe)
            direction.step(1.0)
        parts = []
        for i, history in enumerate(histories):
            if i == 1 and k < 2:
                continue
            since = history[2:] if i == 1 else history
            d = multipliers[i] * nesterov_direction_of([g.double() for g in since], beta1)
            parts.append((d * history[-1].double()).sum().item())
            expected[i] = expected[i] * (1 - lr * decay) - lr * d
        if probes:
            assert slope.item() == pytest.approx(sum(parts), rel=1e-5)
        for p, value in zip(ours, expected):
            torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-6)
    for p, other in zip(ours, adamw.param_groups[0]["params"]):
        for name in NesterovAdamDirection.buffer_names:  # Adam's moments, whatever the kernel was told
            torch.testing.assert_close(state[p][name], adamw.state[other][name], rtol=1e-5, atol=1e-6)


def test_the_last_direction_of_nesterov_momentum_is_adams():
    p = single([1.0, -2.0, 3.0])
    state, history = {p: {}}, []
    for k in range(4):
        p.grad = torch.cos(k + p.detach())
        history.append(p.grad.clone())
        update([parameter_group([p])], state, NesterovAdamDirection)
    p.grad = torch.tensor([0.3, -0.2, 0.5], dtype=p.dtype)
    path_slopes(NesterovAdamDirection([parameter_group([p])], state))  # notes the first weights
    slopes = path_slopes(NesterovAdamDirection([parameter_group([p])], state))
    assert slopes.last[0].item() == pytest.approx((p.grad * adam_direction_of(history)).sum().item(), rel=1e-10)


def test_each_parameter_has_its_own_bias_correction():
    early, late = single([1.0, -3.0]), single([2.0])
    state = {early: {}, late: {}}
    histories = {early: [], late: []}
    for k in range(8):
        early.grad, late.grad = None, None
        for p in (early, late) if k >= 4 else (early,):
            p.grad = p.detach() ** 3
            histories[p].append(p.grad.clone())
        before = {p: p.detach().clone() for p in histories}
        direction = update([parameter_group([early, late])], state)
        with torch.no_grad():
            direction.move(0.05)
        for p, history in histories.items():
            step = 0.05 * adam_direction_of(history) if history else 0.0
            torch.testing.assert_close(p.detach(), before[p] - step, rtol=1e-12, atol=1e-12)
    assert (state[early]["step"].item(), state[late]["step"].item()) == (8, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_second_moment_of_a_small_half_precision_gradient_does_not_underflow(dtype):
    w = single([1.0, 2.0], dtype)
    w.grad = torch.tensor([1e-4, -1e-4], dtype=dtype)
    with torch.no_grad():
        update([parameter_group([w])], {w: {}}).move(0.25)
    assert w.tolist() == pytest.approx([0.75, 2.25], rel=0.01)
