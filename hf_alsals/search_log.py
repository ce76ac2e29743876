"""What a Trainer logs of the search, beside the training loss."""

import statistics
from typing import Any

from .mixin_base import TrainerMixinBase
from .optimizer import ALSALS


class SearchLogMixin(TrainerMixinBase):
    """Adds step size, probes per step and what the line search says of itself to the Trainer's logs.

    Attributes:
        alsals (`ALSALS` or `None`): The optimizer, without Accelerate's wrapper, once training has begun.
    """

    alsals: ALSALS | None = None
    _logged_probes = (0, 0)
    _learning_rate: Any = 1.0  # of this optimizer step

    def start_search_log(self) -> None:
        """Count probes from this optimizer step on."""
        assert self.alsals is not None
        self._logged_probes = (self.state.global_step, self.alsals.search.total_probes)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with step size, slope, decrease, Armijo ratio, path slope and probes per step beside the training loss.

        Of the step sizes of each kind of tensor the median and the quartiles are logged.

        Args:
            logs (`dict[str, float]`): The values to log.
            args, kwargs: Passed on to the Trainer.
        """
        if self.alsals is not None and {"loss", "learning_rate"} <= set(logs):  # else it is no log of the Trainer's
            last_step, last_probes = self._logged_probes
            self.start_search_log()
            step, probes = self._logged_probes
            logs["step_size"] = self.alsals.step_size
            # The Trainer's is that of this step, or already the next one's; another one was set by a log() above.
            of_step, of_next = (float(rate) for rate in (self._learning_rate, self.alsals.param_groups[0]["lr"]))
            is_own = logs["learning_rate"] in (of_step, of_next)
            logs["lr_multiplier"] = logs["learning_rate"] if is_own else of_step
            if is_own:
                logs["learning_rate"] = logs["step_size"] * logs["lr_multiplier"]
            for kind, sizes in self.alsals.step_sizes().items():
                quartiles = statistics.quantiles(sizes, n=4, method="inclusive") if len(sizes) > 1 else sizes * 3
                logs |= zip((f"step_size_{kind}_q1", f"step_size_{kind}", f"step_size_{kind}_q3"), quartiles)
            logs |= self.alsals.line_search.metrics(self.alsals.search)
            logs["probes"] = (probes - last_probes) / max(step - last_step, 1)
        super().log(logs, *args, **kwargs)
