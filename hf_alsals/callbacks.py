"""The picture of a run: loss, step size, Armijo ratio and probes."""

import contextlib
import copy
import datetime
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from .optimizer import ALSALS, KINDS, unwrap_alsals
from .presets import PRESETS
from .publishing import without_local_paths
from .training_args import defaults_of

logger = logging.getLogger(__name__)


def one_line(error: BaseException) -> str:
    """Return what an error says in one line, without the number that the system has for it.

    Args:
        error (`BaseException`): The error.
    """
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f": {str(error.filename)!r}"
        return f"{error.strerror}{name}"
    return " ".join(str(error).split())


@contextlib.contextmanager
def costs_no_run(path: str) -> Iterator[None]:
    """Log one line where the block cannot draw or write a file that training can do without.

    Args:
        path (`str`): The file.
    """
    try:
        yield
    except Exception as error:  # whatever the disk, matplotlib or odd logs do
        logger.warning(f"{path} is not written, training goes on without it: {one_line(error)}")


def optimizer_name(args: TrainingArguments, model: Any, optimizer: Any) -> str:
    """Return the optimizer of a training: its `optim`, or the class of one that was made otherwise.

    Args:
        args (`TrainingArguments`): The training arguments.
        model (`nn.Module`): The model.
        optimizer (`torch.optim.Optimizer`): The optimizer, Accelerate's wrapper around it included.
    """
    optim = getattr(args.optim, "value", args.optim)
    made = unwrap_alsals(optimizer) or getattr(optimizer, "optimizer", optimizer)
    try:
        cls = ALSALS if optim in PRESETS else Trainer.get_optimizer_cls_and_kwargs(args, model)[0]
    except (ImportError, ValueError):  # of an optimizer that comes with its own Trainer
        return optim
    is_other = isinstance(made, torch.optim.Optimizer) and isinstance(cls, type) and not isinstance(made, cls)
    return type(made).__name__ if is_other else optim


class StepSizeCallback(TrainerCallback, ExportableState):
    """Draws loss, step size, Armijo ratio and probes into `output_dir/step_size.png`.

    The values are those of the Trainer's own logs, so a resumed run is drawn whole. It is drawn with every checkpoint
    and at the end. While training goes on, `output_dir/trainer_state.json` has the logs, at most `seconds` old, for
    `hf-alsals report`.

    Args:
        seconds (`float`, defaults to 30.0): Time between two updates of the logs, at least.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self.settings: dict[str, Any] = {}
        self.c: float | None = None
        self.growth_metrics: list[str] = []
        self.first_step = 0
        self.search_seconds = 0.0
        self.updated = ""
        self._last_update = math.inf  # an evaluation without training writes nothing

    def state(self) -> dict[str, Any]:
        """Return what a report says beyond the logs, such as the settings and the time spent in searches."""
        names = ("settings", "c", "growth_metrics", "first_step", "search_seconds", "updated")
        return {"args": {"seconds": self.seconds}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Note the settings that are not the default."""
        optim = optimizer_name(args, model, optimizer)
        if (alsals := unwrap_alsals(optimizer)) is not None:
            search = alsals.line_search
            self.c, self.growth_metrics = search.acceptance.c, list(search.growth.metrics(alsals.search.growth))
        defaults = {one.name: None if one.default is MISSING else one.default for one in fields(args)}
        # A subclass may have arguments that json does not know, such as a Path or an array.
        settings, defaults = (
            json.loads(json.dumps(one, default=str)) for one in (args.to_dict(), defaults | defaults_of(optim))
        )
        shown = {
            name: value
            for name, value in settings.items()
            # None and False, as well as None and [], are one and the same here.
            if value != defaults[name] and (value or defaults[name]) and not isinstance(value, dict)
        }
        shown = {name: value for name, value in shown.items() if not name.endswith("_token")} | {"optim": optim}
        self.settings = without_local_paths(shown)
        self.first_step, self.search_seconds, self._last_update = state.global_step, 0.0, -math.inf
        state.stateful_callbacks["StepSizeCallback"] = self.state()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the logs if it is time."""
        if time.monotonic() - self._last_update >= self.seconds:
            self._write_state(args, state, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the picture."""
        if state.is_world_process_zero:
            name = os.path.basename(os.path.abspath(args.output_dir))
            title = f"{name}: {self.settings.get('optim', 'optimizer not recorded')}"
            path = os.path.join(args.output_dir, "step_size.png")
            with costs_no_run(path):
                draw_step_size(state.log_history, title, path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the logs and draw the picture."""
        self._write_state(args, state, **kwargs)
        self.on_save(args, state, control)

    def _write_state(self, args: TrainingArguments, state: TrainerState, optimizer: Any = None, **kwargs: Any) -> None:
        self._last_update = time.monotonic()
        if not state.is_world_process_zero:
            return
        if (alsals := unwrap_alsals(optimizer)) is not None:
            self.search_seconds = max(self.search_seconds, alsals.search_seconds)
        self.updated = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        state.stateful_callbacks["StepSizeCallback"] = self.state()
        shown = copy.copy(state)
        shown.best_model_checkpoint = without_local_paths(state.best_model_checkpoint)
        path = os.path.join(args.output_dir, TRAINER_STATE_NAME)
        with costs_no_run(path):
            shown.save_to_json(path + ".part")
            os.replace(path + ".part", path)  # whoever reads it meanwhile reads a whole one


def as_text(text: str) -> str:
    """Return text that matplotlib draws as it is, though it would take what is between two dollar signs for a formula.

    Args:
        text (`str`): The text.
    """
    return text.replace("$", r"\$")


def draw_step_size(log_history: list[dict[str, Any]], title: str, path: str) -> None:
    """Draw loss, step size, Armijo ratio and probes over the optimizer steps.

    Args:
        log_history (`list[dict]`): The Trainer's logs; nothing is drawn if there is none of training.
        title (`str`): The title of the picture.
        path (`str`): The picture to write.
    """
    from matplotlib.figure import Figure

    logs = [entry for entry in log_history if {"loss", "learning_rate"} <= set(entry)]
    if not logs:
        return
    evals = [entry for entry in log_history if "eval_loss" in entry]
    steps = [entry["step"] for entry in logs]
    searched = all("step_size" in entry for entry in logs)
    figure = Figure(figsize=(7, 10 if searched else 5.5), layout="constrained")
    loss_axes, step_size_axes, *others = figure.subplots(4 if searched else 2, 1, sharex=True)
    loss_axes.plot(steps, [entry["loss"] for entry in logs], ".-", label="training loss")
    if evals:
        eval_steps = [entry["step"] for entry in evals]
        loss_axes.plot(eval_steps, [entry["eval_loss"] for entry in evals], "o-", label="evaluation loss")
    loss_axes.set_ylabel("loss")
    if searched:
        taken = [entry["step_size"] * entry["lr_multiplier"] for entry in logs]
        step_size_axes.plot(steps, [entry["step_size"] for entry in logs], ".-", label="common step size")
        step_size_axes.plot(steps, taken, ".--", label="times the schedule")
        for number, kind in enumerate(KINDS, start=2):
            low, median, high = (
                [entry.get(f"step_size_{kind}{end}", math.nan) for entry in logs] for end in ("_q1", "", "_q3")
            )
            if not all(map(math.isnan, median)):
                step_size_axes.plot(steps, median, color=f"C{number}", label=f"{kind}: median and quartiles")
                step_size_axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.2)
        for axes, name, label in zip(
            others,
            ("armijo_ratio", "probes"),
            ("Armijo ratio (decrease over prediction)", "probes per optimizer step"),
            strict=True,
        ):
            axes.plot(steps, [entry.get(name, math.nan) for entry in logs], ".-", label=label)
            axes.set_ylabel(name.replace("_", " "))
    else:
        step_size_axes.plot(steps, [entry["learning_rate"] for entry in logs], ".-", label="learning rate")
    step_size_axes.set_yscale("log")
    step_size_axes.set_ylabel("step size")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.axes[-1].set_xlabel("optimizer step")
    figure.suptitle(as_text(title))
    figure.savefig(path, dpi=120)
