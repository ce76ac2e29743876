"""The loss along the search direction, at many step sizes: the loss-landscape figures of arXiv 2403.18519."""

import copy
import json
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .callbacks import costs_no_run
from .line import Line
from .optimizer import ALSALS, unwrap_alsals
from .shards import local_shard


class LineProfile:
    """The line of an optimizer step that is about to be taken, for losses at many step sizes on it.

    Neither weights nor gradients nor the optimizer are changed by it. It holds a copy of the weights and of the state.

    Args:
        alsals (`ALSALS`): The optimizer, with gradients in place.
        closure (`Callable[[], Tensor]`): Returns the loss of the step's batch, a scalar, without a backward pass.
        clip_coef (`Tensor` or `float`, defaults to 1.0): What clipping multiplied the gradients by.

    Attributes:
        slope (`float`): The slope of the batch that the gradients came from.
    """

    @torch.no_grad()
    def __init__(self, alsals: ALSALS, closure: Callable[[], Tensor | float], clip_coef: Tensor | float = 1.0) -> None:
        state = {p: copy.deepcopy(alsals.state.get(p, {})) for group in alsals.param_groups for p in group["params"]}
        groups = [dict(group) for group in alsals.param_groups]  # a schedule will have moved on at the next batch
        self._direction = alsals.direction(groups, state)
        self._direction.multipliers = alsals.multipliers
        self._direction.update()
        self.slope = Line(self._direction, closure, math.nan, float(clip_coef)).slope
        self._direction.save(keep_grads=True)

    @torch.no_grad()
    def losses(self, closure: Callable[[], Tensor | float], step_sizes: list[float]) -> list[float]:
        """Return the loss at each step size; the weights are back where they were afterwards.

        Args:
            closure (`Callable[[], Tensor]`): Returns the loss of a batch, a scalar, without a backward pass.
            step_sizes (`list[float]`): The step sizes.
        """
        params = [local_shard(p) for p in self._direction.params]
        present = [p.clone() for p in params]
        line = Line(self._direction, closure, math.nan)
        try:
            return [line.probe(step_size) for step_size in step_sizes]
        finally:
            torch._foreach_copy_(params, present)


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
        """Refuse what cannot be profiled."""
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
        alsals = unwrap_alsals(optimizer)
        if alsals is None or alsals.pending.closure is None:
            return
        closure = alsals.pending.closure
        if self._line is not None:
            self._profile["next_losses"] = self._line.losses(closure, self._profile["step_sizes"])
            self._write(args, state)
        if (state.global_step + 1) % self.every:
            return
        line = LineProfile(alsals, closure, alsals.pending.clip_coef)
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
            "c": alsals.line_search.acceptance.c,
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
        """Note the step that was taken."""
        if self._line is not None and (alsals := unwrap_alsals(optimizer)) is not None:
            self._profile["searched"] = alsals.search.searched
            self._profile["accepted_step_size"] = alsals.search.taken * self._profile["lr_multiplier"]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write a profile of the last step, for which there is no next batch."""
        if self._line is not None:
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        self._line = None
        if state.is_world_process_zero:
            path = os.path.join(args.output_dir, "line_profile", f"step-{self._profile['step']:06}")
            with costs_no_run(path + ".png"):
                os.makedirs(os.path.dirname(path), exist_ok=True)
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
    axes.set_title(f"optimizer step {profile['step']}, {'searched' if profile['searched'] else 'not searched'}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
