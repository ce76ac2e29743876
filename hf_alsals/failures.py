"""What goes wrong in a search, told from its numbers: each thing with its likely cause and what to change."""

import logging
import math
from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .callbacks import alsals_of
from .loss_replay import first_inexact_module
from .optimizer import ALSALS
from .path_search import PathSearch

logger = logging.getLogger(__name__)


class FailureMonitor:
    """Names the failures of a run from the numbers of its optimizer steps, each of them once.

    Args:
        alsals (`ALSALS`): The optimizer that is watched.
        low_precision (`bool`, defaults to `False`): Whether the loss is computed in bfloat16 or float16.

    Attributes:
        named (`set[str]`): The failures that have been named so far.
    """

    window = 20  # searches that a failure has to show in
    largest_step_size = 1.0  # Adam's direction is about 1 in every weight
    steps_at_largest = 50
    steps_without_progress = 200

    def __init__(self, alsals: ALSALS, low_precision: bool = False) -> None:
        self.alsals = alsals
        self.low_precision = low_precision
        self.named: set[str] = set()
        self.searches: deque[dict[str, bool]] = deque(maxlen=self.window)
        self.searches_so_far = 0
        self.steps_at_large_step_size = 0
        self.smoothed_loss = self.lowest_loss = math.nan
        self.steps_since_lowest_loss = 0
        self.step_size_at_lowest_loss = math.nan
        self.last_step_size = math.nan

    def update(self) -> dict[str, str]:
        """Take up the numbers of the optimizer's last step.

        Returns:
            `dict[str, str]`: What shows now for the first time, as a sentence by its name.
        """
        alsals, search = self.alsals, self.alsals.line_search
        if math.isfinite(alsals.loss):
            first = math.isnan(self.smoothed_loss)
            self.smoothed_loss = alsals.loss if first else 0.98 * self.smoothed_loss + 0.02 * alsals.loss
            self.steps_since_lowest_loss += 1
            if first or self.smoothed_loss < self.lowest_loss - 1e-3 * abs(self.lowest_loss):
                self.lowest_loss, self.steps_since_lowest_loss = self.smoothed_loss, 0
                self.step_size_at_lowest_loss = alsals.step_size
        at_largest = alsals.step_size >= self.largest_step_size
        self.steps_at_large_step_size = self.steps_at_large_step_size + 1 if at_largest else 0
        if alsals.searched:
            self.searches_so_far += 1
            self.searches.append(
                {
                    "rejected": not search.accepted and search.probes > 0,
                    # The first search comes down from an arbitrary step size, and one after a rejection searches on.
                    "cut": self.searches_so_far > 1
                    and not self.searches[-1]["rejected"]
                    and search.step_size < 2 / 3 * self.last_step_size,
                    "uphill": search.smoothed_slope < 0,
                    "non-finite": alsals.non_finite_probes > 0,
                    "unseen": search.slope > 0 and search.decrease == 0,
                }
            )
        self.last_step_size = alsals.step_size
        found = {name: sentence for name, sentence in self._failures().items() if name not in self.named}
        self.named |= set(found)
        return found

    def _failures(self) -> dict[str, str]:
        count = {name: sum(one[name] for one in self.searches) for name in self.searches[0]} if self.searches else {}
        half = self.window // 2
        found = {}
        if [one["rejected"] for one in self.searches][-half:] == half * [True]:
            smallest = self.last_step_size
            search = self.alsals.line_search
            if isinstance(search, PathSearch) and not search.started:
                smallest = search.first_probe * 0.5 ** (search.max_first_probes - 1)
            found["smallest step size"] = (
                f"no step size met the condition in {half} searches in a row, down to {smallest:.1e}: "
                + (
                    "the losses in low precision are too coarse to show a decrease; compute the loss in float32."
                    if self.low_precision
                    else "the slope is larger than what the loss does, or c is too large; try slope=exact or a smaller"
                    " c in optim_args."
                )
            )
        if self.steps_at_large_step_size >= self.steps_at_largest:
            found["largest step size"] = (
                f"the step size has been {self.largest_step_size:g} or more for {self.steps_at_largest} steps: the "
                "loss hardly depends on the weights, or c is too small to bound the step; try a larger c in "
                "optim_args."
            )
        if len(self.searches) == self.window and count["cut"] >= self.window // 4:
            found["jumping step size"] = (
                f"{count['cut']} of the last {len(self.searches)} searches cut the step size by a third or more: "
                "batches disagree, for they are too small or the landscape is irregular; try a larger "
                "per_device_train_batch_size or gradient_accumulation_steps, or a larger beta3 in optim_args."
            )
        if (
            self.steps_since_lowest_loss >= self.steps_without_progress
            and self.alsals.step_size > 10 * self.step_size_at_lowest_loss
        ):
            found["run-away step size"] = (
                f"the step size has grown from {self.step_size_at_lowest_loss:.1e} to {self.alsals.step_size:.1e} in "
                f"{self.steps_since_lowest_loss} steps in which the loss did not fall: nothing bounds it; try "
                "lr_scheduler_type=linear, or growth=path or a smaller growth_factor in optim_args."
            )
        if [one["uphill"] for one in self.searches][-half:] == half * [True]:
            found["uphill direction"] = (
                f"the smoothed slope has been negative for {half} searches: momentum points uphill, as it does after "
                "steps that were too long; try a smaller adam_beta1, or a larger c in optim_args."
            )
        if count.get("non-finite", 0) >= self.window // 4:
            found["non-finite probes"] = (
                f"{count['non-finite']} of the last {len(self.searches)} searches met a loss that is not finite: the "
                "model overflows at small steps; try bf16 in place of fp16, or a smaller growth_factor in optim_args."
            )
        if count.get("unseen", 0) >= half:
            found["unseen decrease"] = (
                f"{count['unseen']} of the last {len(self.searches)} searches saw no decrease at all, to the bit: the "
                "loss or the weights are too coarse for such small steps; keep the weights in float32"
                + (" and do without bf16 or fp16." if self.low_precision else ".")
            )
        return found


class FailureCallback(TrainerCallback, ExportableState):
    """Warns, once each, when a search goes wrong, with the likely cause and the option to change.

    Beside what [`FailureMonitor`] names it warns when a probe at step size 0 is not the loss of training, and names
    the module that is the likely cause. That costs a forward pass at the first step and every `steps_between_checks`.

    Attributes:
        warnings (`list[dict]`): The warnings so far, as `step` and `message`.
    """

    steps_between_checks = 500

    def __init__(self) -> None:
        self.warnings: list[dict[str, Any]] = []
        self.monitor: FailureMonitor | None = None
        self._is_exact = True
        self._first_step = 0

    def state(self) -> dict[str, Any]:
        """Return the warnings so far."""
        return {"args": {}, "attributes": {"warnings": self.warnings}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the warnings of a run that is resumed; the arguments are those of every Trainer callback."""
        saved = state.stateful_callbacks.get("FailureCallback", {}) if state.global_step > 0 else {}
        self.warnings = list(saved.get("attributes", {}).get("warnings", []))
        self.monitor, self._is_exact, self._first_step = None, True, state.global_step
        state.stateful_callbacks["FailureCallback"] = self.state()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check, now and then, that a probe repeats training; the arguments are those of every Trainer callback."""
        alsals = alsals_of(optimizer)
        if alsals is None or not self._is_exact or (state.global_step - self._first_step) % self.steps_between_checks:
            return
        closure, loss, _ = alsals.handed_over
        if closure is None:
            return
        # Sums over GPUs and atomic additions round differently from call to call.
        tolerance = 1e-2 if _has_low_precision(args, model) else 1e-5
        training_loss, probe = float(loss), float(closure())
        if not math.isfinite(training_loss) or abs(probe - training_loss) <= tolerance * max(abs(training_loss), 1.0):
            return
        self._is_exact = False
        name = first_inexact_module(model, closure)
        cause = (
            f"{name} answers the same input differently from call to call, as with random numbers from a generator of "
            "its own, or a state that is no buffer; draw them from torch's, NumPy's or Python's global generator"
            if name
            else "no single module is the cause, so look at compute_loss, and at code that asks whether gradients are "
            "computed"
        )
        self._warn(
            state,
            f"a probe at step size 0 gives the loss {probe:.6g} where training gave {training_loss:.6g}, so probes do "
            f"not repeat training and decreases are off: {cause}.",
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Warn of what the numbers of the step show; the arguments are those of every Trainer callback."""
        alsals = alsals_of(optimizer)
        if alsals is None:
            return
        if self.monitor is None:
            self.monitor = FailureMonitor(alsals, _has_low_precision(args, model))
        for message in self.monitor.update().values():
            self._warn(state, message)

    def _warn(self, state: TrainerState, message: str) -> None:
        self.warnings.append({"step": state.global_step, "message": message})
        state.stateful_callbacks["FailureCallback"] = self.state()
        if state.is_world_process_zero:
            logger.warning(f"Step {state.global_step}: {message}")


def _has_low_precision(args: TrainingArguments, model: torch.nn.Module) -> bool:
    weights = {p.dtype for p in model.parameters()}  # frozen ones compute the loss too
    return args.bf16 or args.fp16 or bool(weights & {torch.bfloat16, torch.float16})
