import pytest
import torch
from accelerate import Accelerator
from noisy_model import NoisyModel
from torch import nn

from hf_alsals import LossReplay
from hf_alsals.inexact_module import first_inexact_module


class OwnNoise(nn.Module):
    """Draws from a generator that no replay knows; takes and gives its tensors in containers."""

    generator = torch.Generator().manual_seed(0)

    def forward(self, *, x):
        return {"x": [x + torch.rand(x.shape, generator=self.generator)]}


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OwnNoise()

    def forward(self, x):
        return self.inner(x=x)["x"][0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NoisyModel().train()


def recorded(model):
    replay = LossReplay(model, Accelerator(cpu=True))
    replay.record(model, torch.randn(8, 4))
    return replay


def test_the_innermost_module_with_two_answers_to_one_input_is_named(model):
    replay = recorded(model)
    assert first_inexact_module(model, replay) is None
    model.layers.insert(1, Wrapper())
    assert first_inexact_module(model, replay) == "layers.1.inner (OwnNoise)"
    assert not any(module._forward_hooks for module in model.modules())


def test_modules_that_only_pass_on_a_difference_are_not_named(model):
    model.layers.insert(1, Wrapper())
    model.layers.insert(3, Wrapper())  # its own input differs already
    assert first_inexact_module(model, recorded(model)) == "layers.1.inner (OwnNoise)"


def test_hooks_are_removed_when_the_closure_fails(model):
    replay = recorded(model)
    model.layers.append(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        first_inexact_module(model, replay)
    assert not any(module._forward_hooks for module in model.modules())
