"""The path slope: the rate at which a batch's loss falls along the displacement from initialization."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .shards import cut, grad_of, sum_over_shards


@torch.no_grad()
def path_slope(params: Sequence[Tensor], state: MutableMapping[Tensor, dict[str, Any]]) -> Tensor:
    """Return `<g, w_0 - w>`, the inner product of the gradients and the way back to the first weights, a scalar.

    The first weights are kept in bfloat16. The present ones are rounded to it too: a weight that has not moved has no
    displacement then, and what rounding does to all that have moved averages out. A parameter without first weights
    has moved nowhere; its present ones are kept as such.

    Args:
        params (`Sequence[Tensor]`): Parameters with gradients.
        state (`MutableMapping[Tensor, dict]`): The optimizer's state of each, where `initial` is kept.
    """
    products, owners = [], []
    for p in params:
        if "initial" not in state[p]:
            state[p]["initial"] = p.detach().to(torch.bfloat16, copy=True)
            continue
        dtype = torch.promote_types(p.dtype, torch.float32)
        for piece, grad, initial in cut(p, grad_of(p), state[p]["initial"]):
            displacement = initial.to(dtype) - piece.to(initial.dtype)
            products.append(torch.dot(displacement.flatten(), grad.to(dtype).flatten()))
            owners.append(p)
    return sum_over_shards(products, owners)
