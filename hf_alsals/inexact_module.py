"""Which module answers the same input differently from call to call, so that a probe cannot repeat training."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def first_inexact_module(model: nn.Module, closure: Callable[[], Any]) -> str | None:
    """Return the name of the innermost module that answers one input with two outputs, in two calls of a closure.

    Args:
        model (`nn.Module`): The model that the closure calls.
        closure (`Callable`): Computes a loss that should be the same whenever it is called.

    Returns:
        `str` or `None`: The module's name and class, if there is one.
    """
    runs: list[list[tuple[str, Any, Any]]] = []
    for _ in range(2):
        calls: list[tuple[str, Any, Any]] = []

        def note(name: str, calls: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((f"{name} ({type(module).__name__})", _sums_of((args, kwargs)), _sums_of(output)))

        hooks = [
            module.register_forward_hook(functools.partial(note, name, calls), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        try:
            closure()
        finally:
            for hook in hooks:
                hook.remove()
        runs.append(calls)
    for (name, given, answer), (_, same, other) in zip(*runs):
        if given == same and answer != other:
            return name
    return None


def _sums_of(value: Any) -> list[float]:
    if isinstance(value, Tensor):
        return [value.detach().cpu().double().sum().item()]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [number for item in values for number in _sums_of(item)]
