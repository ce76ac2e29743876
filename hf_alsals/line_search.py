"""The line search: numbers in, a step size out. No tensors, no model, no torch."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal


def check_number(name: str, value: Any, valid: Callable[[float], bool], expected: str) -> None:
    """Raise unless an argument is a valid number.

    Args:
        name (`str`): The argument's name, for the message.
        value (`Any`): What was passed.
        valid (`Callable[[float], bool]`): Whether a number is in range.
        expected (`str`): What the range is in words, for the message.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}.")
    if not valid(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


class ArmijoLineSearch:
    """Backtracking line search on the smoothed Armijo condition `h(eta) >= c * eta * s` (ALSALS, arXiv 2403.18519).

    `s` is the moving average of the slope and `h` that of the loss decrease. A search probes the loss at the last
    accepted step size times `growth_factor` and multiplies by `decrease_factor` until the condition holds, or two
    probes in a row show the loss at step size 0, to the bit: a still smaller step would not show either.

    Args:
        c (`float`, defaults to 0.3): Share of the predicted decrease that must be reached, in (0, 1).
        beta3 (`float`, defaults to 0.99): Decay of both moving averages, in [0, 1); 0 is the plain Armijo condition.
        growth_factor (`float`, defaults to 1.01): Growth of the step size from one search to the next, at least 1.
        decrease_factor (`float`, defaults to 0.9): Shrinkage of the step size after a rejected probe, in (0, 1).
        initial_step_size (`float`, defaults to 0.1): Step size of the first probe, positive.
        search_interval (`int` or `"adaptive"`, defaults to 1): Steps from one search to the next. `"adaptive"`
            searches the more often the more the step size moves, at least every 10 steps (SaLSA, arXiv 2407.20650).

    Attributes:
        step_size (`float`): The step size that the last search ended at; `initial_step_size` before the first.
        slope, decrease, prediction (`float`): Slope, loss decrease and predicted decrease (step size times slope) of
            the last search, unsmoothed; 0.0 before the first.
        armijo_ratio (`float`): Decrease over prediction of the last search, which the condition holds against `c`.
        probes (`int`), searched (`bool`): Probes of the last optimizer step, and whether it searched at all.
        accepted (`bool`): Whether the last search ended at a step size with sufficient decrease.
        total_probes (`int`): Probes of all optimizer steps.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is outside the range given above.
    """

    _state = (
        "step_size",
        "trial_step_size",
        "smoothed_slope",
        "smoothed_decrease",
        "fast_step_size",
        "slow_step_size",
        "steps_until_search",
        "slope",
        "decrease",
        "prediction",
        "total_probes",
    )

    max_probes = 100  # as in the authors' code: 0.9 ** 100 shrinks a step size to 3e-5 of itself

    def __init__(
        self,
        c: float = 0.3,
        beta3: float = 0.99,
        growth_factor: float = 1.01,
        decrease_factor: float = 0.9,
        initial_step_size: float = 0.1,
        search_interval: int | Literal["adaptive"] = 1,
    ) -> None:
        check_number("c", c, lambda x: 0 < x < 1, "a number in (0, 1)")
        check_number("beta3", beta3, lambda x: 0 <= x < 1, "a number in [0, 1)")
        check_number("growth_factor", growth_factor, lambda x: 1 <= x < math.inf, "a finite number of at least 1")
        check_number("decrease_factor", decrease_factor, lambda x: 0 < x < 1, "a number in (0, 1)")
        check_number("initial_step_size", initial_step_size, lambda x: 0 < x < math.inf, "a positive finite number")
        if search_interval != "adaptive":
            if isinstance(search_interval, (bool, float)) or not isinstance(search_interval, (int, str)):
                raise TypeError(f'search_interval must be an int or "adaptive", got {search_interval!r}.')
            if isinstance(search_interval, str) or search_interval < 1:
                raise ValueError(f'search_interval must be at least 1 or "adaptive", got {search_interval!r}.')
        self.c = c
        self.beta3 = beta3
        self.growth_factor = growth_factor
        self.decrease_factor = decrease_factor
        self.initial_step_size = initial_step_size
        self.search_interval = search_interval

        self.step_size = float(initial_step_size)
        self.trial_step_size = float(initial_step_size)
        self.smoothed_slope = 0.0
        self.smoothed_decrease = 0.0
        self.fast_step_size = 0.0
        self.slow_step_size = 0.0
        self.steps_until_search = 0
        self.slope = 0.0
        self.decrease = 0.0
        self.prediction = 0.0
        self.probes = 0
        self.searched = False
        self.accepted = True
        self.total_probes = 0

    @property
    def armijo_ratio(self) -> float:
        """The decrease of the last search over its prediction, NaN where the prediction is 0."""
        return self.decrease / self.prediction if self.prediction != 0 else math.nan

    def is_due(self) -> bool:
        """Return whether the next optimizer step is one that searches."""
        return self.steps_until_search <= 0

    def search(self, loss: float, slope: float, probe: Callable[[float], float]) -> float:
        """Find the step size of this optimizer step (Algorithm 1 of arXiv 2403.18519).

        Nothing of the search changes when `probe` raises.

        Args:
            loss (`float`): Loss at step size 0.
            slope (`float`): Decrease of the loss per unit of step size at step size 0. One that is not finite is left
                out of the average.
            probe (`Callable[[float], float]`): Returns the loss at a step size. A non-finite loss rejects it.

        Returns:
            `float`: The accepted step size. After `max_probes` rejections it is the smallest one tried, or 0.0 if not
            even that lowers the loss.
        """
        step_size, probes, decrease = self.trial_step_size, 0, math.nan
        while True:
            last_decrease, decrease = decrease, loss - probe(step_size)
            probes += 1
            smoothed_decrease = self._smooth_decrease(step_size, slope, decrease)
            sufficient = smoothed_decrease >= self._bound(step_size, slope) or decrease == last_decrease == 0
            accepted = math.isfinite(decrease) and sufficient
            if accepted or probes == self.max_probes:
                break
            step_size *= self.decrease_factor

        self._remember(step_size, slope, decrease)
        self.step_size = step_size
        if not accepted:  # costs the next search one decrease, not a hundred
            self.trial_step_size *= self.decrease_factor
        elif slope == 0:  # where any step size is accepted, there is no reason to grow
            self.trial_step_size = step_size
        else:
            self.trial_step_size = step_size * self.growth_factor
        self.slope, self.decrease, self.prediction = slope, decrease, step_size * slope
        self.probes, self.searched, self.accepted = probes, True, accepted
        self.total_probes += probes
        self.fast_step_size = 0.9 * self.fast_step_size + 0.1 * step_size
        self.slow_step_size = 0.99 * self.slow_step_size + 0.01 * step_size
        self.steps_until_search = self._interval() - 1 if accepted else 0
        return step_size if accepted or 0 < decrease < math.inf else 0.0

    def skip(self) -> float:
        """Pass an optimizer step that is not due for a search.

        Returns:
            `float`: The step size of the last search, to be taken unsearched.
        """
        self.steps_until_search = max(self.steps_until_search - 1, 0)
        self.probes, self.searched = 0, False
        return self.step_size

    def state_dict(self) -> dict[str, float | int]:
        """Return the numbers that a resumed search continues from."""
        return {name: getattr(self, name) for name in self._state}

    def load_state_dict(self, state_dict: dict[str, float | int]) -> None:
        """Continue from the numbers of `state_dict()`; other keys are ignored.

        Args:
            state_dict (`dict[str, float | int]`): Numbers by name.

        Raises:
            KeyError: If one of the numbers is missing.
        """
        for name in self._state:
            setattr(self, name, state_dict[name])
        if self.search_interval != "adaptive":
            self.steps_until_search = min(self.steps_until_search, self.search_interval - 1)

    def _smooth(self, slope: float) -> float:
        if not math.isfinite(slope):
            return self.smoothed_slope
        return self.beta3 * self.smoothed_slope + (1 - self.beta3) * slope

    def _smooth_decrease(self, step_size: float, slope: float, decrease: float) -> float:
        return self.beta3 * self.smoothed_decrease + (1 - self.beta3) * decrease

    def _bound(self, step_size: float, slope: float) -> float:
        smoothed_slope = self._smooth(slope)
        c = self.c if smoothed_slope > 0 else 1 / self.c  # uphill, the loss may rise by 1 / c of the prediction
        return c * step_size * smoothed_slope

    def _remember(self, step_size: float, slope: float, decrease: float) -> None:
        if math.isfinite(decrease):
            self.smoothed_decrease = self._smooth_decrease(step_size, slope, decrease)
        self.smoothed_slope = self._smooth(slope)

    def _interval(self) -> int:
        if self.search_interval != "adaptive":
            return self.search_interval
        ratio = max(self.fast_step_size / self.slow_step_size, self.slow_step_size / self.fast_step_size)
        return 10 if ratio <= 1.1 else math.ceil(1 / (ratio - 1))
