"""Callbacks that show what the step size does."""

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepSizeCallback(TrainerCallback):
    """Draws loss and step size over the optimizer steps into `output_dir/step_size.png` when training ends.

    The values are those of the Trainer's own logs, so a resumed run is drawn whole. Needs matplotlib.
    """

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the picture; the arguments are those of every Trainer callback."""
        from matplotlib.figure import Figure

        logs = [entry for entry in state.log_history if {"loss", "learning_rate"} <= set(entry)]
        if not state.is_world_process_zero or not logs:
            return
        evals = [entry for entry in state.log_history if "eval_loss" in entry]
        steps = [entry["step"] for entry in logs]
        figure = Figure(figsize=(7, 5.5), layout="constrained")
        loss_axes, step_size_axes = figure.subplots(2, 1, sharex=True)
        loss_axes.plot(steps, [entry["loss"] for entry in logs], ".-", label="training loss")
        if evals:
            loss_axes.plot(
                [entry["step"] for entry in evals],
                [entry["eval_loss"] for entry in evals],
                "o-",
                label="evaluation loss",
            )
        loss_axes.set_ylabel("loss")
        if all("step_size" in entry for entry in logs):
            step_sizes = [entry["step_size"] for entry in logs]
            taken = [entry["step_size"] * entry["lr_multiplier"] for entry in logs]
            step_size_axes.plot(steps, step_sizes, ".-", label="step size (search)")
            step_size_axes.plot(steps, taken, ".--", label="times the schedule")
        else:
            step_size_axes.plot(steps, [entry["learning_rate"] for entry in logs], ".-", label="learning rate")
        step_size_axes.set_yscale("log")
        step_size_axes.set_ylabel("step size")
        step_size_axes.set_xlabel("optimizer step")
        for axes in (loss_axes, step_size_axes):
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.suptitle(
            f"{os.path.basename(os.path.abspath(args.output_dir))}: {getattr(args.optim, 'value', args.optim)}"
        )
        figure.savefig(os.path.join(args.output_dir, "step_size.png"), dpi=120)
