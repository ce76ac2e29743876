"""How the step size grows from one optimizer step to the next: by a constant. Numbers only, no torch.

A growth rule is a frozen dataclass. Its fields are options of the search; its state is a value that it takes and
returns.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from .checks import check_number


class Growth(Protocol):
    """A growth rule, as [`LineSearch`] calls it.

    Attributes:
        name (`str`): Its name, as in `growth=path`.
        description (`str`): How the step size was found, as a clause for a model card.
        direction (`str`): The name of the direction that it takes unless another is given.
        needs_path_slope (`bool`): Whether `follow` reads the path slope.
        least_lr_fraction (`float`): Fraction of the peak learning rate below which the schedule alone sets the step:
            the step size stays, and nothing is searched.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    description: ClassVar[str]
    direction: ClassVar[str]
    needs_path_slope: ClassVar[bool]
    least_lr_fraction: ClassVar[float]

    def init(self, initial_step_size: float) -> Any:
        """Return the state before training."""

    def follow(
        self, state: Any, step_size: float, path_slope: Any, is_searched: bool = True, lr_fraction: float = 1.0
    ) -> tuple[Any, float]:
        """Return the state and the step size of a new optimizer step, before any search.

        Args:
            state (`Any`): The state before.
            step_size (`float`): The step size before.
            path_slope (`float` or `PathSlope`): `<g_k, w_0 - w_k>`, NaN where it was not measured.
            is_searched (`bool`, defaults to `True`): Whether there are searches at all; some runs have none.
            lr_fraction (`float`, defaults to 1.0): Learning rate of this step as a fraction of its peak so far.
        """

    def start(self, state: Any, step_size: float) -> float:
        """Return the step size that a search probes first."""

    def largest_doubled(self, state: Any) -> float:
        """Return the largest step size that a search may double to, 0.0 for none."""

    def searched(
        self, state: Any, *, start: float, step_size: float, slope: float, accepted: bool, decrease_factor: float
    ) -> Any:
        """Return the state after a search from `start` to `step_size`."""

    def metrics(self, state: Any) -> dict[str, float]:
        """Return what the rule logs, by name."""


def check_growth_factor(growth_factor: Any) -> None:
    """Raise unless a growth factor is a number in [1, 1000].

    Args:
        growth_factor (`float`): The growth factor.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of its range.
    """
    check_number("growth_factor", growth_factor, lambda x: 1 <= x < math.inf, "a finite number of at least 1")
    check_number("growth_factor", growth_factor, lambda x: x <= 1000, "at most 1000")  # its powers are to be finite


@dataclass(frozen=True)
class ConstantGrowthState:
    """State of [`ConstantGrowth`].

    Args:
        next_step_size (`float`): The step size that the next search probes first.
    """

    next_step_size: float


@dataclass(frozen=True)
class ConstantGrowth:
    """Growth by a constant factor from one search to the next (arXiv 2403.18519, Algorithm 1).

    A search starts at `growth_factor` times the step size that the last one accepted. After a search that accepted
    none it starts one `decrease_factor` below the last start, and after a slope of 0, where any step size is accepted,
    where the last one ended.

    Args:
        growth_factor (`float`, defaults to 1.01): Growth of the step size from one search to the next, at least 1.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of its range.

    Example:
        >>> growth = ConstantGrowth(growth_factor=1.5)
        >>> state = growth.searched(
        ...     growth.init(0.1), start=0.1, step_size=0.1, slope=1.0, accepted=True, decrease_factor=0.9
        ... )
        >>> round(growth.start(state, step_size=0.1), 3)
        0.15
    """

    name: ClassVar[str] = "constant"
    description: ClassVar[str] = "the step size was found by a line search"
    direction: ClassVar[str] = "adam"
    needs_path_slope: ClassVar[bool] = False
    least_lr_fraction: ClassVar[float] = 0.0

    growth_factor: float = 1.01

    def __post_init__(self) -> None:
        check_growth_factor(self.growth_factor)

    def init(self, initial_step_size: float) -> ConstantGrowthState:
        """Return the state before training."""
        return ConstantGrowthState(initial_step_size)

    def follow(
        self,
        state: ConstantGrowthState,
        step_size: float,
        path_slope: Any,
        is_searched: bool = True,
        lr_fraction: float = 1.0,
    ) -> tuple[ConstantGrowthState, float]:
        """Return both as they are: the step size moves in searches only."""
        return state, step_size

    def start(self, state: ConstantGrowthState, step_size: float) -> float:
        """Return the step size that a search probes first."""
        return state.next_step_size

    def largest_doubled(self, state: ConstantGrowthState) -> float:
        """Return 0.0: it grows by its factor."""
        return 0.0

    def searched(
        self,
        state: ConstantGrowthState,
        *,
        start: float,
        step_size: float,
        slope: float,
        accepted: bool,
        decrease_factor: float,
    ) -> ConstantGrowthState:
        """Return the state after a search from `start` to `step_size`."""
        if not accepted:  # costs the next search one probe, not a hundred
            return ConstantGrowthState(start * decrease_factor)
        return ConstantGrowthState(step_size if slope == 0 else step_size * self.growth_factor)

    def metrics(self, state: ConstantGrowthState) -> dict[str, float]:
        """Return nothing: all there is to log is the search's."""
        return {}
