"""The path slope: the rate at which a batch's loss falls along the displacement from initialization."""

import math
from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from .shards import cut, grad_of, sum_over_shards

# Up to as many elements are read whole; of more, SAMPLE_SIZE or a share of 1 in MAX_DISTANCE, whichever is more, stand
# for all. Short blocks, for of an embedding the rows of frequent tokens count, and every row has to be met.
WHOLE_SIZE = 2**22
SAMPLE_SIZE = 2**19
MAX_DISTANCE = 64
BLOCK_SIZE = 8
SMALL_SIZE = 2**12  # parameters that are read whole in any case


@torch.no_grad()
@record_function("ALSALS.path_slope")
def path_slope(params: Sequence[Tensor], state: MutableMapping[Tensor, dict[str, Any]]) -> Tensor:
    """Return `<g, w_0 - w>`, the inner product of the gradients and the way back to the first weights, a scalar.

    The first weights are kept in bfloat16. The present ones are rounded to it too: a weight that has not moved has no
    displacement then, and what rounding does to all that have moved averages out. A parameter without first weights
    has moved nowhere; its present ones are kept as such.

    Of more than `WHOLE_SIZE` elements in all, large parameters are sampled: blocks of `BLOCK_SIZE` at equal distances,
    which share no factor with the length of a row, so that all columns are met. The product is that of the sample
    times what it is a share of. Shards of a DTensor are read whole.

    Args:
        params (`Sequence[Tensor]`): Parameters with gradients.
        state (`MutableMapping[Tensor, dict]`): The optimizer's state of each, where `initial` is kept.
    """
    products, owners = [], []
    sampled: dict[Any, list[Tensor]] = defaultdict(list)
    for p in params:
        if "initial" not in state[p]:
            blocks = _number_of_blocks(p, total=sum(one.numel() for one in params))
            kept = _blocks(p.detach(), blocks) if blocks else p.detach()
            state[p]["initial"] = kept.to(torch.bfloat16, copy=True)
        elif state[p]["initial"].shape == p.shape:
            dtype = torch.promote_types(p.dtype, torch.float32)
            for piece, grad, initial in cut(p, grad_of(p), state[p]["initial"]):
                # Both are converted first: a difference of two dtypes takes twice as long.
                displacement = initial.to(dtype).sub_(piece.to(initial.dtype).to(dtype))
                products.append(torch.dot(displacement.flatten(), grad.to(dtype).flatten()))
                owners.append(p)
        else:
            sampled[p.device, p.dtype, grad_of(p).dtype, p.numel() / state[p]["initial"].numel()].append(p)
    for (*_, share), group in sampled.items():
        initials = [state[p]["initial"] for p in group]
        present = torch.cat([_blocks(p, len(initial)) for p, initial in zip(group, initials)]).to(torch.bfloat16)
        grads = torch.cat([_blocks(grad_of(p).contiguous(), len(initial)) for p, initial in zip(group, initials)])
        displacement = torch.cat(initials).float().sub_(present.float())
        products.append(share * torch.dot(displacement.flatten(), grads.float().flatten()))
        owners.append(group[0])
    return sum_over_shards(products, owners)


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
