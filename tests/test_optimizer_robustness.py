import dataclasses
import math
import warnings

import pytest
import torch
from small_problems import (
    METHODS,
    SLOPES,
    ConstantALSALS,
    assert_identical,
    make_net,
    net_loss,
    optimizer_state,
    single,
    snapshot,
    train,
)

from hf_alsals import ALSALS, PRESETS

# ---- non-finite numbers ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "closure", "gradient"])
@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize("search_interval", [1, 2, 3])
def test_non_finite_start_skips_the_step_and_touches_nothing(value, where, steps_before, search_interval):
    net = make_net(torch.float32)
    optimizer = ConstantALSALS(net.parameters(), weight_decay=0.1, search_interval=search_interval)
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
        group.update(skipped_steps=1, consecutive_skips=1, peak_lr=1.0)
        group.update(search_searched=False, search_probes=0, search_nonfinite_probes=0)
    assert_identical(optimizer_state(optimizer), state)


def test_ten_non_finite_steps_in_a_row_raise():
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ConstantALSALS([w])
    for _ in range(9):
        optimizer.step(lambda: math.nan)
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        optimizer.step(lambda: math.inf)
    assert optimizer.skipped_steps == 10
    assert w.item() == 1.0


def test_good_step_resets_the_count_of_skips_in_a_row():
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ConstantALSALS([w])
    for _ in range(3):
        w.grad = torch.ones_like(w)
        for _ in range(9):
            optimizer.step(lambda: math.nan)
        optimizer.step(lambda: w.sum())
    assert optimizer.skipped_steps == 27
    assert w.item() < 1.0


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_gradients_whose_norm_is_not_finite_are_skipped(growth):
    w = single([1.0, 2.0])
    optimizer = ConstantALSALS([w], growth=growth)
    for step in range(3):
        before = w.detach().clone()
        loss = w.square().sum()
        w.grad = None
        loss.backward()
        clip_coef = 0.0 if step == 1 else 1.0  # max_norm / infinity
        w.grad *= clip_coef
        optimizer.set_clip_coef(torch.tensor(clip_coef))
        optimizer.step(lambda: w.square().sum(), loss)
        assert torch.equal(w, before) == (step == 1)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("search_interval", [1, "adaptive"])
def test_non_finite_probe_is_rejected_and_training_goes_on(slope, search_interval):
    w = single([3.0, 2.5])
    optimizer = ConstantALSALS([w], slope=slope, search_interval=search_interval, initial_step_size=10.0)

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
    optimizer = ConstantALSALS([w], slope="finite_difference", initial_step_size=0.05)

    def loss_of(net, k):
        return (w**2).sum()

    train(None, optimizer, range(3), loss_of)
    losses = iter([value])
    optimizer.zero_grad()
    loss = loss_of(None, 3)
    loss.backward()
    optimizer.step(lambda: next(losses, loss_of(None, 3)), loss)
    assert math.isfinite(optimizer.search.acceptance.slope)
    train(None, optimizer, range(100), loss_of)
    assert loss_of(None, 0) < 1.0


def test_batch_on_which_no_probe_is_finite_moves_nothing():
    w = single([3.0, -2.0])
    optimizer = ConstantALSALS([w])
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
    optimizer = ConstantALSALS(net.parameters(), weight_decay=0.1, slope=slope, initial_step_size=10.0)
    optimizer.zero_grad()
    net_loss(net, 0).backward()
    before, search, calls = snapshot(net.parameters()), optimizer.search, 0

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
    assert optimizer.search == search
    # The first call is for the loss at the start; from the first probe on the gradients' memory holds the start point.
    assert [p.grad is None for p in net.parameters()] == [failing_call > 0] * len(before)

    optimizer.zero_grad()
    net_loss(net, 0).backward()
    optimizer.step(closure)
    assert net_loss(net, 0) < net_loss(net, 0, dict(zip(dict(net.named_parameters()), before)))


def test_a_step_that_fails_in_a_probe_leaves_the_followed_step_size_where_it_was():
    net = make_net()
    optimizer = ALSALS(net.parameters(), search_interval=1)
    train(net, optimizer, range(5))
    # Nothing but that this step has not searched.
    before = dataclasses.replace(optimizer.search, searched=False, probes=0)

    def fail():
        raise KeyboardInterrupt

    loss = net_loss(net, 5)
    loss.backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail, loss)
    assert optimizer.search == before


# ---- degenerate problems ----


@pytest.mark.parametrize("name", PRESETS)
def test_zero_gradients_move_nothing(name):
    w = single([3.0, -2.0], torch.float32)
    optimizer = ConstantALSALS([w], **PRESETS[name])
    train(None, optimizer, range(30), lambda net, k: (w * 0).sum() + 1)
    assert w.tolist() == [3.0, -2.0]
    assert optimizer.slope == optimizer.actual_reduction == 0.0
    assert optimizer.search.total_probes <= 30


@pytest.mark.parametrize("name", PRESETS)
def test_a_long_stretch_of_zero_gradients_leaves_the_step_size_alone(name):
    w = single([3.0, -2.0])
    optimizer = ConstantALSALS([w], **PRESETS[name])
    for _ in range(2000):
        w.grad = torch.zeros_like(w)
        optimizer.step(lambda: 0.0, 0.0)
    assert optimizer.step_size == 0.1
    train(None, optimizer, range(100), lambda net, k: (w**2).sum())
    assert (w**2).sum() < 10.0  # from 13


@pytest.mark.parametrize("name", PRESETS)
def test_zero_loss_moves_nothing(name):
    w = single([0.0, 0.0], torch.float32)
    optimizer = ConstantALSALS([w], **PRESETS[name])
    train(None, optimizer, range(30), lambda net, k: (w**2).sum())
    assert w.tolist() == [0.0, 0.0]
    assert optimizer.loss == 0.0
    assert math.isfinite(optimizer.step_size)


@pytest.mark.parametrize("name", METHODS)
def test_training_past_the_minimum_stays_finite(name):
    w = single([3.0, -2.0], torch.float32)
    optimizer = ConstantALSALS([w], **METHODS[name])
    history = train(None, optimizer, range(300), lambda net, k: (w**2).sum())
    assert w.isfinite().all()
    assert all(math.isfinite(step_size) and step_size > 0 for step_size, _ in history)
    assert history[-1][1] < 0.1


@pytest.mark.parametrize("c", [0.3, 0.7])
def test_uphill_momentum_may_raise_the_loss_by_one_over_c_of_the_prediction(c):
    w = single([3.0, -2.0])
    optimizer = ConstantALSALS([w], c=c, beta3=0.0, initial_step_size=0.01)
    train(None, optimizer, range(20), lambda net, k: (w**2).sum())
    before = (w**2).sum().item()
    train(None, optimizer, [20], lambda net, k: -(w**2).sum())
    decrease = (w**2).sum().item() - before
    assert optimizer.slope < 0
    assert optimizer.actual_reduction == pytest.approx(decrease)
    assert 0 > decrease >= optimizer.step_size * optimizer.slope / c


WITH_ADAM = METHODS | {"alsals, adam": {"growth": "path", "direction": "adam"}}


@pytest.mark.parametrize("name", WITH_ADAM)
@pytest.mark.parametrize("period", [2, 7])
def test_loss_that_keeps_changing_its_sign_stays_finite(name, period):
    net = make_net(torch.float32)
    settings = {"search_interval": 1} | WITH_ADAM[name]  # on both sides of a change
    optimizer = ConstantALSALS(net.parameters(), **settings)
    slopes = []
    for k in range(60):
        sign = 1 if (k // period) % 2 == 0 else -1
        train(net, optimizer, [k], lambda net, k, sign=sign: sign * net_loss(net, k).tanh())
        slopes.append(optimizer.slope)
        assert optimizer.probes <= 100
    assert all(
        math.isfinite(value) for value in (*slopes, *optimizer.line_search.state_dict(optimizer.search).values())
    )
    assert all(p.isfinite().all() for p in net.parameters())
    assert optimizer.skipped_steps == 0
    turns_with_it = ("alsals", "alsals_muon")  # Nesterov momentum
    if settings.get("slope") != "preconditioned" and name not in turns_with_it:
        assert min(slopes) < 0 < max(slopes)


def test_gradients_in_one_memory_swap_no_weights():
    a, b = single([1.0]), single([5.0])

    def closure():
        return (a + b).pow(2).sum()

    c, d = single([1.0]), single([5.0])
    optimizer, other = ConstantALSALS([a, b], search_interval=1), ConstantALSALS([c, d], search_interval=1)
    for _ in range(3):
        loss = closure()
        a.grad, b.grad = torch.autograd.grad(loss, (a, b))
        assert a.grad.data_ptr() == b.grad.data_ptr()
        optimizer.step(closure, loss)
        other_loss = (c + d).pow(2).sum()
        other.zero_grad()
        other_loss.backward()
        c.grad, d.grad = c.grad.clone(), d.grad.clone()
        other.step(lambda: (c + d).pow(2).sum(), other_loss)
    assert_identical([a.detach(), b.detach()], [c.detach(), d.detach()])
    assert optimizer.step_size == other.step_size


def test_an_expanded_gradient_is_taken_as_its_copy():
    w, other = single([1.0, 2.0, 3.0]), single([1.0, 2.0, 3.0])
    for p, copied in ((w, False), (other, True)):
        optimizer = ConstantALSALS([p])
        (gradient,) = torch.autograd.grad(p.sum(), p)
        assert gradient.stride() == (0,)
        p.grad = gradient.clone() if copied else gradient
        optimizer.step(lambda p=p: p.sum(), p.detach().sum())
    assert_identical(w.detach(), other.detach())
    assert not torch.equal(w.detach(), torch.tensor([1.0, 2.0, 3.0], dtype=w.dtype))


def test_a_compiled_step_is_the_step_itself():
    net, other = make_net(), make_net()
    optimizer = ConstantALSALS(net.parameters())
    compiled = torch.compile(optimizer.step, backend="eager")
    for k in range(3):
        loss = net_loss(net, k)
        optimizer.zero_grad()
        loss.backward()
        compiled(lambda k=k: net_loss(net, k), loss)
    train(other, ConstantALSALS(other.parameters()), range(3))
    assert_identical(snapshot(net.parameters()), snapshot(other.parameters()))


def test_a_learning_rate_that_is_a_tensor_is_that_number():
    net, other = make_net(), make_net()
    optimizer = ConstantALSALS(net.parameters(), lr=torch.tensor(0.5))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)  # as capturable schedules set it
    reference = ConstantALSALS(other.parameters(), lr=0.25)
    train(net, optimizer, range(4))
    train(other, reference, range(4))
    assert_identical(snapshot(net.parameters()), snapshot(other.parameters()))


@pytest.mark.parametrize("search_interval", [1, 100])
@pytest.mark.parametrize("lr", [float("nan"), float("inf"), torch.tensor(float("nan")), -0.1], ids=str)
def test_a_learning_rate_that_is_negative_or_not_finite_midway_is_refused_and_moves_nothing(lr, search_interval):
    net = make_net()
    groups = [{"params": [net[0].weight]}, {"params": list(net.parameters())[1:]}]
    optimizer = ConstantALSALS(groups, search_interval=search_interval)
    train(net, optimizer, range(2))
    optimizer.param_groups[1]["lr"] = lr
    before = snapshot(net.parameters())
    with pytest.raises(ValueError, match=r"lr must be finite and at least 0 in every step, got (nan|inf|-0\.1): look"):
        train(net, optimizer, range(1))
    assert_identical(snapshot(net.parameters()), before)


def hidden(net, k):
    """Return a surrogate loss: its gradient is that of the loss, its value is 1 everywhere."""
    loss = net_loss(net, k)
    return torch.exp(loss - loss.detach())


@pytest.mark.parametrize("arguments", [{}, {"search_interval": "never"}])
def test_a_loss_whose_value_hides_its_gradient_is_trained_on_without_probes(arguments):
    net = make_net()
    optimizer = ALSALS(net.parameters(), **arguments)
    first = net_loss(net, 0).item()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = train(net, optimizer, range(200), hidden)
    said = [str(one.message) for one in caught if "does not show its gradient" in str(one.message)]
    assert len(said) == (0 if arguments else 1)
    assert optimizer.search.total_probes == (0 if arguments else 30)
    assert history[0][0] == pytest.approx(1e-4)
    assert net_loss(net, 0).item() < 0.2 * first
    assert set(optimizer.line_search.metrics(optimizer.search)) == {"path_slope"}


def test_a_loss_whose_value_shows_its_gradient_is_not_taken_for_one_that_hides_it():
    for scale in (1e-6, 1.0, 1e6):
        net = make_net()
        optimizer = ALSALS(net.parameters())
        train(net, optimizer, range(3), lambda net, k, scale=scale: scale * net_loss(net, k))
        assert not optimizer.search.is_blind
        assert optimizer.search.is_initialized


def test_parameters_that_share_memory_are_refused_and_stay():
    base = torch.arange(4.0, dtype=torch.float64)
    a, b = torch.nn.Parameter(base[:3]), torch.nn.Parameter(base[1:])
    optimizer = ConstantALSALS([a, b])

    def closure():
        return a.pow(2).sum() + b.pow(2).sum()

    loss = closure()
    loss.backward()
    with pytest.raises(ValueError, match="Parameters must not share memory"):
        optimizer.step(closure, loss)
    assert_identical(base, torch.arange(4.0, dtype=torch.float64))


def test_parameters_side_by_side_in_one_memory_are_taken():
    base = torch.arange(4.0, dtype=torch.float64)
    a, b = torch.nn.Parameter(base[:2]), torch.nn.Parameter(base[2:])
    loss = a.pow(2).sum() + b.pow(2).sum()
    loss.backward()
    ConstantALSALS([a, b]).step(lambda: a.pow(2).sum() + b.pow(2).sum(), loss)
    assert not torch.equal(base, torch.arange(4.0, dtype=torch.float64))
