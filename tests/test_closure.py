import math
import warnings

import pytest
import torch
from small_problems import (
    ConstantALSALS,
    assert_identical,
    make_net,
    net_loss,
    optimizer_state,
    single,
    snapshot,
)

from hf_alsals import ALSALS


class Replay:
    """A closure that knows the batch of every step by itself, as LossReplay does."""

    closure = loss = None
    is_taken = True

    def record(self, closure, loss):
        self.closure, self.loss, self.is_taken = closure, loss, False

    @property
    def is_ready(self):
        return not self.is_taken

    def take_loss(self):
        if self.is_taken:
            raise RuntimeError("there is no batch of this step")
        self.is_taken = True
        return self.loss

    def clear(self):
        self.is_taken = True

    def __call__(self):
        return self.closure()


def with_gradient(w, gradient=1.0):
    w.grad = torch.full_like(w, gradient)
    return w


def test_all_ways_to_give_it_the_closure_are_the_same_to_the_bit():
    def with_set_closure(optimizer, closure, loss):
        optimizer.set_closure(closure)
        optimizer.step()

    def with_set_closure_and_loss(optimizer, closure, loss):
        optimizer.set_closure(closure, loss)
        optimizer.step()

    def with_set_closure_and_loss_to_step(optimizer, closure, loss):
        optimizer.set_closure(closure)
        optimizer.step(loss=loss)

    def with_replay():
        replay = Replay()

        def step(optimizer, closure, loss):
            if optimizer.pending.closure is None:
                optimizer.set_closure(replay)  # once
            replay.record(closure, loss)
            optimizer.step()

        return step

    def run(step):
        net = make_net(torch.float32)
        optimizer = ConstantALSALS(net.parameters())
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
        with_replay(),
    ):
        assert_identical(run(step), expected)


def test_closure_given_to_step_wins_over_the_one_set_before_and_its_loss():
    w = with_gradient(single([1.0]))
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(lambda: pytest.fail("the closure of an earlier batch was called"), 17.0)
    assert optimizer.step(lambda: w.sum()) == 1.0


def test_loss_given_to_step_wins_over_the_one_set_before():
    w = with_gradient(single([1.0]))
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(lambda: w.sum(), 5.0)
    assert optimizer.step() == optimizer.loss == 5.0
    optimizer.set_closure(lambda: w.sum(), 5.0)
    assert optimizer.step(loss=7.0) == optimizer.loss == 7.0


# ---- a closure that knows the batch of every step ----


def test_a_replay_is_set_once_and_serves_all_steps_with_the_loss_of_each():
    w, replay = single([3.0, -2.0]), Replay()
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(replay)
    for k in range(1, 6):
        optimizer.zero_grad()
        loss = k * (w**2).sum()
        loss.backward()
        calls = []
        replay.record(lambda k=k, calls=calls: calls.append(1) or k * (w**2).sum(), loss)
        assert optimizer.pending_loss is loss
        assert optimizer.step() is loss
        assert replay.is_taken
        assert len(calls) == optimizer.probes  # it is not called for the loss that it knows
        assert optimizer.pending.closure is replay


def test_a_second_step_on_the_batch_of_a_replay_raises_and_moves_nothing():
    w, replay = with_gradient(single([1.0])), Replay()
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(replay)
    replay.record(lambda: w.sum(), 1.0)
    optimizer.step()
    before, search = w.detach().clone(), optimizer.search
    with_gradient(w)
    with pytest.raises(RuntimeError, match="no batch of this step"):
        optimizer.step()
    assert_identical(w.detach(), before)
    assert optimizer.line_search.metrics(optimizer.search) == optimizer.line_search.metrics(search)
    replay.record(lambda: w.sum(), w.sum())  # it is still there for the next one
    optimizer.step()
    assert w.item() < before.item()


def test_a_loss_given_to_step_wins_over_that_of_the_replay_which_counts_as_taken():
    w, replay = with_gradient(single([1.0])), Replay()
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(replay)
    replay.record(lambda: w.sum(), 5.0)
    assert optimizer.step(loss=7.0) == optimizer.loss == 7.0
    assert replay.is_taken


def test_a_closure_given_to_step_with_its_loss_wins_over_the_replay_which_stays():
    w, replay = with_gradient(single([1.0])), Replay()
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(replay)
    replay.record(lambda: pytest.fail("the replay was called"), 17.0)
    assert optimizer.step(lambda: w.sum(), 1.0) == 1.0
    assert not replay.is_taken
    assert optimizer.pending.closure is replay


def test_a_closure_given_to_step_is_called_once_where_there_is_a_replay_which_is_probed():
    w, replay, calls = single([1.0]), Replay(), []
    optimizer = ConstantALSALS([w], initial_step_size=0.5)
    optimizer.set_closure(replay)
    w.grad = torch.ones_like(w)  # of an earlier micro-batch

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = w.sum()
        replay.record(lambda: 3 * w.sum(), 3.0)
        (2 * loss).backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert calls == [True]
    assert optimizer.search.slope == pytest.approx(3.0)
    assert (optimizer.probes, w.item()) == (1, pytest.approx(0.5))


def test_what_a_closure_has_recorded_is_forgotten_if_it_raises():
    w, replay = single([1.0]), Replay()
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(replay)

    def closure():
        replay.record(lambda: w.sum(), 1.0)
        raise KeyError("out of memory")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert replay.is_taken


def test_a_plain_closure_takes_the_place_of_the_replay():
    w, replay = with_gradient(single([1.0])), Replay()
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(replay)
    optimizer.set_closure(lambda: w.sum(), 1.0)
    assert optimizer.pending_loss == 1.0
    optimizer.step()
    assert optimizer.pending_loss is None
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()


# ---- a plain closure ----


@pytest.mark.parametrize("fails", [False, True])
def test_a_plain_closure_serves_one_step_only(fails):
    w = with_gradient(single([1.0]))
    optimizer = ConstantALSALS([w])

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


# ---- calls and the loss ----


@pytest.mark.parametrize("loss_given", [False, True])
@pytest.mark.parametrize("initial_step_size", [1e-3, 10.0])
def test_closure_is_called_once_a_probe_without_autograd(loss_given, initial_step_size):
    w = single([3.0, -2.0])
    optimizer = ConstantALSALS([w], initial_step_size=initial_step_size)
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
    optimizer = ConstantALSALS([w])
    loss = (w**2).sum()
    loss.backward()
    assert optimizer.step(lambda: (w**2).sum(), loss) is loss
    assert optimizer.loss == 13.0
    before = (w**2).sum().item()
    assert optimizer.step(lambda: (w**2).sum()).item() == before
    assert optimizer.loss == before


# ---- clipped gradients ----


def before_the_closure(optimizer, clip_coef):
    if clip_coef is not None:
        optimizer.set_clip_coef(clip_coef)
    optimizer.set_closure(lambda: 0.0, 1.0)
    optimizer.step()


def after_the_closure(optimizer, clip_coef):
    optimizer.set_closure(lambda: 0.0, 1.0)
    if clip_coef is not None:
        optimizer.set_clip_coef(clip_coef)
    optimizer.step()


def with_the_closure_passed_to_step(optimizer, clip_coef):
    if clip_coef is not None:
        optimizer.set_clip_coef(clip_coef)
    optimizer.step(lambda: 0.0, 1.0)


def with_a_replay(optimizer, clip_coef):
    if optimizer.pending.closure is None:
        optimizer.set_closure(Replay())
    optimizer.pending.closure.record(lambda: 0.0, 1.0)
    if clip_coef is not None:
        optimizer.set_clip_coef(clip_coef)
    optimizer.step()


@pytest.mark.parametrize("slope", ["exact", "preconditioned"])
@pytest.mark.parametrize(
    "step_with", [before_the_closure, after_the_closure, with_the_closure_passed_to_step, with_a_replay]
)
def test_a_clip_coef_of_any_kind_counts_for_one_step_only_however_the_closure_comes(slope, step_with):
    w = single([3.0, -2.0])
    optimizer = ConstantALSALS([w], slope=slope)
    for clip_coef in (0.125, None, torch.tensor(0.5), None):
        w.grad = torch.tensor([0.5, -0.25], dtype=torch.float64)
        step_with(optimizer, clip_coef)
        assert optimizer.slope == pytest.approx(0.75 / float(clip_coef or 1.0), rel=1e-6)


def test_a_clip_coef_is_that_of_one_step_even_if_its_closure_raises():
    w = with_gradient(single([1.0]))
    optimizer = ConstantALSALS([w])

    def fail():
        raise ValueError

    optimizer.set_clip_coef(0.25)
    with pytest.raises(ValueError):
        optimizer.step(fail, 1.0)
    with_gradient(w)
    optimizer.step(lambda: 0.0, 1.0)
    assert optimizer.slope == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("clip_coef", "error"), [(0.0, ValueError), (-1.0, ValueError), (math.inf, ValueError), ("half", TypeError)]
)
def test_a_clip_coef_out_of_range_is_named(clip_coef, error):
    with pytest.raises(error, match=f"clip_coef must be a positive number, got {clip_coef!r}"):
        ConstantALSALS([single([1.0])]).set_clip_coef(clip_coef)


# ---- wrong use ----


def test_step_without_closure_raises():
    with pytest.raises(RuntimeError, match="needs a closure"):
        ConstantALSALS([single([1.0])]).step()
    with pytest.raises(RuntimeError, match="needs a closure"):
        ConstantALSALS([{"params": [single([1.0])], "lr": 0.0}, {"params": [single([1.0])]}]).step()


@pytest.mark.parametrize("closure", [1.0, torch.tensor(1.0), "loss"])
def test_closure_that_cannot_be_called_raises(closure):
    optimizer = ConstantALSALS([single([1.0])])
    with pytest.raises(TypeError, match=f"closure must be a function.* {type(closure).__name__}"):
        optimizer.step(closure)
    with pytest.raises(TypeError, match="closure must be a function"):
        optimizer.set_closure(closure)


@pytest.mark.parametrize("loss_given", [False, True])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [(torch.ones(2, 3), ValueError, r"scalar.*\[2, 3\]"), ("1.0", TypeError, "str"), (True, TypeError, "bool")],
)
def test_loss_that_is_no_scalar_raises_and_moves_nothing(loss_given, loss, error, message):
    w = single([1.0, 2.0])
    w.grad = torch.ones_like(w)
    optimizer = ConstantALSALS([w])
    with pytest.raises(error, match=message):
        optimizer.step(lambda: loss, 1.0 if loss_given else None)
    assert w.tolist() == [1.0, 2.0]


def with_backward(optimizer, net, k, set_to_none=True):
    """Return a closure of torch.optim's convention: it zeroes the gradients and computes them anew."""

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = net_loss(net, k)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("wrap", [lambda closure: closure, torch.enable_grad()], ids=["plain", "enable_grad"])
@pytest.mark.parametrize("search_interval", [1, 3])
def test_a_closure_that_computes_the_gradients_as_in_torch_optim_trains_to_the_bit(wrap, search_interval):
    net, other = make_net(), make_net()
    ours = ConstantALSALS(net.parameters(), search_interval=search_interval, initial_step_size=1.0)
    theirs = ConstantALSALS(other.parameters(), search_interval=search_interval, initial_step_size=1.0)
    rejected = 0
    for k in range(12):
        loss = net_loss(net, k)
        ours.zero_grad()
        loss.backward()
        ours.step(lambda k=k: net_loss(net, k), loss)
        theirs.step(wrap(with_backward(theirs, other, k)))
        assert (theirs.loss, theirs.step_size, theirs.probes) == (ours.loss, ours.step_size, ours.probes)
        rejected += max(ours.probes - 1, 0)
    assert rejected > 0
    assert_identical(snapshot(other.parameters()), snapshot(net.parameters()))


@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_closure_that_adds_to_gradients_that_were_there_is_refused_and_moves_nothing(has_gradients):
    net = make_net()
    optimizer = ConstantALSALS(net.parameters())
    before = snapshot(net.parameters())

    @torch.enable_grad()
    def closure():
        loss = net_loss(net, 1)
        loss.backward()
        return loss

    if has_gradients:  # as with micro-batches accumulated before
        net_loss(net, 0).backward()
        with pytest.raises(RuntimeError, match=r"adds to gradients that were there.*zero_grad\(set_to_none=True\)"):
            optimizer.step(closure)
        assert_identical(snapshot(net.parameters()), before)
    else:
        optimizer.step(closure)
        assert optimizer.step_size > 0
        assert not torch.equal(net[0].weight, before[0])


def test_a_closure_that_leaves_a_gradient_of_another_loss_is_refused():
    # As with accumulated micro-batches, each through another branch of the model.
    a, b = single([1.0]), single([2.0])
    optimizer = ConstantALSALS([a, b])
    a.square().sum().backward()

    @torch.enable_grad()
    def closure():
        loss = b.square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="adds to gradients that were there"):
        optimizer.step(closure)
    assert (a.item(), b.item()) == (1.0, 2.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda params: torch.nn.utils.clip_grad_norm_(params, 1e-3),
        lambda params: torch.nn.utils.clip_grad_value_(params, 1e-3),
        lambda params: [setattr(p, "grad", p.grad * 0.5) for p in params],
        lambda params: setattr(params[0], "grad", None),
    ],
    ids=["norm", "value", "replaced", "removed"],
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_closure_whose_gradients_are_changed_after_the_backward_pass_is_refused(change, steps_before):
    net = make_net()
    optimizer = ConstantALSALS(net.parameters())
    for k in range(steps_before):
        optimizer.step(with_backward(optimizer, net, k))
    before = snapshot(net.parameters())

    def closure():
        loss = with_backward(optimizer, net, 5)()
        change([*net.parameters()])
        return loss

    with pytest.raises(RuntimeError, match=r"changed after backward\(\).*set_clip_coef"):
        optimizer.step(closure)
    assert_identical(snapshot(net.parameters()), before)


def test_a_closure_that_returns_nothing_is_told_to_return_the_loss():
    with pytest.raises(TypeError, match="got NoneType: the closure has to return it"):
        ConstantALSALS([with_gradient(single([1.0]))]).step(lambda: None)


def test_an_error_of_the_closures_own_is_not_taken_for_a_backward_pass():
    w = with_gradient(single([1.0]))
    with pytest.raises(RuntimeError, match="out of memory"):
        ConstantALSALS([w]).step(lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))


def test_a_closure_with_backward_beside_a_loss_is_told_so():
    w = single([1.0, 2.0])
    optimizer = ALSALS([w])
    loss = (w**2).sum()
    loss.backward()

    def closure():
        again = (w**2).sum()
        again.backward()
        return again

    with pytest.raises(RuntimeError, match=r"calls backward\(\) though step\(\) was given the loss: leave out one"):
        optimizer.step(closure, loss)
    assert w.tolist() == [1.0, 2.0]


def warnings_of(closure_of, steps=3):
    """Take steps on a net with dropout, with a closure that is made of its loss, and return what was warned of."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
    optimizer = ALSALS(net.parameters())
    x = torch.randn(32, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            closure = closure_of(lambda: (net(x) - x[:, :1]).square().mean(), net)
            loss = closure()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(closure, loss)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_a_closure_with_dropout_is_warned_of():
    message, *_ = warnings_of(lambda loss_of, net: loss_of, steps=1)
    assert "where the loss is" in message and "LossReplay" in message


def test_a_closure_that_repeats_its_loss_is_not_warned_of():
    def without_dropout(loss_of, net):
        net.eval()
        return loss_of

    def with_a_seed(loss_of, net):
        def closure():
            torch.manual_seed(2)
            return loss_of()

        return closure

    assert warnings_of(without_dropout) == warnings_of(with_a_seed) == []


def test_probes_that_are_never_accepted_are_warned_of():
    def closure_of(loss_of, net):
        net.eval()
        calls = []

        def closure():
            calls.append(None)
            return loss_of() if len(calls) <= 2 else loss_of() * math.nan  # the first two are at the start

        return closure

    messages = warnings_of(closure_of, steps=12)
    assert any("no step size met the condition in 10 searches in a row" in message for message in messages)
    assert len(messages) <= 2
