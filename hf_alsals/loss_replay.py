"""The loss of one optimizer step's micro-batches, again, exactly: what a probe of the line search measures."""

import contextlib
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .checks import check_number
from .module_state import ModuleState, Slot, copied_slots, marks

if TYPE_CHECKING:
    from accelerate import Accelerator


class RandomState:
    """The random number generators of Python, NumPy and torch as they stand now, on the CPU and the model's devices.

    Args:
        model (`nn.Module`): The model whose devices count.
        device (`torch.device`): The device of the training loop, which counts too.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        devices = {p.device for p in model.parameters()} | {device}
        devices = {device for device in devices if device.type not in ("cpu", "meta")}
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        # torch.mps has one generator and takes no device.
        self._devices = {device: () if device.type == "mps" else (device,) for device in devices}
        self._states = {
            device: torch.get_device_module(device).get_rng_state(*index) for device, index in self._devices.items()
        }

    def restore(self) -> None:
        """Set every generator back to this state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, index in self._devices.items():
            torch.get_device_module(device).set_rng_state(self._states[device], *index)


@dataclass
class MicroBatch:
    """One micro-batch of an optimizer step.

    Args:
        compute_loss (`Callable[[], Any]`): Computes its loss anew, at the weights as they are then.
        random_state (`RandomState`): The random number generators before its training forward pass.
        module_state (`ModuleState`): What moves in the model, before its training forward pass.
        autocast (`dict[str, tuple[bool, torch.dtype]]`): Whether autocast was on, and its dtype, by device type.
        loss (`Tensor`): Its training loss, without a graph.
        divisor (`int`): What the training loop divides its loss by, before the backward pass.
    """

    compute_loss: Callable[[], Any]
    random_state: RandomState
    module_state: ModuleState
    autocast: dict[str, tuple[bool, torch.dtype]]
    loss: Tensor
    divisor: int


class LossReplay:
    """The closure of [`ALSALS`]: the loss of one optimizer step's micro-batches, at the weights of the moment.

    It is set once, `optimizer.set_closure(replay)`; then every micro-batch is recorded. The forward passes of a probe
    see the random numbers (so the dropout masks) and the state of training: buffers, frozen parameters, other tensors
    and numbers of modules. Afterwards generators and state are as they were. The loss is averaged over processes. What
    moves is seen in the forward passes of training; at the first step that something moves later than in the first
    pass in a mode, probes see it one pass further.

    Args:
        model (`nn.Module`): The model as the training loop calls it, wrapped or not.
        accelerator (`Accelerator`, *optional*): The accelerator of the training loop, for its gradient accumulation
            and processes. Without one the processes are those of `torch.distributed`, if it is initialized, and all
            that is recorded between two optimizer steps belongs together.
        probe_micro_batches (`int`, *optional*): With gradient accumulation the number of micro-batches, from the
            first, whose loss stands for that of all: probes are cheaper by as much, and noisier. All if left out.
        probe_context (`Callable[[], ContextManager]`, *optional*): Returns the context that a probe runs in.
        gradient_accumulation_steps (`int`, *optional*): What the training loop divides the losses by, before the
            backward pass; that of the accelerator if there is one, else 1.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If it is less than 1, or `gradient_accumulation_steps` is given beside an accelerator.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: "Accelerator | None" = None,
        probe_micro_batches: int | None = None,
        probe_context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        gradient_accumulation_steps: int | None = None,
    ) -> None:
        check_count("probe_micro_batches", probe_micro_batches)
        check_count("gradient_accumulation_steps", gradient_accumulation_steps)
        if accelerator is not None and gradient_accumulation_steps is not None:
            raise ValueError(
                "gradient_accumulation_steps must be left out where there is an accelerator, which has its own, got "
                f"{gradient_accumulation_steps}."
            )
        self.model = model
        self.accelerator = accelerator
        self.probe_micro_batches = probe_micro_batches
        self.gradient_accumulation_steps = gradient_accumulation_steps or 1
        self.probe_context = probe_context
        self.micro_batches: list[MicroBatch] = []
        self._moving: dict[Slot, None] = {}
        self._modes: list[bool] = []
        self._is_complete = False
        self._loss: Tensor | None = None
        self._is_taken = False

    def record(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the training loss of a micro-batch and remember how.

        The first micro-batch after an optimizer step begins a new record.

        Args:
            function (`Callable[..., Any]`): Returns the loss, or a tuple that begins with it.
            args, kwargs: What it is called with, in training and in every probe.

        Returns:
            What `function` returned.

        Raises:
            RuntimeError: Without an accelerator, if more micro-batches are recorded than an optimizer step has.
        """
        if self._is_complete or (self.accelerator is None and self._is_taken):
            self.clear()
        elif self.accelerator is None and len(self.micro_batches) >= self.gradient_accumulation_steps:
            raise RuntimeError(
                f"LossReplay has {len(self.micro_batches)} micro-batches that no optimizer step was taken with, as "
                "many as one has: give it gradient_accumulation_steps, or call its clear() where a step is skipped."
            )
        random_state = RandomState(self.model, self._device)
        types = {"cpu", self._device.type}
        autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types}
        modes = [module.training for module in self.model.modules()]
        slots = list(self._moving) if modes == self._modes else copied_slots(self.model)
        befores = [(marks(self.model), ModuleState(slots))]

        def capture(*_: Any) -> None:
            befores.append((marks(self.model), ModuleState(slots)))

        # DDP's forward begins by setting the buffers to those of the first process.
        wrapped = [module.module for module in self.model.modules() if isinstance(module, DistributedDataParallel)]
        hooks = [module.register_forward_pre_hook(capture) for module in wrapped]
        try:
            output = function(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        before, module_state = befores[min(1, len(befores) - 1)]
        after = marks(self.model)
        moved = [slot for slot, mark in after.items() if slot not in before or before[slot] != mark]
        self._moving |= dict.fromkeys([*moved, *(module_state.moved() if modes != self._modes else [])])
        self._modes = modes
        self.micro_batches.append(
            MicroBatch(
                compute_loss=functools.partial(function, *args, **kwargs),
                random_state=random_state,
                module_state=module_state,
                autocast=autocast,
                loss=_loss_of(output).detach().clone(),
                divisor=(self if self.accelerator is None else self.accelerator).gradient_accumulation_steps,
            )
        )
        self._loss = None
        self._is_complete = self.accelerator is not None and self.accelerator.sync_gradients
        return output

    def clear(self) -> None:
        """Forget the micro-batches, as after a forward or backward pass that has failed."""
        self.micro_batches = []
        self._loss = None
        self._is_taken = self._is_complete = False

    @property
    def loss(self) -> Tensor:
        """The training loss of the recorded micro-batches, a scalar."""
        if self._loss is None:  # a sum over processes, once a step
            self._loss = self._mean_over_processes([batch.loss / batch.divisor for batch in self._probed()])
        return self._loss

    @property
    def is_ready(self) -> bool:
        """Whether micro-batches are recorded that no optimizer step has been taken with."""
        return bool(self.micro_batches) and not self._is_taken

    def take_loss(self) -> Tensor:
        """Return `loss` to the optimizer step that is taken with it.

        Raises:
            RuntimeError: If another step has been taken with these micro-batches already, or there are none.
        """
        if not self.is_ready:
            raise RuntimeError(
                "LossReplay has no micro-batch of this optimizer step: compute its training loss with record()."
            )
        self._is_taken = True
        return self.loss

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the loss of the recorded micro-batches at the present weights, a scalar.

        Raises:
            RuntimeError: If there are none.
        """
        with self.probe_context():
            return self._replay()

    def _replay(self) -> Tensor:
        random_state = RandomState(self.model, self._device)
        module_state = ModuleState(self._moving)
        wrappers = [module for module in self.model.modules() if isinstance(module, DistributedDataParallel)]
        self._reshard()
        try:
            for wrapper in wrappers:
                wrapper.require_forward_param_sync = False  # a probe must not synchronize buffers
            losses = []
            for batch in self._probed():
                batch.random_state.restore()
                batch.module_state.restore()
                with contextlib.ExitStack() as stack:
                    for kind, (enabled, dtype) in batch.autocast.items():
                        if torch.is_autocast_enabled(kind) != enabled:  # a step may be taken outside of it
                            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
                    losses.append(_loss_of(batch.compute_loss()) / batch.divisor)
        finally:
            random_state.restore()
            module_state.restore()
            for wrapper in wrappers:
                wrapper.require_forward_param_sync = True
            self._reshard()
        return self._mean_over_processes(losses)

    @property
    def _device(self) -> torch.device:
        if self.accelerator is not None:
            return self.accelerator.device
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _reshard(self) -> None:
        # Without a backward pass FSDP2 may keep the weights that it has gathered, and miss that the shards have moved.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _probed(self) -> list[MicroBatch]:
        return self.micro_batches[: self.probe_micro_batches]

    def _mean_over_processes(self, losses: list[Tensor]) -> Tensor:
        if not losses:
            raise RuntimeError("LossReplay has no micro-batch to replay: compute the training loss with record().")
        # The micro-batches that are left out count like those that are not.
        loss = torch.stack(losses).sum() * (len(self.micro_batches) / len(losses))
        if self.accelerator is not None:
            return self.accelerator.reduce(loss, reduction="mean")
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(loss)
            loss /= distributed.get_world_size()
        return loss


def _loss_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def check_count(name: str, count: Any) -> None:
    """Raise unless a number of micro-batches is one.

    Args:
        name (`str`): The name of the argument.
        count (`Any`): An int of at least 1, or `None`.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is less than 1.
    """
    if count is None:
        return
    check_number(name, count, lambda x: x >= 1, "an int of at least 1")
    if not isinstance(count, int):
        raise TypeError(f"{name} must be an int of at least 1, got {count!r}.")
