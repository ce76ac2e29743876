"""How many optimizer steps lie between two searches. Numbers only, no torch."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class IntervalState:
    """State of every interval, so that a resumed run may take another one.

    Args:
        steps_left (`int`): Optimizer steps until the next search.
        fast_step_size, slow_step_size (`float`): Moving averages of the step size, with decays 0.9 and 0.99.
    """

    steps_left: int = 0
    fast_step_size: float = 0.0
    slow_step_size: float = 0.0


@dataclass(frozen=True)
class Interval:
    """The steps from one search to the next; a subclass says how many."""

    def init(self) -> IntervalState:
        """Return the state before training, when a search is due."""
        return IntervalState()

    def is_due(self, state: IntervalState) -> bool:
        """Return whether the next optimizer step is one that searches."""
        return state.steps_left <= 0

    def skipped(self, state: IntervalState) -> IntervalState:
        """Return the state after an optimizer step without a search."""
        return replace(state, steps_left=max(state.steps_left - 1, 0))

    def searched(self, state: IntervalState, step_size: float, again: bool) -> IntervalState:
        """Return the state after a search.

        Args:
            state (`IntervalState`): The state before.
            step_size (`float`): The step size that the search ended at.
            again (`bool`): Whether the next optimizer step is to search in any case.
        """
        state = IntervalState(
            fast_step_size=0.9 * state.fast_step_size + 0.1 * step_size,
            slow_step_size=0.99 * state.slow_step_size + 0.01 * step_size,
        )
        return state if again else replace(state, steps_left=self.length(state) - 1)

    def resumed(self, state: IntervalState) -> IntervalState:
        """Return the state of another interval as this one takes it over."""
        return state

    def length(self, state: IntervalState) -> int:
        """Return the optimizer steps from the search just done to the next."""
        raise NotImplementedError


@dataclass(frozen=True)
class EverySteps(Interval):
    """A search every so many optimizer steps.

    Args:
        search_interval (`int`, defaults to 1): Optimizer steps from one search to the next.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is less than 1.
    """

    search_interval: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.search_interval, bool) or not isinstance(self.search_interval, (int, str)):
            raise TypeError(f'search_interval must be an int, "adaptive" or "never", got {self.search_interval!r}.')
        if isinstance(self.search_interval, str) or self.search_interval < 1:
            raise ValueError(
                f'search_interval must be at least 1, "adaptive" or "never", got {self.search_interval!r}.'
            )

    def length(self, state: IntervalState) -> int:
        """Return `search_interval`."""
        return self.search_interval

    def resumed(self, state: IntervalState) -> IntervalState:
        """Return the state with the next search no further off than this interval allows."""
        return replace(state, steps_left=min(state.steps_left, self.search_interval - 1))


@dataclass(frozen=True)
class AdaptiveInterval(Interval):
    """The more searches the more the step size moves, at least one every 10 steps (SaLSA, arXiv 2407.20650).

    The interval is `1 / (ratio - 1)`, rounded up, where `ratio` is that of the larger to the smaller of two moving
    averages of the step size.
    """

    search_interval: Literal["adaptive"] = "adaptive"

    def length(self, state: IntervalState) -> int:
        """Return the interval that the two averages ask for."""
        fast, slow = state.fast_step_size, state.slow_step_size
        ratio = max(fast / slow, slow / fast)
        return 10 if ratio <= 1.1 else math.ceil(1 / (ratio - 1))


@dataclass(frozen=True)
class Never(Interval):
    """No search at all: the growth rule alone moves the step size, and the closure is called for no probe."""

    search_interval: Literal["never"] = "never"

    def is_due(self, state: IntervalState) -> bool:
        """Return `False`."""
        return False


def interval_of(search_interval: Any) -> Interval:
    """Return the interval that the option `search_interval` asks for.

    Args:
        search_interval (`int`, `"adaptive"` or `"never"`): The option.

    Raises:
        TypeError: If it is neither an int nor text.
        ValueError: If it is less than 1, or other text.
    """
    for interval in (AdaptiveInterval(), Never()):
        if search_interval == interval.search_interval:
            return interval
    return EverySteps(search_interval)
