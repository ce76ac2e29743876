import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_alsals import LossReplay
from hf_alsals.loss_replay import first_inexact_module


class NoisyModel(nn.Module):
    """Draws from every generator and moves buffers: one in place, one by replacing it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last_batch_mean", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last_batch_mean = x.mean()
        noise = random.random() + np.random.rand() + torch.rand(())
        return (self.layers(x) ** 2).mean() + noise


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


def test_at_least_one_micro_batch_is_probed(model):
    with pytest.raises(ValueError, match=r"probe_micro_batches must be at least 1, got 0\."):
        LossReplay(model, Accelerator(cpu=True), probe_micro_batches=0)


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


def test_the_innermost_module_with_two_answers_to_one_input_is_named(model):
    class OwnNoise(nn.Module):
        generator = torch.Generator().manual_seed(0)

        def forward(self, *, x):
            return {"x": [x + torch.rand(x.shape, generator=self.generator)]}

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = OwnNoise()

        def forward(self, x):
            return self.inner(x=x)["x"][0]

    x = torch.randn(8, 4)
    replay = LossReplay(model, Accelerator(cpu=True))
    replay.record(model, x)
    assert first_inexact_module(model, replay) is None
    model.layers.insert(1, Wrapper())
    assert first_inexact_module(model, replay) == "layers.1.inner (OwnNoise)"
    assert not any(module._forward_hooks for module in model.modules())
