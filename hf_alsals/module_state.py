"""What moves in a model's forward pass beside its trained parameters, which a probe must not move."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .plain_state import PLAIN
from .shards import local_shard

# A module and the name of a buffer, a frozen parameter, another tensor or a number or text of it.
Slot = tuple[nn.Module, str]


def marks(model: nn.Module) -> dict[Slot, Any]:
    """Return a mark of every slot of a model, which is another one once the slot has moved, and costs no memory.

    Args:
        model (`nn.Module`): The model, wrapped or not. What wrappers count is left out.
    """
    found: dict[Slot, Any] = {}
    # FSDP2 puts other tensors in the place of parameters while it has them gathered.
    has_frozen = not any(isinstance(module, FSDPModule) for module in model.modules())
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            continue
        # Once before and once after every forward pass, so from the dictionaries: the public iterators are slow.
        for name, value in module.__dict__.items():
            if type(value) in PLAIN:
                found[module, name] = value
            elif not isinstance(value, dict) and isinstance(value, Tensor):
                found[module, name] = _mark(value)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found[module, name] = _mark(buffer)
        for name, p in module._parameters.items() if has_frozen else ():
            if p is not None and not p.requires_grad:
                found[module, name] = _mark(p)
    return found


def copied_slots(model: nn.Module) -> list[Slot]:
    """Return the slots that the first forward pass is compared by: all, but frozen parameters only if they are few.

    A momentum encoder is about as large as the encoder that is trained, and may move without a trace, through `.data`.
    What LoRA freezes is many times as large as what it trains, and is not copied.

    Args:
        model (`nn.Module`): The model, wrapped or not.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    slots = marks(model)
    if frozen <= trained:
        return list(slots)
    return [(module, name) for module, name in slots if not isinstance(getattr(module, name), nn.Parameter)]


class ModuleState:
    """The values of slots as they stand now.

    Args:
        slots (`Iterable[Slot]`): The slots. One that is not there any more is left out.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._values: list[tuple[nn.Module, str, Any, Tensor | None]] = []
        for module, name in slots:
            if hasattr(module, name):
                value = getattr(module, name)
                is_copied = isinstance(value, Tensor) and not value.requires_grad
                self._values.append((module, name, value, value.detach().clone() if is_copied else None))

    @torch.no_grad()
    def restore(self) -> None:
        """Set every slot back to this state, in the tensor that held it."""
        for module, name, value, copy in self._values:
            if copy is not None:
                value.copy_(copy)
            if getattr(module, name, None) is not value:
                setattr(module, name, value)

    def moved(self) -> list[Slot]:
        """Return the slots that have another value, or hold another tensor, than in this state."""
        return [(module, name) for module, name, value, copy in self._values if _has_moved(module, name, value, copy)]


def _has_moved(module: nn.Module, name: str, value: Any, copy: Tensor | None) -> bool:
    held = getattr(module, name, None)
    return held is not value or (copy is not None and not torch.equal(copy, held))


def _mark(tensor: Tensor) -> tuple[int, int, int]:
    # _version counts changes in place; private, but torch.autograd's own messages name it (torch 2.6 to 2.13).
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, local_shard(tensor).data_ptr() if tensor.layout == torch.strided else 0
