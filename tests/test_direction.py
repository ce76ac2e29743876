import copy
import functools
import math

import pytest
import torch
from small_problems import (
    DTYPES,
    ConstantALSALS,
    assert_identical,
    make_net,
    net_loss,
    parameter_group,
    single,
    snapshot,
    through_torch_save,
    train,
)
from torch import nn

from hf_alsals import ALSALS
from hf_alsals.adam import AdamDirection, NesterovAdamDirection
from hf_alsals.direction import Direction


class MomentumDirection(Direction):
    """Momentum `b_k = beta1 b_{k-1} + g_k`."""

    name = "momentum"
    description = "plain momentum"
    buffer_names = ("momentum",)

    def accumulate(self, chunk):
        (momenta,) = chunk.buffers.values()
        torch._foreach_mul_(momenta, chunk.group["betas"][0])
        torch._foreach_add_(momenta, chunk.grads_like(momenta))

    def tensors(self, chunk, momentum=True):
        (momenta,) = chunk.buffers.values()
        return momenta if momentum else chunk.grads_like(momenta)


DIRECTIONS = [AdamDirection, NesterovAdamDirection, MomentumDirection]


def grad_for(p, k=0):
    generator = torch.Generator().manual_seed(17 * p.numel() + k)
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def updated(kind, params, state=None, multipliers=None, updates=1, **settings):
    """Return a direction that has seen some gradients of its parameters."""
    state = {p: {} for p in params} if state is None else state
    for k in range(updates):
        for p in params:
            p.grad = grad_for(p, k)
        direction = kind([parameter_group(params, **settings)], state)
        direction.multipliers = multipliers or {}
        direction.update()
    return direction


def change(direction, step_size=1.0):
    """Return how far a direction moves each parameter."""
    before = snapshot(direction.params)
    with torch.no_grad():
        direction.move(step_size)
    return [p.detach() - start for p, start in zip(direction.params, before)]


# ---- slope and moves ----


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("multipliers", [(), (0.5, 3.0, 1.0, 0.0)], ids=["alike", "multiplied"])
def test_slope_and_move_agree_with_finite_differences_of_the_loss(kind, multipliers):
    net = make_net()
    groups = [
        parameter_group([p for p in net.parameters() if p.ndim == 2]),
        parameter_group([p for p in net.parameters() if p.ndim == 1], betas=(0.5, 0.9), eps=0.1, lr=7.0),
    ]
    state = {p: {} for p in net.parameters()}
    for k in range(4):
        net.zero_grad()
        net_loss(net, k).backward()
        direction = kind(groups, state)
        direction.multipliers = dict(zip(net.parameters(), multipliers))
        direction.update()

        slopes = direction.slope()
        losses = {}
        with torch.no_grad():
            direction.save()
        for step_size in (1e-5, -1e-5):
            with torch.no_grad():
                direction.move(step_size)
            losses[step_size] = net_loss(net, k).item()
        expected = (losses[-1e-5] - losses[1e-5]) / 2e-5
        assert len(slopes) == 2  # one for each group
        assert sum(slope.item() for slope in slopes) == pytest.approx(expected, rel=1e-6)
        with torch.no_grad():
            direction.step(0.01)


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [True, False])
def test_the_first_move_is_update_slope_save_and_move(kind, dtype, momentum):
    """To the bit, but where the fused kernel makes it."""
    is_fused = issubclass(kind, AdamDirection) and dtype == torch.float32 and momentum
    assert_same = torch.testing.assert_close if is_fused else assert_identical
    # A sum of half a million float32, added up in another order.
    assert_close_to = (
        functools.partial(torch.testing.assert_close, rtol=1e-5, atol=0) if is_fused else assert_identical
    )
    shapes = [(1100, 500), (3,), (0,), (40, 30)]
    pairs = [
        [nn.Parameter(torch.linspace(-1, 1, math.prod(s)).reshape(s).to(dtype)) for s in shapes] for _ in range(2)
    ]
    states = [{p: {} for p in params} for params in pairs]
    for k in range(3):
        directions = []
        for params, state in zip(pairs, states):
            for p in params:
                p.grad = grad_for(p, k)
            directions.append(kind([parameter_group(params, lr=0.5, weight_decay=0.1)], state))
        one_by_one, at_once = directions
        one_by_one.update()
        slopes = one_by_one.slope(momentum)
        with torch.no_grad():
            one_by_one.save()
            one_by_one.move(0.3)
        assert_close_to(at_once.first_move(0.3, momentum), slopes)
        assert all(p.grad is None for params in pairs for p in params)
        for end in (lambda d: None, lambda d: d.move(0.3), lambda d: d.move(0.1), lambda d: d.step(0.2)):
            with torch.no_grad():
                end(one_by_one), end(at_once)
            assert_same([p.detach() for p in pairs[1]], [p.detach() for p in pairs[0]])
        for one, other in zip(*(state.values() for state in states)):
            assert one.keys() == other.keys()
            assert_same([*one.values()], [*other.values()])


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_a_step_without_an_update_before_updates_too(kind):
    pairs = [[nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4).double())] for _ in range(2)]
    states = [{p: {} for p in params} for params in pairs]
    for k in range(3):
        for params, state in zip(pairs, states):
            params[0].grad = grad_for(params[0], k)
            direction = kind([parameter_group(params, lr=0.5, weight_decay=0.1)], state)
            if params is pairs[0]:
                direction.update()
            with torch.no_grad():
                direction.step(0.2)
            assert params[0].grad is not None
        assert_identical(pairs[1][0].detach(), pairs[0][0].detach())
        assert_identical([*states[1].values()], [*states[0].values()])


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_a_multiplier_scales_the_part_of_its_parameter_and_nothing_else(kind):
    params = [single([3.0, -1.0]), single([0.5]), single([2.0, 4.0, 1.0])]
    plain = updated(kind, params, updates=3)
    slopes = [(p.grad * -moved).sum().item() for p, moved in zip(params, change(plain))]
    moves = change(plain)
    assert sum(slope.item() for slope in plain.slope()) == pytest.approx(sum(slopes))

    scaled = updated(kind, params, multipliers={params[0]: 0.25, params[2]: 0.0}, updates=3)
    factors = [0.25, 1.0, 0.0]
    expected = sum(factor * slope for factor, slope in zip(factors, slopes))
    assert sum(slope.item() for slope in scaled.slope()) == pytest.approx(expected)
    for moved, factor, move in zip(change(scaled), factors, moves):
        torch.testing.assert_close(moved, factor * move, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_the_slope_without_momentum_is_that_of_the_gradient_alone(kind):
    w = single([3.0, -1.0])
    direction = updated(kind, [w], betas=(0.9, 0.9), updates=3)
    (slope,) = direction.slope(momentum=False)
    without = updated(kind, [single(w.tolist())], betas=(0.0, 0.9), updates=3)
    assert slope.item() == pytest.approx(without.slope()[0].item())
    assert slope.item() != pytest.approx(direction.slope()[0].item(), rel=1e-2)


def test_a_step_takes_the_learning_rate_and_the_decoupled_weight_decay_of_each_group():
    settings = [{"lr": 0.5, "weight_decay": 0.1}, {"lr": 2.0}, {"lr": 0.0, "weight_decay": 0.3}]
    params = [single([1.0, -2.0]), single([3.0]), single([[0.5], [4.0]])]
    for p in params:
        p.grad = grad_for(p)
    groups = [parameter_group([p], **group) for p, group in zip(params, settings)]
    direction = MomentumDirection(groups, {p: {} for p in params})
    direction.multipliers = {params[0]: 3.0}
    direction.update()
    before = snapshot(params)
    with torch.no_grad():
        direction.step(0.2)
    for p, start, group, multiplier in zip(params, before, groups, (3.0, 1.0, 1.0)):
        step = 0.2 * group["lr"]
        expected = start * (1 - step * group["weight_decay"]) - step * multiplier * p.grad
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-14)


def test_a_move_takes_no_learning_rate_and_no_weight_decay():
    w = single([3.0, -1.0])
    direction = updated(MomentumDirection, [w], lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(change(direction, 0.25), [-0.25 * w.grad], rtol=1e-14, atol=1e-14)


# ---- save and restore ----


@pytest.mark.parametrize("keep_grads", [False, True])
def test_moves_go_out_from_where_the_parameters_were_saved(keep_grads):
    w, other = single([3.0, -1.0]), single([3.0, -1.0])
    direction, once = updated(MomentumDirection, [w]), updated(MomentumDirection, [other])
    assert not direction.is_saved
    with torch.no_grad():
        direction.save(keep_grads)
        assert direction.is_saved
        for step_size in (0.3, -2.0, 0.1):
            direction.move(step_size)
        once.move(0.1)
    assert_identical(w.detach(), other.detach())
    with torch.no_grad():
        direction.step(0.2)
        once.move(0.1)
    torch.testing.assert_close(w, other, rtol=1e-14, atol=1e-14)  # without a save moves add up


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep_grads", [False, True])
def test_restored_parameters_are_where_they_were_to_the_bit(kind, dtype, keep_grads):
    params = [nn.Parameter(grad_for(torch.empty(size), 5).to(dtype)) for size in (7, 1, 600_000)]
    direction = updated(kind, params)
    before = snapshot(params)
    with torch.no_grad():
        direction.restore()  # nothing was saved
        assert_identical(snapshot(params), before)
        direction.save(keep_grads)
        for step_size in (1e4, 0.7):
            direction.move(step_size)
        assert not any(torch.equal(p, start) for p, start in zip(params, before))
        direction.restore()
    assert_identical(snapshot(params), before)


def test_save_takes_the_memory_of_the_gradients_unless_they_are_kept():
    w = single([3.0, -1.0])
    direction = updated(MomentumDirection, [w])
    gradient = w.grad
    with torch.no_grad():
        direction.save()
    assert w.grad is None
    assert torch.equal(gradient, w)

    direction = updated(MomentumDirection, [w])
    gradient, before = w.grad, w.grad.clone()
    with torch.no_grad():
        direction.save(keep_grads=True)
        direction.move(1.0)
    assert w.grad is gradient
    assert torch.equal(gradient, before)


def test_an_interrupted_save_leaves_no_weights_in_the_gradients(monkeypatch):
    params = [single([3.0, -1.0]), single([2.0])]
    direction = updated(MomentumDirection, params)
    copy_ = torch.Tensor.copy_

    def interrupted(self, other):
        copy_(self, other)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        direction.save()
    assert [p.grad for p in params] == [None, None]


# ---- parameters and state ----


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_creating_one_changes_nothing(kind):
    w = single([3.0, -1.0])
    w.grad = grad_for(w)
    state = {w: {}}
    direction = kind([parameter_group([w])], state)
    assert state == {w: {}}
    assert w.tolist() == [3.0, -1.0]
    assert w.grad is not None
    assert direction.params == [w]
    assert direction.slope() == []  # all else comes after update


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_state_tensors_have_the_shape_of_the_parameter_and_at_least_float32(kind, dtype):
    w = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    state = {w: {}}
    for k in range(1, 4):
        updated(kind, [w], state)
        assert set(state[w]) == {"step", *kind.buffer_names}
        assert state[w]["step"].item() == k
        for name in kind.buffer_names:
            assert state[w][name].dtype == torch.promote_types(dtype, torch.float32)
            assert state[w][name].shape == w.shape


def test_a_parameter_without_gradient_stays_and_gets_no_state():
    used, unused = single([1.0, -1.0]), single([2.0])
    used.grad = grad_for(used)
    state = {used: {}, unused: {}}
    direction = MomentumDirection([parameter_group([used, unused]), parameter_group([unused])], state)
    direction.update()
    assert direction.params == [used]
    assert len(direction.slope()) == 1
    with torch.no_grad():
        direction.step(0.1)
    assert unused.item() == 2.0
    assert state[unused] == {}


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        MomentumDirection([parameter_group(embedding.parameters())], {embedding.weight: {}})


# ---- a direction of your own, in the optimizer ----


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("search_interval", [1, 10**6])
def test_at_a_constant_step_size_plain_momentum_is_sgd(momentum, search_interval):
    nets = [make_net(), make_net()]
    options = {"growth_factor": 1.0, "initial_step_size": 0.05, "search_interval": search_interval}
    betas = (momentum, 0.999)
    optimizer = ConstantALSALS(nets[0].parameters(), direction=MomentumDirection, betas=betas, **options)
    sgd = torch.optim.SGD(nets[1].parameters(), lr=0.05, momentum=momentum)
    for k in range(40):
        for net in nets:
            net.zero_grad()
            net_loss(net, k).backward()
        optimizer.step(lambda: -1e9, net_loss(nets[0], k))
        sgd.step()
        for p, q in zip(nets[0].parameters(), nets[1].parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_a_direction_of_your_own_trains_and_is_resumed(growth):
    net = make_net(torch.float32)
    arguments = {"direction": MomentumDirection, "growth": growth, "beta3": 0.5}
    optimizer = ALSALS(net.parameters(), **arguments)
    losses = [loss for _, loss in train(net, optimizer, range(60))]
    assert max(losses[-10:]) < 0.5 * losses[0]
    assert set(optimizer.state[net[0].weight]) - {"initial", "path"} == {"step", "momentum"}

    other_net = copy.deepcopy(net)
    other = ALSALS(other_net.parameters(), **arguments)
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    assert train(other_net, other, range(60, 80)) == train(net, optimizer, range(60, 80))
    copied_net, copied = copy.deepcopy((net, optimizer))
    assert train(copied_net, copied, range(80, 90)) == train(net, optimizer, range(80, 90))


def test_the_state_of_another_direction_is_refused_by_name():
    optimizers = [ALSALS([single([1.0])], direction=direction) for direction in DIRECTIONS]
    names = [direction.name for direction in DIRECTIONS]
    for loading, saved, name, other in zip(optimizers, optimizers[1:] + optimizers[:1], names, names[1:] + names[:1]):
        with pytest.raises(ValueError, match=f"direction must be '{other}', as in the state_dict, got '{name}'"):
            loading.load_state_dict(saved.state_dict())


def test_weights_that_a_forward_pass_changes_are_moved_again():
    (w,) = params = [single([3.0, -1.0])]
    direction = updated(AdamDirection, params)
    with torch.no_grad():
        direction.save()
        direction.move(0.5)
        expected = w.detach().clone()
        w.mul_(0.5)  # as nn.Embedding(max_norm=...) does
        direction.step(0.5 / direction.param_groups[0]["lr"])
    assert_identical(w.detach(), expected)
