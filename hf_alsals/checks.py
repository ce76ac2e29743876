"""Checks of numeric arguments: the message names the argument, what would be right, and the value."""

from collections.abc import Callable
from numbers import Real
from typing import Any


def check_number(name: str, value: Any, is_valid: Callable[[float], bool], expected: str) -> None:
    """Raise unless an argument is a valid number.

    Args:
        name (`str`): The argument's name, for the message.
        value (`Any`): What was passed.
        is_valid (`Callable[[float], bool]`): Whether a number is in range.
        expected (`str`): The range in words, for the message.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}.")
    if not is_valid(float(value)):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
