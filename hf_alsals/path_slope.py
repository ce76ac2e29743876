"""The path slope: the rate at which a batch's loss falls along the displacement from initialization."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from .direction import Chunk, Direction
from .shards import cut, grad_of, local_shard, piece_size, sums_by_param

# Up to as many elements are read whole; of more, SAMPLE_SIZE or a share of 1 in MAX_DISTANCE, whichever is more, stand
# for all. Short blocks, for of an embedding the rows of frequent tokens count, and every row has to be met.
WHOLE_SIZE = 2**22
SAMPLE_SIZE = 2**19
MAX_DISTANCE = 64
BLOCK_SIZE = 8
SMALL_SIZE = 2**12  # parameters that are read whole in any case


class PathSlopes(NamedTuple):
    """The slopes of a batch along two ways back, of each parameter with a gradient, scalars.

    Args:
        path (`list[Tensor]`): `<g_k, w_0 - w_k>`, to the first weights.
        last (`list[Tensor]`): `<g_k, d_{k-1}>`, along the last step, per unit of step size.
    """

    path: list[Tensor]
    last: list[Tensor]


@torch.no_grad()
@record_function("ALSALS.path_slope")
def path_slopes(direction: Direction) -> PathSlopes:
    """Return `<g, w_0 - w>` and `<g, d>` of the last direction for each parameter of a direction, before its update.

    The first weights are kept in bfloat16. The present ones are rounded to it too: a weight that has not moved has no
    displacement then, and what rounding does to all that have moved averages out. A parameter without first weights
    has moved nowhere; its present ones are kept as such.

    Of more than `WHOLE_SIZE` elements in all, large parameters are sampled: blocks of `BLOCK_SIZE` at equal distances,
    which share no factor with the length of a row, so that all columns are met. The product is that of the sample
    times what it is a share of. Shards of a DTensor are read whole.

    Args:
        direction (`Direction`): The direction, whose state has the first weights of each parameter as `initial`.
    """
    total = sum(p.numel() for p in direction.params)
    paths: list[Tensor] = []
    lasts: list[Tensor] = []
    owners: list[Tensor] = []
    moved: list[Tensor] = []
    for group in direction.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        known = [p for p in params if "initial" in direction.state[p]]
        for p in params:
            if "initial" not in direction.state[p]:
                blocks = _number_of_blocks(p, total)
                kept = _blocks(p.detach(), blocks) if blocks else p.detach()
                direction.state[p]["initial"] = kept.to(torch.bfloat16, copy=True)
        batch: list[_Piece] = []
        size = 0
        for piece in itertools.chain(_whole(direction, known), _sampled(direction, known)):
            paths.append(piece.path_slope)
            owners.append(piece.owner)
            if piece.buffers:
                batch.append(piece)
                moved.append(piece.owner)
                size += piece.grad.numel()
            if size >= piece_size(piece.grad):
                lasts += _last_slopes(direction, group, batch)
                batch, size = [], 0
        lasts += _last_slopes(direction, group, batch)
    path, last = sums_by_param(paths, owners), sums_by_param(lasts, moved)
    zero = torch.zeros(())
    return PathSlopes([path.get(p, zero) for p in direction.params], [last.get(p, zero) for p in direction.params])


class _Piece(NamedTuple):
    owner: Tensor
    grad: Tensor
    buffers: list[Tensor]  # of the direction, empty before its first step
    share: float  # what the piece stands for, as a multiple of it
    path_slope: Tensor


def _last_slopes(direction: Direction, group: dict[str, Any], pieces: list[_Piece]) -> list[Tensor]:
    if not pieces:
        return []
    grads = [piece.grad for piece in pieces]
    chunk = Chunk(
        group,
        owners=[piece.owner for piece in pieces],
        params=grads,
        grads=grads,
        buffers={name: [piece.buffers[i] for piece in pieces] for i, name in enumerate(direction.buffer_names)},
        steps=[direction.state[piece.owner]["step"].item() for piece in pieces],
        multipliers=[direction.multipliers.get(piece.owner, 1.0) for piece in pieces],
    )
    return [piece.share * product for piece, product in zip(pieces, direction.last_products(chunk))]


def _whole(direction: Direction, params: list[Tensor]) -> Iterator[_Piece]:
    for p in params:
        initial = direction.state[p]["initial"]
        if initial.shape == p.shape:
            dtype = torch.promote_types(p.dtype, torch.float32)
            for piece, grad, start, *buffers in cut(p, grad_of(p), initial, *_buffers(direction, p)):
                # Both are converted first: a difference of two dtypes takes twice as long.
                displacement = start.to(dtype).sub_(piece.to(start.dtype).to(dtype))
                product = torch.dot(displacement.flatten(), grad.to(dtype).flatten())
                yield _Piece(p, grad, buffers, 1.0, product)


def _sampled(direction: Direction, params: list[Tensor]) -> Iterator[_Piece]:
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for p in params:
        if direction.state[p]["initial"].shape != p.shape:
            alike[p.device, p.dtype, grad_of(p).dtype, len(_buffers(direction, p))].append(p)
    for some in alike.values():
        initials = [direction.state[p]["initial"] for p in some]
        counts = [len(initial) for initial in initials]

        def sample(tensors: list[Tensor], counts: list[int] = counts) -> Tensor:
            return torch.cat([_blocks(tensor, count) for tensor, count in zip(tensors, counts)])

        grads = sample([grad_of(p).contiguous() for p in some])
        buffers = [sample(list(column)).split(counts) for column in zip(*(_buffers(direction, p) for p in some))]
        displacement = torch.cat(initials).float().sub_(sample(some).bfloat16().float())
        products = (displacement * grads.float()).sum(1).split(counts)
        for i, (p, grad, product) in enumerate(zip(some, grads.split(counts), products)):
            share = p.numel() / initials[i].numel()
            yield _Piece(p, grad, [column[i] for column in buffers], share, share * product.sum())


def _buffers(direction: Direction, p: Tensor) -> list[Tensor]:
    state = direction.state[p]
    return [state[name] for name in direction.buffer_names] if "step" in state else []


def weight_scale(params: list[Tensor], state: MutableMapping[Tensor, dict[str, Any]]) -> Tensor:
    """Return the geometric mean of the root mean squares of parameters' first weights, a scalar.

    Each counts by its number of elements. One large embedding among small matrices hardly lifts it. Parameters of
    zeros, as LoRA's B, do not count; it is 0.0 if all are.

    Args:
        params (`list[Tensor]`): The parameters, of whose first weights there may be a sample.
        state (`MutableMapping[Tensor, dict]`): The optimizer's state of each, with `initial`.
    """
    squares = []
    for p in params:
        initial = state[p]["initial"]
        share = p.numel() / max(1, initial.numel())
        squares.append(share * local_shard(initial).float().square().sum())
    sums = sums_by_param(squares, params)
    device = sums[params[0]].device
    sizes = torch.tensor([max(1, p.numel()) for p in params], dtype=torch.float32, device=device)
    means = torch.stack([sums[p].to(device) for p in params]) / sizes
    counted = sizes * (means > 0)
    log = (counted * means.clamp(min=1e-38).log()).sum() / (2 * counted.sum().clamp(min=1))
    return log.exp() * (counted.sum() > 0)


def _number_of_blocks(p: Tensor, total: int) -> int:
    """Return how many blocks of a parameter are sampled, 0 if it is read whole."""
    if total <= WHOLE_SIZE or p.numel() < SMALL_SIZE or not p.is_contiguous() or isinstance(p, DTensor):
        return 0
    distance = min(MAX_DISTANCE, math.ceil(total / SAMPLE_SIZE))
    if p.ndim > 1:  # a block in every row
        distance = min(distance, max(1, _row_size(p) // BLOCK_SIZE))
    while math.gcd(distance, _row_size(p)) > 1:
        distance -= 1
    blocks = p.numel() // (BLOCK_SIZE * distance)
    return blocks if blocks >= 4 else 0


def _blocks(tensor: Tensor, blocks: int) -> Tensor:
    """Return a view of some blocks of a contiguous tensor, one a row."""
    distance = tensor.numel() // (BLOCK_SIZE * blocks)
    while math.gcd(distance, _row_size(tensor)) > 1:
        distance -= 1
    return tensor.as_strided((blocks, BLOCK_SIZE), (distance * BLOCK_SIZE, 1), tensor.storage_offset())


def _row_size(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[0]
