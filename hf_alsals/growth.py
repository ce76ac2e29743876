"""How the step size grows from one optimizer step to the next. Numbers only, no torch.

A growth rule is a frozen dataclass. Its fields are options of the search; its state is a value that it takes and
returns.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from .checks import check_number


class Growth(Protocol):
    """A growth rule, as [`LineSearch`] calls it.

    Attributes:
        name (`str`): Its name, as in `growth=path`.
        description (`str`): How the step size was found, as a clause for a model card.
        needs_path_slope (`bool`): Whether `follow` reads the path slope.
        least_lr_fraction (`float`): Fraction of the peak learning rate below which the schedule alone sets the step:
            the step size stays, and nothing is searched.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    description: ClassVar[str]
    needs_path_slope: ClassVar[bool]
    least_lr_fraction: ClassVar[float]

    def init(self, initial_step_size: float) -> Any:
        """Return the state before training."""

    def follow(self, state: Any, step_size: float, path_slope: float, is_searched: bool = True) -> tuple[Any, float]:
        """Return the state and the step size of a new optimizer step, before any search; some runs have none."""

    def start(self, state: Any, step_size: float) -> float:
        """Return the step size that a search probes first."""

    def searched(
        self, state: Any, *, start: float, step_size: float, slope: float, accepted: bool, decrease_factor: float
    ) -> Any:
        """Return the state after a search from `start` to `step_size`."""

    def metrics(self, state: Any) -> dict[str, float]:
        """Return what the rule logs, by name."""


def _check_growth_factor(growth_factor: Any) -> None:
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
    needs_path_slope: ClassVar[bool] = False
    least_lr_fraction: ClassVar[float] = 0.0

    growth_factor: float = 1.01

    def __post_init__(self) -> None:
        _check_growth_factor(self.growth_factor)

    def init(self, initial_step_size: float) -> ConstantGrowthState:
        """Return the state before training."""
        return ConstantGrowthState(initial_step_size)

    def follow(
        self, state: ConstantGrowthState, step_size: float, path_slope: float, is_searched: bool = True
    ) -> tuple[ConstantGrowthState, float]:
        """Return both as they are: the step size moves in searches only."""
        return state, step_size

    def start(self, state: ConstantGrowthState, step_size: float) -> float:
        """Return the step size that a search probes first."""
        return state.next_step_size

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


@dataclass(frozen=True)
class PathGrowthState:
    """State of [`PathGrowth`].

    Args:
        mean_slope, mean_size (`float`): Moving averages of the path slopes and of their absolute values.
        log_size, largest_log_size (`float`): Moving average of the logarithms of the absolute values, and its largest
            so far; minus infinity before there is any.
        has_overshot (`bool`): Whether a path slope has been negative.
    """

    mean_slope: float = 0.0
    mean_size: float = 0.0
    log_size: float = -math.inf
    largest_log_size: float = -math.inf
    has_overshot: bool = False

    @property
    def path_slope(self) -> float:
        """The mean path slope over the mean of its absolute values, in [-1, 1]; 0.0 before there are any."""
        return self.mean_slope / self.mean_size if self.mean_size > 0 else 0.0

    @property
    def path_size(self) -> float:
        """The geometric mean of the absolute values over its largest so far, in (0, 1]; 1.0 before there are any."""
        return math.exp(self.log_size - self.largest_log_size) if self.log_size > -math.inf else 1.0


@dataclass(frozen=True)
class PathGrowth:
    """Growth by the slope along the path of training, `p_k = <g_k, w_0 - w_k>` (this package's own).

    `p_k` is the rate at which a new batch's loss falls along the displacement from initialization. It is positive
    while the steps have been too short and negative once they have gone too far. At each step

        eta <- eta * growth_factor ** (damping * (r + overshoot)),    r = mean(p) / mean(|p|) in [-1, 1].

    `damping` is 1 where the exponent is negative. Elsewhere it is `min(1, path_size / least_path_size)`: on memorized
    data the loss falls a little along the path however large the step size is, but then all of `p` is small.
    `path_size` is a geometric mean, which one bad batch cannot lift. Where nothing is searched, training starts low,
    the exponent is `ramp` times as large until a path slope is negative, and it grows to `largest_unsearched` at most.

    `p_k` is the product that D-Adaptation (arXiv 2301.07733), Mechanic (2306.00144) and Prodigy (2306.06101) are built
    on.

    Args:
        growth_factor (`float`, defaults to 1.03): Growth of the step size per step at `r + overshoot = 1`, at least 1.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of its range.

    Example:
        >>> growth = PathGrowth(growth_factor=1.1)
        >>> state, step_size = growth.follow(growth.init(0.1), step_size=0.1, path_slope=2.0)
        >>> state.path_slope, step_size == 0.1 * 1.1**1.3
        (1.0, True)
    """

    name: ClassVar[str] = "path"
    description: ClassVar[str] = (
        "the step size followed the slope along the path of training, bounded by a line search"
    )
    needs_path_slope: ClassVar[bool] = True
    least_lr_fraction: ClassVar[float] = 0.5
    overshoot: ClassVar[float] = 0.3  # at 0 the steps are too short where gradients are mostly noise
    decay: ClassVar[float] = 0.9
    least_path_size: ClassVar[float] = 0.1
    ramp: ClassVar[float] = 6.0
    largest_unsearched: ClassVar[float] = 0.01  # Adam's direction is about 1 in every weight

    growth_factor: float = 1.03

    def __post_init__(self) -> None:
        _check_growth_factor(self.growth_factor)

    def init(self, initial_step_size: float) -> PathGrowthState:
        """Return the state before training."""
        return PathGrowthState()

    def follow(
        self, state: PathGrowthState, step_size: float, path_slope: float, is_searched: bool = True
    ) -> tuple[PathGrowthState, float]:
        """Return the state and the step size after a new batch's path slope.

        Args:
            state (`PathGrowthState`): The state before.
            step_size (`float`): The step size before.
            path_slope (`float`): `<g_k, w_0 - w_k>`, 0.0 at initialization. One that is not finite is left out.
            is_searched (`bool`, defaults to `True`): Whether searches bound the step size.
        """
        if not math.isfinite(path_slope):
            return state, step_size
        new = 1 - self.decay
        state = replace(
            state,
            mean_slope=self.decay * state.mean_slope + new * path_slope,
            mean_size=self.decay * state.mean_size + new * abs(path_slope),
            has_overshot=state.has_overshot or path_slope < 0,
        )
        if path_slope != 0:
            log = math.log(abs(path_slope))
            log_size = self.decay * (log if state.log_size == -math.inf else state.log_size) + new * log
            state = replace(state, log_size=log_size, largest_log_size=max(state.largest_log_size, log_size))
        if state.mean_size == 0:
            return state, step_size
        exponent = state.path_slope + self.overshoot
        if exponent > 0:
            exponent *= min(1.0, state.path_size / self.least_path_size)
        if not is_searched and not state.has_overshot:
            exponent *= self.ramp
        grown = step_size * self.growth_factor**exponent
        return state, grown if is_searched else min(grown, max(step_size, self.largest_unsearched))

    def start(self, state: PathGrowthState, step_size: float) -> float:
        """Return the step size that a search probes first: the one that it has come to."""
        return step_size

    def searched(
        self,
        state: PathGrowthState,
        *,
        start: float,
        step_size: float,
        slope: float,
        accepted: bool,
        decrease_factor: float,
    ) -> PathGrowthState:
        """Return the state as it is: the step size grows in `follow`."""
        return state

    def metrics(self, state: PathGrowthState) -> dict[str, float]:
        """Return `path_slope`, the mean path slope over the mean of its absolute values."""
        return {"path_slope": state.path_slope}
