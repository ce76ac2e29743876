"""The direction of an optimizer step: what all directions share. See adam.py for Adam's."""

import functools
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import record_function

from .shards import cut, grad_of, is_dense, local_shard, overlapping, piece_size, sum_over_shards


def state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state tensors, at least float32."""
    return torch.promote_types(param.dtype, torch.float32)


@dataclass
class Chunk:
    """Small parameters of one group, or pieces of a large one, that are worked on at once.

    Args:
        group (`dict`): The parameter group.
        owners (`list[Tensor]`): The parameter that each piece belongs to.
        params, grads (`list[Tensor]`): The pieces of parameters and gradients.
        buffers (`dict[str, list[Tensor]]`): The pieces of each state tensor, by its name.
        steps (`list[float]`): How many updates each piece has seen, this one included.
        multipliers (`list[float]`): The multiplier of the step size of each piece.
        is_grad_free (`list[bool]`): Whether the start of each piece may be saved in the memory of its gradient.
        starts (`list[Tensor]`): Where the pieces were at `save`; empty before.
    """

    group: dict[str, Any]
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    buffers: dict[str, list[Tensor]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)
    is_grad_free: list[bool] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)

    def grads_like(self, buffers: list[Tensor]) -> list[Tensor]:
        """Return the gradients in the dtypes of some buffers."""
        return [grad.to(buffer.dtype) for grad, buffer in zip(self.grads, buffers)]


def hidden_matrices(param_groups: list[dict[str, Any]]) -> list[Tensor]:
    """Return the matrices of parameter groups that are neither embeddings nor heads, as far as the groups say it.

    Args:
        param_groups (`list[dict]`): The parameter groups. One with `"hidden": False` has none, and `"apart"` lists the
            places of the others in a group.
    """
    return [
        p
        for group in param_groups
        if group.get("hidden", True)
        for place, p in enumerate(group["params"])
        if p.ndim >= 2 and place not in group.get("apart", ())
    ]


class Direction:
    """The direction `d` of an optimizer step: weights move along `-d`, whose slope is `<g, d>`.

    Creating one changes nothing. `update` updates the state from the gradients, and all else comes after it, but for
    `step` and `first_move`, which do both at once, in fewer passes over memory. A subclass names its state tensors in
    `buffer_names` and says how they take in gradients (`accumulate`) and what the direction is (`tensors` over
    `divisors`). State tensors have the parameter's shape and at least float32: in bfloat16 or float16 moments stall or
    underflow. The direction must follow from them alone, for a search writes over the gradients, unless `keeps_grads`
    says otherwise. Of a DTensor the local shard is moved.

    Args:
        param_groups (`list[dict]`): The optimizer's parameter groups. `lr` and `weight_decay` are read here, the rest
            by the subclass. Parameters without a gradient are left out.
        state (`MutableMapping[Tensor, dict]`): The optimizer's state of each parameter.

    Attributes:
        hidden_matrices (`list[Tensor]`): The parameters of at least two dimensions, but for those of groups with
            `"hidden": False` and those whose place in their group is in its `"apart"`: embeddings and heads.
        name, description (`str`): Its name in checkpoints, and in words, for a model card.
        has_momentum_apart, takes_shards (`bool`): Whether `slope(momentum=False)` is there, and whether parameters may
            be DTensors.
        takes_betas (`bool`): Whether it reads the `betas` and `eps` of parameter groups.
        keeps_grads (`bool`): Whether its moves read the gradients, so that a search does not write over them.
        params (`list[Tensor]`): The parameters with a gradient.
        multipliers (`dict[Tensor, float]`): Multiplier of the step size, by parameter; 1.0 for those that are not in
            it. To be set before `update`. It scales a parameter's part of the direction, and so of the slope.

    Raises:
        RuntimeError: If a gradient is sparse.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    buffer_names: ClassVar[tuple[str, ...]] = ()
    has_momentum_apart: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = True
    takes_betas: ClassVar[bool] = True
    keeps_grads: ClassVar[bool] = False

    def __init__(self, param_groups: list[dict[str, Any]], state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        self.param_groups = param_groups
        self.state = state
        self.params: list[Tensor] = [p for group in param_groups for p in group["params"] if p.grad is not None]
        self.hidden_matrices = hidden_matrices(param_groups)
        self.multipliers: dict[Tensor, float] = {}
        self._chunks: list[list[Chunk]] = []
        self._moved: tuple[float, list[int]] | None = None
        if any(grad_of(p).is_sparse for p in self.params):
            raise RuntimeError("ALSALS takes dense gradients, got a sparse one: use sparse=False in the embedding.")

    @classmethod
    def check_installed(cls) -> None:
        """Raise an ImportError that names what has to be installed, if anything is missing; nothing is by default."""

    @classmethod
    def check_group(cls, group: dict[str, Any]) -> None:
        """Raise if a parameter group says something that the direction does not read.

        Args:
            group (`dict`): The parameter group.

        Raises:
            TypeError: If `hidden` is no bool.
            ValueError: If it is called otherwise, or `betas` and `eps` are set and not read.
        """
        for name in ("muon", "use_muon"):
            if name in group:
                raise ValueError(
                    f'{name} is called hidden in parameter groups: {{"params": embeddings, "hidden": False}}.'
                )
        if not isinstance(hidden := group.get("hidden", True), bool):
            raise TypeError(f"hidden must be True or False in a parameter group, got {hidden!r}.")
        for name, default in () if cls.takes_betas else (("betas", (0.9, 0.999)), ("eps", 1e-8)):
            value = tuple(group[name]) if name == "betas" else group[name]  # a list is taken too
            if value != default:
                raise ValueError(f"{name} must be left at {default}: {cls.description} has its own, got {value}.")

    def accumulate(self, chunk: Chunk) -> None:
        """Update the buffers of a chunk from its gradients."""
        raise NotImplementedError

    def tensors(self, chunk: Chunk, momentum: bool = True) -> list[Tensor]:
        """Return the direction of a chunk times its divisors.

        Args:
            chunk (`Chunk`): The chunk, after `accumulate`.
            momentum (`bool`, defaults to `True`): Whether the momentum of earlier gradients is part of it.
        """
        raise NotImplementedError

    def divisors(self, chunk: Chunk, momentum: bool = True) -> list[float]:
        """Return what each of `tensors` is to be divided by, such as a bias correction; by default 1.0."""
        return [1.0] * len(chunk.params)

    def add(self, chunk: Chunk, factors: list[float]) -> None:
        """Add `tensors`, each times a factor, to the parameters of a chunk."""
        torch._foreach_add_(chunk.params, torch._foreach_mul(self.tensors(chunk), factors))

    @property
    def is_saved(self) -> bool:
        """Whether `save` has noted where the parameters are."""
        return any(chunk.starts for chunk in self._all_chunks())

    @property
    def is_updated(self) -> bool:
        """Whether `update` has updated the state."""
        return bool(self._chunks)

    @torch.no_grad()
    def update(self) -> None:
        """Update the state from the gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            chunks = self._cut(group, params)
            for chunk in chunks:
                self.accumulate(chunk)
            if chunks:
                self._chunks.append(chunks)

    def update_and_move(self, group: dict[str, Any], params: list[Tensor], step_size: float, decay: float) -> None:
        """Update the state of some parameters and move them, as a step without a search does.

        Args:
            group (`dict`): Their parameter group.
            params (`list[Tensor]`): Parameters with gradients.
            step_size (`float`): The step size times the learning rate.
            decay (`float`): The share of the weights that weight decay takes.
        """
        for chunk in self._cut(group, params):
            self.accumulate(chunk)
            self._move(chunk, step_size, decay)

    def update_save_and_move(self, chunk: Chunk, step_size: float, momentum: bool) -> list[Tensor]:
        """Update the state of a chunk, save where it is and move it, as the first probe of a search does.

        Args:
            chunk (`Chunk`): The chunk.
            step_size (`float`): The step size of its group.
            momentum (`bool`): As `slope` takes it.

        Returns:
            `list[Tensor]`: The part of `<g, d>` of each of its pieces, a scalar, before the group's learning rate.
        """
        self.accumulate(chunk)
        products = self.products(chunk, momentum)
        self.save_chunk(chunk)
        self._move(chunk, step_size, decay=0.0)
        return products

    def slope(self, momentum: bool = True) -> list[Tensor]:
        """Return the parts of `<g, d>`, a scalar for each parameter group that has gradients.

        `d` is what a probe moves along: that of a group is scaled as its `lr` wants.

        Args:
            momentum (`bool`, defaults to `True`): Whether the momentum of earlier gradients is part of `d`; without,
                it is the preconditioned slope of arXiv 2407.20650.
        """
        return [
            self._slope_of(chunks, [product for chunk in chunks for product in self.products(chunk, momentum)])
            for chunks in self._chunks
        ]

    @torch.no_grad()
    def save(self, keep_grads: bool = False) -> None:
        """Save where the parameters are.

        Args:
            keep_grads (`bool`, defaults to `False`): Whether to leave the gradients alone. Otherwise the copy
                reuses their memory, and `.grad` is `None` from then on, even where a probe raises.

        Raises:
            ValueError: If two parameters share memory.
        """
        self._refuse_shared_memory()
        self._begin_saving(keep_grads)
        for chunk in self._all_chunks():
            self.save_chunk(chunk)

    @torch.no_grad()
    @record_function("ALSALS.first_move")
    def first_move(self, step_size: float, momentum: bool = True) -> list[Tensor]:
        """Do `update`, `slope`, `save` and `move` in fewer passes over memory.

        Args:
            step_size (`float`): The step size to move to, before the learning rate.
            momentum (`bool`, defaults to `True`): As `slope` takes it.

        Returns:
            `list[Tensor]`: What `slope` returns.

        Raises:
            ValueError: If two parameters share memory.
        """
        self._refuse_shared_memory()
        for group in self.param_groups:
            if chunks := self._cut(group, [p for p in group["params"] if p.grad is not None]):
                self._chunks.append(chunks)
        self._begin_saving()
        slopes = []
        for chunks in self._chunks:
            products = []
            for chunk in chunks:
                products += self.update_save_and_move(chunk, self._ratio(chunk.group) * step_size, momentum)
            slopes.append(self._slope_of(chunks, products))
        self._moved = step_size, self._versions()
        return slopes

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back, to the bit, to where they were at `save`, if they were saved."""
        for chunk in self._all_chunks():
            if chunk.starts:
                torch._foreach_copy_(chunk.params, chunk.starts)

    @torch.no_grad()
    @record_function("ALSALS.move")
    def move(self, step_size: float) -> None:
        """Move the parameters to `w - step_size * d`, from where they were at `save` or, without one, are.

        Args:
            step_size (`float`): The step size, before the learning rate.
        """
        for chunk in self._all_chunks():
            self._move(chunk, self._ratio(chunk.group) * step_size, decay=0.0)
        self._moved = step_size, self._versions()

    @torch.no_grad()
    @record_function("ALSALS.step_direction")
    def step(self, step_size: float) -> None:
        """Take the optimizer step: `step_size` times each group's `lr`, with its decoupled weight decay.

        Without an `update` before it does that too.

        Args:
            step_size (`float`): The step size, before the learning rates of the groups.
        """
        if self.is_updated:
            if not self._is_there(step_size):
                for chunk in self._all_chunks():
                    self._move(chunk, *self._scaled(chunk.group, step_size))
        else:
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                self.update_and_move(group, params, *self._scaled(group, step_size))

    def advance(self, p: Tensor) -> float:
        """Count an update of a parameter, whose state is made at the first one, and return how many there were."""
        state = self.state[p]
        if "step" not in state:
            dtype = state_dtype(p)
            state["step"] = torch.tensor(0.0, dtype=torch.float32)  # whatever the default dtype is
            for name in self.buffer_names:
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["step"] += 1
        return state["step"].item()

    def _is_there(self, step_size: float) -> bool:
        """Return whether the last move from the start was that of a step; a forward pass may have changed weights."""
        if self._moved is None or not self.is_saved:
            return False
        moved, versions = self._moved
        is_step = (self._scaled(group, step_size) == (self._ratio(group) * moved, 0.0) for group in self.param_groups)
        return all(is_step) and versions == self._versions()

    def _versions(self) -> list[int]:
        return [p._version for p in self._locals()]  # counts changes in place

    def _ratio(self, group: dict[str, Any]) -> float:
        """Return by what a probe scales a group: groups move in proportion to their learning rates, as in a step.

        It is over the largest of those that are at most 1, schedule apart: that one multiplies what is found.
        """
        return float(group["lr"]) / self._reference_lr if self._reference_lr > 0 else 1.0

    @functools.cached_property
    def _reference_lr(self) -> float:
        rates = [(float(group.get("initial_lr", group["lr"])), float(group["lr"])) for group in self.param_groups]
        moving = [(initial, lr) for initial, lr in rates if lr > 0]
        shares = [lr for initial, lr in moving if initial <= 1]
        return max(shares) if shares else min((lr for _, lr in moving), default=0.0)

    @staticmethod
    def _scaled(group: dict[str, Any], step_size: float) -> tuple[float, float]:
        scaled = float(group["lr"]) * step_size
        return scaled, scaled * group["weight_decay"]

    def _locals(self) -> list[Tensor]:
        return [local_shard(p) for p in self.params]

    def _all_chunks(self) -> list[Chunk]:
        return [chunk for chunks in self._chunks for chunk in chunks]

    def _cut(self, group: dict[str, Any], params: list[Tensor]) -> list[Chunk]:
        chunks: list[Chunk] = []
        size = 0
        for p in params:
            step = self.advance(p)
            for piece, grad, *buffers in cut(p, grad_of(p), *(self.state[p][name] for name in self.buffer_names)):
                size += piece.numel()
                if not chunks or (size > piece_size(p) and chunks[-1].params):
                    chunks.append(Chunk(group, buffers={name: [] for name in self.buffer_names}))
                    size = piece.numel()
                chunk = chunks[-1]
                chunk.owners.append(p)
                chunk.params.append(piece)
                chunk.grads.append(grad)
                chunk.steps.append(step)
                chunk.multipliers.append(self.multipliers.get(p, 1.0))
                for name, buffer in zip(self.buffer_names, buffers, strict=True):
                    chunk.buffers[name].append(buffer)
        return chunks

    def products(self, chunk: Chunk, momentum: bool = True) -> list[Tensor]:
        """Return the part of `<g, d>` of each piece of a chunk, a scalar.

        Args:
            chunk (`Chunk`): The chunk. With buffers of before `accumulate` `d` is the last step's direction.
            momentum (`bool`, defaults to `True`): As `slope` takes it.
        """
        return self.products_of(chunk, self.tensors(chunk, momentum), self.divisors(chunk, momentum))

    @staticmethod
    def products_of(chunk: Chunk, tensors: list[Tensor], divisors: list[float]) -> list[Tensor]:
        """Return the products of the gradients of a chunk and tensors over their divisors."""
        products = []
        for grad, tensor, divisor, multiplier in zip(chunk.grads_like(tensors), tensors, divisors, chunk.multipliers):
            product = torch.dot(grad.flatten(), tensor.flatten()) / divisor
            products.append(product if multiplier == 1.0 else product * multiplier)
        return products

    def last_products(self, chunk: Chunk) -> list[Tensor]:
        """Return `products` along the last step's direction, for a chunk with the buffers of before `accumulate`.

        Args:
            chunk (`Chunk`): The chunk, of which nothing is kept.
        """
        return self.products(chunk)

    def _slope_of(self, chunks: list[Chunk], products: list[Tensor]) -> Tensor:
        """Return the part of `<g, d>` of a group, of which a probe moves the ratio of its learning rate."""
        owners = [owner for chunk in chunks for owner in chunk.owners]
        return self._ratio(chunks[0].group) * sum_over_shards(products, owners)

    def _refuse_shared_memory(self) -> None:
        if any(shared and is_dense(p) for p, shared in zip(self._locals(), overlapping(self._locals()))):
            raise ValueError(
                "Parameters must not share memory, as overlapping views of one tensor do: make them one parameter."
            )

    def _begin_saving(self, keep_grads: bool = False) -> None:
        """Note which gradients leave their memory to the saved parameters, and let go of them."""
        # Gradients of a sum may be one and the same tensor, or an expanded one.
        shares = iter(overlapping([grad for chunk in self._all_chunks() for grad in chunk.grads]))
        for chunk in self._all_chunks():
            chunk.is_grad_free = [
                not next(shares) and not keep_grads and not self.keeps_grads and grad.dtype == p.dtype
                for grad, p in zip(chunk.grads, chunk.params)
            ]
        for p in () if keep_grads else self.params:
            p.grad = None  # before the copies: an interrupt must not leave weights there

    @staticmethod
    def save_chunk(chunk: Chunk) -> None:
        """Save where a chunk is, in the memory of its gradients where that is free."""
        chunk.starts = [
            grad.copy_(p) if is_free else p.clone()
            for grad, p, is_free in zip(chunk.grads, chunk.params, chunk.is_grad_free)
        ]

    def _move(self, chunk: Chunk, step_size: float, decay: float) -> None:
        if chunk.starts:
            torch._foreach_copy_(chunk.params, chunk.starts)
        if decay != 0:
            torch._foreach_mul_(chunk.params, 1 - decay)
        factors = [
            -step_size * multiplier / divisor for multiplier, divisor in zip(chunk.multipliers, self.divisors(chunk))
        ]
        self.add(chunk, factors)
