import contextlib
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from noisy_model import NoisyModel
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_alsals import ALSALS, LossReplay


def generators():
    return random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NoisyModel().train()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_replayed_loss_is_the_training_loss_to_the_bit(model, accumulation):
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    replay = LossReplay(model, accelerator)
    losses = []
    for _ in range(accumulation):
        with accelerator.accumulate(model):
            losses.append(replay.record(model, torch.randn(8, 4)))
    assert replay() == replay() == replay.loss
    torch.testing.assert_close(replay.loss, torch.stack(losses).mean())


def test_the_replayed_loss_is_that_of_the_weights_of_the_moment(model):
    replay = LossReplay(model, Accelerator(cpu=True))
    x = torch.randn(8, 4)
    torch.manual_seed(1)
    replay.record(model, x)
    with torch.no_grad():
        model.layers[-1].weight *= 2
    torch.manual_seed(1)
    assert replay() != replay.loss


def test_generators_and_buffers_are_as_if_there_had_been_no_replay(model):
    replay = LossReplay(model, Accelerator(cpu=True))
    replay.record(model, torch.randn(8, 4))
    before = generators(), {name: buffer.clone() for name, buffer in model.named_buffers()}
    identities = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    replay()
    assert generators() == before[0]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[1][name]), name
        assert buffer.data_ptr() == identities[name], name


def test_generators_and_buffers_are_put_back_when_a_probe_fails(model):
    replay = LossReplay(model, Accelerator(cpu=True))
    x = torch.randn(8, 4)
    replay.record(model, x)
    before = generators(), model.calls.item()
    x.resize_(8, 3)
    with pytest.raises(RuntimeError):
        replay()
    assert (generators(), model.calls.item()) == before


def test_a_record_holds_the_micro_batches_of_one_optimizer_step(model):
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    replay = LossReplay(model, accelerator)
    for step in range(1, 6):
        with accelerator.accumulate(model):
            replay.record(model, torch.randn(8, 4))
        assert len(replay.micro_batches) == 2 - step % 2


@pytest.mark.parametrize("probed", [1, 2, 5])
def test_some_micro_batches_stand_for_all(probed, model):
    accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True)
    replay = LossReplay(model, accelerator, probe_micro_batches=probed)
    losses, calls = [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        with accelerator.accumulate(model):
            losses.append(replay.record(model, torch.randn(8, 4)).item())
    count = min(probed, 3)
    calls.clear()
    assert replay().item() == pytest.approx(sum(losses[:count]) / count)  # the mean of 3 by that of the first
    assert len(calls) == count
    assert replay.loss.item() == pytest.approx(replay().item())


@pytest.mark.parametrize("name", ["probe_micro_batches", "gradient_accumulation_steps"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)])
def test_numbers_of_micro_batches_are_at_least_one(name, value, error, model):
    with pytest.raises(error, match=f"{name} must be an int of at least 1, got {value!r}"):
        LossReplay(model, **{name: value})


def test_an_accelerator_has_its_own_accumulation(model):
    with pytest.raises(ValueError, match="must be left out where there is an accelerator, which has its own, got 2"):
        LossReplay(model, Accelerator(cpu=True), gradient_accumulation_steps=2)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loop_without_accelerate_is_that_with_it_to_the_bit(accumulation):
    runs = []
    for has_accelerator in (True, False):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        model = NoisyModel().train()
        alsals = ALSALS(model.parameters(), search_interval=1)
        accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True) if has_accelerator else None
        if accelerator is None:
            replay = LossReplay(model, gradient_accumulation_steps=accumulation)
        else:
            replay = LossReplay(model, accelerator)
            optimizer = accelerator.prepare(alsals)
        alsals.set_closure(replay)
        seen = []
        for i in range(4 * accumulation):
            x = torch.randn(8, 4)
            if accelerator is not None:
                with accelerator.accumulate(model):
                    accelerator.backward(replay.record(model, x))
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                (replay.record(model, x) / accumulation).backward()
                if i % accumulation == accumulation - 1:
                    assert len(replay.micro_batches) == accumulation
                    alsals.step()
                    alsals.zero_grad()
            seen.append((alsals.step_size, alsals.search.actual_reduction))
        runs.append((seen, [p.detach() for p in model.parameters()], model.calls, generators()))
    assert runs[0][0] == runs[1][0]
    assert alsals.search.total_probes >= 4
    torch.testing.assert_close(runs[0][1:3], runs[1][1:3], rtol=0, atol=0)
    assert runs[0][3] == runs[1][3]


def test_buffers_that_begin_to_move_later_are_left_alone_too(model):
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=True)
    replay = LossReplay(model, accelerator)
    for training in (False, True):
        model.layers[1].train(training)
        with accelerator.accumulate(model):
            replay.record(model, torch.randn(8, 4))
    before = model.layers[1].running_mean.clone()
    assert replay() == replay.loss
    assert torch.equal(model.layers[1].running_mean, before)


def test_without_a_record_there_is_nothing_to_replay(model):
    with pytest.raises(RuntimeError, match=r"no micro-batch to replay.*record\(\)"):
        LossReplay(model, Accelerator(cpu=True))()


def test_no_graph_is_built(model):
    replay = LossReplay(model, Accelerator(cpu=True))
    replay.record(model, torch.randn(8, 4))
    assert not replay().requires_grad
    assert not replay.loss.requires_grad


def test_a_loss_is_taken_for_one_optimizer_step(model):
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    replay = LossReplay(model, accelerator)
    for _ in range(3):
        for _ in range(2):
            with accelerator.accumulate(model):
                replay.record(model, torch.randn(8, 4))
        assert replay.take_loss() == replay.loss == replay()
        with pytest.raises(RuntimeError, match=r"no micro-batch of this optimizer step.*record\(\)"):
            replay.take_loss()
        assert replay.loss == replay()  # who only looks may go on looking


def test_after_clear_there_is_nothing_to_take(model):
    replay = LossReplay(model, Accelerator(cpu=True))
    replay.record(model, torch.randn(8, 4))
    replay.clear()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no micro-batch of this optimizer step"):
            replay.take_loss()
    replay.record(model, torch.randn(8, 4))
    assert replay.take_loss() == replay()


def test_an_optimizer_takes_one_step_with_a_record(model):
    replay = LossReplay(model, Accelerator(cpu=True))
    optimizer = ALSALS(model.parameters())
    optimizer.set_closure(replay)
    for _ in range(2):
        replay.record(model, torch.randn(8, 4)).backward()
        assert optimizer.pending_loss == replay.loss
        optimizer.step()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="no micro-batch of this optimizer step"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_a_probe_runs_in_its_context_and_leaves_it_when_it_fails(model):
    depth, seen = [0], []

    @contextlib.contextmanager
    def context():
        depth[0] += 1
        try:
            yield
        finally:
            depth[0] -= 1

    def loss_of(x):
        seen.append(depth[0])
        return model(x)

    replay = LossReplay(model, Accelerator(cpu=True), probe_context=context)
    x = torch.randn(8, 4)
    replay.record(loss_of, x)
    assert replay() == replay() == replay.loss
    assert (seen, depth) == ([0, 1, 1], [0])
    x.resize_(8, 3)
    with pytest.raises(RuntimeError):
        replay()
    assert (seen, depth) == ([0, 1, 1, 1], [0])


def test_a_state_dict_is_loaded_as_torch_distributed_does_after_the_closure_is_set(model):
    trained, loaded = ALSALS(model.parameters()), ALSALS(model.parameters())
    for optimizer in (trained, loaded):
        replay = LossReplay(model, Accelerator(cpu=True))
        optimizer.set_closure(replay)
        if optimizer is trained:
            replay.record(model, torch.randn(8, 4)).backward()
            optimizer.step()
    set_optimizer_state_dict(model, loaded, get_optimizer_state_dict(model, trained))
    assert loaded.search == trained.search
    for p in model.parameters():
        assert all(torch.equal(value, loaded.state[p][name]) for name, value in trained.state[p].items())


def test_without_accelerate_more_micro_batches_than_a_step_has_are_refused(model):
    replay = LossReplay(model, gradient_accumulation_steps=2)
    for _ in range(2):
        replay.record(model, torch.randn(8, 4))
    with pytest.raises(RuntimeError, match="has 2 micro-batches that no optimizer step was taken with"):
        replay.record(model, torch.randn(8, 4))
    replay.clear()
    replay.record(model, torch.randn(8, 4))


@pytest.mark.parametrize("outside", [False, True])
def test_a_probe_is_in_autocast_if_training_was(outside):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64)
    replay = LossReplay(linear)
    x = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
        loss = replay.record(lambda: linear(x).float().square().mean())
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        assert replay() == loss
    assert loss != linear(x).square().mean() or outside
