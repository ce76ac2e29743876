"""Adam's direction, and that with Nesterov momentum."""

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
            if multiplier != 0 and self.fuses(group) and _is_fusible(tensors):
                step = self.advance(p)
                tensors[2:] = [local_shard(state[name]) for name in self.buffer_names]
                scale = multiplier * self.scale(group, step)
                by_place.setdefault((p.device, scale), []).append((step, tensors))
            else:
                others.append(p)
        for (_, scale), batch in by_place.items():
            columns = [list(column) for column in zip(*(tensors for _, tensors in batch))]
            weight_decay = group["weight_decay"] / scale  # neither a multiplier nor momentum is any of weight decay
            self.fused(group, columns, [step for step, _ in batch], step_size * scale, weight_decay)
        super().update_and_move(group, others, step_size, decay)

    def update_save_and_move(self, chunk: Chunk, step_size: float, momentum: bool) -> list[Tensor]:
        """Do so by the fused kernel where that is possible, which moves zeros first: the slope is read from them."""
        columns = (chunk.params, chunk.grads, *chunk.buffers.values())
        is_fusible = self.fuses(chunk.group) and all(_is_fusible(list(tensors)) for tensors in zip(*columns))
        is_one_device = len({p.device for p in chunk.params}) == 1
        # The moves have to be numbers that float32 has.
        if not (momentum and is_fusible and is_one_device and step_size > 1e-30):
            return super().update_save_and_move(chunk, step_size, momentum)
        moves = [torch.zeros_like(p) for p in chunk.params]
        scales = [one * self.scale(chunk.group, step) for one, step in zip(chunk.multipliers, chunk.steps)]
        for scale in dict.fromkeys(scales):
            places = [i for i, one in enumerate(scales) if one == scale]
            tensors = [[column[i] for i in places] for column in (moves, *columns[1:])]
            self.fused(chunk.group, tensors, [chunk.steps[i] for i in places], step_size * scale, 0.0)
        products = [torch.dot(grad.flatten(), move.flatten()) / -step_size for grad, move in zip(chunk.grads, moves)]
        self.save_chunk(chunk)
        torch._foreach_add_(chunk.params, moves)
        return products

    def tensors(self, chunk: Chunk, momentum: bool = True) -> list[Tensor]:
        """Return `m_k / (sqrt(v_k / (1 - beta2 ** k)) + eps)`; without momentum `g_k` takes the place of `m_k`."""
        numerators = self.momenta(chunk) if momentum else chunk.grads_like(chunk.buffers["exp_avg"])
        return list(torch._foreach_div(numerators, self._denominators(chunk)))

    def momenta(self, chunk: Chunk) -> list[Tensor]:
        """Return the momentum of each piece, before its bias correction."""
        return chunk.buffers["exp_avg"]

    def last_products(self, chunk: Chunk) -> list[Tensor]:
        """Return the products with `m_k` as momentum, and keep no denominators of them."""
        tensors = list(torch._foreach_div(chunk.buffers["exp_avg"], self._denominators(chunk)))
        self._last = None
        return self.products_of(chunk, tensors, AdamDirection.divisors(self, chunk))

    def divisors(self, chunk: Chunk, momentum: bool = True) -> list[float]:
        """Return `1 - beta1 ** k` of each piece; without momentum there is nothing to correct."""
        beta1, _ = chunk.group["betas"]
        return [1 - beta1**step if momentum else 1.0 for step in chunk.steps]

    def add(self, chunk: Chunk, factors: list[float]) -> None:
        """Add the direction in one operation, rounded as AdamW rounds it."""
        torch._foreach_addcdiv_(chunk.params, self.momenta(chunk), self._denominators(chunk), factors)

    def fuses(self, group: dict[str, Any]) -> bool:
        """Return whether the fused kernel takes the `betas` of a group."""
        return True

    def scale(self, group: dict[str, Any], step: float) -> float:
        """Return what the step size of the fused kernel is to be multiplied by at a step."""
        return 1.0

    def fused(
        self, group: dict[str, Any], columns: list[list[Tensor]], steps: list[float], lr: float, weight_decay: float
    ) -> None:
        """Update moments and move parameters by the fused kernel.

        Args:
            group (`dict`): The parameter group, of which `betas` and `eps` are read.
            columns (`list[list[Tensor]]`): Parameters, gradients and both moments, all of one device.
            steps (`list[float]`): How many updates each has seen, this one included.
            lr (`float`): The learning rate.
            weight_decay (`float`): The decoupled weight decay, of which `lr` times as much is taken.
        """
        _fused_adamw(group, columns, steps, lr, weight_decay)

    def _denominators(self, chunk: Chunk) -> list[Tensor]:
        if self._last is not None and self._last[0] is chunk:  # the slope and the first move share them
            return self._last[1]
        _, beta2 = chunk.group["betas"]
        denominators = list(torch._foreach_sqrt(chunk.buffers["exp_avg_sq"]))
        torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in chunk.steps])
        torch._foreach_add_(denominators, chunk.group["eps"])
        self._last = chunk, denominators
        return denominators


class NesterovAdamDirection(AdamDirection):
    """Adam's direction with Nesterov momentum, as in NAdam (Dozat, 2016).

        n_k = beta1 m_k + (1 - beta1) g_k
        d_k = (n_k / (1 - beta1 ** (k + 1))) / (sqrt(v_k / (1 - beta2 ** k)) + eps)

    `n_k` is what `m_{k+1}` will be if the next gradient is that of this step. It is not kept: `m_k` and `v_k` are
    Adam's. A search keeps the gradients, for `n_k` is made of them.

    With `beta1` of at least 0.5 the fused kernel takes steps as in [`AdamDirection`]: with `beta1 ** 2` for `beta1`
    its momentum is `n_k`, of which `m_k` is made.
    """

    name = "nadam"
    description = "Adam's direction with Nesterov momentum"
    keeps_grads = True

    def momenta(self, chunk: Chunk) -> list[Tensor]:
        """Return `n_k`."""
        exp_avgs = chunk.buffers["exp_avg"]
        return list(torch._foreach_lerp(exp_avgs, chunk.grads_like(exp_avgs), 1 - chunk.group["betas"][0]))

    def divisors(self, chunk: Chunk, momentum: bool = True) -> list[float]:
        """Return `1 - beta1 ** (k + 1)` of each piece; without momentum there is nothing to correct."""
        beta1, _ = chunk.group["betas"]
        return [1 - beta1 ** (step + 1) if momentum else 1.0 for step in chunk.steps]

    def fuses(self, group: dict[str, Any]) -> bool:
        """Return whether `m_k` can be made of `n_k`, which divides by `beta1`."""
        return group["betas"][0] >= 0.5

    def scale(self, group: dict[str, Any], step: float) -> float:
        """Return the bias correction of `n_k` over that of the kernel."""
        beta1, _ = group["betas"]
        return (1 - beta1 ** (2 * step)) / (1 - beta1 ** (step + 1))

    def fused(
        self, group: dict[str, Any], columns: list[list[Tensor]], steps: list[float], lr: float, weight_decay: float
    ) -> None:
        """Do so with `n_k` as the kernel's momentum."""
        _, grads, exp_avgs, _ = columns
        beta1, beta2 = group["betas"]
        super().fused({**group, "betas": (beta1**2, beta2)}, columns, steps, lr, weight_decay)
        torch._foreach_lerp_(exp_avgs, grads, 1 - 1 / beta1)


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
