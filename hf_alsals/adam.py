"""Adam's direction."""

import torch
from torch import Tensor

from .direction import Chunk, Direction


class AdamDirection(Direction):
    """Adam's direction (arXiv 1412.6980, Algorithm 1), operation for operation that of `torch.optim.AdamW`.

        m_k = beta1 m_{k-1} + (1 - beta1) g_k          v_k = beta2 v_{k-1} + (1 - beta2) g_k ** 2
        d_k = (m_k / (1 - beta1 ** k)) / (sqrt(v_k / (1 - beta2 ** k)) + eps)

    `betas` and `eps` are those of the parameter group.
    """

    name = "adam"
    description = "Adam's direction"
    buffer_names = ("exp_avg", "exp_avg_sq")

    def accumulate(self, chunk: Chunk) -> None:
        """Take the gradients into both moments."""
        beta1, beta2 = chunk.group["betas"]
        exp_avgs, exp_avg_sqs = chunk.buffers.values()
        grads = chunk.grads_like(exp_avgs)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)

    def tensors(self, chunk: Chunk, momentum: bool = True) -> list[Tensor]:
        """Return `m_k / (sqrt(v_k / (1 - beta2 ** k)) + eps)`; without momentum `g_k` takes the place of `m_k`."""
        exp_avgs = chunk.buffers["exp_avg"]
        return list(torch._foreach_div(exp_avgs if momentum else chunk.grads_like(exp_avgs), _denominators(chunk)))

    def divisors(self, chunk: Chunk, momentum: bool = True) -> list[float]:
        """Return `1 - beta1 ** k` of each piece; without momentum there is nothing to correct."""
        beta1, _ = chunk.group["betas"]
        return [1 - beta1**step if momentum else 1.0 for step in chunk.steps]

    def add(self, chunk: Chunk, factors: list[float]) -> None:
        """Add the direction in one operation, rounded as AdamW rounds it."""
        torch._foreach_addcdiv_(chunk.params, chunk.buffers["exp_avg"], _denominators(chunk), factors)


def _denominators(chunk: Chunk) -> list[Tensor]:
    _, beta2 = chunk.group["betas"]
    denominators = list(torch._foreach_sqrt(chunk.buffers["exp_avg_sq"]))
    torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in chunk.steps])
    torch._foreach_add_(denominators, chunk.group["eps"])
    return denominators
