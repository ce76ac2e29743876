"""Adam's direction."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .direction import Chunk, Direction
from .shards import grad_of, is_dense, local_shard


class AdamDirection(Direction):
    """Adam's direction (arXiv 1412.6980, Algorithm 1), to the bit that of `torch.optim.AdamW`.

        m_k = beta1 m_{k-1} + (1 - beta1) g_k          v_k = beta2 v_{k-1} + (1 - beta2) g_k ** 2
        d_k = (m_k / (1 - beta1 ** k)) / (sqrt(v_k / (1 - beta2 ** k)) + eps)

    `betas` and `eps` are those of the parameter group. Where all tensors are float32, torch's fused kernel takes a
    step without a search in one call and makes the first move of a search: both are those of `AdamW(fused=True)`.
    Other moves, a step with weight decay after a search, and other dtypes are those of `AdamW(foreach=True)`.
    They differ in rounding.
    """

    name = "adam"
    description = "Adam's direction"
    buffer_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last: tuple[Chunk, list[Tensor]] | None = None

    def accumulate(self, chunk: Chunk) -> None:
        """Take the gradients into both moments."""
        self._last = None
        beta1, beta2 = chunk.group["betas"]
        exp_avgs, exp_avg_sqs = chunk.buffers.values()
        grads = chunk.grads_like(exp_avgs)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)

    def update_and_move(self, group: dict[str, Any], params: list[Tensor], step_size: float, decay: float) -> None:
        """Update moments and move parameters, by torch's fused kernel where that is possible."""
        others = []
        by_place: dict[tuple[torch.device, float], list[tuple[float, list[Tensor]]]] = {}
        for p in params:
            state = self.state[p]
            moments = [state[name] for name in self.buffer_names if name in state]
            tensors = [local_shard(t) for t in (p, grad_of(p), *moments)]
            multiplier = self.multipliers.get(p, 1.0)
            if multiplier != 0 and _is_fusible(tensors):
                step = self.advance(p)
                tensors[2:] = [local_shard(state[name]) for name in self.buffer_names]
                by_place.setdefault((p.device, multiplier), []).append((step, tensors))
            else:
                others.append(p)
        for (_, multiplier), batch in by_place.items():
            columns = [list(column) for column in zip(*(tensors for _, tensors in batch))]
            weight_decay = group["weight_decay"] / multiplier  # a multiplier is none of weight decay
            _fused_adamw(group, columns, [step for step, _ in batch], step_size * multiplier, weight_decay)
        super().update_and_move(group, others, step_size, decay)

    def update_save_and_move(self, chunk: Chunk, step_size: float, momentum: bool) -> list[Tensor]:
        """Do so by the fused kernel where that is possible, which moves zeros first: the slope is read from them."""
        columns = (chunk.params, chunk.grads, *chunk.buffers.values())
        is_fusible = all(_is_fusible(list(tensors)) for tensors in zip(*columns))
        if not (momentum and is_fusible and step_size > 1e-30):  # the moves have to be numbers that float32 has
            return super().update_save_and_move(chunk, step_size, momentum)
        moves = [torch.zeros_like(p) for p in chunk.params]
        for multiplier in dict.fromkeys(chunk.multipliers):
            places = [i for i, one in enumerate(chunk.multipliers) if one == multiplier]
            tensors = [[column[i] for i in places] for column in (moves, *columns[1:])]
            _fused_adamw(chunk.group, tensors, [chunk.steps[i] for i in places], step_size * multiplier, 0.0)
        products = [torch.dot(grad.flatten(), move.flatten()) / -step_size for grad, move in zip(chunk.grads, moves)]
        self.save_chunk(chunk)
        torch._foreach_add_(chunk.params, moves)
        return products

    def tensors(self, chunk: Chunk, momentum: bool = True) -> list[Tensor]:
        """Return `m_k / (sqrt(v_k / (1 - beta2 ** k)) + eps)`; without momentum `g_k` takes the place of `m_k`."""
        exp_avgs = chunk.buffers["exp_avg"]
        return list(
            torch._foreach_div(exp_avgs if momentum else chunk.grads_like(exp_avgs), self._denominators(chunk))
        )

    def last_products(self, chunk: Chunk) -> list[Tensor]:
        """Return the products, and keep no denominators of them."""
        products = self.products(chunk)
        self._last = None
        return products

    def divisors(self, chunk: Chunk, momentum: bool = True) -> list[float]:
        """Return `1 - beta1 ** k` of each piece; without momentum there is nothing to correct."""
        beta1, _ = chunk.group["betas"]
        return [1 - beta1**step if momentum else 1.0 for step in chunk.steps]

    def add(self, chunk: Chunk, factors: list[float]) -> None:
        """Add the direction in one operation, rounded as AdamW rounds it."""
        torch._foreach_addcdiv_(chunk.params, chunk.buffers["exp_avg"], self._denominators(chunk), factors)

    def _denominators(self, chunk: Chunk) -> list[Tensor]:
        if self._last is not None and self._last[0] is chunk:  # the slope and the first move share them
            return self._last[1]
        _, beta2 = chunk.group["betas"]
        denominators = list(torch._foreach_sqrt(chunk.buffers["exp_avg_sq"]))
        torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in chunk.steps])
        torch._foreach_add_(denominators, chunk.group["eps"])
        self._last = chunk, denominators
        return denominators


def _fused_adamw(
    group: dict[str, Any], columns: list[list[Tensor]], steps: list[float], lr: float, weight_decay: float
) -> None:
    """Call torch's kernel for columns of parameters, gradients and both moments."""
    params, grads, exp_avgs, exp_avg_sqs = columns
    # It counts the steps itself, on its device.
    before = torch.tensor([step - 1 for step in steps], dtype=torch.float32).to(params[0].device, non_blocking=True)
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        list(before.unbind()),
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


def _is_fusible(tensors: list[Tensor]) -> bool:
    param = tensors[0]
    return (
        param.device.type in ("cpu", "cuda")
        and is_dense(param)
        and all(t.dtype == torch.float32 and t.stride() == param.stride() for t in tensors)
    )
