import functools
import math

import pytest
import torch
from small_problems import (
    SLOPES,
    adam_direction_of,
    assert_identical,
    flat,
    flat_net_loss,
    make_net,
    net_loss,
    parameter_group,
    single,
    snapshot,
)
from torch import nn

from hf_alsals.adam import AdamDirection
from hf_alsals.closure import check_loss
from hf_alsals.line import Line

SLOPE_TOLERANCES = [("exact", 1e-10), ("preconditioned", 1e-10), ("finite_difference", 1e-5)]


def squares(w):
    """Return the loss `sum w^2`, whose first Adam step is along the sign of w."""
    return lambda: (w**2).sum()


def line_of(w, closure=None, slope="exact", **settings):
    """Return the line of the first Adam step on the sum of squares of `w`."""
    w.grad = 2 * w.detach()
    direction = AdamDirection([parameter_group([w], eps=0.0, **settings)], {w: {}})
    direction.update()
    return Line(direction, closure or squares(w), (w**2).sum().item(), slope=slope)


# ---- slope ----


@pytest.mark.parametrize(("slope", "relative_tolerance"), SLOPE_TOLERANCES)
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("probed_first", [False, True])
@torch.no_grad()
def test_the_slope_is_the_derivative_of_the_unclipped_loss_along_the_direction(
    slope, relative_tolerance, max_norm, probed_first
):
    net = make_net()
    params = list(net.parameters())
    state = {p: {} for p in params}
    gradients = []
    for k in range(6):
        net.zero_grad()
        with torch.enable_grad():
            loss = net_loss(net, k)
        loss.backward()
        w, gradient = flat(params), flat(p.grad for p in params)
        clip_coef = 1.0
        if max_norm is not None:
            clip_coef = min(1.0, max_norm / (nn.utils.clip_grad_norm_(params, max_norm).item() + 1e-6))
            assert clip_coef < 0.5
        gradients.append(flat(p.grad for p in params))
        direction = AdamDirection([parameter_group(params)], state)
        direction.update()
        line = Line(direction, lambda k=k: net_loss(net, k), loss.item(), clip_coef, slope)
        if probed_first:
            line.probe(0.3)
        if slope == "preconditioned":
            expected = (gradient * adam_direction_of(gradients, beta1=0.0)).sum().item()
        else:
            f = functools.partial(flat_net_loss(net), k=k)
            expected = torch.autograd.functional.jvp(f, w, adam_direction_of(gradients))[1].item()
        assert line.slope == pytest.approx(expected, rel=relative_tolerance)
        line.move(0.01)


@pytest.mark.parametrize(
    ("dtypes", "step_size"),
    [
        ([torch.float64], 2**-26),
        ([torch.float32, torch.float64], 2**-11.5),
        ([torch.float64, torch.bfloat16], 2**-3.5),
    ],
)
@torch.no_grad()
def test_a_finite_difference_steps_as_far_as_the_coarsest_dtype_needs(dtypes, step_size):
    params, probed = [single([1.0], dtype) for dtype in dtypes], []

    def closure():
        probed.append(fine.item())
        return sum(p.double().sum() for p in params)

    fine = params[dtypes.index(torch.float64)]
    for p in params:
        p.grad = torch.ones_like(p)
    direction = AdamDirection([parameter_group(params)], {p: {} for p in params})
    direction.update()
    line = Line(direction, closure, float(len(params)), slope="finite_difference")
    assert line.slope == pytest.approx(len(params), rel=0.1)
    assert probed == pytest.approx([1.0 - step_size], rel=1e-7)


@pytest.mark.parametrize("slope", ["exact", "preconditioned"])
@torch.no_grad()
def test_a_slope_from_gradients_costs_no_probe_and_leaves_them_alone(slope):
    w = single([3.0, -2.0])
    line = line_of(w, lambda: pytest.fail("the closure was called"), slope)
    assert line.slope == pytest.approx(10.0)
    assert torch.equal(w.grad, 2 * w)
    assert w.tolist() == [3.0, -2.0]


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("asked_first", [True, False])
@torch.no_grad()
def test_the_slope_is_measured_once(slope, asked_first, monkeypatch):
    w, calls = single([3.0, -2.0]), []
    line = line_of(w, lambda: calls.append("probe") or (w**2).sum(), slope)
    measure = line.direction.slope
    monkeypatch.setattr(line.direction, "slope", lambda **how: calls.append("slope") or measure(**how))
    first = line.slope if asked_first else None
    for step_size in (1.0, 0.5):
        line.probe(step_size)
    assert line.slope == pytest.approx(10.0, rel=1e-6)
    assert first in (line.slope, None)
    expected = ["probe"] * 3 if slope == "finite_difference" else ["probe", "probe", "slope"]
    assert sorted(calls) == expected


# ---- probes and moves ----


@pytest.mark.parametrize("as_number", [False, True])
@torch.no_grad()
def test_a_probe_is_the_loss_along_the_direction_without_learning_rate_and_weight_decay(as_number):
    w = single([3.0, -2.0])
    closure = (lambda: (w**2).sum().item()) if as_number else squares(w)
    line = line_of(w, closure, lr=0.3, weight_decay=0.2)
    for step_size in (4.0, 1.0, 0.25, 0.0):
        number = line.probe(step_size)
        assert type(number) is float
        assert number == pytest.approx((3.0 - step_size) ** 2 + (2.0 - step_size) ** 2)
        assert w.tolist() == pytest.approx([3.0 - step_size, -2.0 + step_size])
    assert w.grad is None  # its memory holds the start


@pytest.mark.parametrize("probes", [0, 2])
@torch.no_grad()
def test_a_step_is_taken_from_the_start_with_learning_rate_and_weight_decay(probes):
    w = single([3.0, -2.0])
    with line_of(w, lr=0.5, weight_decay=0.2) as line:
        for _ in range(probes):
            line.probe(2.0)
        line.move(0.4)
    expected = [3.0 * (1 - 0.2 * 0.2) - 0.2, -2.0 * (1 - 0.2 * 0.2) + 0.2]
    assert w.tolist() == pytest.approx(expected)
    assert (w.grad is None) == (probes > 0)


@torch.no_grad()
def test_a_start_that_was_saved_before_is_kept_and_so_are_the_gradients():
    w = single([3.0, -2.0])
    line = line_of(w)
    line.direction.save(keep_grads=True)
    w += 10.0  # moved by others since
    assert line.probe(1.0) == pytest.approx(5.0)
    assert torch.equal(w.grad, torch.tensor([6.0, -4.0], dtype=torch.float64))
    assert line.slope == pytest.approx(10.0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("probes", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slope", SLOPES)
@torch.no_grad()
def test_whatever_raises_the_parameters_are_put_back_to_the_bit(error, probes, dtype, slope):
    net = make_net(dtype)
    params = list(net.parameters())
    with torch.enable_grad():
        net_loss(net, 0).backward()
    before = snapshot(params)
    direction = AdamDirection([parameter_group(params)], {p: {} for p in params})
    direction.update()
    with (
        pytest.raises(error, match="out of luck"),
        Line(direction, lambda: net_loss(net, 0), net_loss(net, 0).item(), slope=slope) as line,
    ):
        for k in range(probes):
            line.probe(10.0 * (k + 1))
        raise error("out of luck")
    assert_identical(snapshot(params), before)


@torch.no_grad()
def test_a_closure_that_raises_leaves_the_parameters_where_they_were():
    w = single([3.0, -2.0])
    calls = []

    def closure():
        calls.append(w.tolist())
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return (w**2).sum()

    with pytest.raises(RuntimeError, match="out of memory"), line_of(w, closure) as line:
        line.probe(1.0)
        line.probe(0.5)
    assert calls[0] != calls[1] != [3.0, -2.0]
    assert w.tolist() == [3.0, -2.0]


@torch.no_grad()
def test_where_nothing_raises_the_parameters_stay_where_they_were_moved():
    w = single([3.0, -2.0])
    with line_of(w) as line:
        line.probe(1.0)
    assert w.tolist() == pytest.approx([2.0, -1.0])


def test_an_autocast_around_a_probe_does_not_hide_the_move_from_it():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 1), torch.randn(64, 8)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    losses = {}
    for around in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            model.zero_grad()
            loss = closure()
            loss.backward()
            params = list(model.parameters())
            direction = AdamDirection([parameter_group(params)], {p: {} for p in params})
            direction.update()
            with torch.no_grad():
                line = Line(direction, closure, loss.item())
                losses[around] = [line.probe(step_size) for step_size in (0.1, 1.0, 0.0)]
    assert losses[True] == losses[False]
    assert len(set(losses[True])) == 3
    assert losses[True][-1] == loss.item()


# ---- the loss ----

NO_LOSSES = [
    (torch.ones(2, 3), ValueError, r"scalar.*\[2, 3\]"),
    (torch.ones(0), ValueError, r"scalar.*\[0\]"),
    ("1.0", TypeError, "str"),
    (True, TypeError, "bool"),
    (None, TypeError, "NoneType"),
    (1j, TypeError, "complex"),
    (torch.tensor(1j), TypeError, "The loss must be real, got a tensor of torch.complex64"),
]


@pytest.mark.parametrize(("loss", "error", "message"), NO_LOSSES)
def test_a_loss_that_is_no_scalar_is_refused(loss, error, message):
    with pytest.raises(error, match=message):
        check_loss(loss)
    w = single([3.0, -2.0])
    with pytest.raises(error, match=message), torch.no_grad(), line_of(w, lambda: loss) as line:
        line.probe(1.0)
    assert w.tolist() == [3.0, -2.0]


@pytest.mark.parametrize(
    "loss", [0, 1.5, math.nan, torch.tensor(2.0), torch.ones(1, 1), torch.tensor(1).to(torch.half)]
)
@torch.no_grad()
def test_a_scalar_of_any_kind_is_a_loss(loss):
    number = line_of(single([3.0, -2.0]), lambda: loss).probe(1.0)
    assert number == pytest.approx(float(loss), nan_ok=True)
