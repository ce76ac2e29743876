"""The learning rate schedule, which multiplies the step size: the default of each preset, and warmup_stable_decay."""

import copy
import math
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import SchedulerType

from .mixin_base import TrainerMixinBase
from .presets import PRESETS, line_search_of

# What the step size of each preset is to be multiplied by, unless lr_scheduler_type says else.
# A growth rule that leaves the end of training to the schedule needs one that falls.
DEFAULT_SCHEDULES = {
    name: "warmup_stable_decay" if line_search_of(preset["growth"]).growth.least_lr_fraction > 0 else "constant"
    for name, preset in PRESETS.items()
}


def default_decay_steps(optim: str, steps: int) -> int:
    """Return in how many steps, the last of `steps`, `warmup_stable_decay` falls where nothing says so.

    Args:
        optim (`str`): The optimizer's name. With one of this package the schedule falls over the last 70 %, which had
            the better worst case on the tasks that it was chosen on (recipes/benchmarks/NOTES.md; compare arXiv
            2501.18965), with any other over the last half.
        steps (`int`): Optimizer steps after the warm-up.
    """
    return steps * 7 // 10 if optim in PRESETS else steps // 2


def changed_rate(lr_scheduler: Any) -> tuple[float, float] | None:
    """Return the learning rate that a checkpoint was saved with and what its step has now, `None` if they agree.

    Args:
        lr_scheduler (`LambdaLR`, or Accelerate's wrapper of it): The schedule after loading. Others always agree.
    """
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
    if not isinstance(schedule, LambdaLR):
        return None
    saved = float(schedule.get_last_lr()[0])
    rate = float(schedule.base_lrs[0]) * schedule.lr_lambdas[0](schedule.last_epoch)
    return None if math.isclose(saved, rate, rel_tol=1e-6) else (saved, rate)


class ScheduleMixin(TrainerMixinBase):
    """Lets `warmup_stable_decay` do without `lr_scheduler_kwargs`."""

    args: Any

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule.

        Without `num_decay_steps`, `"warmup_stable_decay"` falls from the end of `num_stable_steps` on, by default
        as `default_decay_steps` says, whatever the optimizer. With an `optim` of ours, or without `num_decay_steps`,
        it falls linearly to 0 unless `lr_scheduler_kwargs` say otherwise.

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
            decay_steps = default_decay_steps(given.optim, steps) if stable is None else max(steps - stable, 0)
            decay = {"num_decay_steps": decay_steps, "decay_type": "linear"}
            self.args = copy.copy(given)  # the user's own may serve another training
            self.args.lr_scheduler_kwargs = decay | changes
        try:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        finally:
            self.args = given
