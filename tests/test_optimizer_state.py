import copy
import math
import pickle

import pytest
import torch
from small_problems import (
    METHODS,
    ConstantALSALS,
    assert_identical,
    make_net,
    optimizer_state,
    single,
    snapshot,
    through_torch_save,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_alsals import ALSALS, PRESETS


def assert_continues_identically(net, optimizer, other_net, other, first, steps=12):
    assert other is not optimizer
    assert all(p is not q for p, q in zip(net.parameters(), other_net.parameters()))
    steps = range(first, first + steps)
    assert train(other_net, other, steps) == train(net, optimizer, steps)
    assert_identical(snapshot(other_net.parameters()), snapshot(net.parameters()))
    assert_identical(optimizer_state(other), optimizer_state(optimizer))


def make_grouped(dtype, **arguments):
    net = make_net(dtype)
    groups = [
        {"params": [p for p in net.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.ndim == 1], "lr": 0.7},
    ]
    return net, ConstantALSALS(groups, **arguments)


def resume(net, optimizer, dtype, arguments):
    other_net, other = make_grouped(dtype, **arguments)
    other_net.load_state_dict(through_torch_save(net.state_dict()))
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    return other_net, other


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_after", [0, 17])
def test_resumed_training_continues_bit_for_bit(name, dtype, saved_after):
    net, optimizer = make_grouped(dtype, **METHODS[name])
    train(net, optimizer, range(saved_after))
    other_net, other = resume(net, optimizer, dtype, METHODS[name])
    assert_continues_identically(net, optimizer, other_net, other, saved_after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_adaptive_cadence_continues_in_its_middle(dtype):
    # The large first step size leaves the slow average above the fast one: they soon cross, and searches get rare.
    arguments = PRESETS["salsa"] | {"initial_step_size": 3.0}
    net, optimizer = make_grouped(dtype, **arguments)
    k = 0
    while optimizer.search.interval.steps_left < 2:
        train(net, optimizer, [k])
        k += 1
        assert k < 300
    other_net, other = resume(net, optimizer, dtype, arguments)
    assert not other.line_search.interval.is_due(other.search.interval)
    assert_continues_identically(net, optimizer, other_net, other, k, steps=20)


def test_state_of_a_parameter_without_gradient_resumes():
    used, unused = single([1.0, -2.0], torch.bfloat16), single([1.0], torch.bfloat16)
    optimizer = ConstantALSALS([unused, used])
    train(None, optimizer, range(5), lambda net, k: (used**2).sum())
    copies = [nn.Parameter(p.detach().clone()) for p in (unused, used)]
    resumed = ConstantALSALS(copies)
    resumed.load_state_dict(through_torch_save(optimizer.state_dict()))
    assert set(resumed.state) == {copies[1]}
    expected = train(None, optimizer, range(10), lambda net, k: (used**2).sum() + unused.sum() ** 2)
    assert train(None, resumed, range(10), lambda net, k: (copies[1] ** 2).sum() + copies[0].sum() ** 2) == expected


def test_the_first_weights_are_kept_in_bfloat16_and_resumed():
    net = make_net(torch.float32)
    before = snapshot(net.parameters())
    optimizer = ALSALS(net.parameters())
    train(net, optimizer, range(3))
    resumed = ALSALS(net.parameters())
    resumed.load_state_dict(optimizer_state(optimizer))
    for p, start in zip(net.parameters(), before, strict=True):
        assert_identical(optimizer.state[p]["initial"], start.bfloat16())
        assert_identical(resumed.state[p]["initial"], start.bfloat16())


def reloaded(optimizer):
    other = ConstantALSALS(optimizer.param_groups[0]["params"])
    other.load_state_dict(optimizer.state_dict())
    return other


@pytest.mark.parametrize("resume", [reloaded, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_resumed_or_copied_optimizer_goes_on_counting_skipped_steps(resume):
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ConstantALSALS([w])
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
    optimizer = ConstantALSALS([w], lr=0.0)
    assert optimizer.step() is None
    assert w.tolist() == [1.0, 2.0]
    assert set(optimizer.state[w]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.search == optimizer.line_search.init()


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_a_fresh_state_dict_has_all_the_numbers_of_a_later_one(growth):
    # torch.distributed.checkpoint fills what is there, and drops the rest.
    net = make_net()
    optimizer = ConstantALSALS(net.parameters(), growth=growth)
    fresh = set(optimizer.state_dict()["param_groups"][0])
    train(net, optimizer, range(3))
    assert set(optimizer.state_dict()["param_groups"][0]) == fresh


# ---- copies ----


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_copy_continues_bit_for_bit(copied, dtype, name):
    net, optimizer = make_grouped(dtype, **METHODS[name])
    train(net, optimizer, range(17))
    other_net, other = copied((net, optimizer))
    assert (other.loss, other.slope, other.actual_reduction, other.probes, other.searched) == (
        optimizer.loss,
        optimizer.slope,
        optimizer.actual_reduction,
        optimizer.probes,
        optimizer.searched,
    )
    assert_continues_identically(net, optimizer, other_net, other, 17)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copy_has_no_closure(copied):
    w = single([1.0])
    w.grad = torch.ones_like(w)
    optimizer = ConstantALSALS([w])
    optimizer.set_closure(lambda: w.sum())
    with pytest.raises(RuntimeError, match="closure"):
        copied(optimizer).step()
    assert optimizer.step() == 1.0


def test_an_optimizer_can_be_built_from_the_groups_of_another():
    w = single([1.0])
    optimizer = ConstantALSALS([w], lr=0.5)
    optimizer.state_dict()
    assert ConstantALSALS(optimizer.param_groups).param_groups[0]["lr"] == 0.5


# ---- states that are refused ----


def test_loading_the_state_of_another_optimizer_raises():
    w = single([1.0])
    w.grad = torch.ones_like(w)
    adamw = torch.optim.AdamW([w])
    adamw.step()
    with pytest.raises(ValueError, match="state_dict must be that of an ALSALS optimizer"):
        ConstantALSALS([w]).load_state_dict(adamw.state_dict())


def test_loading_the_state_of_an_earlier_version_raises():
    state_dict = ALSALS([single([1.0])]).state_dict()
    del state_dict["param_groups"][0]["search_growth_log_size"]
    with pytest.raises(ValueError, match="of this version of hf_alsals, got one without search_growth_log_size"):
        ALSALS([single([1.0])]).load_state_dict(state_dict)


def test_loading_the_state_of_other_parameter_groups_raises():
    with pytest.raises(ValueError):
        ConstantALSALS([single([1.0])]).load_state_dict(ConstantALSALS([single([1.0]), single([2.0])]).state_dict())


@pytest.mark.parametrize(("made", "loaded"), [("path", "constant"), ("constant", "path")])
def test_a_state_of_the_other_growth_is_refused_by_name(made, loaded):
    net = make_net()
    optimizer = ALSALS(net.parameters(), growth=made)
    train(net, optimizer, range(2))
    with pytest.raises(ValueError, match=f"growth must be '{made}', as in the state_dict, got '{loaded}'"):
        ALSALS(net.parameters(), growth=loaded).load_state_dict(optimizer_state(optimizer))


def test_a_pre_hook_that_changes_the_state_dict_changes_what_is_loaded_of_the_search():
    net = make_net()
    optimizer = ALSALS(net.parameters())
    train(net, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())

    def halve(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for group in state_dict["param_groups"]:
            group["search_step_size"] *= 0.5
        return state_dict

    other = ALSALS(make_net().parameters())
    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(saved)
    assert other.step_size == 0.5 * optimizer.step_size
    assert other.param_groups[0]["search_step_size"] == other.step_size
    other.load_state_dict(saved)  # and the check of the first call is gone
    assert other.step_size == 0.5 * optimizer.step_size


@pytest.mark.parametrize("missing", ["skipped_steps", "consecutive_skips", "search_taken", "search_direction"])
def test_a_state_dict_that_lacks_something_is_refused_and_nothing_of_it_is_loaded(missing):
    net = make_net()
    optimizer = ALSALS(net.parameters())
    train(net, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group[missing]
    other_net = make_net()
    other = ALSALS(other_net.parameters())
    before = optimizer_state(other)
    with pytest.raises(ValueError, match=f"of this version of hf_alsals, got one without {missing}"):
        other.load_state_dict(saved)
    assert_identical(optimizer_state(other), before)
    assert not other.state


def test_a_count_of_steps_that_is_a_number_is_loaded_as_torch_optim_loads_it():
    net = make_net()
    optimizer = ALSALS(net.parameters())
    train(net, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    other_net = copy.deepcopy(net)
    other = ALSALS(other_net.parameters())
    other.load_state_dict(saved)
    assert_continues_identically(net, optimizer, other_net, other, 3)
