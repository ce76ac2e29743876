import copy
import functools
import io
import itertools
import json
import math
import pickle

import pytest
import torch
from reference import alsals_reference, path_reference
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import hf_alsals
from hf_alsals import PRESETS, ArmijoLineSearch

# The published search; that along the path is tested in test_path_search.py, and here by its preset and at the end.
ALSALS = functools.partial(hf_alsals.ALSALS, growth="constant")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make_net(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for p in net.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return net.to(dtype)


def net_loss(net, k, parameters=None):
    """Return the loss of step k's minibatch, of which there are ten."""
    generator = torch.Generator().manual_seed(k % 10)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    y = 0.1 * ((2 * x[:, :1]).sin() + x[:, 1:2] * x[:, 2:3])
    parameters = dict(net.named_parameters()) if parameters is None else parameters
    dtype = next(iter(parameters.values())).dtype
    return (torch.func.functional_call(net, parameters, x.to(dtype)) - y.to(dtype)).pow(2).mean()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def unflatten(net, w):
    """Return net's parameters by name, taken from the flat tensor `w`."""
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()))
    return {name: x.view(shape) for name, x, shape in zip(names, w.split([s.numel() for s in shapes]), shapes)}


def flat_net_loss(net):
    return lambda w, k: net_loss(net, k, unflatten(net, w))


def rosenbrock(w, k=0):
    return (10 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum()


def train(net, optimizer, steps, loss_of=net_loss):
    """Train on the given steps' batches and return the step size and the loss of each."""
    history = []
    for k in steps:
        optimizer.zero_grad()
        loss = loss_of(net, k)
        loss.backward()
        returned = optimizer.step(lambda k=k: loss_of(net, k), loss)
        history.append((optimizer.step_size, returned.item()))
    return history


def single(values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def snapshot(params):
    return [p.detach().clone() for p in params]


def optimizer_state(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def adam_direction_of(gradients, beta1=0.9, beta2=0.999, eps=1e-8):
    """Return Adam's direction after these gradients: its bias-corrected moments are weighted averages of them."""
    gradients = torch.stack(list(gradients))
    ages = torch.arange(len(gradients) - 1, -1, -1, dtype=gradients.dtype)
    first, second = ((beta**ages) / (beta**ages).sum() for beta in (beta1, beta2))
    return torch.tensordot(first, gradients, 1) / (torch.tensordot(second, gradients**2, 1).sqrt() + eps)


# ---- trajectory ----


def assert_follows(net, optimizer, loss_of, f, w, constants):
    steps = 200
    history = train(net, optimizer, range(steps), loss_of)
    step_sizes, losses, w = alsals_reference(f, w, steps, **constants)

    assert [step_size for step_size, _ in history] == pytest.approx(step_sizes, rel=1e-9)
    assert [loss for _, loss in history] == pytest.approx(losses, rel=1e-8)
    torch.testing.assert_close(flat(net.parameters()), w, rtol=1e-9, atol=1e-9)

    assert max(losses[-10:]) < 0.25 * losses[0]
    if "eta" in constants:
        assert sum(later < earlier for earlier, later in itertools.pairwise(step_sizes)) >= 3


# The presets and the constants that the papers give them, SaLSA's without the slope and the cadence of its own.
TRAJECTORIES = {
    "alsals_paper": (PRESETS["alsals_paper"], {"c": 0.3, "growth_factor": 1 / 0.999}),
    "constant_growth": ({}, {"c": 0.3, "growth_factor": 1.01}),
    "adam_sls": (PRESETS["adam_sls"], {"c": 0.2, "growth_factor": 2 ** (1 / 500), "beta1": 0.0, "beta3": 0.0}),
    "salsa": (
        PRESETS["salsa"] | {"slope": "exact", "search_interval": 1},
        {"c": 0.5, "growth_factor": 1.1, "decrease_factor": 0.8},
    ),
}
FIRST_STEP_SIZES = [({}, {}), ({"initial_step_size": 1.0}, {"eta": 1.0})]


@pytest.mark.parametrize("name", TRAJECTORIES)
@pytest.mark.parametrize(("argument", "constant"), FIRST_STEP_SIZES, ids=["default_start", "large_start"])
def test_follows_the_published_algorithm_on_rosenbrock(name, argument, constant):
    preset, constants = TRAJECTORIES[name]
    net = nn.ParameterList([torch.linspace(-1.2, 1.0, 6, dtype=torch.float64)])
    optimizer = ALSALS(net.parameters(), **preset | argument)
    assert_follows(net, optimizer, lambda net, k: rosenbrock(net[0]), rosenbrock, flat(net), constants | constant)


@pytest.mark.parametrize("name", TRAJECTORIES)
@pytest.mark.parametrize(("argument", "constant"), FIRST_STEP_SIZES, ids=["default_start", "large_start"])
def test_follows_the_published_algorithm_on_minibatches_of_a_network(name, argument, constant):
    preset, constants = TRAJECTORIES[name]
    net = make_net()
    optimizer = ALSALS(net.parameters(), **preset | argument)
    assert_follows(net, optimizer, net_loss, flat_net_loss(net), flat(net.parameters()), constants | constant)


class TiedNet(nn.Module):
    """Next-token prediction with one weight as embedding and head."""

    def __init__(self, weight):
        super().__init__()
        self.embedding = nn.Embedding(*weight.shape, _weight=weight.clone())
        self.head = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_tied_weights_follow_the_published_algorithm():
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = TiedNet(weight)

    def tokens(k):
        inputs = torch.randint(7, (64,), generator=torch.Generator().manual_seed(k % 10))
        return inputs, 6 - inputs

    def loss_of(net, k):
        inputs, targets = tokens(k)
        return nn.functional.cross_entropy(net(inputs), targets, label_smoothing=0.2)

    def f(w, k):
        inputs, targets = tokens(k)
        w = w.view(7, 5)
        return nn.functional.cross_entropy(w[inputs] @ w.T, targets, label_smoothing=0.2)

    constants = {"c": 0.3, "growth_factor": 1.01, "eta": 1.0}
    optimizer = ALSALS(net.parameters(), initial_step_size=1.0)
    assert_follows(net, optimizer, loss_of, f, weight.flatten(), constants)
    assert net.head.weight is net.embedding.weight


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4 * 2**-23)])
@pytest.mark.parametrize("search_interval", [1, 10**6])
def test_constant_step_size_is_adamw(dtype, tolerance, search_interval):
    lr = 0.01
    nets = [make_net(dtype), make_net(dtype)]
    groups = [
        [
            {"params": [p for p in net.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.02, "betas": (0.8, 0.99)},
        ]
        for net in nets
    ]
    optimizer = ALSALS(groups[0], growth_factor=1.0, initial_step_size=lr, search_interval=search_interval)
    adamw = torch.optim.AdamW(groups[1], lr=lr)
    for k in range(50):
        for net in nets:
            net.zero_grad()
        loss = net_loss(nets[0], k)
        loss.backward()
        net_loss(nets[1], k).backward()
        optimizer.step(lambda: -1e9, loss)
        adamw.step()
        assert optimizer.step_size == lr
        for p, q in zip(nets[0].parameters(), nets[1].parameters()):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert optimizer.line_search.total_probes == (50 if search_interval == 1 else 1)


# ---- slope ----


def assert_slopes(slope, relative_tolerance, max_norm):
    net = make_net()
    optimizer = ALSALS(net.parameters(), slope=slope)
    gradients = []
    for k in range(8):
        optimizer.zero_grad()
        loss = net_loss(net, k)
        loss.backward()
        w, gradient = flat(net.parameters()), flat(p.grad for p in net.parameters())
        clip_coef = 1.0
        if max_norm is not None:
            total_norm = nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            clip_coef = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
            assert clip_coef < 0.5
        gradients.append(flat(p.grad for p in net.parameters()))
        optimizer.set_closure(lambda k=k: net_loss(net, k), loss, clip_coef)
        optimizer.step()

        if slope == "preconditioned":
            expected = (gradient * adam_direction_of(gradients, beta1=0.0)).sum().item()
        else:
            direction = adam_direction_of(gradients)
            f = functools.partial(flat_net_loss(net), k=k)
            expected = torch.autograd.functional.jvp(f, w, direction)[1].item()
        assert optimizer.slope == pytest.approx(expected, rel=relative_tolerance)


SLOPE_TOLERANCES = [("exact", 1e-10), ("preconditioned", 1e-10), ("finite_difference", 1e-5)]


@pytest.mark.parametrize(("slope", "relative_tolerance"), SLOPE_TOLERANCES)
def test_slope_is_the_derivative_along_the_direction(slope, relative_tolerance):
    assert_slopes(slope, relative_tolerance, max_norm=None)


@pytest.mark.parametrize(("slope", "relative_tolerance"), SLOPE_TOLERANCES)
def test_clip_coef_makes_it_the_slope_of_the_unclipped_gradient(slope, relative_tolerance):
    assert_slopes(slope, relative_tolerance, max_norm=0.05)


def test_finite_difference_steps_as_far_as_the_coarsest_dtype_needs():
    coarse, fine = single([1.0], torch.bfloat16), single([1.0])
    optimizer, probed = ALSALS([coarse, fine], slope="finite_difference"), []

    def closure():
        probed.append(fine.item())
        return coarse.double().sum() + fine.sum()

    loss = closure()
    loss.backward()
    optimizer.step(closure, loss)
    assert probed[1] == pytest.approx(1.0 - 2**-3.5, rel=1e-7)


@pytest.mark.parametrize("slope", ["exact", "preconditioned"])
def test_clip_coef_may_be_a_float_and_counts_for_one_step_only(slope):
    w = single([3.0, -2.0])
    optimizer = ALSALS([w], slope=slope)
    w.grad = torch.tensor([0.5, -0.25], dtype=torch.float64)
    optimizer.set_closure(lambda: 0.0, 1.0, 0.125)
    optimizer.step()
    assert optimizer.slope == pytest.approx(0.75 / 0.125, rel=1e-6)
    w.grad = torch.tensor([0.5, -0.25], dtype=torch.float64)
    optimizer.set_closure(lambda: 0.0, 1.0)
    optimizer.step()
    assert optimizer.slope == pytest.approx(0.75, rel=1e-6)


def test_slope_adds_up_over_parameter_groups_with_their_own_betas_and_eps():
    v, w = single([1.0, 2.0]), single([[3.0], [-1.0]])
    settings = [{"betas": (0.5, 0.9), "eps": 0.1}, {"betas": (0.9, 0.99), "eps": 1e-8}]
    optimizer = ALSALS([{"params": [v]} | settings[0], {"params": [w]} | settings[1]])
    history = []
    for k in range(4):
        optimizer.zero_grad()
        loss = (k + 1) * (v**2).sum() + (w**4).sum() + v.sum() * w.sum()
        loss.backward()
        history.append((v.grad.clone(), w.grad.flatten().clone()))
        optimizer.step(lambda: 0.0, loss)
        expected = sum(
            (gradients[-1] * adam_direction_of(gradients, *group["betas"], group["eps"])).sum().item()
            for gradients, group in zip(zip(*history), settings)
        )
        assert optimizer.slope == pytest.approx(expected, rel=1e-10)


# ---- step taken ----


@pytest.mark.parametrize("lr", [0.0, 0.5, 1.0, 2.0])
def test_lr_multiplies_the_step_and_leaves_the_search_alone(lr):
    w = single([3.0, -2.0, 0.5])
    start = w.detach().clone()
    optimizer = ALSALS([w], lr=lr, initial_step_size=8.0)
    loss = (w**2).sum()
    loss.backward()
    gradient = w.grad.clone()
    optimizer.step(lambda: (w**2).sum(), loss)

    assert optimizer.probes > 1
    assert optimizer.step_size == pytest.approx(8.0 * 0.9 ** (optimizer.probes - 1))
    assert_identical(w.detach() == start, torch.full((3,), lr == 0))
    torch.testing.assert_close(w.detach(), start - lr * optimizer.step_size * start.sign(), rtol=1e-7, atol=1e-7)

    unscaled = single(start.tolist())
    other = ALSALS([unscaled], initial_step_size=8.0)
    unscaled.grad = gradient
    other.step(lambda: (unscaled**2).sum(), loss)
    assert other.step_size == optimizer.step_size


def test_lr_scheduler_scales_the_steps():
    w = single([3.0, -2.0, 0.5])
    factors = [1.0, 0.5, 0.25, 0.0, 2.0]
    optimizer = ALSALS([w], initial_step_size=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: factors[min(k, len(factors) - 1)])
    gradients = []
    for factor in factors:
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        gradients.append(w.grad.clone())
        before = w.detach().clone()
        optimizer.step(lambda: (w**2).sum(), loss)
        scheduler.step()
        expected = before - factor * optimizer.step_size * adam_direction_of(gradients)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)


def test_each_group_has_its_lr_and_decoupled_weight_decay():
    settings = [{"lr": 0.5, "weight_decay": 0.1}, {"lr": 2.0, "weight_decay": 0.0}, {"weight_decay": 0.3}]
    params = [single([1.0, -2.0]), single([3.0]), single([[0.5], [4.0]])]
    optimizer = ALSALS([{"params": [p]} | group for p, group in zip(params, settings)], lr=0.25)
    gradients = [[] for _ in params]
    for _ in range(5):
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        before = snapshot(params)
        for p, history in zip(params, gradients):
            history.append(p.grad.clone())
        optimizer.step(lambda: sum((p**2).sum() for p in params), loss)
        for p, start, history, group in zip(params, before, gradients, settings):
            step = group.get("lr", 0.25) * optimizer.step_size
            expected = start * (1 - step * group["weight_decay"]) - step * adam_direction_of(history)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_probes_lie_on_the_line_without_lr_and_weight_decay():
    w = single([3.0, -2.0, 0.5])
    optimizer = ALSALS([w], lr=0.3, weight_decay=0.2, beta3=0.0, initial_step_size=6.0)
    start, probed = w.detach().clone(), []

    def closure():
        probed.append(w.detach().clone())
        return (w**2).sum()

    loss = (w**2).sum()
    loss.backward()
    gradient = w.grad.clone()
    optimizer.step(closure, loss)
    assert len(probed) == optimizer.probes > 2
    for k, point in enumerate(probed):
        expected = start - 6.0 * 0.9**k * adam_direction_of([gradient])
        torch.testing.assert_close(point, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slope", ["exact", "preconditioned", "finite_difference"])
def test_parameter_without_gradient_stays_and_gets_no_state(slope):
    used, unused, frozen = single([1.0, -1.0]), single([2.0]), single([3.0]).requires_grad_(False)
    optimizer = ALSALS([{"params": [used, unused]}, {"params": [frozen]}], weight_decay=0.5, slope=slope)
    for _ in range(3):
        optimizer.zero_grad()
        (used**2).sum().backward()
        optimizer.step(lambda: (used**2).sum())
    assert set(optimizer.state) == {used}
    assert (unused.item(), frozen.item()) == (2.0, 3.0)
    assert (used.abs() < 1).all()


@pytest.mark.parametrize("slope", ["exact", "preconditioned", "finite_difference"])
@pytest.mark.parametrize("search_interval", [1, 2])
def test_step_without_any_gradient_moves_nothing(slope, search_interval):
    w = single([1.0, -1.0])
    optimizer = ALSALS([w], weight_decay=0.5, slope=slope, search_interval=search_interval)
    for _ in range(2):
        assert optimizer.step(lambda: (w**2).sum()) == 2.0
    assert w.tolist() == [1.0, -1.0]
    assert not optimizer.state


def test_parameter_that_gets_its_first_gradient_later_has_its_own_bias_correction():
    early, late = single([1.0, -3.0]), single([2.0])
    optimizer = ALSALS([early, late], initial_step_size=0.05)
    histories = {early: [], late: []}
    for k in range(8):
        optimizer.zero_grad()

        def closure(k=k):
            return (early**4).sum() + ((late**4).sum() if k >= 4 else 0)

        loss = closure()
        loss.backward()
        before = {p: p.detach().clone() for p in histories}
        gradients = {p: p.grad for p in histories if p.grad is not None}
        for p, gradient in gradients.items():
            histories[p].append(gradient.clone())
        optimizer.step(closure, loss)
        for p, history in histories.items():
            if p not in gradients:
                assert_identical(p.detach(), before[p])
                continue
            expected = before[p] - optimizer.step_size * adam_direction_of(history)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    assert len(histories[early]) == 8
    assert len(histories[late]) == 4


# ---- dtypes and layouts ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESETS)
def test_trains_in_every_dtype_with_moments_of_at_least_float32(dtype, name):
    net = make_net(dtype)
    optimizer = ALSALS(net.parameters(), **PRESETS[name])
    losses = [loss for _, loss in train(net, optimizer, range(100))]
    assert max(losses[-10:]) < 0.2 * losses[0]
    assert optimizer.skipped_steps == 0
    for p in net.parameters():
        assert p.dtype == dtype
        assert set(optimizer.state[p]) - {"start"} == {"step", "exp_avg", "exp_avg_sq"}
        for moment in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][moment].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_moment_of_a_small_half_precision_gradient_does_not_underflow(dtype):
    w = single([1.0, 2.0], dtype)
    w.grad = torch.tensor([1e-4, -1e-4], dtype=dtype)
    ALSALS([w], initial_step_size=0.25).step(lambda: -1.0, 0.0)
    assert w.tolist() == pytest.approx([0.75, 2.25], rel=0.01)


def test_channels_last_parameter_keeps_its_layout_and_takes_the_same_steps():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nets = [nn.Conv2d(3, 4, 3, dtype=torch.float64) for _ in range(2)]
    for net in nets:
        nn.init.zeros_(net.bias)
        net.weight.data = weight.clone()
    nets[1].to(memory_format=torch.channels_last)
    assert not nets[1].weight.is_contiguous()

    def loss_of(net, k):
        return (net(images.roll(k, dims=0)[:4]).tanh().mean(dim=(2, 3)) - 0.5).pow(2).mean()

    optimizers = [ALSALS(net.parameters(), weight_decay=0.1) for net in nets]
    histories = [train(net, optimizer, range(40), loss_of) for net, optimizer in zip(nets, optimizers)]
    for contiguous, channels_last in zip(*histories):
        assert channels_last == pytest.approx(contiguous, rel=1e-9)
    torch.testing.assert_close(nets[1].weight, nets[0].weight, rtol=1e-9, atol=1e-9)
    assert nets[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert not nets[1].weight.is_contiguous()
    assert optimizers[1].state[nets[1].weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert histories[0][-1][1] < 0.5 * histories[0][0][1]


@pytest.mark.parametrize("slope", ["exact", "preconditioned", "finite_difference"])
@pytest.mark.parametrize("order", [1, -1])
def test_parameters_of_different_dtypes_train_together(slope, order):
    params = [single([1.0, -2.0], dtype) for dtype in DTYPES][::order]
    optimizer = ALSALS(params, slope=slope)

    def closure():
        return sum((p.double() ** 2).sum() for p in params)

    first = closure().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step(closure, loss)
    assert closure() < 0.05 * first
    assert [p.dtype for p in params] == DTYPES[::order]


@pytest.mark.parametrize("order", [1, -1])
def test_gradient_too_large_for_another_parameters_dtype_is_still_finite(order):
    half, single_precision, double = (single([1.0], dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    half.grad, single_precision.grad, double.grad = (
        torch.tensor([value], dtype=p.dtype) for value, p in ((1.0, half), (1e6, single_precision), (1e50, double))
    )
    optimizer = ALSALS([half, single_precision, double][::order], initial_step_size=0.5)
    optimizer.step(lambda: -1e60, 0.0)
    assert optimizer.skipped_steps == 0
    assert (half.item(), single_precision.item(), double.item()) == pytest.approx((0.5, 0.5, 0.5), rel=1e-3)


def test_empty_and_zero_dimensional_parameters_are_taken():
    empty, scalar = single([]), single(3.0)
    optimizer = ALSALS([empty, scalar], initial_step_size=0.5)
    (empty.sum() + scalar**2).backward()
    optimizer.step(lambda: empty.sum() + scalar**2)
    assert scalar.item() == pytest.approx(2.5, rel=1e-7)


# ---- closure and loss ----


def test_all_ways_to_hand_over_the_closure_give_identical_results():
    def with_set_closure(optimizer, closure, loss):
        optimizer.set_closure(closure)
        optimizer.step()

    def with_set_closure_and_loss(optimizer, closure, loss):
        optimizer.set_closure(closure, loss)
        optimizer.step()

    def with_set_closure_and_loss_to_step(optimizer, closure, loss):
        optimizer.set_closure(closure)
        optimizer.step(loss=loss)

    def run(step):
        net = make_net(torch.float32)
        optimizer = ALSALS(net.parameters())
        for k in range(10):
            optimizer.zero_grad()
            loss = net_loss(net, k)
            loss.backward()
            step(optimizer, lambda k=k: net_loss(net, k), loss)
        return snapshot(net.parameters()), optimizer_state(optimizer)

    expected = run(lambda optimizer, closure, loss: optimizer.step(closure))
    for step in (
        lambda optimizer, closure, loss: optimizer.step(closure, loss),
        lambda optimizer, closure, loss: optimizer.step(closure, loss.item()),
        lambda optimizer, closure, loss: optimizer.step(lambda: closure().item()),
        with_set_closure,
        with_set_closure_and_loss,
        with_set_closure_and_loss_to_step,
    ):
        assert_identical(run(step), expected)


def test_closure_given_to_step_wins_over_the_handed_over_closure_and_loss():
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ALSALS([w])
    optimizer.set_closure(lambda: pytest.fail("the closure of an earlier batch was called"), 17.0)
    assert optimizer.step(lambda: w.sum()) == 1.0


def test_loss_given_to_step_wins_over_the_handed_over_one():
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ALSALS([w])
    optimizer.set_closure(lambda: w.sum(), 5.0)
    assert optimizer.step() == optimizer.loss == 5.0
    optimizer.set_closure(lambda: w.sum(), 5.0)
    assert optimizer.step(loss=7.0) == optimizer.loss == 7.0


@pytest.mark.parametrize("fails", [False, True])
def test_handed_over_closure_is_used_once_only(fails):
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ALSALS([w])

    def closure():
        if fails:
            raise ValueError
        return w.sum()

    optimizer.set_closure(closure, 1.0)
    if fails:
        with pytest.raises(ValueError):
            optimizer.step()
    else:
        optimizer.step()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()


@pytest.mark.parametrize("loss_given", [False, True])
@pytest.mark.parametrize("initial_step_size", [1e-3, 10.0])
def test_closure_is_called_once_a_probe_without_autograd(loss_given, initial_step_size):
    w = single([3.0, -2.0])
    optimizer = ALSALS([w], initial_step_size=initial_step_size)
    loss = (w**2).sum()
    loss.backward()
    grad_modes = []

    def closure():
        grad_modes.append(torch.is_grad_enabled())
        return (w**2).sum()

    optimizer.step(closure, loss if loss_given else None)
    assert grad_modes == [False] * (optimizer.probes if loss_given else optimizer.probes + 1)
    assert optimizer.probes == 1 if initial_step_size < 1 else optimizer.probes > 1
    assert torch.is_grad_enabled()


def test_step_returns_the_loss_it_started_from():
    w = single([3.0, -2.0])
    optimizer = ALSALS([w])
    loss = (w**2).sum()
    loss.backward()
    assert optimizer.step(lambda: (w**2).sum(), loss) is loss
    assert optimizer.loss == 13.0
    before = (w**2).sum().item()
    assert optimizer.step(lambda: (w**2).sum()).item() == before
    assert optimizer.loss == before


def test_search_has_the_defaults_of_the_line_search():
    assert vars(ALSALS([single([1.0])]).line_search) == vars(ArmijoLineSearch())


def test_steps_between_searches_call_no_closure_and_take_the_last_step_size():
    w = single([3.0, -2.0])
    optimizer = ALSALS([w], search_interval=3, initial_step_size=0.01)
    gradients = []
    for k in range(9):
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        gradients.append(w.grad.clone())
        before, calls = w.detach().clone(), []
        optimizer.step(lambda calls=calls: calls.append(1) or (w**2).sum(), loss)
        assert len(calls) == optimizer.probes == (1 if k % 3 == 0 else 0)
        assert optimizer.searched == (k % 3 == 0)
        assert optimizer.step_size == pytest.approx(0.01 * 1.01 ** (k // 3), rel=1e-12)
        expected = before - optimizer.step_size * adam_direction_of(gradients)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)


# ---- saving and copying ----


def assert_continues_identically(net, optimizer, other_net, other, first, steps=12):
    assert other is not optimizer
    assert all(p is not q for p, q in zip(net.parameters(), other_net.parameters()))
    steps = range(first, first + steps)
    assert train(other_net, other, steps) == train(net, optimizer, steps)
    assert_identical(snapshot(other_net.parameters()), snapshot(net.parameters()))
    assert_identical(optimizer_state(other), optimizer_state(optimizer))


def through_torch_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make_grouped(dtype, **arguments):
    net = make_net(dtype)
    groups = [
        {"params": [p for p in net.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.ndim == 1], "lr": 0.7},
    ]
    return net, ALSALS(groups, **arguments)


RESUMED = PRESETS | {"finite_difference": {"slope": "finite_difference"}, "every_third": {"search_interval": 3}}


def resume(net, optimizer, dtype, arguments):
    other_net, other = make_grouped(dtype, **arguments)
    other_net.load_state_dict(through_torch_save(net.state_dict()))
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    return other_net, other


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_after", [0, 17])
def test_resumed_training_continues_bit_for_bit(name, dtype, saved_after):
    net, optimizer = make_grouped(dtype, **RESUMED[name])
    train(net, optimizer, range(saved_after))
    other_net, other = resume(net, optimizer, dtype, RESUMED[name])
    assert_continues_identically(net, optimizer, other_net, other, saved_after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_adaptive_cadence_continues_in_its_middle(dtype):
    # The large first step size leaves the slow average above the fast one: they soon cross, and searches get rare.
    arguments = PRESETS["salsa"] | {"initial_step_size": 3.0}
    net, optimizer = make_grouped(dtype, **arguments)
    k = 0
    while optimizer.line_search.state_dict()["steps_until_search"] < 2:
        train(net, optimizer, [k])
        k += 1
        assert k < 300
    other_net, other = resume(net, optimizer, dtype, arguments)
    assert not other.line_search.is_due()
    assert_continues_identically(net, optimizer, other_net, other, k, steps=20)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RESUMED)
def test_copy_continues_bit_for_bit(copied, dtype, name):
    net, optimizer = make_grouped(dtype, **RESUMED[name])
    train(net, optimizer, range(17))
    other_net, other = copied((net, optimizer))
    assert (other.loss, other.slope, other.decrease, other.probes, other.searched) == (
        optimizer.loss,
        optimizer.slope,
        optimizer.decrease,
        optimizer.probes,
        optimizer.searched,
    )
    assert_continues_identically(net, optimizer, other_net, other, 17)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copy_has_no_closure(copied):
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ALSALS([w])
    optimizer.set_closure(lambda: w.sum())
    with pytest.raises(RuntimeError, match="closure"):
        copied(optimizer).step()
    assert optimizer.step() == 1.0


def test_state_of_a_parameter_without_gradient_resumes():
    used, unused = single([1.0, -2.0], torch.bfloat16), single([1.0], torch.bfloat16)
    optimizer = ALSALS([unused, used])
    train(None, optimizer, range(5), lambda net, k: (used**2).sum())
    copies = [nn.Parameter(p.detach().clone()) for p in (unused, used)]
    resumed = ALSALS(copies)
    resumed.load_state_dict(through_torch_save(optimizer.state_dict()))
    assert set(resumed.state) == {copies[1]}
    expected = train(None, optimizer, range(10), lambda net, k: (used**2).sum() + unused.sum() ** 2)
    assert train(None, resumed, range(10), lambda net, k: (copies[1] ** 2).sum() + copies[0].sum() ** 2) == expected


def reloaded(optimizer):
    other = ALSALS(optimizer.param_groups[0]["params"])
    other.load_state_dict(optimizer.state_dict())
    return other


@pytest.mark.parametrize("resume", [reloaded, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_resumed_or_copied_optimizer_goes_on_counting_skipped_steps(resume):
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ALSALS([w])
    for _ in range(6):
        optimizer.step(lambda: math.nan)
    resumed = resume(optimizer)
    resumed.param_groups[0]["params"][0].grad = torch.ones_like(w)
    for _ in range(3):
        resumed.step(lambda: math.nan)
    assert resumed.skipped_steps == 9
    with pytest.raises(RuntimeError):
        resumed.step(lambda: math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_resumed_by_distributed_checkpoint_continues_bit_for_bit(dtype):
    net, optimizer = make_grouped(dtype)
    train(net, optimizer, range(17))
    optimizer.zero_grad()
    state = through_torch_save(get_optimizer_state_dict(net, optimizer))

    other_net, other = make_grouped(dtype)
    other_net.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other_net, other, state)
    assert_continues_identically(net, optimizer, other_net, other, 17)


def test_step_at_lr_zero_without_closure_makes_the_state_and_moves_nothing():
    w = single([1.0, 2.0])
    w.grad = torch.zeros_like(w)
    optimizer = ALSALS([w], lr=0.0)
    assert optimizer.step() is None
    assert w.tolist() == [1.0, 2.0]
    assert set(optimizer.state[w]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.line_search.state_dict() == ArmijoLineSearch().state_dict()


# ---- wrong use ----


def test_step_without_closure_raises():
    with pytest.raises(RuntimeError, match="needs a closure"):
        ALSALS([single([1.0])]).step()
    with pytest.raises(RuntimeError, match="needs a closure"):
        ALSALS([{"params": [single([1.0])], "lr": 0.0}, {"params": [single([1.0])]}]).step()


@pytest.mark.parametrize("closure", [1.0, torch.tensor(1.0), "loss"])
def test_closure_that_cannot_be_called_raises(closure):
    optimizer = ALSALS([single([1.0])])
    with pytest.raises(TypeError, match=f"closure must be a function.* {type(closure).__name__}"):
        optimizer.step(closure)
    with pytest.raises(TypeError, match="closure must be a function"):
        optimizer.set_closure(closure)


@pytest.mark.parametrize(("clip_coef", "error"), [(0.0, ValueError), (-1.0, ValueError), ("half", TypeError)])
def test_a_clip_coef_that_clips_nothing_is_named(clip_coef, error):
    with pytest.raises(error, match=f"clip_coef must be a positive number, got {clip_coef!r}"):
        ALSALS([single([1.0])]).set_closure(lambda: 1.0, 1.0, clip_coef)


def test_a_handed_over_clip_coef_is_not_that_of_a_closure_passed_later():
    w = single([2.0])
    optimizer = ALSALS([w])
    loss = (w**2).sum()
    loss.backward()
    optimizer.set_closure(lambda: (w**2).sum(), None, 0.01)
    optimizer.step(lambda: (w**2).sum(), loss)
    assert optimizer.slope == pytest.approx(4.0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_long_stretch_of_zero_gradients_leaves_the_step_size_alone(name):
    w = single([3.0, -2.0])
    optimizer = ALSALS([w], **PRESETS[name])
    for _ in range(2000):
        w.grad = torch.zeros_like(w)
        optimizer.step(lambda: 0.0, 0.0)
    assert optimizer.step_size == 0.1
    train(None, optimizer, range(100), lambda net, k: (w**2).sum())
    assert (w**2).sum() < 10.0  # from 13


def test_a_refused_parameter_group_is_not_added():
    optimizer = ALSALS([single([1.0])])
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [single([2.0])], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_can_be_built_from_the_groups_of_another():
    w = single([1.0])
    optimizer = ALSALS([w], lr=0.5)
    optimizer.state_dict()
    assert ALSALS(optimizer.param_groups).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_too_small_to_show_in_half_precision_do_not_end_the_search(dtype):
    net = make_net(dtype)
    optimizer = ALSALS(net.parameters(), **PRESETS["adam_sls"])
    train(net, optimizer, range(400))
    assert optimizer.step_size > 1e-6
    assert optimizer.line_search.total_probes < 4000


@pytest.mark.parametrize("loss_given", [False, True])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [(torch.ones(2, 3), ValueError, r"scalar.*\[2, 3\]"), ("1.0", TypeError, "str"), (True, TypeError, "bool")],
)
def test_loss_that_is_no_scalar_raises_and_moves_nothing(loss_given, loss, error, message):
    w = single([1.0, 2.0])
    w.grad = torch.ones_like(w)
    optimizer = ALSALS([w])
    with pytest.raises(error, match=message):
        optimizer.step(lambda: loss, 1.0 if loss_given else None)
    assert w.tolist() == [1.0, 2.0]


def test_sparse_gradient_raises_and_moves_nothing():
    embedding = nn.Embedding(5, 2, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = ALSALS(embedding.parameters())
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(lambda: 0.0, 1.0)
    assert_identical(embedding.weight.detach(), before)


def test_complex_parameter_raises():
    w = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"complex64.*\[2, 3\]"):
        ALSALS([w])
    with pytest.raises(TypeError, match="complex64"):
        ALSALS([single([1.0])]).add_param_group({"params": [w]})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *((name, value, ValueError) for name in ("lr", "eps", "weight_decay") for value in (-0.1, math.inf, math.nan)),
        *(("betas", value, ValueError) for value in ((0.9,), (1.0, 0.9), (0.9, -0.1), (0.9, math.nan), (0.9,) * 3)),
        *((name, "0.1", TypeError) for name in ("lr", "eps", "weight_decay")),
        *(("betas", value, TypeError) for value in (0.9, None, ("0.9", "0.999"))),
        ("c", 1.0, ValueError),
        ("beta3", 1.0, ValueError),
        ("growth_factor", 0.5, ValueError),
        ("decrease_factor", 1.0, ValueError),
        ("initial_step_size", 0.0, ValueError),
        ("initial_step_size", "0.1", TypeError),
        ("search_interval", 0, ValueError),
        ("search_interval", 1.5, TypeError),
        ("slope", "precise", ValueError),
    ],
)
def test_wrong_argument_is_named_with_its_value(name, value, error):
    with pytest.raises(error, match=f"^{name} must be ") as raised:
        ALSALS([single([1.0])], **{name: value})
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1e-8), ("weight_decay", -0.1)]
)
def test_wrong_value_in_a_parameter_group_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        ALSALS([{"params": [single([1.0])], name: value}])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("c", 0.3),
        ("beta3", 0.9),
        ("growth_factor", 1.1),
        ("decrease_factor", 0.5),
        ("initial_step_size", 0.1),
        ("slope", "exact"),
        ("search_interval", 1),
    ],
)
def test_search_setting_in_a_parameter_group_raises(name, value):
    with pytest.raises(ValueError, match=f"^{name} cannot differ between parameter groups"):
        ALSALS([{"params": [single([1.0])]}, {"params": [single([2.0])], name: value}])


def test_loading_the_state_of_another_optimizer_raises():
    w = single([1.0])
    w.grad = torch.ones_like(w)
    adamw = torch.optim.AdamW([w])
    adamw.step()
    with pytest.raises(ValueError, match="state_dict must be that of an ALSALS optimizer"):
        ALSALS([w]).load_state_dict(adamw.state_dict())


def test_loading_the_state_of_an_earlier_version_raises():
    state_dict = hf_alsals.ALSALS([single([1.0])]).state_dict()
    del state_dict["param_groups"][0]["search_log_path_size"]
    with pytest.raises(ValueError, match="of this version of hf_alsals, got one without log_path_size"):
        hf_alsals.ALSALS([single([1.0])]).load_state_dict(state_dict)


def test_loading_the_state_of_other_parameter_groups_raises():
    with pytest.raises(ValueError):
        ALSALS([single([1.0])]).load_state_dict(ALSALS([single([1.0]), single([2.0])]).state_dict())


# ---- non-finite numbers ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "closure", "gradient"])
@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize("search_interval", [1, 2, 3])
def test_non_finite_start_skips_the_step_and_touches_nothing(value, where, steps_before, search_interval):
    net = make_net(torch.float32)
    optimizer = ALSALS(net.parameters(), weight_decay=0.1, search_interval=search_interval)
    train(net, optimizer, range(steps_before))
    loss = net_loss(net, 0)
    optimizer.zero_grad()
    loss.backward()
    if where == "gradient":
        net[2].weight.grad[0, 3] = value
    loss = {"loss": value, "closure": None, "gradient": loss}[where]
    before, state = snapshot(net.parameters()), optimizer_state(optimizer)

    optimizer.step(lambda: value, loss)

    assert_identical(snapshot(net.parameters()), before)
    assert optimizer.skipped_steps == 1
    for group in state["param_groups"]:
        group.update(skipped_steps=1, consecutive_skips=1)
    assert_identical(optimizer_state(optimizer), state)


def test_ten_non_finite_steps_in_a_row_raise():
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ALSALS([w])
    for _ in range(9):
        optimizer.step(lambda: math.nan)
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        optimizer.step(lambda: math.inf)
    assert optimizer.skipped_steps == 10
    assert w.item() == 1.0


def test_good_step_resets_the_count_of_skips_in_a_row():
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ALSALS([w])
    for _ in range(3):
        w.grad = torch.ones_like(w)
        for _ in range(9):
            optimizer.step(lambda: math.nan)
        optimizer.step(lambda: w.sum())
    assert optimizer.skipped_steps == 27
    assert w.item() < 1.0


@pytest.mark.parametrize("slope", ["exact", "preconditioned", "finite_difference"])
@pytest.mark.parametrize("search_interval", [1, "adaptive"])
def test_non_finite_probe_is_rejected_and_training_goes_on(slope, search_interval):
    w = single([3.0, 2.5])
    optimizer = ALSALS([w], slope=slope, search_interval=search_interval, initial_step_size=10.0)

    def loss_of(net, k):
        return (w - w.log()).sum()

    train(None, optimizer, [0], loss_of)
    assert optimizer.probes >= 15
    assert optimizer.step_size < 3.0
    train(None, optimizer, range(1, 200), loss_of)
    assert loss_of(None, 0).item() == pytest.approx(2.0, abs=0.01)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_finite_difference_does_not_stay_in_the_search(value):
    w = single([3.0, -2.0])
    optimizer = ALSALS([w], slope="finite_difference", initial_step_size=0.05)

    def loss_of(net, k):
        return (w**2).sum()

    train(None, optimizer, range(3), loss_of)
    losses = iter([value])
    optimizer.zero_grad()
    loss = loss_of(None, 3)
    loss.backward()
    optimizer.step(lambda: next(losses, loss_of(None, 3)), loss)
    assert math.isfinite(optimizer.line_search.smoothed_slope)
    train(None, optimizer, range(100), loss_of)
    assert loss_of(None, 0) < 1.0


def test_batch_on_which_no_probe_is_finite_moves_nothing():
    w = single([3.0, -2.0])
    optimizer = ALSALS([w])
    w.grad = torch.ones_like(w)
    optimizer.step(lambda: math.nan, 1.0)
    assert w.tolist() == [3.0, -2.0]
    w.grad = 2 * w.detach()
    optimizer.step(lambda: (w**2).sum())
    assert (w**2).sum() < 13.0


# ---- exceptions in the closure ----


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_call", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", ["exact", "finite_difference"])
def test_exception_in_the_closure_leaves_the_parameters_where_they_were(error, failing_call, dtype, slope):
    net = make_net(dtype)
    optimizer = ALSALS(net.parameters(), weight_decay=0.1, slope=slope, initial_step_size=10.0)
    optimizer.zero_grad()
    net_loss(net, 0).backward()
    before, search, calls = snapshot(net.parameters()), optimizer.line_search.state_dict(), 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == failing_call + 1:
            raise error("out of luck")
        return net_loss(net, 0)

    with pytest.raises(error, match="out of luck"):
        optimizer.step(closure)
    assert calls == failing_call + 1
    assert_identical(snapshot(net.parameters()), before)
    assert optimizer.line_search.state_dict() == search
    # The first call is for the loss at the start; from the first probe on the gradients' memory holds the start point.
    assert [p.grad is None for p in net.parameters()] == [failing_call > 0] * len(before)

    optimizer.zero_grad()
    net_loss(net, 0).backward()
    optimizer.step(closure)
    assert net_loss(net, 0) < net_loss(net, 0, dict(zip(dict(net.named_parameters()), before)))


# ---- degenerate problems ----


@pytest.mark.parametrize("name", PRESETS)
def test_zero_gradients_move_nothing(name):
    w = single([3.0, -2.0], torch.float32)
    optimizer = ALSALS([w], **PRESETS[name])
    train(None, optimizer, range(30), lambda net, k: (w * 0).sum() + 1)
    assert w.tolist() == [3.0, -2.0]
    assert optimizer.slope == optimizer.decrease == 0.0
    assert optimizer.line_search.total_probes <= 30


@pytest.mark.parametrize("name", PRESETS)
def test_zero_loss_moves_nothing(name):
    w = single([0.0, 0.0], torch.float32)
    optimizer = ALSALS([w], **PRESETS[name])
    train(None, optimizer, range(30), lambda net, k: (w**2).sum())
    assert w.tolist() == [0.0, 0.0]
    assert optimizer.loss == 0.0
    assert math.isfinite(optimizer.step_size)


@pytest.mark.parametrize("name", RESUMED)
def test_training_past_the_minimum_stays_finite(name):
    w = single([3.0, -2.0], torch.float32)
    optimizer = ALSALS([w], **RESUMED[name])
    history = train(None, optimizer, range(300), lambda net, k: (w**2).sum())
    assert w.isfinite().all()
    assert all(math.isfinite(step_size) and step_size > 0 for step_size, _ in history)
    assert history[-1][1] < 0.1


@pytest.mark.parametrize("c", [0.3, 0.7])
def test_uphill_momentum_may_raise_the_loss_by_one_over_c_of_the_prediction(c):
    w = single([3.0, -2.0])
    optimizer = ALSALS([w], c=c, beta3=0.0, initial_step_size=0.01)
    train(None, optimizer, range(20), lambda net, k: (w**2).sum())
    before = (w**2).sum().item()
    train(None, optimizer, [20], lambda net, k: -(w**2).sum())
    decrease = (w**2).sum().item() - before
    assert optimizer.slope < 0
    assert optimizer.decrease == pytest.approx(decrease)
    assert 0 > decrease >= optimizer.step_size * optimizer.slope / c


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("period", [2, 7])
def test_loss_that_keeps_changing_its_sign_stays_finite(name, period):
    net = make_net(torch.float32)
    optimizer = ALSALS(net.parameters(), **RESUMED[name])
    slopes = []
    for k in range(60):
        sign = 1 if (k // period) % 2 == 0 else -1
        train(net, optimizer, [k], lambda net, k, sign=sign: sign * net_loss(net, k).tanh())
        slopes.append(optimizer.slope)
        assert optimizer.probes <= 100
    assert all(math.isfinite(value) for value in (*slopes, *optimizer.line_search.state_dict().values()))
    assert all(p.isfinite().all() for p in net.parameters())
    assert optimizer.skipped_steps == 0
    if RESUMED[name].get("slope") != "preconditioned":
        assert min(slopes) < 0 < max(slopes)


# ---- memory ----


@pytest.mark.parametrize(("growth", "megabytes"), [("constant", 0), ("path", 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_search_needs_no_memory_beyond_that_of_adam_and_the_first_weights(tmp_path, dtype, growth, megabytes):
    p = nn.Parameter(torch.ones(4000, 4000, dtype=dtype))
    optimizer = ALSALS([p], lr=0.5, weight_decay=0.1, growth=growth)
    optimizer.line_search.started = True  # no search in two directions
    optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.ones(p.shape), "exp_avg_sq": torch.ones(p.shape)}
    p.grad = gradient = torch.full_like(p, -0.5)  # uphill, so that any finite loss is accepted
    losses = iter([math.inf, math.inf, 0.5])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step(lambda: next(losses), 1.0)
    assert optimizer.probes == 3
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    in_use = list(itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])))
    assert max(in_use) < megabytes * 1e6 + 6e6  # pieces of a parameter; all of it has 64 or 32 MB
    assert in_use[-1] == megabytes * 1e6
    del gradient  # held until here, for the profile counts what it did not see allocated only sometimes


def test_large_parameters_move_as_small_ones():
    """Pieces of a large parameter, and parameters that cannot be cut, give what AdamW gives."""
    torch.manual_seed(0)
    starts = [torch.randn(700, 500), torch.randn(500, 700).t(), torch.randn(3), torch.randn(0), torch.randn(64, 64)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    alsals = ALSALS(ours, weight_decay=0.01)
    adamw = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01, eps=1e-8)
    alsals.line_search.search = lambda loss, slope, probe: (probe(0.3), probe(0.2), 0.1)[-1]
    for _ in range(3):
        for one, other in zip(ours, theirs):
            gradient = torch.randn(one.shape)
            one.grad, other.grad = gradient.clone(), gradient.clone()
        alsals.step(lambda: 0.0, 1.0)
        adamw.step()
    for one, other in zip(ours, theirs):
        assert_identical(one.detach(), other.detach())


@pytest.mark.parametrize("search_interval", [1, 2])
def test_gradients_are_gone_after_a_search_only(search_interval):
    w = single([1.0, -1.0])
    optimizer = ALSALS([w], search_interval=search_interval)
    for searches in (True, search_interval == 1):
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        optimizer.step(lambda: (w**2).sum(), loss)
        assert (w.grad is None) == searches == optimizer.searched


# ---- the step size that follows the slope along the path ----


def cosine(steps):
    return [0.5 * (1 + math.cos(math.pi * k / steps)) for k in range(steps)]


@pytest.mark.parametrize("lrs", [[1.0] * 200, cosine(200)], ids=["constant", "cosine"])
@pytest.mark.parametrize("initial_step_size", [1e-4, 0.1, 10.0])
def test_path_search_follows_its_reference(initial_step_size, lrs):
    net = make_net()
    w = flat(net.parameters())
    optimizer = hf_alsals.ALSALS(net.parameters(), initial_step_size=initial_step_size, search_interval=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: lrs[min(k, len(lrs) - 1)])
    history = []
    for k in range(200):
        history += train(net, optimizer, [k])
        scheduler.step()
    step_sizes, losses, w = path_reference(flat_net_loss(net), w, lrs, history[0][0])
    assert [step_size for step_size, _ in history] == pytest.approx(step_sizes, rel=1e-9)
    assert [loss for _, loss in history] == pytest.approx(losses, rel=1e-8)
    torch.testing.assert_close(flat(net.parameters()), w, rtol=1e-9, atol=1e-9)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_data_that_is_known_by_heart_is_no_reason_to_run_away(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    inputs, labels = torch.randn(16, 32, 32), torch.randint(0, 10, (16, 32))
    optimizer = hf_alsals.ALSALS(net.parameters())
    cross_entropy = torch.nn.functional.cross_entropy
    losses = []
    for k in range(1600):
        optimizer.zero_grad()
        loss = cross_entropy(net(inputs[k % 16]), labels[k % 16])
        loss.backward()
        optimizer.step(lambda k=k: cross_entropy(net(inputs[k % 16]), labels[k % 16]), loss)
        losses.append(loss.item())
    assert max(losses[-800:]) < 0.01
    assert optimizer.step_size < 0.5


def test_the_path_slope_is_that_of_the_unclipped_gradient_towards_the_first_weights():
    w = single([1.0, -2.0])
    optimizer = hf_alsals.ALSALS([w], initial_step_size=0.5, growth_factor=2.0)
    for _ in range(2):
        here = w.detach().bfloat16().double()
        loss = (w**2).sum()
        (gradient,) = torch.autograd.grad(loss, w)
        w.grad = 0.25 * gradient
        optimizer.set_closure(lambda: (w**2).sum(), loss, clip_coef=0.25)
        optimizer.step()
    slope = (gradient @ (torch.tensor([1.0, -2.0], dtype=torch.float64) - here)).item()
    assert optimizer.line_search.smoothed_path_slope == pytest.approx(0.1 * slope)


def test_a_step_that_fails_in_a_probe_leaves_the_followed_step_size_where_it_was():
    net = make_net()
    optimizer = hf_alsals.ALSALS(net.parameters(), search_interval=1)
    train(net, optimizer, range(5))
    before = optimizer.line_search.state_dict()

    def fail():
        raise KeyboardInterrupt

    loss = net_loss(net, 5)
    loss.backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail, loss)
    assert optimizer.line_search.state_dict() == before


def test_the_first_weights_are_kept_in_bfloat16_and_resumed():
    net = make_net(torch.float32)
    before = snapshot(net.parameters())
    optimizer = hf_alsals.ALSALS(net.parameters())
    train(net, optimizer, range(3))
    resumed = hf_alsals.ALSALS(net.parameters())
    resumed.load_state_dict(optimizer_state(optimizer))
    for p, start in zip(net.parameters(), before, strict=True):
        assert_identical(optimizer.state[p]["start"], start.bfloat16())
        assert_identical(resumed.state[p]["start"], start.bfloat16())


def test_it_anneals_when_the_learning_rates_of_all_groups_do():
    net = make_net()
    first, *others = net.parameters()
    optimizer = hf_alsals.ALSALS([{"params": [first], "lr": 1.0}, {"params": others, "lr": 0.01}])
    train(net, optimizer, range(2))
    for lrs, is_annealing in [
        ((0.0, 0.01), False),
        ((1.0, 0.004), False),
        ((0.4, 0.004), True),
        ((0.4, 0.006), False),
    ]:
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        before = optimizer.step_size
        train(net, optimizer, [2])
        assert optimizer.line_search.is_annealing == is_annealing
        assert (optimizer.step_size == before) == is_annealing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_path_slope_of_large_parameters_is_the_inner_product(dtype):
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(700, 500, generator=generator, dtype=torch.float64).to(dtype))  # of two pieces
    gradient = torch.randn(700, 500, generator=generator, dtype=torch.float64).to(dtype)
    optimizer = hf_alsals.ALSALS([w])
    for start in (w.detach().clone(), None):
        w.grad = gradient.clone()
        optimizer.step(lambda: 0.0, 0.0)
        if start is not None:
            assert optimizer.line_search.smoothed_path_slope == 0  # rounding is no way
            first = start.bfloat16().double()
            with torch.no_grad():
                w.copy_(start + 0.3 * gradient)
            slope = (gradient.double() * (first - w.bfloat16().double())).sum().item()
    assert optimizer.line_search.smoothed_path_slope == pytest.approx(0.1 * slope, rel=1e-4)
    assert slope == pytest.approx(-0.3 * gradient.double().square().sum().item(), rel=0.01)


@pytest.mark.parametrize(("made", "loaded"), [("path", "constant"), ("constant", "path")])
def test_a_state_of_the_other_growth_is_refused_by_name(made, loaded):
    net = make_net()
    optimizer = hf_alsals.ALSALS(net.parameters(), growth=made)
    train(net, optimizer, range(2))
    with pytest.raises(ValueError, match=f"growth must be '{made}', as in the state_dict, got '{loaded}'"):
        hf_alsals.ALSALS(net.parameters(), growth=loaded).load_state_dict(optimizer_state(optimizer))


def test_weights_stay_until_a_first_search_has_found_a_step_size():
    net = make_net()
    before = snapshot(net.parameters())
    optimizer = hf_alsals.ALSALS(net.parameters())
    for lr in (1.0, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        train(net, optimizer, [0], lambda net, k: 0.0 * net_loss(net, k))
    for p, start in zip(net.parameters(), before, strict=True):
        assert_identical(p.detach(), start)


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_a_step_waits_once_for_the_device_and_a_search_once_more_and_once_a_probe(growth):
    class Waits(torch.overrides.TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            reads = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__)
            on_host = {id(state["step"]) for state in optimizer.state.values() if "step" in state}
            self.count += function in reads and id(args[0]) not in on_host
            return function(*args, **(kwargs or {}))

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = hf_alsals.ALSALS(model.parameters(), growth=growth, search_interval=3)
    x = torch.randn(16, 4)
    searched = []

    def closure():
        return (model(x) - x[:, :1]).square().mean()

    for _ in range(7):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        with Waits() as waits:
            optimizer.set_closure(closure, loss, clip_coef=torch.tensor(0.5))
            optimizer.step()
        assert waits.count == 1 + (1 + optimizer.probes if optimizer.searched else 0)
        searched.append(optimizer.searched)
    assert searched == [True, False, False, True, False, False, True]


def test_an_autocast_around_the_step_does_not_hide_the_moves_from_the_probes():
    losses = {}
    for around in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 1)
        x = torch.randn(64, 8)
        optimizer = hf_alsals.ALSALS(model.parameters())
        losses[around] = []

        def closure(model=model, x=x, losses=losses[around]):
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x).float() - x[:, :1]).square().mean()
            losses.append(loss.item())
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            loss = closure()
            loss.backward()
            optimizer.step(closure, loss)
    assert losses[True] == losses[False]
    assert len(set(losses[True])) > 2


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_a_fresh_state_dict_has_all_the_numbers_of_a_later_one(growth):
    # torch.distributed.checkpoint fills what is there, and drops the rest.
    net = make_net()
    optimizer = ALSALS(net.parameters(), growth=growth)
    fresh = set(optimizer.state_dict()["param_groups"][0])
    train(net, optimizer, range(3))
    assert set(optimizer.state_dict()["param_groups"][0]) == fresh


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_gradients_whose_norm_is_not_finite_are_skipped(growth):
    w = single([1.0, 2.0])
    optimizer = ALSALS([w], growth=growth)
    for step in range(3):
        before = w.detach().clone()
        loss = w.square().sum()
        w.grad = None
        loss.backward()
        clip_coef = 0.0 if step == 1 else 1.0  # max_norm / infinity
        w.grad *= clip_coef
        optimizer.set_closure(lambda: w.square().sum(), loss, torch.tensor(clip_coef))
        optimizer.step()
        assert torch.equal(w, before) == (step == 1)
    assert optimizer.skipped_steps == 1
