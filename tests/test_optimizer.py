import copy
import functools
import itertools
import math

import pytest
import torch
from reference import alsals_reference, path_reference
from small_problems import (
    SLOPES,
    ConstantALSALS,
    adam_direction_of,
    assert_identical,
    flat,
    flat_net_loss,
    make_net,
    net_loss,
    rosenbrock,
    single,
    snapshot,
    train,
    unflatten,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_alsals import ALSALS, PRESETS
from hf_alsals.path_growth import PathGrowth

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
    optimizer = ConstantALSALS(net.parameters(), **preset | argument)
    assert_follows(net, optimizer, lambda net, k: rosenbrock(net[0]), rosenbrock, flat(net), constants | constant)


@pytest.mark.parametrize("name", TRAJECTORIES)
@pytest.mark.parametrize(("argument", "constant"), FIRST_STEP_SIZES, ids=["default_start", "large_start"])
def test_follows_the_published_algorithm_on_minibatches_of_a_network(name, argument, constant):
    preset, constants = TRAJECTORIES[name]
    net = make_net()
    optimizer = ConstantALSALS(net.parameters(), **preset | argument)
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
    optimizer = ConstantALSALS(net.parameters(), initial_step_size=1.0)
    assert_follows(net, optimizer, loss_of, f, weight.flatten(), constants)
    assert net.head.weight is net.embedding.weight


def cosine(steps):
    return [0.5 * (1 + math.cos(math.pi * k / steps)) for k in range(steps)]


def assert_follows_the_default(net, loss_of, lrs, growth_factor=1.03, bounded_steps=400, **settings):
    w = flat(net.parameters())
    optimizer = ALSALS(net.parameters(), growth_factor=growth_factor, search_interval=1, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: lrs[min(k, len(lrs) - 1)])
    history = []
    for k in range(len(lrs)):
        history += train(net, optimizer, [k], loss_of)
        scheduler.step()
    shapes = [p.shape for p in net.parameters()]
    start_sizes = [size for size, _ in history[: optimizer.search.initial_searches]]
    step_sizes, losses, w, multipliers = path_reference(
        lambda w, k: loss_of(net, k, unflatten(net, w)),
        w,
        shapes,
        lrs,
        start_sizes,
        growth_factor=growth_factor,
        bounded_steps=bounded_steps,
    )
    assert [step_size for step_size, _ in history] == pytest.approx(step_sizes, rel=1e-9)
    assert [loss for _, loss in history] == pytest.approx(losses, rel=1e-8)
    torch.testing.assert_close(flat(net.parameters()), w, rtol=1e-9, atol=1e-9)
    assert losses[-1] < 0.3 * losses[0]
    found = [size / optimizer.step_size for size in optimizer.step_sizes()["hidden"]]
    assert found == pytest.approx([multipliers[0], multipliers[2]])
    return step_sizes


@pytest.mark.parametrize("lrs", [[1.0] * 200, cosine(200)], ids=["constant", "cosine"])
@pytest.mark.parametrize(("initial_step_size", "growth_factor"), [(1e-4, 1.03), (0.1, 1.03), (10.0, 1.03), (0.1, 1.2)])
def test_the_default_follows_its_reference(initial_step_size, growth_factor, lrs):
    settings = {"initial_step_size": initial_step_size, "growth_factor": growth_factor}
    assert_follows_the_default(make_net(), net_loss, lrs, **settings)


def steep(net, k, parameters=None):
    return net_loss(net, k, parameters, offset=2.0).sqrt()  # as steep far away as near


def test_the_default_raises_what_is_far_too_small_as_its_reference_does():
    step_sizes = assert_follows_the_default(make_net(), steep, [1.0] * 100)
    ratios = [after / before for before, after in itertools.pairwise(step_sizes[4:])]
    assert max(ratios) > 2  # doubled
    assert any(1.03**1.3 < ratio < 1.03**2.7 for ratio in ratios)  # and raised twice as fast


@pytest.mark.parametrize("initial_step_size", [0.1, 10.0])
def test_the_bound_of_the_default_falls_as_that_of_its_reference(initial_step_size, monkeypatch):
    monkeypatch.setattr(PathGrowth, "bounded_steps", 5)
    settings = {"initial_step_size": initial_step_size, "bounded_steps": 5}
    step_sizes = assert_follows_the_default(make_net(), steep, [1.0] * 100, **settings)
    assert step_sizes[-1] / step_sizes[-2] == pytest.approx(math.sqrt(99 / 100))


def overshooting(net, **settings):
    """Return an optimizer that has overshot, and whose tensors have step sizes of their own."""
    with torch.no_grad():
        net[0].weight.mul_(0.3)  # which is to go farther than the others
    optimizer = ALSALS(net.parameters(), growth_factor=1.1, search_interval=1, **settings)
    train(net, optimizer, range(90))
    assert optimizer.search.growth.shrinking_steps > 0
    assert len({size for sizes in optimizer.step_sizes().values() for size in sizes}) > 1
    return optimizer


def nesterov_direction(state, g):
    """Return the direction of a step from Adam's moments and the gradient, after it."""
    step = state["step"].item()
    momentum = (0.9 * state["exp_avg"] + 0.1 * g) / (1 - 0.9 ** (step + 1))
    return momentum / ((state["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8)


def test_a_step_moves_each_tensor_by_its_own_step_size_and_the_learning_rate_of_its_group():
    net = make_net()
    optimizer = overshooting(net)
    rest = optimizer.param_groups[0]["params"][2:]
    del optimizer.param_groups[0]["params"][2:]
    optimizer.add_param_group({"params": rest, "lr": 0.25, "weight_decay": 0.01})
    before = snapshot(net.parameters())
    gradients = torch.autograd.grad(net_loss(net, 60), list(net.parameters()))
    train(net, optimizer, [60])
    for group in optimizer.param_groups:
        for p in group["params"]:
            place = [q is p for q in net.parameters()].index(True)
            start = before[place]
            multiplier = 2 ** (round(4 * optimizer.tensors[p].log_multiplier / math.log(2)) / 4)
            taken = group["lr"] * optimizer.search.taken
            d = nesterov_direction(optimizer.state[p], gradients[place])
            expected = start * (1 - taken * group["weight_decay"]) - multiplier * taken * d
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_that_fills_a_fresh_optimizer_has_the_step_sizes_of_tensors():
    net = make_net()
    optimizer = overshooting(net)
    other = make_net()
    other.load_state_dict(net.state_dict())
    fresh = ALSALS(other.parameters(), growth_factor=1.1, search_interval=1)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    # torch.distributed.checkpoint.load fills only what is there.
    there = get_optimizer_state_dict(other, fresh)["state"]
    assert {name: state["path"].shape for name, state in there.items()} == {
        name: state["path"].shape for name, state in saved["state"].items()
    }
    set_optimizer_state_dict(other, fresh, saved)
    assert [fresh.tensors[p] for p in other.parameters()] == [optimizer.tensors[p] for p in net.parameters()]
    assert train(other, fresh, range(60, 80)) == train(net, optimizer, range(60, 80))


def test_the_slope_of_a_search_is_along_all_step_sizes():
    net = make_net()
    optimizer = overshooting(net)
    gradients = torch.autograd.grad(net_loss(net, 60), list(net.parameters()))
    train(net, optimizer, [60])
    sizes = optimizer.step_sizes()
    multipliers = [size / optimizer.step_size for pair in zip(sizes["hidden"], sizes["vectors"]) for size in pair]
    slope = 0.0
    for p, g, multiplier in zip(net.parameters(), gradients, multipliers):
        slope += multiplier * (g * nesterov_direction(optimizer.state[p], g)).sum().item()
    assert optimizer.slope == pytest.approx(slope)


def test_embeddings_of_a_group_apart_do_not_steer_the_common_step_size():
    def common(hidden):
        net = make_net()
        optimizer = ALSALS(
            [{"params": list(net[0].parameters()), "hidden": hidden}, {"params": list(net[2].parameters())}]
        )
        train(net, optimizer, range(30))
        return optimizer

    apart, together = common(False), common(True)
    assert apart.search.growth.mean_slope != together.search.growth.mean_slope
    assert set(apart.step_sizes()) == {"hidden", "vectors", "others"}
    assert set(together.step_sizes()) == {"hidden", "vectors"}
    first = make_net()
    assert apart.search.growth.weight_scale == pytest.approx(first[2].weight.square().mean().sqrt().item(), rel=0.01)


def test_a_model_of_vectors_has_one_step_size_at_first_and_no_largest_one():
    net = nn.ParameterList([torch.linspace(-1.2, 1.0, 6, dtype=torch.float64)])
    optimizer = ALSALS(net.parameters())
    train(net, optimizer, range(20), lambda net, k: rosenbrock(net[0]))
    assert optimizer.search.growth.weight_scale == math.inf
    assert optimizer.step_sizes() == {"vectors": [optimizer.step_size]}


@pytest.mark.parametrize("seed", [0, 1])
def test_data_that_is_known_by_heart_is_no_reason_to_run_away(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    inputs, labels = torch.randn(16, 32, 32), torch.randint(0, 10, (16, 32))
    optimizer = ALSALS(net.parameters())
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
    optimizer = ConstantALSALS(groups[0], growth_factor=1.0, initial_step_size=lr, search_interval=search_interval)
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
    assert optimizer.search.total_probes == (50 if search_interval == 1 else 1)


# ---- slope ----


def assert_slopes(slope, relative_tolerance, max_norm):
    net = make_net()
    optimizer = ConstantALSALS(net.parameters(), slope=slope)
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
        optimizer.set_clip_coef(clip_coef)
        optimizer.step(lambda k=k: net_loss(net, k), loss)

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


def test_slope_adds_up_over_parameter_groups_with_their_own_betas_and_eps():
    v, w = single([1.0, 2.0]), single([[3.0], [-1.0]])
    settings = [{"betas": (0.5, 0.9), "eps": 0.1}, {"betas": (0.9, 0.99), "eps": 1e-8}]
    optimizer = ConstantALSALS([{"params": [v]} | settings[0], {"params": [w]} | settings[1]])
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
    optimizer = ConstantALSALS([w], lr=lr, initial_step_size=8.0)
    loss = (w**2).sum()
    loss.backward()
    gradient = w.grad.clone()
    optimizer.step(lambda: (w**2).sum(), loss)

    assert optimizer.probes > 1
    assert optimizer.step_size == pytest.approx(8.0 * 0.9 ** (optimizer.probes - 1))
    assert_identical(w.detach() == start, torch.full((3,), lr == 0))
    torch.testing.assert_close(w.detach(), start - lr * optimizer.step_size * start.sign(), rtol=1e-7, atol=1e-7)

    unscaled = single(start.tolist())
    other = ConstantALSALS([unscaled], initial_step_size=8.0)
    unscaled.grad = gradient
    other.step(lambda: (unscaled**2).sum(), loss)
    assert other.step_size == optimizer.step_size


def test_lr_scheduler_scales_the_steps():
    w = single([3.0, -2.0, 0.5])
    factors = [1.0, 0.5, 0.25, 0.0, 2.0]
    optimizer = ConstantALSALS([w], initial_step_size=0.5)
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
    optimizer = ConstantALSALS([{"params": [p]} | group for p, group in zip(params, settings)], lr=0.25)
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


@pytest.mark.parametrize("direction", ["nadam", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lrs", [(1.0, 0.25, 0.0), (10.0, 1.0, 0.1), (4.0, 8.0, 0.0)])
def test_probes_move_groups_in_proportion_to_their_lr(lrs, dtype, direction):
    """So the last probe is what the step takes, but for the schedule, where one group has the lr of 1."""
    params = [torch.nn.Parameter(torch.tensor(values, dtype=dtype)) for values in ([1.0, -2.0], [[3.0], [1.0]], [0.5])]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, lrs)]
    optimizer = ALSALS(groups, direction=direction, search_interval=1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7)
    multiplier = 0.7 * (4 if lrs[0] == 4 else 1)  # as if all had an lr of it
    moved = []

    def closure():
        moved.append([(p - start).detach().clone() for p, start in zip(params, before)])
        return sum((p**2).sum() for p in params)

    for _ in range(5):
        before = snapshot(params)
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        gradients = [p.grad.clone() for p in params]
        moved.clear()
        optimizer.step(closure, loss)
        unit = [(start - p.detach()) / (multiplier * optimizer.search.taken) for p, start in zip(params, before)]
        tolerance = 1e-4 if dtype == torch.float32 else 1e-9
        expected = sum((g * d).sum().item() for g, d in zip(gradients, unit))
        assert optimizer.slope == pytest.approx(expected, rel=tolerance)
        assert optimizer.probes > 0
        for way in moved[-optimizer.probes :]:
            size = way[0].norm() / unit[0].norm()
            for part, one in zip(way, unit):
                torch.testing.assert_close(part, -size * one, rtol=tolerance, atol=tolerance * size.item())


def test_a_group_whose_lr_is_0_is_as_good_as_frozen():
    def trained(is_frozen):
        net, still = make_net(), torch.nn.Parameter(torch.tensor([[30.0, 1.0]], dtype=torch.float64))
        still.requires_grad_(not is_frozen)
        groups = [{"params": list(net.parameters())}] + [{"params": [still], "lr": 0.0}] * (not is_frozen)
        optimizer = ALSALS(groups)
        # Sharp in what stands still: a probe that moved it would be rejected.
        train(net, optimizer, range(60), lambda net, k: net_loss(net, k) + (still**4).sum())
        assert still.tolist() == [[30.0, 1.0]]
        return [*snapshot(net.parameters()), torch.tensor(optimizer.step_size)]

    assert_identical(trained(is_frozen=False), trained(is_frozen=True))


def test_where_all_hidden_matrices_stand_still_the_others_steer():
    def trained(is_frozen):
        w, still = single([3.0, -2.0, 0.5]), single([[30.0, 1.0]])
        still.requires_grad_(not is_frozen)
        optimizer = ALSALS([{"params": [w]}] + [{"params": [still], "lr": 0.0}] * (not is_frozen))
        for _ in range(60):
            loss = (w**2).sum() + (still**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(lambda: (w**2).sum() + (still**2).sum(), loss)
        assert optimizer.search.growth.steps > 0
        assert (w**2).sum() < 1
        return [w.detach(), torch.tensor(optimizer.step_size)]

    assert_identical(trained(is_frozen=False), trained(is_frozen=True))


def test_probes_lie_on_the_line_without_lr_and_weight_decay():
    w = single([3.0, -2.0, 0.5])
    optimizer = ConstantALSALS([w], lr=0.3, weight_decay=0.2, beta3=0.0, initial_step_size=6.0)
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


def test_steps_between_searches_call_no_closure_and_take_the_last_step_size():
    w = single([3.0, -2.0])
    optimizer = ConstantALSALS([w], search_interval=3, initial_step_size=0.01)
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


@pytest.mark.parametrize("slope", SLOPES)
def test_parameter_without_gradient_stays_and_gets_no_state(slope):
    used, unused, frozen = single([1.0, -1.0]), single([2.0]), single([3.0]).requires_grad_(False)
    optimizer = ConstantALSALS([{"params": [used, unused]}, {"params": [frozen]}], weight_decay=0.5, slope=slope)
    for _ in range(3):
        optimizer.zero_grad()
        (used**2).sum().backward()
        optimizer.step(lambda: (used**2).sum())
    assert set(optimizer.state) == {used}
    assert (unused.item(), frozen.item()) == (2.0, 3.0)
    assert (used.abs() < 1).all()


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("search_interval", [1, 2])
def test_step_without_any_gradient_moves_nothing(slope, search_interval):
    w = single([1.0, -1.0])
    optimizer = ConstantALSALS([w], weight_decay=0.5, slope=slope, search_interval=search_interval)
    for _ in range(2):
        assert optimizer.step(lambda: (w**2).sum()) == 2.0
    assert w.tolist() == [1.0, -1.0]
    assert not optimizer.state


def test_parameter_that_gets_its_first_gradient_later_has_its_own_bias_correction():
    early, late = single([1.0, -3.0]), single([2.0])
    optimizer = ConstantALSALS([early, late], initial_step_size=0.05)
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


def test_it_anneals_when_the_learning_rates_of_all_groups_do():
    net = make_net()
    first, *others = net.parameters()
    optimizer = ALSALS([{"params": [first], "lr": 1.0}, {"params": others, "lr": 0.01}])
    train(net, optimizer, range(4))
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
        assert optimizer.search.is_annealing == is_annealing
        assert (optimizer.step_size == before) == is_annealing


def test_weights_stay_until_a_first_search_has_found_a_step_size():
    net = make_net()
    before = snapshot(net.parameters())
    optimizer = ALSALS(net.parameters())
    for lr in (1.0, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        train(net, optimizer, [0], lambda net, k: 0.0 * net_loss(net, k))
    for p, start in zip(net.parameters(), before, strict=True):
        assert_identical(p.detach(), start)
