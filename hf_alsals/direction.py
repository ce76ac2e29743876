"""Adam's direction: its slope, and the moves along it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


class AdamDirection:
    """Adam's direction for the parameters of one group: `d = m / (sqrt(v) + eps)`, moments without their bias.

    Creating it updates the moments with the gradients (Kingma and Ba, arXiv 1412.6980, Algorithm 1). The arithmetic is
    that of `torch.optim.AdamW`, operation for operation. Of a DTensor it moves the local shard.

    Args:
        params (`list[Tensor]`): Parameters with gradients.
        states (`list[dict]`): Their optimizer states, which hold `step`, `exp_avg` and `exp_avg_sq` or are empty.
        betas (`tuple[float, float]`): Decay of the two moments.
        eps (`float`): Term added to the denominator.
    """

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        for p, state in zip(params, states):
            if not state:
                # Moments of bfloat16 and float16 parameters would stall or underflow in their own dtype.
                dtype = torch.promote_types(p.dtype, torch.float32)
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state["step"] += 1
        self._whole = params
        self.params = [_local(p) for p in params]
        self.exp_avgs = [_local(state["exp_avg"]) for state in states]
        self.grads = [_local(p.grad).to(exp_avg.dtype) for p, exp_avg in zip(params, self.exp_avgs)]
        exp_avg_sqs = [_local(state["exp_avg_sq"]) for state in states]
        steps = [state["step"].item() for state in states]
        beta1, beta2 = betas
        torch._foreach_lerp_(self.exp_avgs, self.grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, self.grads, self.grads, 1 - beta2)
        self.denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(self.denominators, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(self.denominators, eps)
        self.bias_corrections = [1 - beta1**step for step in steps]
        self._start: list[Tensor] = []

    def slope(self) -> float:
        """Return the inner product of the gradients and the direction, the decrease of the loss per unit of step."""
        return self._inner_product(self.exp_avgs, self.bias_corrections)

    def preconditioned_slope(self) -> float:
        """Return the slope along the direction without momentum, the sum of `g ** 2 / (sqrt(v) + eps)`."""
        return self._inner_product(self.grads, [1.0] * len(self.grads))

    def move(self, step_size: float) -> None:
        """Move the parameters by `step_size` times the direction, downhill.

        Args:
            step_size (`float`): The step size.
        """
        factors = [-step_size / correction for correction in self.bias_corrections]
        torch._foreach_addcdiv_(self.params, self.exp_avgs, self.denominators, factors)

    def remember(self) -> None:
        """Note where the parameters are."""
        self._start = [p.clone() for p in self.params]

    def restore(self) -> None:
        """Put the parameters back, to the bit, to where they were at the last `remember()`."""
        torch._foreach_copy_(self.params, self._start)

    def _inner_product(self, numerators: list[Tensor], corrections: list[float]) -> float:
        products = [
            torch.dot(grad.flatten(), (numerator / denominator).flatten()) / correction
            for grad, numerator, denominator, correction in zip(self.grads, numerators, self.denominators, corrections)
        ]
        return sum_over_shards(products, self._whole)


def all_finite(params: list[Tensor]) -> bool:
    """Return whether every element of every gradient is finite, on all shards.

    Args:
        params (`list[Tensor]`): Parameters with gradients.
    """
    grads = [_local(p.grad) for p in params]
    largest = torch._foreach_norm([grad if grad.numel() > 0 else grad.new_zeros(1) for grad in grads], math.inf)
    return sum_over_shards([(~value.isfinite()).float() for value in largest], params) == 0


def sum_over_shards(values: list[Tensor], params: list[Tensor]) -> float:
    """Return the sum of one scalar for each parameter, over all shards of each.

    Args:
        values (`list[Tensor]`): Scalars, each computed from the local shard of a parameter.
        params (`list[Tensor]`): The parameters, some of which may be DTensors.
    """
    by_layout: dict[Any, list[Tensor]] = {}
    for value, p in zip(values, params):
        layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else (None, p.device)
        by_layout.setdefault(layout, []).append(value)
    total = 0.0
    for (mesh, placements), parts in by_layout.items():
        part = torch.stack(parts).sum()
        if mesh is not None:
            partial = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
            part = DTensor.from_local(part, mesh, partial, run_check=False).full_tensor()
        total += part.item()
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
