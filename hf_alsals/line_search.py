"""The line search: growth, acceptance and interval, composed. Numbers in, a step size out. No torch."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Protocol

from .acceptance import Acceptance
from .checks import check_number
from .growth import Growth
from .initial_search import InitialSearch
from .interval import Interval, IntervalState, Never, interval_of
from .path_growth import PathSlope


class SearchLine(Protocol):
    """What a search knows of the loss along the direction; [`Line`] is one."""

    @property
    def loss(self) -> float:
        """The loss at step size 0."""

    @property
    def slope(self) -> float:
        """The decrease of the loss per unit of step size at step size 0."""

    def probe(self, step_size: float) -> float:
        """Return the loss at a step size."""


@dataclass(frozen=True)
class SearchState:
    """All that a line search carries from one optimizer step to the next, and so what a checkpoint has of it.

    Logs name `actual_reduction` `decrease`, and `reduction_ratio` `armijo_ratio`.

    Args:
        step_size (`float`): The step size found so far; the initial one before the first search.
        is_initialized (`bool`): Whether an [`InitialSearch`] has found a step size, or there is none to do it.
        initial_searches (`int`): How many batches it has searched on.
        least_found (`float`): The least of the largest sufficient step sizes of these batches; 0.0 before.
        is_confirmed (`bool`): Whether another batch than the first has allowed one.
        growth, acceptance (`Any`), interval (`IntervalState`): The states of the parts.
        taken (`float`): The step size to take at this optimizer step: `step_size`, or 0.0 where a search found none
            that lowers the loss.
        searched (`bool`), probes (`int`): Whether this optimizer step searched, and its probes.
        nonfinite_probes (`int`): How many of them gave a loss that is not finite.
        accepted (`bool`): Whether the last search ended at a step size with sufficient decrease.
        slope, actual_reduction, predicted_reduction (`float`): Of the last search, unsmoothed, in units of the loss;
            the predicted one is step size times slope.
        smallest_probe (`float`): The smallest step size that the last search probed.
        total_probes (`int`): Probes of all optimizer steps.
        is_blind (`bool`): Whether nothing is probed any more, because the loss's value does not show its gradient.
        is_annealing (`bool`): Whether the schedule alone sets the step, and nothing is followed or searched.
    """

    step_size: float
    is_initialized: bool
    growth: Any
    acceptance: Any
    interval: IntervalState
    taken: float = 0.0
    searched: bool = False
    probes: int = 0
    nonfinite_probes: int = 0
    accepted: bool = True
    slope: float = 0.0
    actual_reduction: float = 0.0
    predicted_reduction: float = 0.0
    smallest_probe: float = 0.0
    total_probes: int = 0
    is_blind: bool = False
    is_annealing: bool = False
    initial_searches: int = 0
    least_found: float = 0.0
    is_confirmed: bool = False

    @property
    def reduction_ratio(self) -> float:
        """Actual over predicted reduction of the last search, NaN where the prediction is 0."""
        return self.actual_reduction / self.predicted_reduction if self.predicted_reduction != 0 else math.nan


@dataclass(frozen=True)
class LineSearch:
    """Backtracking line search (arXiv 2403.18519, Algorithm 1), composed of its parts.

    A search probes the step size that `growth` says, then `decrease_factor` times that, and so on, until `acceptance`
    holds, or two probes in a row show the loss at step size 0, to the bit: a still smaller step would not show either.
    Where `growth` finds the step size far too small and its first probe is accepted, a search doubles it, twice at
    most, as long as the actual reduction is near the predicted one (forward tracking).

    It is a value: `step` takes a state and returns the next one, so that nothing has moved where a probe raises.

    Args:
        growth (`Growth`): How the step size grows from step to step.
        acceptance (`Acceptance`): Which step sizes are accepted.
        interval (`Interval`): When to search.
        initial_search (`InitialSearch`, *optional*): How the first step size is found. Without, the first search is
            one like the others.
        decrease_factor (`float`, defaults to 0.9): Shrinkage of the step size after a rejected probe, in (0, 1).
        initial_step_size (`float`, defaults to 0.1): Step size of the first probe, positive.
        least_shrinkage (`float`, *optional*): A search ends once another rejection would bring the step size below
            this share of its start. In any case it ends after 100 probes: 0.9 ** 100 is 3e-5, as in the authors' code.
        retry_rejected (`bool`, defaults to `True`): Whether a search that accepted no step size is followed by another
            one at the next optimizer step. If not, only where a loss was not finite.

    Raises:
        TypeError: If a number is not one.
        ValueError: If a number is out of its range.

    Example:
        >>> from hf_alsals.acceptance import ArmijoCondition
        >>> from hf_alsals.growth import ConstantGrowth
        >>> from hf_alsals.interval import EverySteps
        >>> class Quadratic:  # f(w) = w ** 2 at w = 1 along the direction 1
        ...     loss, slope = 1.0, 2.0
        ...     def probe(self, step_size):
        ...         return (1 - step_size) ** 2
        >>> search = LineSearch(ConstantGrowth(), ArmijoCondition(beta3=0.0), EverySteps(), initial_step_size=4.0)
        >>> state = search.step(search.init(), Quadratic())
        >>> round(state.taken, 3), state.probes  # 0.3 is met up to a step size of 1.4
        (1.395, 11)
    """

    growth: Growth
    acceptance: Acceptance
    interval: Interval
    initial_search: InitialSearch | None = None
    decrease_factor: float = 0.9
    initial_step_size: float = 0.1
    least_shrinkage: float | None = None
    retry_rejected: bool = True

    max_doublings: ClassVar[int] = 2
    least_doubled_ratio: ClassVar[float] = 0.7  # of actual to predicted reduction, before and after a doubling

    def __post_init__(self) -> None:
        methods = ("init", "follow", "start", "largest_doubled", "searched", "metrics")
        if missing := [name for name in methods if not hasattr(self.growth, name)]:
            raise TypeError(f"growth must have {', '.join(methods)}, got one without {', '.join(missing)}.")
        check_number("decrease_factor", self.decrease_factor, lambda x: 0 < x < 1, "a number in (0, 1)")
        check_number(
            "initial_step_size", self.initial_step_size, lambda x: 0 < x < math.inf, "a positive finite number"
        )
        if isinstance(self.interval, Never) and not self.growth.needs_path_slope:
            raise ValueError(
                f'search_interval must be an int or "adaptive" with growth={self.growth.name}, whose step size moves '
                'in searches only, got "never".'
            )

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, with their values: the fields of the parts and two numbers of the search itself."""
        parts = (self.acceptance, self.growth, self.interval)
        of_parts = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
        return of_parts | {"decrease_factor": self.decrease_factor, "initial_step_size": self.initial_step_size}

    def with_options(self, **options: Any) -> "LineSearch":
        """Return a line search with some options changed.

        Args:
            options: Values by the names of `options`.

        Raises:
            TypeError: If a name is unknown or a value of the wrong type.
            ValueError: If a value is out of its range.
        """
        if unknown := [name for name in options if name not in self.options]:
            raise TypeError(
                f"{unknown[0]} is no option of growth={self.growth.name}, which takes {', '.join(self.options)}."
            )
        changes: dict[str, Any] = {}
        for part in ("growth", "acceptance"):
            names = {field.name for field in fields(getattr(self, part))}
            changes[part] = replace(
                getattr(self, part), **{name: value for name, value in options.items() if name in names}
            )
        if "search_interval" in options:
            changes["interval"] = interval_of(options["search_interval"])
        own = {name: options[name] for name in ("decrease_factor", "initial_step_size") if name in options}
        return replace(self, **changes, **own)

    @property
    def max_probes(self) -> int:
        """The probes of a search, at most."""
        if self.least_shrinkage is None:
            return 100
        return min(100, 1 + max(1, math.floor(math.log(self.least_shrinkage) / math.log(self.decrease_factor))))

    def init(self) -> SearchState:
        """Return the state before training."""
        step_size = float(self.initial_step_size)
        is_unprobed = isinstance(self.interval, Never)
        if is_unprobed and self.initial_search is not None:
            step_size *= self.initial_search.unprobed_share
        return SearchState(
            step_size=step_size,
            is_initialized=self.initial_search is None or is_unprobed,
            growth=self.growth.init(step_size),
            acceptance=self.acceptance.init(),
            interval=self.interval.init(),
        )

    def needs_path_slope(self, lr_fraction: float) -> bool:
        """Return whether `step` will read the path slope.

        Args:
            lr_fraction (`float`): Learning rate of this step as a fraction of its peak so far.
        """
        return self.growth.needs_path_slope and lr_fraction >= self.growth.least_lr_fraction

    def step(
        self,
        state: SearchState,
        line: SearchLine,
        path_slope: float | PathSlope = math.nan,
        lr_fraction: float = 1.0,
    ) -> SearchState:
        """Return the state of the next optimizer step, whose `taken` is the step size to take; `follow` and `search`.

        Args:
            state (`SearchState`): The state of the last optimizer step.
            line (`SearchLine`): The loss along the direction of this one; it is asked only if a search is due.
            path_slope (`float` or `PathSlope`, *optional*): As `follow` takes it.
            lr_fraction (`float`, defaults to 1.0): As `follow` takes it.

        Raises:
            Exception: What `line.probe` raises.
        """
        return self.search(self.follow(state, path_slope, lr_fraction), line)

    def follow(
        self, state: SearchState, path_slope: float | PathSlope = math.nan, lr_fraction: float = 1.0
    ) -> SearchState:
        """Return the state of the next optimizer step before any search.

        Args:
            state (`SearchState`): The state of the last optimizer step.
            path_slope (`float` or `PathSlope`, *optional*): `<g_k, w_0 - w_k>`. One that is not finite is left out.
            lr_fraction (`float`, defaults to 1.0): Learning rate of this step as a fraction of its peak so far.
        """
        is_annealing = lr_fraction < self.growth.least_lr_fraction
        is_over = state.is_blind or (is_annealing and state.is_initialized)
        is_due = (self.interval.is_due(state.interval) or not state.is_initialized) and not is_over
        state = replace(state, is_annealing=is_annealing, searched=is_due, probes=0, nonfinite_probes=0)
        if is_annealing:
            return state
        growth, step_size = self.growth.follow(
            state.growth, state.step_size, path_slope, self.is_searched(state), lr_fraction
        )
        return replace(state, growth=growth, step_size=step_size if state.is_initialized else state.step_size)

    def search(self, state: SearchState, line: SearchLine) -> SearchState:
        """Return the state after the search of an optimizer step, if there is to be one.

        Args:
            state (`SearchState`): What `follow` returned.
            line (`SearchLine`): The loss along the direction.

        Raises:
            Exception: What `line.probe` raises.
        """
        if not state.searched:
            return replace(state, interval=self.interval.skipped(state.interval), taken=state.step_size)
        if self.initial_search is None or state.is_initialized:
            return self._backtrack(state, line)
        return self._initialize(state, line, self.initial_search)

    def metrics(self, state: SearchState) -> dict[str, float]:
        """Return what there is to log of the last search, by name; nothing while the schedule alone sets the step.

        Args:
            state (`SearchState`): The state of the last optimizer step.
        """
        if state.is_annealing:
            return {}
        followed = self.growth.metrics(state.growth)
        if not self.is_searched(state):
            return followed
        searched = {
            "slope": state.slope,
            "decrease": state.actual_reduction,
            "armijo_ratio": state.reduction_ratio,
        }
        return searched | followed

    def state_dict(self, state: SearchState) -> dict[str, Any]:
        """Return a state as numbers by name, for a checkpoint.

        Args:
            state (`SearchState`): The state.
        """
        numbers = asdict(state)
        for part in ("growth", "acceptance", "interval"):
            numbers |= {f"{part}_{name}": value for name, value in numbers.pop(part).items()}
        return numbers

    def load_state_dict(self, state_dict: dict[str, Any]) -> SearchState:
        """Return the state that `state_dict` was made of.

        Args:
            state_dict (`dict[str, Any]`): What `state_dict` returned; other keys are ignored.

        Raises:
            KeyError: If a number is missing.
        """
        state = self.init()
        parts = {
            part: replace(
                getattr(state, part),
                **{field.name: state_dict[f"{part}_{field.name}"] for field in fields(getattr(state, part))},
            )
            for part in ("growth", "acceptance", "interval")
        }
        parts["interval"] = self.interval.resumed(parts["interval"])
        own = {field.name: state_dict[field.name] for field in fields(state) if field.name not in parts}
        return SearchState(**parts, **own)

    def is_searched(self, state: SearchState) -> bool:
        """Return whether searches bound the step size.

        Args:
            state (`SearchState`): The state.
        """
        return not (state.is_blind or isinstance(self.interval, Never))

    def _backtrack(self, state: SearchState, line: SearchLine) -> SearchState:
        loss = line.loss
        start = step_size = self.growth.start(state.growth, state.step_size)
        probes, nonfinite_probes, reduction = 0, 0, math.nan
        while True:
            last_reduction, reduction = reduction, loss - line.probe(step_size)
            slope = line.slope  # after the first probe, which measures it in passing
            probes += 1
            nonfinite_probes += not math.isfinite(reduction)
            acceptance = self.acceptance.update(state.acceptance, step_size, slope, reduction)
            accepted = math.isfinite(reduction) and (
                self.acceptance.is_sufficient(acceptance, step_size) or reduction == last_reduction == 0
            )
            if accepted or probes == self.max_probes:
                break
            step_size *= self.decrease_factor
        if accepted and probes == 1:
            step_size, reduction, more = self._double(state, line, step_size, reduction)
            probes += len(more)
            nonfinite_probes += sum(not math.isfinite(one) for one in more)
            if step_size > start:
                acceptance = self.acceptance.update(state.acceptance, step_size, slope, reduction)
        again = not math.isfinite(reduction) or (self.retry_rejected and not accepted)
        return replace(
            state,
            step_size=step_size,
            growth=self.growth.searched(
                state.growth,
                start=start,
                step_size=step_size,
                slope=slope,
                accepted=accepted,
                decrease_factor=self.decrease_factor,
            ),
            acceptance=acceptance,
            interval=self.interval.searched(state.interval, step_size, again),
            taken=step_size if accepted or 0 < reduction < math.inf else 0.0,
            probes=probes,
            nonfinite_probes=nonfinite_probes,
            accepted=accepted,
            slope=slope,
            actual_reduction=reduction,
            predicted_reduction=step_size * slope,
            smallest_probe=min(start, step_size),
            total_probes=state.total_probes + probes,
        )

    def _double(
        self, state: SearchState, line: SearchLine, step_size: float, reduction: float
    ) -> tuple[float, float, list[float]]:
        """Return where doubling ends, the reduction there and those of all its probes."""
        probed: list[float] = []
        while (
            len(probed) < self.max_doublings
            and line.slope > 0
            and 2 * step_size <= self.growth.largest_doubled(state.growth)
            and reduction > self.least_doubled_ratio * step_size * line.slope
        ):
            probed.append(line.loss - line.probe(2 * step_size))
            if not probed[-1] > self.least_doubled_ratio * 2 * step_size * line.slope:
                break
            step_size, reduction = 2 * step_size, probed[-1]
        return step_size, reduction, probed

    def _initialize(self, state: SearchState, line: SearchLine, initial_search: InitialSearch) -> SearchState:
        slope, c = line.slope, self.acceptance.c
        is_first = state.initial_searches == 0
        if is_first:
            first_probe = initial_search.first_probe(self.initial_step_size)
            found = initial_search.search(line.loss, slope, line.probe, c, first_probe)
        else:  # one probe where this batch allows as much
            found = initial_search.search(line.loss, slope, line.probe, c, state.least_found, state.least_found)
        probes = len(found.reductions)
        smallest_probe = min(found.reductions, default=0.0)
        last = found.step_size or smallest_probe
        state = replace(
            state,
            taken=0.0,
            probes=probes,
            nonfinite_probes=sum(not math.isfinite(reduction) for reduction in found.reductions.values()),
            accepted=found.step_size > 0,
            slope=slope,
            actual_reduction=found.reductions.get(last, 0.0),
            predicted_reduction=last * slope,
            smallest_probe=smallest_probe,
            total_probes=state.total_probes + probes,
        )
        if found.step_size == 0 and is_first:
            if not (found.hides_gradient and self.growth.needs_path_slope):
                return state
            step_size = initial_search.unprobed_share * self.initial_step_size
            return replace(state, is_blind=True, is_initialized=True, step_size=step_size, taken=step_size)
        is_over = state.initial_searches == 2
        step_size = initial_search.share * found.step_size
        if is_first:
            interval = self.interval.searched(state.interval, step_size, again=False)
        else:
            interval = self.interval.skipped(state.interval)
        state = replace(
            state,
            initial_searches=state.initial_searches + 1,
            least_found=found.step_size or state.least_found,
            is_confirmed=state.is_confirmed or (found.step_size > 0 and not is_first),
            step_size=step_size or state.step_size,
            taken=step_size,
            interval=interval,
        )
        if not is_over:
            return state
        if not state.is_confirmed:  # the first batch was the outlier: all over again
            return replace(state, initial_searches=0, least_found=0.0)
        return replace(
            state,
            is_initialized=True,
            growth=self.growth.searched(
                state.growth,
                start=step_size,
                step_size=step_size,
                slope=slope,
                accepted=True,
                decrease_factor=self.decrease_factor,
            ),
        )
