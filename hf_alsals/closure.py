"""The closure of a step: the loss of its batch, and checks that its gradients are those of that loss."""

import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from .shards import grad_of, to_floats

Closure = Callable[[], Tensor | float]

GRADIENTS_BEFORE = (
    "compute loss and gradients before and pass step() a closure without backward() (in Lightning by manual "
    "optimization)"
)


class ReplayedLoss(Protocol):
    """A closure that knows the batch of every step by itself; [`LossReplay`] is one."""

    @property
    def loss(self) -> Tensor:
        """The loss that the gradients came from."""

    @property
    def is_ready(self) -> bool:
        """Whether there is a batch that no step has been taken with."""

    def take_loss(self) -> Tensor:
        """Return that loss to the step that is taken with it, and to no second one."""

    def clear(self) -> None:
        """Forget the batch."""

    def __call__(self) -> Tensor:
        """Return the loss of that batch at the present weights."""


def is_replayed(closure: Closure | ReplayedLoss | None) -> TypeGuard[ReplayedLoss]:
    """Return whether a closure knows the batch of every step by itself."""
    return hasattr(type(closure), "take_loss")


def check_closure(closure: Any) -> None:
    """Raise a TypeError unless a closure can be called."""
    if not callable(closure):
        raise TypeError(f"closure must be a function that returns the loss, got {type(closure).__name__}.")


def compute_loss(
    closure: Closure, params: Iterable[Tensor], *, has_backward: bool, is_accumulated: bool = False
) -> tuple[Tensor | float, bool]:
    """Return the loss of a closure that may compute gradients, and whether it has, once they are seen to be its own.

    Args:
        closure (`Callable[[], Tensor]`): The closure.
        params (iterable of `Tensor`): The parameters.
        has_backward (`bool`): Whether it computed gradients in the last step. Where it did not, it is called under
            `no_grad` first.
        is_accumulated (`bool`, defaults to `False`): Whether it may add to gradients that were there.

    Raises:
        RuntimeError: If gradients are of another loss than that of the closure.
    """
    params = list(params)
    # _version counts changes in place; private, but torch.autograd's own messages name it (torch 2.6 to 2.13).
    before = [None if p.grad is None else (p.grad, p.grad._version) for p in params]
    computed: dict[Tensor, tuple[Tensor, int]] = {}

    def note(p: Tensor) -> None:
        computed[p] = (grad_of(p), grad_of(p)._version)

    handles = [p.register_post_accumulate_grad_hook(note) for p in params if p.requires_grad]
    try:
        with torch.set_grad_enabled(is_accumulated or has_backward):
            loss = closure() if is_accumulated else _call_first(closure)
    finally:
        for handle in handles:
            handle.remove()
    after = [p.grad for p in params]
    fresh = [new is not None and (old is None or new is not old[0]) for old, new in zip(before, after)]
    # With fresh gradients, one that was left alone is of another loss too.
    if not is_accumulated and any(
        old is not None and new is old[0] and (any(fresh) or new._version != old[1]) for old, new in zip(before, after)
    ):
        raise RuntimeError(
            "The closure adds to gradients that were there already, so its loss is not theirs: call "
            f"zero_grad(set_to_none=True) in it, or {GRADIENTS_BEFORE}."
        )
    if any(p.grad is not grad or grad._version != version for p, (grad, version) in computed.items()):
        raise RuntimeError(
            "The closure's gradients are changed after backward(), as clipping and DistributedDataParallel do, so "
            f"they are not those of its loss: {GRADIENTS_BEFORE}, and tell set_clip_coef() of clipping."
        )
    return loss, any(fresh)


def loss_of(closure: Closure) -> float:
    """Return the loss of a closure that has no backward pass, as a number.

    Args:
        closure (`Callable[[], Tensor]`): The closure, which is called once.

    Raises:
        RuntimeError: If it has one.
        TypeError: If it does not return a tensor or a number.
        ValueError: If it returns a tensor of more than one element.
    """
    try:
        loss = closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            "The closure calls backward() though step() was given the loss: leave out one of the two."
        ) from error
    check_loss(loss)
    (number,) = to_floats([loss])
    return number


def warn_unless_repeated(closure: Closure, loss: float) -> None:
    """Warn of a closure that returns another loss than that of the gradients, though no weight has moved.

    Args:
        closure (`Callable[[], Tensor]`): The closure, which is called once.
        loss (`float`): The loss that the gradients came from.
    """
    again = loss_of(closure)
    if not abs(again - loss) <= 1e-3 * abs(loss) + 1e-6:
        warnings.warn(
            f"ALSALS: the closure returns {again:g} where the loss is {loss:g}, with the weights unmoved: it must "
            "repeat the batch that the gradients came from; with dropout make it a LossReplay.",
            stacklevel=5,
        )


def _call_first(closure: Closure) -> Tensor | float:
    try:
        return closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        with torch.enable_grad():
            return closure()


def check_loss(loss: Any) -> None:
    """Raise unless a loss is a scalar.

    Args:
        loss (`Any`): What a closure returned.

    Raises:
        TypeError: If it is neither a tensor nor a number, or complex.
        ValueError: If it is a tensor of more than one element.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"The loss must be a scalar, got a tensor of shape {list(loss.shape)}.")
        if loss.is_complex():
            raise TypeError(f"The loss must be real, got a tensor of {loss.dtype}.")
    elif loss is None:
        raise TypeError("The loss must be a tensor or a number, got NoneType: the closure has to return it.")
    elif isinstance(loss, bool) or not isinstance(loss, Real):
        raise TypeError(f"The loss must be a tensor or a number, got {type(loss).__name__}.")
