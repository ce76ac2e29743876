"""What goes wrong in a search, told from its numbers: each thing with its likely cause and what to change."""

import math
import statistics
from collections import deque
from dataclasses import dataclass

from .optimizer import ALSALS, HIDDEN_GRADIENT


@dataclass(frozen=True)
class SearchRecord:
    """What a search showed.

    Args:
        rejected (`bool`): No step size with sufficient decrease was found, though some were probed.
        cut (`bool`): The step size was cut by a third or more.
        uphill (`bool`): The smoothed slope was negative.
        nonfinite (`bool`): A probe gave a loss that is not finite.
        unseen (`bool`): The loss did not change at all, to the bit, where it should have fallen.
    """

    rejected: bool
    cut: bool
    uphill: bool
    nonfinite: bool
    unseen: bool


class SearchHistory:
    """The optimizer steps of a run, as far as failures need them.

    Args:
        alsals (`ALSALS`): The optimizer that is watched.
        is_low_precision (`bool`, defaults to `False`): Whether the loss is computed in bfloat16 or float16.
        flat_loss_step (`int`, *optional*): The optimizer step at which the loss has to have fallen.
    """

    window = 20  # searches that a failure has to show in
    largest_step_size = 1.0  # Adam's direction is about 1 in every weight
    first_steps, last_steps = 20, 50  # whose losses are compared

    def __init__(self, alsals: ALSALS, is_low_precision: bool = False, flat_loss_step: int | None = None) -> None:
        self.alsals = alsals
        self.is_low_precision = is_low_precision
        self.flat_loss_step = flat_loss_step
        self.steps = 0
        self.first_losses: list[float] = []
        self.last_losses: deque[float] = deque(maxlen=self.last_steps)
        self.searches: deque[SearchRecord] = deque(maxlen=self.window)
        self.searches_so_far = 0
        self.steps_at_large_step_size = 0
        self.smoothed_loss = self.lowest_loss = math.nan
        self.steps_since_lowest_loss = 0
        self.step_size_at_lowest_loss = math.nan
        self.last_step_size = math.nan

    def update(self) -> None:
        """Take up the numbers of the optimizer's last step."""
        alsals, search = self.alsals, self.alsals.search
        self.steps += 1
        if math.isfinite(alsals.loss):
            if len(self.first_losses) < self.first_steps:
                self.first_losses.append(alsals.loss)
            self.last_losses.append(alsals.loss)
            is_first = math.isnan(self.smoothed_loss)
            self.smoothed_loss = alsals.loss if is_first else 0.98 * self.smoothed_loss + 0.02 * alsals.loss
            self.steps_since_lowest_loss += 1
            if is_first or self.smoothed_loss < self.lowest_loss - 1e-3 * abs(self.lowest_loss):
                self.lowest_loss, self.steps_since_lowest_loss = self.smoothed_loss, 0
                self.step_size_at_lowest_loss = search.step_size
        is_large = search.step_size >= self.largest_step_size
        self.steps_at_large_step_size = self.steps_at_large_step_size + 1 if is_large else 0
        if search.searched:
            # The first search comes down from an arbitrary step size, and one after a rejection searches on.
            may_be_cut = self.searches_so_far > 0 and not self.searches[-1].rejected
            self.searches_so_far += 1
            self.searches.append(
                SearchRecord(
                    rejected=not search.accepted and search.probes > 0,
                    cut=may_be_cut and search.step_size < 2 / 3 * self.last_step_size,
                    uphill=search.acceptance.slope < 0,
                    nonfinite=search.nonfinite_probes > 0,
                    unseen=search.slope > 0 and search.actual_reduction == 0,
                )
            )
        self.last_step_size = search.step_size

    @property
    def is_searched(self) -> bool:
        """Whether searches bound the step size."""
        return self.alsals.line_search.is_searched(self.alsals.search)

    @property
    def shorter_steps(self) -> str:
        """The option that makes steps shorter."""
        return "larger c" if self.is_searched else "smaller growth_factor"

    def count(self, name: str) -> int:
        """Return how many of the last searches showed something, by the name of a field of `SearchRecord`."""
        return sum(getattr(one, name) for one in self.searches)

    def shows_steadily(self, name: str) -> bool:
        """Return whether the last half window of searches showed something, every one of them."""
        last = list(self.searches)[-self.window // 2 :]
        return len(last) == self.window // 2 and all(getattr(one, name) for one in last)


class Failure:
    """Something that goes wrong: when it shows, what is said of it, and what to change."""

    name: str

    def shows(self, history: SearchHistory) -> bool:
        """Return whether it shows now."""
        raise NotImplementedError

    def sentence(self, history: SearchHistory) -> str:
        """Return what is seen, and the likely cause."""
        raise NotImplementedError

    def remedy(self, history: SearchHistory) -> str:
        """Return the option to change."""
        raise NotImplementedError


class SmallestStepSize(Failure):
    """No step size is accepted any more."""

    name = "smallest step size"

    def shows(self, history: SearchHistory) -> bool:
        return history.shows_steadily("rejected")

    def sentence(self, history: SearchHistory) -> str:
        cause = (
            "the losses in low precision are too coarse to show a decrease"
            if history.is_low_precision
            else "the loss falls by less than its slope says, or c is too large"
        )
        return (
            f"no step size met the condition in {history.window // 2} searches in a row, down to "
            f"{history.alsals.search.smallest_probe:.1e}: {cause}"
        )

    def remedy(self, history: SearchHistory) -> str:
        if history.is_low_precision:
            return "compute the loss in float32"
        exact = "" if history.alsals.slope_method == "exact" else "slope=exact or "
        return f"try {exact}a smaller c in optim_args"


class LargestStepSize(Failure):
    """Nothing bounds the step size from above."""

    name = "largest step size"
    steps = 50

    def shows(self, history: SearchHistory) -> bool:
        return history.steps_at_large_step_size >= self.steps

    def sentence(self, history: SearchHistory) -> str:
        return (
            f"the step size has been {history.largest_step_size:g} or more for {self.steps} steps: the loss hardly "
            f"depends on the weights, or {'c is too small to bound' if history.is_searched else 'no search bounds'} "
            "the step"
        )

    def remedy(self, history: SearchHistory) -> str:
        return f"try a {history.shorter_steps} in optim_args"


class JumpingStepSize(Failure):
    """Searches cut the step size again and again."""

    name = "jumping step size"

    def shows(self, history: SearchHistory) -> bool:
        return len(history.searches) == history.window and history.count("cut") >= history.window // 4

    def sentence(self, history: SearchHistory) -> str:
        return (
            f"{history.count('cut')} of the last {len(history.searches)} searches cut the step size by a third or "
            "more: batches disagree, for they are too small or the landscape is irregular"
        )

    def remedy(self, history: SearchHistory) -> str:
        smoother = "" if history.alsals.line_search.options["beta3"] >= 0.9 else ", or a larger beta3 in optim_args"
        return f"try a larger per_device_train_batch_size or gradient_accumulation_steps{smoother}"


class RunAwayStepSize(Failure):
    """The step size grows while the loss does not fall."""

    name = "run-away step size"
    steps = 200

    def shows(self, history: SearchHistory) -> bool:
        has_grown = history.alsals.step_size > 10 * history.step_size_at_lowest_loss
        return history.steps_since_lowest_loss >= self.steps and has_grown

    def sentence(self, history: SearchHistory) -> str:
        return (
            f"the step size has grown from {history.step_size_at_lowest_loss:.1e} to {history.alsals.step_size:.1e} "
            f"in {history.steps_since_lowest_loss} steps in which the loss did not fall: nothing bounds it"
        )

    def remedy(self, history: SearchHistory) -> str:
        path = "" if history.alsals.line_search.growth.name == "path" else "growth=path or "
        return f"try lr_scheduler_type=linear, or {path}a smaller growth_factor in optim_args"


class FlatLoss(Failure):
    """The loss is where it began."""

    name = "flat loss"
    least_share = 0.1  # of the first losses; what falls by more than that has fallen

    def shows(self, history: SearchHistory) -> bool:
        first, last = history.first_losses, history.last_losses
        if history.steps != history.flat_loss_step or len(last) < history.last_steps:
            return False
        error = math.hypot(*(statistics.stdev(losses) / math.sqrt(len(losses)) for losses in (first, last)))
        fall = statistics.mean(first) - statistics.mean(last)
        return fall < 2 * error and fall < self.least_share * abs(statistics.mean(first))

    def sentence(self, history: SearchHistory) -> str:
        first, last = (statistics.mean(losses) for losses in (history.first_losses, history.last_losses))
        return (
            f"the loss of the last {history.last_steps} steps, {last:.4g} on average, is not clearly below that of "
            f"the first {history.first_steps}, {first:.4g}: nothing has been learned, because the data do not say "
            "more, or a step was too long for pretrained weights"
        )

    def remedy(self, history: SearchHistory) -> str:
        return f"if AdamW learns here, try a {history.shorter_steps} in optim_args"


class UphillDirection(Failure):
    """The direction points uphill."""

    name = "uphill direction"

    def shows(self, history: SearchHistory) -> bool:
        return history.shows_steadily("uphill")

    def sentence(self, history: SearchHistory) -> str:
        return (
            f"the smoothed slope has been negative for {history.window // 2} searches: momentum points uphill, as it "
            "does after steps that were too long"
        )

    def remedy(self, history: SearchHistory) -> str:
        return "try a smaller adam_beta1, or a larger c in optim_args"


class NonfiniteProbes(Failure):
    """The loss overflows not far from the weights."""

    name = "non-finite probes"

    def shows(self, history: SearchHistory) -> bool:
        return history.count("nonfinite") >= history.window // 4

    def sentence(self, history: SearchHistory) -> str:
        return (
            f"{history.count('nonfinite')} of the last {len(history.searches)} searches met a loss that is not "
            "finite: steps not much longer than those taken make the model overflow"
        )

    def remedy(self, history: SearchHistory) -> str:
        range_ = "bf16 in place of fp16, or " if history.is_low_precision else ""
        return f"try {range_}a smaller growth_factor in optim_args"


class UnseenDecrease(Failure):
    """Steps are too small for the precision."""

    name = "unseen decrease"

    def shows(self, history: SearchHistory) -> bool:
        return history.count("unseen") >= history.window // 2

    def sentence(self, history: SearchHistory) -> str:
        return (
            f"{history.count('unseen')} of the last {len(history.searches)} searches saw no decrease at all, to the "
            "bit: the loss or the weights are too coarse for such small steps"
        )

    def remedy(self, history: SearchHistory) -> str:
        if history.is_low_precision:
            return "keep the weights in float32 and do without bf16 or fp16"
        return "take what does not depend on the weights out of the loss, or train in float64"


class HiddenGradient(Failure):
    """The loss's value does not show its gradient, so that no probe can measure it."""

    name = "hidden gradient"

    def shows(self, history: SearchHistory) -> bool:
        return history.alsals.search.is_blind

    def sentence(self, history: SearchHistory) -> str:
        return HIDDEN_GRADIENT

    def remedy(self, history: SearchHistory) -> str:
        return "search_interval=never in optim_args does so from the start"


FAILURES: tuple[Failure, ...] = (
    HiddenGradient(),
    SmallestStepSize(),
    LargestStepSize(),
    JumpingStepSize(),
    RunAwayStepSize(),
    FlatLoss(),
    UphillDirection(),
    NonfiniteProbes(),
    UnseenDecrease(),
)


class FailureMonitor:
    """Names the failures of a run from the numbers of its optimizer steps, each of them once.

    Args:
        alsals (`ALSALS`): The optimizer that is watched.
        is_low_precision (`bool`, defaults to `False`): Whether the loss is computed in bfloat16 or float16.
        flat_loss_step (`int`, *optional*): The optimizer step at which the loss has to have fallen.
    """

    def __init__(self, alsals: ALSALS, is_low_precision: bool = False, flat_loss_step: int | None = None) -> None:
        self.history = SearchHistory(alsals, is_low_precision, flat_loss_step)
        self.left = list(FAILURES)

    def update(self) -> dict[str, str]:
        """Take up the numbers of the optimizer's last step.

        Returns:
            `dict[str, str]`: What shows now for the first time, as a sentence by its name.
        """
        self.history.update()
        found = [failure for failure in self.left if failure.shows(self.history)]
        self.left = [failure for failure in self.left if failure not in found]
        return {
            failure.name: f"{failure.sentence(self.history)}; {failure.remedy(self.history)}." for failure in found
        }
