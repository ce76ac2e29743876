"""The default of this package: a step size that follows the slope along the path, and a line search that bounds it."""

import math
from collections.abc import Callable
from typing import Literal

from .line_search import ArmijoLineSearch


class PathSearch(ArmijoLineSearch):
    """Step size that follows the slope along the path of training, bounded by the smoothed Armijo condition.

    Not of the paper. The path slope `<g_k, w_0 - w_k>` is the decrease of a new batch's loss for going on along the
    way from the first weights to the present ones. It is positive while the steps have been too short and negative
    once they have gone too far, as at the end of a line search over the whole of training, and it costs no probe. At
    each step the step size is multiplied by `growth_factor ** (r + overshoot)`, where `r`, between -1 and 1, is the
    average of the path slopes over that of their absolute values. An exponent above 0 is multiplied by
    `path_size / least_path_size`, if that is below 1, where `path_size` is the geometric average of the absolute
    values (which one bad batch cannot lift) as a share of its largest: the loss of data that is known by heart falls
    a little along the path however large the step size is.

    Searches bound it: they probe the step size that it has come to, and multiply by `decrease_factor` until the
    smoothed decrease is at least `c` times the smoothed prediction, which is the step size times the smoothed slope.
    The decreases of earlier batches are taken at the step size of the probe, by the parabolas through what was
    measured, and not at their own, as in arXiv 2403.18519: an old decrease does not judge a new step size. One search
    halves the step size at most (or takes `decrease_factor`, if that is less), for its batch may be a bad one, and the
    next step searches on only if it met a loss that is not finite. Uphill, where the smoothed slope is not positive,
    the loss may rise by `1 / c` of the prediction. The first search looks for the largest step size with a sufficient
    decrease, and training starts at `first_share` of that, for what a first batch allows is mostly noise.

    Once a schedule has brought the learning rate below half of its peak, the step size stays, and nothing is searched.

    Args:
        c (`float`, defaults to 0.3): Share of the predicted decrease that must be reached, in (0, 1).
        beta3 (`float`, defaults to 0.5): Decay of the averages of slopes and curvatures, in [0, 1).
        growth_factor (`float`, defaults to 1.03): Growth of the step size a step at `r + overshoot = 1`, at least 1.
        decrease_factor (`float`, defaults to 0.9): Shrinkage of the step size after a rejected probe, in (0, 1).
        initial_step_size (`float`, defaults to 0.1): Step size of the first probe, positive. One below 0.1 is doubled
            until it is not, for the decrease of a small one may be rounding.
        search_interval (`int` or `"adaptive"`, defaults to 10): Steps from one search to the next. `"adaptive"`
            searches the more often the more the step size moves, at least every 10 steps.

    Attributes:
        path_slope (`float`): The average of path slopes over that of their absolute values, in [-1, 1].
        path_size (`float`): The geometric average of their absolute values as a share of its largest, in (0, 1].
        is_annealing (`bool`): Whether the schedule is below half of its peak.
        started (`bool`): Whether a first search has found a step size; before, no step is taken.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is outside the range given above.
    """

    overshoot = 0.3  # with none the steps are too short where gradients are mostly noise
    path_decay = 0.9
    least_path_size = 0.1
    first_share = 0.1
    least_first_probe = 0.1
    max_first_probes = 30  # downwards: to 2 ** -29 of the first
    largest_first_step_size = 10.0  # Adam's direction is about 1 in every weight

    _state = (
        *ArmijoLineSearch._state,
        "started",
        "smoothed_curvature",
        "smoothed_path_slope",
        "smoothed_path_size",
        "log_path_size",
        "largest_log_path_size",
    )

    def __init__(
        self,
        c: float = 0.3,
        beta3: float = 0.5,
        growth_factor: float = 1.03,
        decrease_factor: float = 0.9,
        initial_step_size: float = 0.1,
        search_interval: int | Literal["adaptive"] = 10,
    ) -> None:
        super().__init__(c, beta3, growth_factor, decrease_factor, initial_step_size, search_interval)
        self.max_probes = 1 + max(1, math.floor(math.log(0.5) / math.log(decrease_factor)))
        self.started = False
        self.smoothed_curvature = 0.0
        self.smoothed_path_slope = 0.0
        self.smoothed_path_size = 0.0
        self.log_path_size = self.largest_log_path_size = -math.inf
        self.is_annealing = False

    @property
    def path_slope(self) -> float:
        """The average of path slopes over that of their absolute values, 0.0 before there are any."""
        return self.smoothed_path_slope / self.smoothed_path_size if self.smoothed_path_size > 0 else 0.0

    @property
    def path_size(self) -> float:
        """The geometric average of the path slopes' absolute values as a share of its largest, 1.0 before any."""
        return math.exp(self.log_path_size - self.largest_log_path_size) if self.log_path_size > -math.inf else 1.0

    @property
    def first_probe(self) -> float:
        """The step size of the first probe: `initial_step_size`, doubled until it is at least 0.1."""
        step_size = self.initial_step_size
        while step_size < self.least_first_probe:
            step_size *= 2
        return step_size

    def heed_schedule(self, schedule: float) -> None:
        """Note whether the schedule anneals this step, in which case there is nothing to follow or to search.

        Args:
            schedule (`float`): The learning rate of this step as a share of its peak so far.
        """
        self.is_annealing = schedule < 0.5

    def follow(self, path_slope: float) -> None:
        """Let the step size follow the path slope of a new batch.

        Args:
            path_slope (`float`): `<g_k, w_0 - w_k>`, 0.0 at the first weights. One that is not finite is left out.
        """
        if not math.isfinite(path_slope):
            return
        share = 1 - self.path_decay
        self.smoothed_path_slope = self.path_decay * self.smoothed_path_slope + share * path_slope
        self.smoothed_path_size = self.path_decay * self.smoothed_path_size + share * abs(path_slope)
        if path_slope != 0:
            size = math.log(abs(path_slope))
            last = size if self.log_path_size == -math.inf else self.log_path_size
            self.log_path_size = self.path_decay * last + share * size
            self.largest_log_path_size = max(self.largest_log_path_size, self.log_path_size)
        if self.started and self.smoothed_path_size > 0:
            exponent = self.path_slope + self.overshoot
            if exponent > 0:
                exponent *= min(1.0, self.path_size / self.least_path_size)
            self.step_size *= self.growth_factor**exponent
            self.trial_step_size = self.step_size

    def is_due(self) -> bool:
        """Return whether the next optimizer step is one that searches."""
        return super().is_due() and not (self.is_annealing and self.started)

    def search(self, loss: float, slope: float, probe: Callable[[float], float]) -> float:
        """Find the step size of this optimizer step.

        Nothing of the search changes when `probe` raises.

        Args:
            loss (`float`): Loss at step size 0.
            slope (`float`): Decrease of the loss per unit of step size at step size 0.
            probe (`Callable[[float], float]`): Returns the loss at a step size. A non-finite loss rejects it.

        Returns:
            `float`: The accepted step size. After too many rejections it is the smallest one tried, or 0.0 if not
            even that lowers the loss.
        """
        if not self.started:
            return self._first_search(loss, slope, probe)
        taken = super().search(loss, slope, probe)
        self.trial_step_size = self.step_size  # it grows in follow()
        if math.isfinite(self.decrease):  # a bad batch is often followed by others, along the same momentum
            self.steps_until_search = self._interval() - 1
        return taken

    def _first_search(self, loss: float, slope: float, probe: Callable[[float], float]) -> float:
        decreases: dict[float, float] = {}

        def is_sufficient(step_size: float) -> bool:
            decreases[step_size] = decrease = loss - probe(step_size)
            return math.isfinite(decrease) and decrease >= self.c * step_size * slope

        found = 0.0
        if 0 < slope < math.inf:
            limit = max(self.largest_first_step_size, self.initial_step_size)
            trial = self.first_probe
            if is_sufficient(trial):
                found = trial
                while 2 * found <= limit and is_sufficient(2 * found):
                    found *= 2
            while found == 0 and len(decreases) < self.max_first_probes:
                trial *= 0.5
                found = trial if is_sufficient(trial) else 0.0
            if found == 0:  # where steps are too small to show in the loss, they do no harm
                shown = min((size for size, decrease in decreases.items() if decrease != 0), default=math.inf)
                found = max((size for size in decreases if size < shown), default=0.0)
            for fraction in (0.5, 0.25, 0.125) if found > 0 else ():  # to a tenth, whatever it was looked for from
                if found * 2**fraction <= limit and is_sufficient(found * 2**fraction):
                    found *= 2**fraction
        last = found or min(decreases, default=0.0)
        self.slope, self.decrease, self.prediction = slope, decreases.get(last, 0.0), last * slope
        self.probes, self.searched = len(decreases), True
        self.total_probes += self.probes
        self.started = self.accepted = found > 0
        if self.started:
            self.step_size = self.trial_step_size = self.first_share * found
            self.fast_step_size = 0.1 * self.step_size
            self.slow_step_size = 0.01 * self.step_size
            self.steps_until_search = self._interval() - 1
        return self.step_size if self.started else 0.0

    def _smooth_decrease(self, step_size: float, slope: float, decrease: float) -> float:
        curvature = self._smooth_curvature(step_size, slope, decrease)
        return step_size * self._smooth(slope) - step_size**2 * curvature

    def _remember(self, step_size: float, slope: float, decrease: float) -> None:
        if math.isfinite(decrease):
            self.smoothed_curvature = self._smooth_curvature(step_size, slope, decrease)
        self.smoothed_slope = self._smooth(slope)

    def _smooth_curvature(self, step_size: float, slope: float, decrease: float) -> float:
        """Return the average of what the decreases lack to their predictions, by the square of the step size."""
        if not math.isfinite(slope):
            return self.smoothed_curvature
        return self.beta3 * self.smoothed_curvature + (1 - self.beta3) * (slope - decrease / step_size) / step_size
