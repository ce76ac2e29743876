import dataclasses
import itertools
import json
import math

import pytest
import torch
from small_problems import ConstantALSALS, assert_identical, single
from torch import nn

from hf_alsals import ALSALS
from hf_alsals.path_slope import SAMPLE_SIZE


@pytest.mark.parametrize(
    ("growth", "direction", "megabytes"),
    [("constant", "adam", 0.0), ("path", "adam", 2 * SAMPLE_SIZE / 1e6), ("path", "nadam", 2 * SAMPLE_SIZE / 1e6)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_search_needs_no_memory_beyond_that_of_adam_and_a_sample_of_the_first_weights(
    tmp_path, dtype, growth, direction, megabytes
):
    """Along Nesterov momentum the gradients stay, so where the weights were takes as much again for the search."""
    p = nn.Parameter(torch.ones(4000, 4000, dtype=dtype))
    starts = p.nbytes if direction == "nadam" else 0
    optimizer = ConstantALSALS([p], lr=0.5, weight_decay=0.1, growth=growth, direction=direction)
    optimizer.search = dataclasses.replace(optimizer.search, is_initialized=True)  # no search in two directions
    optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.ones(p.shape), "exp_avg_sq": torch.ones(p.shape)}
    p.grad = gradient = torch.full_like(p, -0.5)  # uphill, so that any finite loss is accepted
    losses = iter([math.inf, math.inf, 0.5])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step(lambda: next(losses), 1.0)
    assert optimizer.probes == 3
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    in_use = list(itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])))
    assert max(in_use) < starts + megabytes * 1e6 + 12e6  # pieces of a parameter; all of it has 64 or 32 MB
    assert in_use[-1] == pytest.approx(megabytes * 1e6, rel=0.05)
    del gradient  # held until here, for the profile counts what it did not see allocated only sometimes


def test_pieces_of_large_parameters_and_what_cannot_be_cut_move_as_in_adamw_whatever_is_probed():
    torch.manual_seed(0)
    starts = [torch.randn(1100, 500), torch.randn(500, 1100).t(), torch.randn(3), torch.randn(0), torch.randn(64, 64)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    # It probes 0.4, 0.2 and 0.1, the learning rate of AdamW to the bit, and starts from 0.4 again.
    options = {"initial_step_size": 0.4, "decrease_factor": 0.5, "growth_factor": 4.0}
    alsals = ConstantALSALS(ours, weight_decay=0.01, **options)
    adamw = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01, eps=1e-8)
    for _ in range(3):
        for one, other in zip(ours, theirs):
            gradient = torch.randn(one.shape)
            one.grad, other.grad = gradient.clone(), gradient.clone()
        losses = iter([math.nan, math.inf, -1e9])
        alsals.step(lambda losses=losses: next(losses), 1.0)
        assert (alsals.probes, alsals.step_size) == (3, 0.1)
        adamw.step()
    for one, other in zip(ours, theirs):
        assert_identical(one.detach(), other.detach())


@pytest.mark.parametrize("search_interval", [1, 2])
def test_gradients_are_gone_after_a_search_only(search_interval):
    w = single([1.0, -1.0])
    optimizer = ConstantALSALS([w], search_interval=search_interval)
    for searches in (True, search_interval == 1):
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        optimizer.step(lambda: (w**2).sum(), loss)
        assert (w.grad is None) == searches == optimizer.searched


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_a_step_waits_once_for_the_device_and_a_search_once_more_and_once_a_probe(growth):
    class Waits(torch.overrides.TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            reads = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__)
            on_host = {
                id(state[name]) for state in optimizer.state.values() for name in ("step", "path") if name in state
            }
            self.count += function in reads and id(args[0]) not in on_host
            return function(*args, **(kwargs or {}))

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = ALSALS(model.parameters(), growth=growth, search_interval=3)
    x = torch.randn(16, 4)
    searched = []

    def closure():
        return (model(x) - x[:, :1]).square().mean()

    for _ in range(7):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        with Waits() as waits:
            optimizer.set_closure(closure, loss)
            optimizer.set_clip_coef(torch.tensor(0.5))
            optimizer.step()
        # Before the first search of the path it sees whether the closure repeats the loss.
        checks = growth == "path" and not searched
        assert waits.count == 1 + checks + (1 + optimizer.probes if optimizer.searched else 0)
        searched.append(optimizer.searched)
    # The path starts by what the second batch allows too, and the third if the second allows less than the first.
    starts = [True, growth == "path", growth == "path" and optimizer.search.initial_searches == 3]
    assert searched == [*starts, True, False, False, True]
