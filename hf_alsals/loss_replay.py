"""The loss of one optimizer step's micro-batches, again, exactly: what a probe of the line search measures."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn


class RandomState:
    """The random number generators of Python, NumPy and torch as they stand now, on the CPU and the model's devices.

    Args:
        model (`nn.Module`): The model whose devices count.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._devices = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Set every generator back to this state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


@dataclass
class MicroBatch:
    """One micro-batch of an optimizer step.

    Args:
        compute_loss (`Callable[[], Tensor]`): Computes its loss anew, at the weights as they are then.
        random_state (`RandomState`): The random number generators before its training forward pass.
        divisor (`int`): What the training loop divides its loss by.
        loss (`Tensor`): Its training loss, after that division, without a graph.
    """

    compute_loss: Callable[[], Tensor]
    random_state: RandomState
    divisor: int
    loss: Tensor


class LossReplay:
    """The closure of [`ALSALS`]: the loss of the recorded micro-batches at the weights as they are when it is called.

    The forward passes see the random numbers (so the dropout masks) of training; the random number generators and
    the model's buffers are left as they were. The loss is averaged over processes.

    Args:
        model (`nn.Module`): The model, for its buffers and devices.
        accelerator (`Accelerator`): The accelerator of the training loop.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.model = model
        self.accelerator = accelerator
        self.micro_batches: list[MicroBatch] = []

    def clear(self) -> None:
        """Forget the recorded micro-batches."""
        self.micro_batches = []

    @property
    def loss(self) -> Tensor:
        """The training loss of the recorded micro-batches together."""
        return self._mean_over_processes(sum(micro_batch.loss for micro_batch in self.micro_batches))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the loss of the recorded micro-batches at the present weights, a scalar."""
        random_state = RandomState(self.model)
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        try:
            losses = []
            for micro_batch in self.micro_batches:
                micro_batch.random_state.restore()
                losses.append(micro_batch.compute_loss() / micro_batch.divisor)
        finally:
            random_state.restore()
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))
        return self._mean_over_processes(sum(losses))

    def _mean_over_processes(self, loss: Any) -> Tensor:
        return self.accelerator.reduce(loss, reduction="mean")
