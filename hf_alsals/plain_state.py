"""The plain state of an object, such as a Trainer's counters and metrics, which a probe must not change."""

from collections import deque
from typing import Any

from torch import Tensor

# An attribute with more values is data, such as a list of examples, and no state.
MOST_VALUES = 10_000

PLAIN = (int, bool, float, str, type(None))


def plain_values(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object that are numbers, texts or `None`.

    Args:
        owner (`Any`): The object, with a `__dict__`.
    """
    return {name: value for name, value in vars(owner).items() if isinstance(value, PLAIN)}


class PlainState:
    """The numbers, texts, containers and one-element tensors among an object's attributes, as they stand now.

    Containers and tensors are restored in place, for others may hold them. Any other value counts as a whole: an
    attribute that was bound to it is bound to it again, and what happened inside it stays. So does a container too
    large for `MOST_VALUES`, but that a list is cut back to its length.

    Args:
        owner (`Any`): The object, with a `__dict__`.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._saved: dict[str, Any] = {}
        self._seen: set[int] = set()
        for name, value in vars(owner).items():
            self._left = MOST_VALUES
            self._saved[name] = self._save(value)

    def restore(self) -> None:
        """Set every attribute back to this state; those made since are deleted."""
        attributes = self._owner.__dict__
        for name in attributes.keys() - self._saved.keys():
            del attributes[name]
        for name, restore in self._saved.items():
            attributes[name] = restore()

    def _save(self, value: Any) -> Any:
        """Return a function that brings a value back, and returns it."""
        self._left -= 1
        if isinstance(value, Tensor) and value.numel() == 1:
            number = value.detach().clone()
            return lambda: value if value.equal(number) else _set(value, number)
        if not isinstance(value, (dict, list, deque, set)) or id(value) in self._seen:
            return lambda: value
        self._seen.add(id(value))  # it may hold itself
        if len(value) > self._left:
            length = len(value)
            return lambda: _cut(value, length) if isinstance(value, list) else value
        if isinstance(value, dict):
            items = {key: self._save(item) for key, item in value.items()}
            return lambda: _refill(value, {key: item() for key, item in items.items()})
        if isinstance(value, set):
            members = set(value)
            return lambda: _refill(value, members)
        entries = [self._save(item) for item in value]
        return lambda: _refill(value, [item() for item in entries])


def _refill(container: Any, content: Any) -> Any:
    if not _is_same(container, content):
        container.clear()
        container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
    return container


def _is_same(container: Any, content: Any) -> bool:
    if isinstance(container, set):
        return container == content
    if len(container) != len(content) or any(one is not other for one, other in zip(container, content)):
        return False
    return not isinstance(container, dict) or all(container[key] is item for key, item in content.items())


def _cut(values: list[Any], length: int) -> list[Any]:
    del values[length:]
    return values


def _set(tensor: Tensor, value: Tensor) -> Tensor:
    tensor.detach().copy_(value)
    return tensor
