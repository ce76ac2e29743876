"""Line searches in tests: a loss along a line in numbers, and a line search together with its state."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hf_alsals.line_search import LineSearch
from hf_alsals.presets import line_search_of

OPEN_UNIT = r"a number in \(0, 1\)"
# Wrong options of a line search: the name, the value, the error, and what the message says would be right.
WRONG_OPTIONS = [
    *(("c", value, ValueError, OPEN_UNIT) for value in (0, 1, -0.1, 1.5, math.nan, math.inf)),
    *(("beta3", value, ValueError, r"a number in \[0, 1\)") for value in (-0.01, 1, 1.5, math.nan)),
    *(("growth_factor", value, ValueError, "at least 1") for value in (0.99, 0, -1, math.inf, math.nan)),
    *(("decrease_factor", value, ValueError, OPEN_UNIT) for value in (0, 1, -0.5, 1.1, math.nan)),
    *(("initial_step_size", value, ValueError, "positive finite") for value in (0, -1, math.inf, math.nan)),
    *(("search_interval", value, ValueError, 'at least 1, "adaptive" or "never"') for value in (0, -3, "often")),
    *(("c", value, TypeError, OPEN_UNIT) for value in ("0.3", None, True)),
    *(("beta3", value, TypeError, r"a number in \[0, 1\)") for value in ("0.9", None, False)),
    *(("growth_factor", value, TypeError, "at least 1") for value in ("1.01", None, True)),
    *(("decrease_factor", value, TypeError, OPEN_UNIT) for value in ("0.9", None, True)),
    *(("initial_step_size", value, TypeError, "positive finite") for value in ("0.1", None, True)),
    *(("search_interval", value, TypeError, 'an int, "adaptive" or "never"') for value in (2.0, True, None, [3])),
]


def wrong(*names: str) -> list[tuple[str, Any, type[Exception], str]]:
    """Return the wrong values of some options."""
    return [case for case in WRONG_OPTIONS if case[0] in names]


def quadratic(a: float, b: float) -> Callable[[float], float]:
    """Return the loss at a step size, 0 at step size 0, with the slope `a` and the curvature `b`."""
    return lambda step_size: -a * step_size + 0.5 * b * step_size**2


def recorder(f: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    """Return `f` and the list of step sizes that it is going to be called with."""
    probed: list[float] = []

    def probe(step_size: float) -> float:
        probed.append(step_size)
        return f(step_size)

    return probe, probed


@dataclass(frozen=True)
class NumbersLine:
    """A line whose loss is known by a function."""

    loss: float
    slope: float
    probe: Callable[[float], float]


class HiddenLine:
    """The line of an optimizer step that has no reason to look at it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a step without a search asked for the line's {name}")


class Searching:
    """A line search together with its state.

    Args:
        growth (`str` or `LineSearch`, defaults to `"constant"`): The line search, as `line_search_of` takes it.
        options: Its options.
    """

    def __init__(self, growth: str | LineSearch = "constant", **options: Any) -> None:
        self.line_search = line_search_of(growth, **options)
        self.state = self.line_search.init()

    def search(self, loss: float, slope: float, probe: Callable[[float], float], **step: Any) -> float:
        """Take an optimizer step that searches, and return the step size to take."""
        self.state = self.line_search.step(self.state, NumbersLine(loss, slope, probe), **step)
        assert self.state.searched
        return self.state.taken

    def start(self, *batches: tuple[float, Callable[[float], float]]) -> list[float]:
        """Take the first optimizer steps, each on a slope and a loss along it, and return the step sizes to take."""
        return [self.search(0.0, slope, probe) for slope, probe in batches]

    def accept(self, slope: float = 1.0) -> float:
        """Take an optimizer step whose first probe is accepted."""
        return self.search(0.0, slope, lambda step_size: -1e9)

    def skip(self, **step: Any) -> float:
        """Take an optimizer step that does not search, and return the step size to take."""
        self.state = self.line_search.step(self.state, HiddenLine(), **step)
        assert not self.state.searched
        assert self.state.probes == 0
        return self.state.taken

    @property
    def is_due(self) -> bool:
        """Whether the next optimizer step is one that searches, unless a schedule anneals."""
        return self.line_search.interval.is_due(self.state.interval)

    @property
    def next_probe(self) -> float:
        """The step size that the next search probes first, unless a path slope is followed before."""
        return self.line_search.growth.start(self.state.growth, self.state.step_size)


def initialized(**options: Any) -> Searching:
    """Return the default line search after its first search, at the step size 0.1, which searches at every step."""
    searching = Searching("path", **{"search_interval": 1} | options)
    searching.state = replace(searching.state, is_initialized=True)
    return searching
