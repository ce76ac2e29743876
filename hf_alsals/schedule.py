"""The learning rate schedule, which multiplies the step size: the default of each preset, and warmup_stable_decay."""

import copy
from typing import Any

from transformers.trainer_utils import SchedulerType

from .mixin_base import TrainerMixinBase
from .presets import PRESETS, line_search_of

# What the step size of each preset is to be multiplied by, unless lr_scheduler_type says else.
# A growth rule that leaves the end of training to the schedule needs one that falls.
DEFAULT_SCHEDULES = {
    name: "warmup_stable_decay" if line_search_of(preset["growth"]).growth.least_lr_fraction > 0 else "constant"
    for name, preset in PRESETS.items()
}


class ScheduleMixin(TrainerMixinBase):
    """Lets `warmup_stable_decay` do without `lr_scheduler_kwargs`."""

    args: Any

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule.

        Without `num_decay_steps`, `"warmup_stable_decay"` falls from the end of `num_stable_steps` on, by default in
        the second half of what comes after a warm-up, whatever the optimizer. With an `optim` of ours, or without
        `num_decay_steps`, it falls linearly to 0 unless `lr_scheduler_kwargs` say otherwise.

        Args:
            num_training_steps (`int`): Optimizer steps of the whole training.
            args, kwargs: Passed on to the Trainer.

        Returns:
            `torch.optim.lr_scheduler.LRScheduler`: The schedule.
        """
        given = self.args
        changes = given.lr_scheduler_kwargs or {}
        is_ours = given.optim in PRESETS or "num_decay_steps" not in changes  # the Trainer refuses the latter
        if given.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and is_ours:
            steps = num_training_steps - given.get_warmup_steps(num_training_steps)
            stable = changes.get("num_stable_steps")
            decay_steps = steps // 2 if stable is None else max(steps - stable, 0)
            decay = {"num_decay_steps": decay_steps, "decay_type": "linear"}
            self.args = copy.copy(given)  # the user's own may serve another training
            self.args.lr_scheduler_kwargs = decay | changes
        try:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        finally:
            self.args = given
