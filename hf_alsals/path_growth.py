"""How the step sizes follow the slope along the path of training. Numbers only, no torch."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

from .growth import check_growth_factor


class PathSlope(NamedTuple):
    """What [`PathGrowth`] follows: the slope of a new batch along the path of training.

    Args:
        slope (`float`): `p_k = <g_k, w_0 - w_k>`, 0.0 at initialization.
        settled (`float`): The same up to where training was some three steps ago, along the last step: `p_k - 3 eta
            <g_k, d_{k-1}>`, with Adam's own direction. Steps to and fro across sharp directions do not count in it.
        weight_scale (`float`, defaults to infinity): Scale of the first weights, where it is known.
    """

    slope: float
    settled: float
    weight_scale: float = math.inf

    @classmethod
    def of(cls, path_slope: "float | PathSlope") -> "PathSlope":
        """Return a path slope, of which a plain number says nothing about the last steps."""
        return path_slope if isinstance(path_slope, PathSlope) else cls(path_slope, path_slope)


@dataclass(frozen=True)
class PathAverages:
    """Moving averages of the path slopes of one tensor, or of several together.

    Args:
        mean_slope, mean_size (`float`): Of the path slopes, and of their absolute values.
        settled_slope, settled_size (`float`): The same of the settled ones.
        steps (`float`): How many path slopes there have been.
        shrinking_steps (`float`): At how many since the overshoot `r` has been below `-overshoot`, so that the step
            size shrank; -1 before. There both path slopes, over the means of their absolute values, are below it.
    """

    mean_slope: float = 0.0
    mean_size: float = 0.0
    settled_slope: float = 0.0
    settled_size: float = 0.0
    steps: float = 0
    shrinking_steps: float = -1

    decay: ClassVar[float] = 0.9
    first_steps: ClassVar[int] = 40  # the steps of a start turn back, which looks like an overshoot
    overshoot: ClassVar[float] = 0.3
    clear: ClassVar[float] = 0.75  # a q above it says that nearly all of the way is still right

    @property
    def path_slope(self) -> float:
        """The mean path slope over the mean of its absolute values, in [-1, 1]; 0.0 before there are any."""
        return self.mean_slope / self.mean_size if self.mean_size > 0 else 0.0

    @property
    def settled_path_slope(self) -> float:
        """The same of the settled path slopes."""
        return self.settled_slope / self.settled_size if self.settled_size > 0 else 0.0

    @property
    def r(self) -> float:
        """What the step size follows, in [-1, 1]: see [`PathGrowth`]."""
        p, q = self.path_slope, self.settled_path_slope
        if self.shrinking_steps >= 0:
            return (p + q) / 2
        if self.steps <= self.first_steps:
            return q
        return max(q + min(p, 0.0) * min(1.0, (1 - q) / (1 - self.clear)), -1.0)

    def averaged(self, path_slope: PathSlope) -> Self:
        """Return the averages with one more path slope; one that is not finite is left out."""
        slope, settled, _ = path_slope
        if not (math.isfinite(slope) and math.isfinite(settled)):
            return self
        new = 1 - self.decay
        averages = replace(
            self,
            mean_slope=self.decay * self.mean_slope + new * slope,
            mean_size=self.decay * self.mean_size + new * abs(slope),
            settled_slope=self.decay * self.settled_slope + new * settled,
            settled_size=self.decay * self.settled_size + new * abs(settled),
            steps=self.steps + 1,
        )
        if self.shrinking_steps >= 0:
            return replace(averages, shrinking_steps=self.shrinking_steps + (averages.r < -self.overshoot))
        largest = max(averages.path_slope, averages.settled_path_slope)
        has_overshot = averages.steps > self.first_steps and largest < -self.overshoot
        return replace(averages, shrinking_steps=0) if has_overshot else averages


@dataclass(frozen=True)
class PathGrowthState(PathAverages):
    """State of [`PathGrowth`]: the averages of the hidden matrices together, with what else it notes.

    Args:
        log_size, largest_log_size (`float`): Moving average of the logarithms of the absolute values, and its largest
            so far; minus infinity before there is any.
        has_gone_back (`bool`): Whether a path slope has been negative.
        has_backtracked (`bool`): Whether a search has rejected a step size.
        weight_scale (`float`): Scale of the first weights; infinity where it is not known.
        lr_fraction (`float`): Learning rate of the last step as a fraction of its peak so far.
        schedule_fall (`float`): By how much the schedule has lowered its logarithm in this step.
    """

    log_size: float = -math.inf
    largest_log_size: float = -math.inf
    has_gone_back: bool = False
    has_backtracked: bool = False
    weight_scale: float = math.inf
    lr_fraction: float = 1.0
    schedule_fall: float = 0.0

    @property
    def path_size(self) -> float:
        """The geometric mean of the absolute values over its largest so far, in (0, 1]; 1.0 before there are any."""
        return math.exp(self.log_size - self.largest_log_size) if self.log_size > -math.inf else 1.0


@dataclass(frozen=True)
class TensorState(PathAverages):
    """The averages of one tensor, with its step size.

    Args:
        log_multiplier (`float`): Logarithm of its step size over the common one.
    """

    log_multiplier: float = 0.0

    @property
    def multiplier(self) -> float:
        """Its step size over the common one, rounded to quarters of a power of two: few values, few kernels."""
        return 2 ** (round(4 * self.log_multiplier / math.log(2)) / 4)


@dataclass(frozen=True)
class PathGrowth:
    """Growth by the slope along the path of training, `p_k = <g_k, w_0 - w_k>` (this package's own).

    `p_k` is the rate at which a new batch's loss falls along the displacement from initialization. It is positive
    while the steps have been too short and negative once they have gone too far. At each step

        log eta <- log eta + gain * damping * (r + overshoot)

    for all hidden matrices together. With `p` for the mean path slope over the mean of its absolute values, and `q`
    for the same of the settled path slopes (see [`PathSlope`]), both in [-1, 1], `r` is

        q                                                         in the first 40 steps
        max(q + min(p, 0) * min(1, (1 - q) / (1 - clear)), -1)    until the overshoot
        (p + q) / 2                                               from the overshoot on

    The overshoot is where both are below `-overshoot`, after the first 40 steps. `gain` is `log(growth_factor)` at
    first, and `settling / (settling + n)` of that once the step size has shrunk at `n` steps since the overshoot
    (Robbins-Monro; that the steps back are what counts is Kesten's, 1958). From then on, too, every tensor has a
    multiplier, which follows its own path slopes by the same rule, less `least_lead` where it grows, and is never
    below 1. The step size does not grow beyond `largest_share` of the scale of the first weights: the geometric mean
    of the hidden matrices' root mean squares. After `bounded_steps` steps that bound falls as `1 / sqrt(k)`: `k` steps
    in random directions go `sqrt(k)` as far as one.

    `damping` is 1 where the exponent is negative. Elsewhere it is `min(1, path_size / least_path_size)`: on memorized
    data the loss falls a little along the path however large the step size is, but then all path slopes are small.
    `path_size` is a geometric mean, which one bad batch cannot lift. What the schedule takes off counts: the step size
    falls only by what the rule takes off more than the schedule in the same step. Where nothing is searched, training
    starts low, the exponent is `ramp` times as large until a path slope is negative, and it grows to
    `largest_unsearched` at most, which falls likewise.

    Until the overshoot and the first rejection the step size is far too small where `q` is above `least_path_slope`,
    in the first 40 steps `p` above `least_first_path_slope` too. Then it grows `acceleration` times as fast, and a
    search may double it.

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
        >>> state.path_slope, round(step_size / 0.1 / 1.1**2.6, 6)  # twice 1 + 0.3: far too small
        (1.0, 1.0)
    """

    name: ClassVar[str] = "path"
    description: ClassVar[str] = (
        "the step sizes followed the slope along the path of training, bounded by a line search"
    )
    direction: ClassVar[str] = "nadam"
    needs_path_slope: ClassVar[bool] = True
    least_lr_fraction: ClassVar[float] = 0.5
    # At 0 the steps are too short where gradients are mostly noise.
    overshoot: ClassVar[float] = PathAverages.overshoot
    settling: ClassVar[float] = 40.0
    largest_share: ClassVar[float] = 0.45
    bounded_steps: ClassVar[int] = 400
    least_lead: ClassVar[float] = 0.3  # r of one tensor is noisier than that of all, and so nearer to 0
    largest_multiplier: ClassVar[float] = 32.0
    largest_hidden_multiplier: ClassVar[float] = 4.0
    least_path_size: ClassVar[float] = 0.1
    acceleration: ClassVar[float] = 2.0
    ramp: ClassVar[float] = 6.0
    largest_unsearched: ClassVar[float] = 0.01  # Adam's direction is about 1 in every weight
    least_path_slope: ClassVar[float] = 0.75
    least_first_path_slope: ClassVar[float] = 0.9

    growth_factor: float = 1.03

    def __post_init__(self) -> None:
        check_growth_factor(self.growth_factor)

    def init(self, initial_step_size: float) -> PathGrowthState:
        """Return the state before training."""
        return PathGrowthState()

    def follow(
        self,
        state: PathGrowthState,
        step_size: float,
        path_slope: float | PathSlope,
        is_searched: bool = True,
        lr_fraction: float = 1.0,
    ) -> tuple[PathGrowthState, float]:
        """Return the state and the step size after a new batch's path slope.

        Args:
            state (`PathGrowthState`): The state before.
            step_size (`float`): The step size before.
            path_slope (`float` or `PathSlope`): That of the hidden matrices. One that is not finite is left out.
            is_searched (`bool`, defaults to `True`): Whether searches bound the step size.
            lr_fraction (`float`, defaults to 1.0): Learning rate of this step as a fraction of its peak so far,
                positive.
        """
        path_slope = PathSlope.of(path_slope)
        slope = path_slope.slope
        fall_before = self.bound_fall(state)
        state = state.averaged(path_slope)
        if not math.isfinite(slope):
            return state, step_size
        state = replace(
            state,
            has_gone_back=state.has_gone_back or slope < 0,
            weight_scale=min(state.weight_scale, path_slope.weight_scale),
            lr_fraction=lr_fraction,
            schedule_fall=max(math.log(state.lr_fraction / lr_fraction), 0.0),
        )
        if slope != 0:
            log = math.log(abs(slope))
            log_size = log if state.log_size == -math.inf else state.decay * state.log_size + (1 - state.decay) * log
            state = replace(state, log_size=log_size, largest_log_size=max(state.largest_log_size, log_size))
        if state.mean_size == 0:
            return state, step_size
        log_growth = self.log_growth(state, state)
        if not is_searched:
            log_growth *= 1.0 if state.has_gone_back else self.ramp
            largest = self.largest_unsearched * self.bound_fall(state)
        else:
            log_growth *= self.acceleration if log_growth > 0 and self.is_far_too_small(state) else 1.0
            largest = self.largest(state)
        grown = step_size * math.exp(log_growth)
        # What is above the bound is not cut, but falls with it.
        return state, min(grown, max(step_size * self.bound_fall(state) / fall_before, largest))

    def largest(self, state: PathGrowthState) -> float:
        """Return the largest step size that it grows to."""
        return self.largest_share * state.weight_scale * self.bound_fall(state)

    def bound_fall(self, averages: PathAverages) -> float:
        """Return by what the largest step size is multiplied after the steps so far, 1.0 at first."""
        return math.sqrt(self.bounded_steps / max(averages.steps, self.bounded_steps))

    def log_growth(self, averages: PathAverages, common: PathGrowthState) -> float:
        """Return by how much the logarithm of a step size grows in a step.

        Args:
            averages (`PathAverages`): The averages of what moves by it.
            common (`PathGrowthState`): The state of all hidden matrices together, whose `path_size` damps it, and
                which knows what the schedule takes off.
        """
        log_growth = self.gain(averages) * (averages.r + self.overshoot)
        if log_growth < 0:
            return min(log_growth + common.schedule_fall, 0.0)
        return log_growth * min(1.0, common.path_size / self.least_path_size)

    def gain(self, averages: PathAverages) -> float:
        """Return by how much the logarithm of a step size grows in a step at `r + overshoot = 1`.

        Args:
            averages (`PathAverages`): The averages of what moves by it.
        """
        return math.log(self.growth_factor) * self.settling / (self.settling + max(averages.shrinking_steps, 0))

    def follow_tensor(
        self,
        state: TensorState,
        path_slope: PathSlope,
        common: PathGrowthState,
        is_hidden: bool,
        largest: float = math.inf,
    ) -> TensorState:
        """Return the state of a tensor after a new batch's path slope.

        Args:
            state (`TensorState`): The state before.
            path_slope (`PathSlope`): That of the tensor.
            common (`PathGrowthState`): The state that `follow` returned.
            is_hidden (`bool`): Whether the tensor is a hidden matrix.
            largest (`float`, defaults to infinity): The largest multiplier, where it is below those of the class.
        """
        state = state.averaged(path_slope)
        if common.shrinking_steps < 0:
            return replace(state, shrinking_steps=-1)
        if state.settled_size == 0:  # nothing is known of it
            return state
        largest = min(largest, self.largest_hidden_multiplier if is_hidden else self.largest_multiplier)
        # Over what the rule says of all: where a bound holds the common step size, nothing leads for that.
        lead = self.log_growth(state, common) - self.log_growth(common, common)
        if lead > 0:
            lead = max(lead - self.least_lead * self.gain(state), 0.0)
        log_multiplier = state.log_multiplier + lead
        return replace(state, log_multiplier=max(min(log_multiplier, math.log(max(largest, 1.0))), 0.0))

    def start(self, state: PathGrowthState, step_size: float) -> float:
        """Return the step size that a search probes first: the one that it has come to."""
        return step_size

    def is_far_too_small(self, state: PathGrowthState) -> bool:
        """Return whether nearly all of the way is still right, and no step size was rejected.

        Args:
            state (`PathGrowthState`): The state of this step, before any search.
        """
        if state.has_backtracked or state.shrinking_steps >= 0 or state.settled_path_slope <= self.least_path_slope:
            return False
        # A few steps say little, and a pretrained model does not come back.
        return state.steps > state.first_steps or state.path_slope > self.least_first_path_slope

    def largest_doubled(self, state: PathGrowthState) -> float:
        """Return the largest step size that a search may double to, 0.0 for none.

        Args:
            state (`PathGrowthState`): The state before the search.
        """
        return self.largest(state) if self.is_far_too_small(state) else 0.0

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
        """Return the state after a search, which notes whether a step size was rejected."""
        return replace(state, has_backtracked=state.has_backtracked or not accepted or step_size < start)

    def metrics(self, state: PathGrowthState) -> dict[str, float]:
        """Return `path_slope`, the mean path slope over the mean of its absolute values."""
        return {"path_slope": state.path_slope}
