"""The loss of one optimizer step's micro-batches, again, exactly: what a probe of the line search measures."""

import functools
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
        compute_loss (`Callable[[], Any]`): Computes its loss anew, at the weights as they are then.
        random_state (`RandomState`): The random number generators before its training forward pass.
        loss (`Tensor`): Its training loss, without a graph.
        divisor (`int`): What the training loop divides its loss by.
    """

    compute_loss: Callable[[], Any]
    random_state: RandomState
    loss: Tensor
    divisor: int


class LossReplay:
    """The closure of [`ALSALS`]: the loss of one optimizer step's micro-batches, at the weights of the moment.

    The forward passes see the random numbers (so the dropout masks) of training; afterwards the random number
    generators and the model's buffers are as they were. The loss is averaged over processes.

    Args:
        model (`nn.Module`): The model, for its buffers and devices.
        accelerator (`Accelerator`): The accelerator of the training loop, for its gradient accumulation and processes.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.model = model
        self.accelerator = accelerator
        self.micro_batches: list[MicroBatch] = []
        self._complete = False

    def record(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the training loss of a micro-batch and remember how.

        The first micro-batch after an optimizer step begins a new record.

        Args:
            function (`Callable[..., Any]`): Returns the loss, or a tuple that begins with it.
            args, kwargs: What it is called with, in training and in every probe.

        Returns:
            What `function` returned.
        """
        if self._complete:
            self.micro_batches = []
        random_state = RandomState(self.model)
        output = function(*args, **kwargs)
        self.micro_batches.append(
            MicroBatch(
                compute_loss=functools.partial(function, *args, **kwargs),
                random_state=random_state,
                loss=_loss_of(output).detach(),
                divisor=self.accelerator.gradient_accumulation_steps,
            )
        )
        self._complete = self.accelerator.sync_gradients
        return output

    @property
    def loss(self) -> Tensor:
        """The training loss of the recorded micro-batches, a scalar."""
        return self._mean_over_processes([batch.loss / batch.divisor for batch in self.micro_batches])

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
            for batch in self.micro_batches:
                batch.random_state.restore()
                losses.append(_loss_of(batch.compute_loss()) / batch.divisor)
        finally:
            random_state.restore()
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))
        return self._mean_over_processes(losses)

    def _mean_over_processes(self, losses: list[Tensor]) -> Tensor:
        return self.accelerator.reduce(torch.stack(losses).sum(), reduction="mean")


def _loss_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
