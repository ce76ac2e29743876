"""The first search: which step size training starts at. Numbers only, no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class InitialSearchResult:
    """What [`InitialSearch`] found.

    Args:
        step_size (`float`): The largest step size found to be sufficient, 0.0 if none is.
        reductions (`dict[float, float]`): The actual reduction at each step size that was probed, in that order.
        hides_gradient (`bool`): Whether no step size was sufficient though many were predicted to show in the loss:
            its value is not what the gradients are of.
    """

    step_size: float
    reductions: dict[float, float]
    hides_gradient: bool = False


@dataclass(frozen=True)
class InitialSearch:
    """Search up and down for the largest step size whose reduction is at least `c` of the predicted one.

    It doubles from the first probe while the condition holds, or halves until it does, then closes in to a tenth of a
    factor of two. A `c` below `least_c` counts as that. Training starts at `share` of the least that it finds on the
    first three batches, for what a batch allows is mostly noise.

    Where no step size is sufficient, the largest of those too small to show in the loss is taken: it does no harm.
    Where none is though the slope is large enough to show, the loss hides its gradient, and training starts at
    `unprobed_share` of the initial step size.
    """

    share: ClassVar[float] = 0.1
    least_c: ClassVar[float] = 0.3  # with 0.1 a pretrained MiniLM starts too high
    least_first_probe: ClassVar[float] = 0.1  # the reduction of a smaller step may be rounding
    max_probes: ClassVar[int] = 30
    unprobed_share: ClassVar[float] = 1e-3
    least_visible: ClassVar[float] = 1e-5  # of the loss, or of 1 where it is smaller: a hundred times its rounding
    most_hidden: ClassVar[int] = 5
    largest_step_size: ClassVar[float] = 10.0  # Adam's direction is about 1 in every weight

    def first_probe(self, initial_step_size: float) -> float:
        """Return where the search of the first batch begins: the initial step size, doubled until it is at least 0.1.

        Args:
            initial_step_size (`float`): The initial step size.
        """
        while initial_step_size < self.least_first_probe:
            initial_step_size *= 2
        return initial_step_size

    def search(
        self,
        loss: float,
        slope: float,
        probe: Callable[[float], float],
        c: float,
        first_probe: float,
        limit: float = largest_step_size,
    ) -> InitialSearchResult:
        """Return the largest sufficient step size.

        Args:
            loss (`float`): Loss at step size 0.
            slope (`float`): Decrease of the loss per unit of step size at step size 0. Unless it is positive and
                finite, nothing is probed.
            probe (`Callable[[float], float]`): Returns the loss at a step size.
            c (`float`): Sufficient-decrease constant; `least_c` where it is smaller.
            first_probe (`float`): The step size to begin at.
            limit (`float`, defaults to 10.0): The largest step size to look at beyond that.
        """
        c = max(c, self.least_c)
        reductions: dict[float, float] = {}

        def is_sufficient(step_size: float) -> bool:
            reductions[step_size] = reduction = loss - probe(step_size)
            return math.isfinite(reduction) and reduction >= c * step_size * slope

        if not 0 < slope < math.inf:
            return InitialSearchResult(0.0, reductions)
        limit = max(limit, first_probe)
        trial = first_probe
        found = 0.0
        if is_sufficient(trial):
            found = trial
            while 2 * found <= limit and is_sufficient(2 * found):
                found *= 2
        while found == 0 and len(reductions) < self.max_probes:
            trial *= 0.5
            found = trial if is_sufficient(trial) else 0.0
        if self._hides_gradient(loss, slope, found, reductions):
            return InitialSearchResult(0.0, reductions, hides_gradient=True)
        if found == 0:
            shown = min((size for size, reduction in reductions.items() if reduction != 0), default=math.inf)
            found = max((size for size in reductions if size < shown), default=0.0)
        for fraction in (0.5, 0.25, 0.125) if found > 0 else ():
            if found * 2**fraction <= limit and is_sufficient(found * 2**fraction):
                found *= 2**fraction
        return InitialSearchResult(found, reductions)

    def _hides_gradient(self, loss: float, slope: float, found: float, reductions: dict[float, float]) -> bool:
        least_size = self.least_visible * max(abs(loss), 1.0) / slope
        visible = sorted(size for size, value in reductions.items() if size >= least_size and math.isfinite(value))
        if found >= least_size or len(visible) < self.most_hidden:
            return False
        if found == 0:
            return True
        # A step below what shows may be sufficient by rounding. What the loss lacks to the prediction halves with the
        # step where it is curvature, and doubles where it is a jump; where it stays, the slope is not the value's.
        small, large = (1 - reductions[size] / (size * slope) for size in visible[:2])
        return 0.75 < small / large < 1.5
