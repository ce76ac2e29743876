"""Warnings, while a run goes on, of what goes wrong in its searches."""

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .checkpoint import saved_attributes
from .failures import FailureMonitor
from .inexact_module import first_inexact_module
from .optimizer import unwrap_alsals
from .schedule import changed_rate

logger = logging.getLogger(__name__)


class FailureCallback(TrainerCallback, ExportableState):
    """Warns, once each, when a search goes wrong, with the likely cause and the option to change.

    Beside what [`FailureMonitor`] names it warns when a probe at step size 0 is not the loss of training, and names
    the module that is the likely cause. That costs a forward pass at steps 0, 1, 2, 4, 8 and so on, up to
    `steps_between_checks`, and every `steps_between_checks`. Of a run that is resumed it warns when the schedule is
    not the one that the checkpoint was saved with.

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
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take up the warnings of a run that is resumed, and compare its schedule with the checkpoint's."""
        saved = saved_attributes(state, "FailureCallback") if state.global_step > 0 else {}
        self.warnings = list(saved.get("warnings", []))
        self.monitor, self._is_exact, self._first_step = None, True, state.global_step
        state.stateful_callbacks["FailureCallback"] = self.state()
        if changed := changed_rate(lr_scheduler):
            before, now = changed
            self._warn(
                state,
                f"the checkpoint was saved with the learning rate {before:.4g}, and the schedule has {now:.4g} at "
                "this step: to go on as the run began, pass the max_steps or num_train_epochs, lr_scheduler_type and "
                "lr_scheduler_kwargs of then.",
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check, now and then, that a probe repeats training."""
        alsals = unwrap_alsals(optimizer)
        step = state.global_step - self._first_step
        is_early = step < self.steps_between_checks and step.bit_count() == 1  # a power of 2
        is_due = is_early or step % self.steps_between_checks == 0
        if alsals is None or not self._is_exact or not is_due:
            return
        closure, loss = alsals.pending.closure, alsals.pending_loss
        if closure is None or loss is None:
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
        """Warn of what the numbers of the step show."""
        alsals = unwrap_alsals(optimizer)
        if alsals is None:
            return
        if self.monitor is None:
            # A run that is resumed has learned before.
            flat_loss_step = None if self._first_step > 0 else min(max(200, state.max_steps // 2), 1000)
            self.monitor = FailureMonitor(alsals, _has_low_precision(args, model), flat_loss_step)
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
