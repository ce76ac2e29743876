"""Adam's direction: its slope, and the moves along it."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


@dataclass
class Chunk:
    """Small parameters, or a part of a large one, that are worked on at once.

    Args:
        owners (`list[Tensor]`): The parameter that each piece belongs to.
        params, grads, exp_avgs, exp_avg_sqs (`list[Tensor]`): The pieces of parameters, gradients and moments.
        bias_corrections (`list[tuple[float, float]]`): Of each piece, `1 - beta1 ** step` and `1 - beta2 ** step`.
        starts (`list[Tensor]`): The start point of a search, in the memory of the gradients if they are of one dtype.
    """

    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    bias_corrections: list[tuple[float, float]] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)


class AdamDirection:
    """Adam's direction for the parameters of one group: `d = m / (sqrt(v) + eps)`, moments without their bias.

    Creating it updates the moments with the gradients (Kingma and Ba, arXiv 1412.6980, Algorithm 1). The arithmetic is
    that of `torch.optim.AdamW`, operation for operation. Of a DTensor it moves the local shard. The start point of a
    search is kept in the memory of the gradients, so that a search needs no memory beyond that of Adam's step.

    Args:
        params (`list[Tensor]`): Parameters with gradients.
        states (`list[dict]`): Their optimizer states, which hold `step`, `exp_avg` and `exp_avg_sq` or are empty.
        betas (`tuple[float, float]`): Decay of the two moments.
        eps (`float`): Term added to the denominator.
    """

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        beta1, beta2 = betas
        self.params = params
        self.eps = eps
        self.chunks = [Chunk()]
        size = 0
        for p, state in zip(params, states):
            if "step" not in state:
                # Moments of bfloat16 and float16 parameters would stall or underflow in their own dtype.
                dtype = torch.promote_types(p.dtype, torch.float32)
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state["step"] += 1
            step = state["step"].item()
            for pieces in _cut((p, p.grad, state["exp_avg"], state["exp_avg_sq"])):
                size += pieces[0].numel()
                if size > _chunk_size(p) and self.chunks[-1].params:
                    self.chunks.append(Chunk())
                    size = pieces[0].numel()
                chunk = self.chunks[-1]
                chunk.owners.append(p)
                chunk.bias_corrections.append((1 - beta1**step, 1 - beta2**step))
                for column, piece in zip((chunk.params, chunk.grads, chunk.exp_avgs, chunk.exp_avg_sqs), pieces):
                    column.append(piece)
        for chunk in self.chunks:
            grads = [grad.to(exp_avg.dtype) for grad, exp_avg in zip(chunk.grads, chunk.exp_avgs)]
            torch._foreach_lerp_(chunk.exp_avgs, grads, 1 - beta1)
            torch._foreach_mul_(chunk.exp_avg_sqs, beta2)
            torch._foreach_addcmul_(chunk.exp_avg_sqs, grads, grads, 1 - beta2)

    def slope(self) -> Tensor:
        """Return the inner product of the gradients and the direction, the decrease of the loss per unit of step."""
        return self._inner_product(with_momentum=True)

    def preconditioned_slope(self) -> Tensor:
        """Return the slope along the direction without momentum, the sum of `g ** 2 / (sqrt(v) + eps)`."""
        return self._inner_product(with_momentum=False)

    def remember(self) -> None:
        """Note where the parameters are, in the memory of the gradients; `.grad` is `None` from then on."""
        for chunk in self.chunks:
            chunk.starts = [
                grad.copy_(p) if grad.dtype == p.dtype else p.clone() for grad, p in zip(chunk.grads, chunk.params)
            ]
        for p in self.params:
            p.grad = None  # no gradient any more, even where a probe raises

    def restore(self) -> None:
        """Put the parameters back, to the bit, to where they were at the last `remember()`."""
        for chunk in self.chunks:
            if chunk.starts:
                torch._foreach_copy_(chunk.params, chunk.starts)

    def move(self, step_size: float, decay: float = 0.0) -> None:
        """Move the parameters by `step_size` times the direction, downhill.

        They start from where they were at the last `remember()`, if there was one, else from where they are.

        Args:
            step_size (`float`): The step size.
            decay (`float`, defaults to 0.0): The share of themselves that the parameters lose first (AdamW's weight
                decay).
        """
        for chunk in self.chunks:
            if chunk.starts:
                torch._foreach_copy_(chunk.params, chunk.starts)
            if decay != 0:
                torch._foreach_mul_(chunk.params, 1 - decay)
            factors = [-step_size / correction for correction, _ in chunk.bias_corrections]
            torch._foreach_addcdiv_(chunk.params, chunk.exp_avgs, self._denominators(chunk), factors)

    def _denominators(self, chunk: Chunk) -> list[Tensor]:
        denominators = torch._foreach_sqrt(chunk.exp_avg_sqs)
        torch._foreach_div_(denominators, [correction**0.5 for _, correction in chunk.bias_corrections])
        torch._foreach_add_(denominators, self.eps)
        return denominators

    def _inner_product(self, with_momentum: bool) -> Tensor:
        products: list[Tensor] = []
        for chunk in self.chunks:
            grads = [grad.to(exp_avg.dtype) for grad, exp_avg in zip(chunk.grads, chunk.exp_avgs)]
            directions = torch._foreach_div(chunk.exp_avgs if with_momentum else grads, self._denominators(chunk))
            products += [
                torch.dot(grad.flatten(), direction.flatten()) / (correction if with_momentum else 1.0)
                for grad, direction, (correction, _) in zip(grads, directions, chunk.bias_corrections)
            ]
        return sum_over_shards(products, [owner for chunk in self.chunks for owner in chunk.owners])


def path_slope(params: list[Tensor], states: list[dict[str, Any]]) -> Tensor:
    """Return the inner product of the gradients and the way back to the start of training, a scalar.

    The start is kept in bfloat16, so the parameters are rounded to it too: a weight that has not moved is at the start
    then, and what rounding does to all that have moved adds up to nothing.

    Args:
        params (`list[Tensor]`): Parameters with gradients.
        states (`list[dict]`): Their optimizer states, which hold the parameters of the start as `start`.
    """
    products, owners = [], []
    for p, state in zip(params, states):
        dtype = torch.promote_types(p.dtype, torch.float32)
        for piece, grad, start in _cut((p, p.grad, state["start"])):
            way = start.to(dtype) - piece.to(start.dtype)
            products.append(torch.dot(way.flatten(), grad.to(dtype).flatten()))
            owners.append(p)
    return sum_over_shards(products, owners)


def _chunk_size(tensor: Tensor) -> int:
    # Few enough elements for a CPU's cache, enough for a GPU to be busy.
    return 2**18 if tensor.device.type == "cpu" else 2**22


def _cut(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    tensors = tuple(local_shard(tensor) for tensor in tensors)
    count, limit = tensors[0].numel(), _chunk_size(tensors[0])
    if count <= limit or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for begin in range(0, count, limit):
        yield tuple(tensor[begin : begin + limit] for tensor in flat)


def zero_if_finite(params: list[Tensor]) -> Tensor:
    """Return 0 if every element of every gradient is finite, on all shards, else NaN, a scalar.

    Args:
        params (`list[Tensor]`): Parameters with gradients.
    """
    pieces = [(p, piece) for p in params for (piece,) in _cut((p.grad,)) if piece.numel() > 0]
    # The norm is one kernel for many tensors on a GPU, and takes 18 times as long as aminmax on a CPU.
    ends = [(p, end) for p, piece in pieces if piece.device.type == "cpu" for end in torch.aminmax(piece)]
    others = [(p, piece) for p, piece in pieces if piece.device.type != "cpu"]
    if others:
        norms = torch._foreach_norm([piece for _, piece in others], math.inf)
        ends += [(p, norm) for (p, _), norm in zip(others, norms, strict=True)]
    return sum_over_shards([(0 * end).float() for _, end in ends], [p for p, _ in ends])


def sum_over_shards(values: list[Tensor], params: list[Tensor]) -> Tensor:
    """Return the sum of one scalar for each parameter, over all shards of each, on the device of the first.

    Args:
        values (`list[Tensor]`): Scalars, each computed from the local shard of a parameter.
        params (`list[Tensor]`): The parameters, some of which may be DTensors.
    """
    by_layout: dict[Any, list[Tensor]] = {}
    for value, p in zip(values, params):
        layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else (None, p.device)
        by_layout.setdefault(layout, []).append(value)
    sums = []
    for (mesh, placements), parts in by_layout.items():
        part = torch.stack(parts).sum()
        if mesh is not None:
            partial = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
            part = DTensor.from_local(part, mesh, partial, run_check=False).full_tensor()
        sums.append(part)
    return sum((part.to(sums[0].device) for part in sums[1:]), start=sums[0]) if sums else torch.tensor(0.0)


def read(values: list[Tensor | float]) -> list[float]:
    """Return scalars as numbers, with one host wait for all that are on one device.

    Args:
        values (`list[Tensor | float]`): Scalars of any shape with one element, or numbers.
    """
    numbers = dict(enumerate(values))
    by_device: dict[torch.device, list[int]] = {}
    for i, value in numbers.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(i)
    for indices in by_device.values():
        dtype = functools.reduce(torch.promote_types, (values[i].dtype for i in indices))
        together = torch.stack([values[i].detach().reshape(()).to(dtype) for i in indices])
        numbers.update(zip(indices, together.tolist(), strict=True))
    return [float(number) for number in numbers.values()]


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this process has; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
