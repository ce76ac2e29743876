"""Tensors and what is asked of all of them: pieces to work on, sums over shards, scalars with one host-device sync."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.profiler import record_function


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this process has; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def grad_of(param: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert param.grad is not None
    return param.grad


def piece_size(tensor: Tensor) -> int:
    """Return how many elements to work on at once: few enough for a CPU's cache, enough for a GPU to be busy."""
    return 2**19 if tensor.device.type == "cpu" else 2**22


def cut(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut the local shards of tensors of one shape into views of at most `piece_size` elements.

    Args:
        tensors (`Tensor`): The tensors. Unless all are contiguous they come whole.
    """
    shards = tuple(local_shard(tensor) for tensor in tensors)
    count, limit = shards[0].numel(), piece_size(shards[0])
    if count <= limit or not all(shard.is_contiguous() for shard in shards):
        yield shards
        return
    flat = [shard.view(-1) for shard in shards]
    for begin in range(0, count, limit):
        yield tuple(shard[begin : begin + limit] for shard in flat)


def overlapping(tensors: Sequence[Tensor]) -> list[bool]:
    """Return which tensors share memory with another one or with themselves, so that writing to one changes more.

    Args:
        tensors (`Sequence[Tensor]`): Local tensors. One with gaps counts as all of the memory that it spans.
    """
    spans = [(str(t.device), t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size()) for t in tensors]
    shares = [not is_dense(t) for t in tensors]
    order = sorted((i for i in range(len(spans)) if tensors[i].numel() > 0), key=lambda i: spans[i])
    furthest = order[0] if order else 0
    for i in order[1:]:
        is_same_device = spans[i][0] == spans[furthest][0]
        if is_same_device and spans[i][1] < spans[furthest][2]:
            shares[i] = shares[furthest] = True
        furthest = max(furthest, i, key=lambda i: spans[i][2]) if is_same_device else i
    return shares


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor lie side by side, none twice, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def sum_over_shards(values: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the sum of scalars over all shards of all parameters, on the device of the first.

    Args:
        values (`Sequence[Tensor]`): Scalars, each computed from the local shard of a parameter.
        params (`Sequence[Tensor]`): The parameter of each, some of which may be DTensors.
    """
    by_layout: dict[Any, list[Tensor]] = {}
    for value, p in zip(values, params):
        by_layout.setdefault(_layout(p), []).append(value)
    sums = [_over_shards(torch.stack(parts).sum(), layout) for layout, parts in by_layout.items()]
    return sum((part.to(sums[0].device) for part in sums[1:]), start=sums[0]) if sums else torch.tensor(0.0)


def sums_by_param(values: Sequence[Tensor], params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Return the sum of the scalars of each parameter over all of its shards.

    Args:
        values (`Sequence[Tensor]`): Scalars, each computed from the local shard of a parameter.
        params (`Sequence[Tensor]`): The parameter of each, some of which may be DTensors.
    """
    parts: dict[Tensor, list[Tensor]] = {}
    for value, p in zip(values, params):
        parts.setdefault(p, []).append(value)
    sums = {p: torch.stack(some).sum() if len(some) > 1 else some[0] for p, some in parts.items()}
    by_layout: dict[Any, list[Tensor]] = {}
    for p in sums:
        if isinstance(p, DTensor):
            by_layout.setdefault(_layout(p), []).append(p)
    for layout, some in by_layout.items():  # one collective for all of a layout
        sums |= zip(some, _over_shards(torch.stack([sums[p] for p in some]), layout).unbind())
    return sums


def _layout(p: Tensor) -> tuple[Any, Any]:
    return (p.device_mesh, p.placements) if isinstance(p, DTensor) else (None, p.device)


def _over_shards(part: Tensor, layout: tuple[Any, Any]) -> Tensor:
    mesh, placements = layout
    if mesh is None:
        return part
    partial = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(part, mesh, partial, run_check=False).full_tensor()


@record_function("ALSALS.nonfinite_flag")
def nonfinite_flag(params: Sequence[Tensor]) -> Tensor:
    """Return 0 if every element of every gradient is finite, on all shards, else NaN, a scalar.

    Args:
        params (`Sequence[Tensor]`): Parameters with gradients.
    """
    pieces = [(p, piece) for p in params for (piece,) in cut(grad_of(p)) if piece.numel() > 0]
    # The norm is one kernel for many tensors on a GPU, and takes 18 times as long as a sum on a CPU. A sum that
    # overflows is of gradients whose squares do so too, and those are no use to Adam.
    ends = [
        (p, piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32)))
        for p, piece in pieces
        if piece.device.type == "cpu"
    ]
    others = [(p, piece) for p, piece in pieces if piece.device.type != "cpu"]
    if others:
        norms = torch._foreach_norm([piece for _, piece in others], math.inf)
        ends += [(p, norm) for (p, _), norm in zip(others, norms, strict=True)]
    return sum_over_shards([(0 * end).float() for _, end in ends], [p for p, _ in ends])


@record_function("ALSALS.to_floats")
def to_floats(values: Sequence[Tensor | float]) -> list[float]:
    """Return scalars as floats, with one host-device sync for all that are on one device.

    Args:
        values (`Sequence[Tensor | float]`): Tensors of one element, or numbers.
    """
    numbers = list(values)
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, {})[i] = value
    for tensors in by_device.values():
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in tensors.values()))
        together = torch.stack([value.detach().reshape(()).to(dtype) for value in tensors.values()])
        for i, number in zip(tensors, together.tolist(), strict=True):
            numbers[i] = number
    return [float(number) for number in numbers]
