"""The loss along the search direction, at many step sizes: the loss-landscape figures of arXiv 2403.18519."""

import json
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .callbacks import alsals_of
from .direction import AdamDirection, local_shard, read
from .optimizer import ALSALS


class LineProfile:
    """The line of an optimizer step that is about to be taken, for losses at many step sizes on it.

    Neither weights nor gradients nor the optimizer are changed by it. It holds two copies of the weights.

    Args:
        alsals (`ALSALS`): The optimizer, with gradients in place.
        clip_coef (`Tensor` or `float`, defaults to 1.0): What clipping multiplied the gradients by.

    Attributes:
        slope (`float`): The slope of the batch that the gradients came from.
        start, direction (`list[Tensor]`): The weights before the step, and the direction that is subtracted from them.
    """

    @torch.no_grad()
    def __init__(self, alsals: ALSALS, clip_coef: Tensor | float = 1.0) -> None:
        self.params: list[Tensor] = []
        self.direction: list[Tensor] = []
        slopes = []
        for group in alsals.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            twins = [p.detach().clone() for p in params]
            for p, twin in zip(params, twins):
                twin.grad = p.grad.clone()
            names = ("step", "exp_avg", "exp_avg_sq")
            states: list[dict[str, Any]] = [
                {name: alsals.state[p][name].clone() for name in names if name in alsals.state[p]} for p in params
            ]
            direction = AdamDirection(twins, states, group["betas"], group["eps"])
            slopes.append(direction.slope())
            for twin in twins:
                twin.zero_()
            direction.move(-1.0)  # from zero by minus one: the direction itself
            self.params += [local_shard(p.detach()) for p in params]
            self.direction += [local_shard(twin) for twin in twins]
        self.start = [p.clone() for p in self.params]
        self.slope = sum(read(slopes)) / float(clip_coef)

    @torch.no_grad()
    def losses(self, closure: Callable[[], Tensor | float], step_sizes: list[float]) -> list[float]:
        """Return the loss at each step size; the weights are back where they were afterwards.

        Args:
            closure (`Callable[[], Tensor]`): Returns the loss of a batch, a scalar, without a backward pass.
            step_sizes (`list[float]`): The step sizes.
        """
        present = [p.clone() for p in self.params]
        losses = []
        try:
            for step_size in step_sizes:
                torch._foreach_copy_(self.params, self.start)
                torch._foreach_add_(self.params, self.direction, alpha=-step_size)
                torch.clear_autocast_cache()
                losses.append(read([closure()])[0])
        finally:
            torch._foreach_copy_(self.params, present)
        return losses


class LineProfileCallback(TrainerCallback):
    """Draws the loss along the search direction, every some steps, into `output_dir/line_profile`.

    A profile has the losses of the step's own batch and of the next one at `points` step sizes, from a hundredth to a
    hundred times the present one, with the line of sufficient decrease, the step taken and the best one, as a picture
    and as json. It costs twice as many forward passes, and two copies of the weights for a step. Training is the same.

    Args:
        every (`int`): Optimizer steps from one profile to the next.
        points (`int`, defaults to 30): Step sizes of a profile.

    Raises:
        ValueError: If one of them is too small.
    """

    def __init__(self, every: int, points: int = 30) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}.")
        if points < 2:
            raise ValueError(f"points must be at least 2, got {points!r}.")
        self.every = every
        self.points = points
        self._line: LineProfile | None = None
        self._profile: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be profiled; the arguments are those of every Trainer callback."""
        self._line = None
        if args.fp16 and not args.max_grad_norm:  # gradients are unscaled when they are clipped
            raise ValueError(f"LineProfileCallback needs max_grad_norm > 0 under fp16, got {args.max_grad_norm}.")

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure the line of this step, and that of the step before on this step's batch."""
        alsals = alsals_of(optimizer)
        closure, _, clip_coef = alsals.handed_over if alsals is not None else (None, None, 1.0)
        if closure is None:
            return
        if self._line is not None:
            self._profile["next_losses"] = self._line.losses(closure, self._profile["step_sizes"])
            self._write(args, state)
        if (state.global_step + 1) % self.every:
            return
        line = LineProfile(alsals, clip_coef)
        if not math.isfinite(line.slope):  # a step that is going to be skipped
            return
        exponents = torch.linspace(-2, 2, self.points, dtype=torch.float64).tolist()
        step_sizes = [0.0, *(alsals.step_size * 10**exponent for exponent in exponents)]
        losses = line.losses(closure, step_sizes)
        if not math.isfinite(losses[0]):  # a step that is going to be skipped too
            return
        self._line = line
        self._profile = {
            "step": state.global_step + 1,
            "c": alsals.line_search.c,
            "slope": line.slope,
            "lr_multiplier": alsals.param_groups[0]["lr"],
            "best_step_size": min(zip(losses, step_sizes), key=lambda pair: (math.isnan(pair[0]), pair[0]))[1],
            "step_sizes": step_sizes,
            "losses": losses,
            "next_losses": [],
        }

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Note the step that was taken; the arguments are those of every Trainer callback."""
        if self._line is not None:
            self._profile["accepted_step_size"] = alsals_of(optimizer).step_size * self._profile["lr_multiplier"]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write a profile of the last step, for which there is no next batch."""
        if self._line is not None:
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        self._line = None
        if state.is_world_process_zero:
            folder = os.path.join(args.output_dir, "line_profile")
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, f"step-{self._profile['step']:06}")
            with open(path + ".json", "w") as file:
                json.dump(self._profile, file)
            draw_line_profile(self._profile, path + ".part.png")
            os.replace(path + ".part.png", path + ".png")  # a report made meanwhile finds a whole one


def draw_line_profile(profile: dict[str, Any], path: str) -> None:
    """Draw the losses of a profile over the step size, with the line of sufficient decrease, accepted and best step.

    Args:
        profile (`dict`): What [`LineProfileCallback`] writes as json.
        path (`str`): The picture to write.
    """
    from matplotlib.figure import Figure

    step_sizes, first = profile["step_sizes"], profile["losses"][0]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    # The first is step size 0, which a logarithmic axis does not show.
    axes.plot(step_sizes[1:], profile["losses"][1:], ".-", label="this batch")
    if profile["next_losses"]:
        shift = first - profile["next_losses"][0]
        shifted = [loss + shift for loss in profile["next_losses"]]
        axes.plot(step_sizes[1:], shifted[1:], ".-", label=f"next batch, moved by {shift:.2g} to the same start")
    line = [first - profile["c"] * step_size * profile["slope"] for step_size in step_sizes[1:]]
    axes.plot(step_sizes[1:], line, "--", color="gray", label=f"sufficient decrease, c = {profile['c']:g}")
    axes.axhline(first, color="black", linewidth=0.6)
    if profile["accepted_step_size"] > 0:
        axes.axvline(profile["accepted_step_size"], color="C2", label="step taken")
    if profile["best_step_size"] > 0:
        axes.axvline(profile["best_step_size"], color="C3", linestyle=":", label="best step on this batch")
    seen = [loss for loss in profile["losses"] if math.isfinite(loss)]
    spread = max(first - min(seen), 1e-12)
    axes.set_ylim(min(seen) - 0.5 * spread, first + 2 * spread)
    axes.set_xscale("log")
    axes.set_xlabel("step size")
    axes.set_ylabel("loss")
    axes.set_title(f"optimizer step {profile['step']}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
