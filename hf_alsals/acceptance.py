"""Which step sizes are accepted: conditions of sufficient decrease. Numbers only, no torch.

A condition is a frozen dataclass. Its fields are options of the search; its state is a value that it takes and
returns.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from .checks import check_number


class Acceptance(Protocol):
    """A condition on a step size, as [`LineSearch`] calls it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def c(self) -> float:
        """The sufficient-decrease constant."""

    def init(self) -> Any:
        """Return the state before training; it has the attribute `slope`, the smoothed slope."""

    def update(self, state: Any, step_size: float, slope: float, actual_reduction: float) -> Any:
        """Return the state if a search ends at the step size of this probe."""

    def is_sufficient(self, state: Any, step_size: float) -> bool:
        """Return whether the condition holds for a probe, given the state that `update` returned for it."""


@dataclass(frozen=True)
class SmoothedCondition:
    """What the two conditions below share: `c`, `beta3` and the smoothed slope `s_k`.

    Args:
        c (`float`, defaults to 0.3): Sufficient-decrease constant, in (0, 1).
        beta3 (`float`, defaults to 0.99): Decay of the moving averages, in [0, 1).

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of its range.
    """

    c: float = 0.3
    beta3: float = 0.99

    def __post_init__(self) -> None:
        check_number("c", self.c, lambda x: 0 < x < 1, "a number in (0, 1)")
        check_number("beta3", self.beta3, lambda x: 0 <= x < 1, "a number in [0, 1)")

    def _smooth(self, average: float, value: float) -> float:
        return self.beta3 * average + (1 - self.beta3) * value

    def _bound(self, smoothed_slope: float, step_size: float) -> float:
        # Uphill the loss may rise by 1 / c of the predicted reduction, as in the authors' code.
        return (self.c if smoothed_slope > 0 else 1 / self.c) * step_size * smoothed_slope


@dataclass(frozen=True)
class ArmijoState:
    """State of [`ArmijoCondition`].

    Args:
        slope (`float`): Moving average of the slopes, the paper's `f_a`.
        reduction (`float`): Moving average of the actual reductions, the paper's `f_h`.
    """

    slope: float = 0.0
    reduction: float = 0.0


@dataclass(frozen=True)
class ArmijoCondition(SmoothedCondition):
    """The smoothed Armijo condition `h_k(eta) >= c * eta * s_k` (arXiv 2403.18519).

    With slope `a_k` and direction `d_k` of step k

        s_k = beta3 s_{k-1} + (1 - beta3) a_k
        h_k = beta3 h_{k-1} + (1 - beta3) (f_k(w_k) - f_k(w_k - eta d_k))

    Where `s_k` is not positive, uphill, `1 / c` takes the place of `c`. What is not finite is left out of the
    averages. `beta3 = 0` is the Armijo condition of the textbooks. Arguments are those of [`SmoothedCondition`].

    Example:
        >>> condition = ArmijoCondition(c=0.5, beta3=0.0)
        >>> state = condition.update(condition.init(), step_size=0.1, slope=2.0, actual_reduction=0.09)
        >>> condition.is_sufficient(state, step_size=0.1)  # 0.09 < 0.5 * 0.1 * 2.0
        False
    """

    def init(self) -> ArmijoState:
        """Return the state before training."""
        return ArmijoState()

    def update(self, state: ArmijoState, step_size: float, slope: float, actual_reduction: float) -> ArmijoState:
        """Return `s_k` and `h_k` for a probe.

        Args:
            state (`ArmijoState`): The averages before this search.
            step_size (`float`): The step size of the probe.
            slope (`float`): The slope of this search.
            actual_reduction (`float`): The loss at step size 0 less that of the probe.
        """
        if math.isfinite(slope):
            state = replace(state, slope=self._smooth(state.slope, slope))
        if math.isfinite(actual_reduction):
            state = replace(state, reduction=self._smooth(state.reduction, actual_reduction))
        return state

    def is_sufficient(self, state: ArmijoState, step_size: float) -> bool:
        """Return whether `h_k(eta) >= c * eta * s_k`.

        Args:
            state (`ArmijoState`): What `update` returned for the probe.
            step_size (`float`): The step size of the probe.
        """
        return state.reduction >= self._bound(state.slope, step_size)


@dataclass(frozen=True)
class ParabolaState:
    """State of [`ParabolaCondition`].

    Args:
        slope (`float`): Moving average of the slopes.
        curvature (`float`): Moving average of the curvatures `b` of the parabolas `a eta - b eta ** 2`.
    """

    slope: float = 0.0
    curvature: float = 0.0


@dataclass(frozen=True)
class ParabolaCondition(SmoothedCondition):
    """The smoothed Armijo condition with earlier reductions taken at the step size of the probe (this package's own).

    A probe gives the parabola through the slope `a_k` and the actual reduction. The parabolas are averaged:

        s_k = beta3 s_{k-1} + (1 - beta3) a_k
        b_k = beta3 b_{k-1} + (1 - beta3) (eta a_k - (f_k(w_k) - f_k(w_k - eta d_k))) / eta ** 2

    and the step size is accepted if `eta s_k - eta ** 2 b_k >= c * eta * s_k`. In [`ArmijoCondition`] a reduction
    counts as it was at its own step size, so that one bad batch at a large step size judges all small ones. Where
    `s_k` is not positive, uphill, `1 / c` takes the place of `c`. What is not finite is left out of the averages.
    Arguments are those of [`SmoothedCondition`], with defaults of 0.1 for `c` and 0.5 for `beta3`.

    Example:
        >>> condition = ParabolaCondition(c=0.5, beta3=0.0)
        >>> state = condition.update(condition.init(), step_size=0.1, slope=2.0, actual_reduction=0.09)
        >>> round(state.curvature, 6), condition.is_sufficient(state, step_size=0.1)
        (11.0, False)
    """

    c: float = 0.1
    beta3: float = 0.5

    def init(self) -> ParabolaState:
        """Return the state before training."""
        return ParabolaState()

    def update(self, state: ParabolaState, step_size: float, slope: float, actual_reduction: float) -> ParabolaState:
        """Return `s_k` and `b_k` for a probe.

        Args:
            state (`ParabolaState`): The averages before this search.
            step_size (`float`): The step size of the probe.
            slope (`float`): The slope of this search.
            actual_reduction (`float`): The loss at step size 0 less that of the probe.
        """
        if not math.isfinite(slope):
            return state
        if math.isfinite(actual_reduction):
            curvature = (slope - actual_reduction / step_size) / step_size
            state = replace(state, curvature=self._smooth(state.curvature, curvature))
        return replace(state, slope=self._smooth(state.slope, slope))

    def is_sufficient(self, state: ParabolaState, step_size: float) -> bool:
        """Return whether `eta s_k - eta ** 2 b_k >= c * eta * s_k`.

        Args:
            state (`ParabolaState`): What `update` returned for the probe.
            step_size (`float`): The step size of the probe.
        """
        smoothed_reduction = step_size * state.slope - step_size**2 * state.curvature
        return smoothed_reduction >= self._bound(state.slope, step_size)
