"""Resuming from the last checkpoint that is complete."""

import logging
import math
import os
import re
import zipfile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from .callbacks import StepSizeCallback
from .mixin_base import TrainerMixinBase
from .optimizer import unwrap_alsals
from .presets import PRESETS

logger = logging.getLogger(__name__)

# What torch.save writes into a checkpoint: always a zip, whose end says where everything is.
_ZIPS = re.compile(r"(optimizer|scheduler|scaler)\.pt|optimizer\.bin|rng_state(_\d+)?\.pth")


def checkpoint_state(checkpoint: str) -> TrainerState | None:
    """Return the state of a checkpoint that was written to its end; `None` of any other folder.

    The Trainer writes a checkpoint's trainer_state.json last: where a run was killed while it saved, there is none or
    a broken one.

    Args:
        checkpoint (`str`): The folder.
    """
    try:
        return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    except (OSError, TypeError, ValueError):
        return None


def saved_attributes(state: TrainerState, callback: str) -> dict[str, Any]:
    """Return what a callback has saved in a state, by name; nothing if there is none or it is not well-formed.

    Args:
        state (`TrainerState`): The state.
        callback (`str`): The name of the callback's class.
    """
    saved = state.stateful_callbacks.get(callback)
    attributes = saved.get("attributes") if isinstance(saved, dict) else None
    return attributes if isinstance(attributes, dict) else {}


def complete_checkpoints(output_dir: str) -> list[str]:
    """Return the folders of the checkpoints that were written to their end, the first one first.

    Args:
        output_dir (`str`): The output directory of a run.
    """
    if not os.path.isdir(output_dir):
        return []
    steps = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in os.listdir(output_dir)]
    names = sorted((match for match in steps if match), key=lambda match: int(match.group(1)))
    folders = [os.path.join(output_dir, match.group()) for match in names]
    return [folder for folder in folders if checkpoint_state(folder) is not None]


def last_complete_checkpoint(output_dir: str) -> str | None:
    """Return the last checkpoint that was written to its end.

    Args:
        output_dir (`str`): The output directory of a run.

    Returns:
        `str` or `None`: The checkpoint's folder, if there is one.
    """
    return next(reversed(complete_checkpoints(output_dir)), None)


def was_searched(checkpoint: str) -> bool | None:
    """Return whether the optimizer of a checkpoint searched; `None` if the checkpoint does not say.

    Args:
        checkpoint (`str`): The folder.
    """
    # One file, of the Trainer or of FSDP; or FSDP's shards, whose names are in clear in the index beside them.
    for name in (OPTIMIZER_NAME, "optimizer.bin"):
        if os.path.isfile(path := os.path.join(checkpoint, name)):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return any("search_step_size" in group for group in saved["param_groups"])
    index = os.path.join(checkpoint, "optimizer_0", ".metadata")
    if not os.path.isfile(index):
        return None
    with open(index, "rb") as file:
        return b"search_step_size" in file.read()


def check_checkpoint(checkpoint: str, model: nn.Module | None) -> None:
    """Raise unless the files of a checkpoint are whole, and its weights are those of the model.

    Args:
        checkpoint (`str`): The folder.
        model (`nn.Module`, *optional*): The model; only one of transformers or peft has its weights compared, for
            others may be saved under other names.

    Raises:
        ValueError: If they are not.
    """
    if checkpoint_state(checkpoint) is None:
        raise ValueError(f"resume_from_checkpoint must be a checkpoint's folder, got {checkpoint!r}.")
    for name in sorted(os.listdir(checkpoint)):
        path = os.path.join(checkpoint, name)
        shapes = {}
        try:
            is_whole = not _ZIPS.fullmatch(name) or zipfile.is_zipfile(path)
            if name.endswith(".safetensors"):
                with safe_open(path, "pt") as file:
                    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            is_whole = False
        if not is_whole:
            raise ValueError(
                f"resume_from_checkpoint must be a whole checkpoint, but {name} in {checkpoint!r} cannot be read: "
                "resume from an earlier one."
            )
        is_known = isinstance(model, PreTrainedModel) or hasattr(model, "peft_config")
        if name == SAFE_WEIGHTS_NAME and is_known and (other := _other_weight(model, shapes)) is not None:
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint of this model, but {other} in {checkpoint!r} is not: "
                "resume with the model's own config."
            )


def _other_weight(model: Any, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Return a name that only one of a model and a file of weights has, or that has two shapes."""
    state = model.state_dict()
    saved = {state[name].data_ptr() for name in shapes.keys() & state.keys()}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, tensor in state.items():
        if name not in shapes and name not in ignored and tensor.numel() and tensor.data_ptr() not in saved:
            return name
    present = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return next((name for name, shape in shapes.items() if present.get(name) != shape), None)


class _NothingLeft(Exception):  # noqa: N818
    """Training had come to its end before it was resumed."""


class _Resumed(TrainerCallback):
    """Sets a resumed state right, and ends a training that has no step left."""

    def __init__(self, checkpoint: str, best: str | None) -> None:
        self.checkpoint, self.best = checkpoint, best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the best checkpoint beside this one, where a pushed or moved one has its name only."""
        if self.best is not None and not os.path.isdir(state.best_model_checkpoint or ""):
            beside = os.path.join(os.path.dirname(os.path.abspath(self.checkpoint)), os.path.basename(self.best))
            state.best_model_checkpoint = beside if os.path.isdir(beside) else None
        if state.global_step >= state.max_steps:
            raise _NothingLeft


class CheckpointMixin(TrainerMixinBase):
    """Resumes from the last complete checkpoint, and refuses one that it cannot go on with."""

    args: Any
    callback_handler: Any
    control: TrainerControl

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end.

        Where it is the last one of all, no step is taken: its model is loaded, and the metrics are those that training
        logged at its end; where it was killed before, they have no loss.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint to resume from.
            args, kwargs: Passed on to the Trainer.

        Raises:
            ValueError: If the checkpoint is not whole, or that of another model or optimizer.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir or "") or True
        if not resume_from_checkpoint or resume_from_checkpoint is True:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = os.fspath(resume_from_checkpoint)
        check_checkpoint(checkpoint, self.model)
        state = checkpoint_state(checkpoint)
        self.add_callback(_Resumed(checkpoint, state and state.best_model_checkpoint))
        try:
            return super().train(checkpoint, *args, **kwargs)
        except _NothingLeft:
            logger.warning(f"Step {self.state.global_step} of {checkpoint} was the last one: nothing is left to train")
            metrics = self._take_end()
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False
            return TrainOutput(self.state.global_step, metrics.get("train_loss", math.nan), metrics)
        finally:
            self.remove_callback(_Resumed)

    def _take_end(self) -> dict[str, float]:
        """Take up what training logged after its last checkpoint, and return the metrics in it."""
        logs, final = self.state.log_history, checkpoint_state(self.args.output_dir or "")
        seen = [] if final is None else final.log_history
        end: dict[str, float] = next((entry for entry in seen[len(logs) :] if "train_loss" in entry), {})
        # NaN is not NaN, but its text is. The output directory may be that of another training.
        if final is None or end.get("step") != self.state.global_step or str(seen[: len(logs)]) != str(logs):
            logger.warning("Its train_loss is not known: training was killed between its last checkpoint and its end")
            return {"total_flos": self.state.total_flos}
        logs.append(end)
        attributes = final.stateful_callbacks.get("StepSizeCallback", {}).get("attributes", {})
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StepSizeCallback):
                callback.first_step = attributes.get("first_step", 0)
                callback.search_seconds = attributes.get("search_seconds", 0.0)
        return {name: value for name, value in end.items() if name != "step"}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        # Private, as is the next, but nothing else comes before the load (transformers 5.0 to 5.24).
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        except (RuntimeError, ValueError) as error:
            # torch lists every weight that does not fit.
            reason = str(error) if isinstance(error, ValueError) else "resume with the model's own config and adapter."
            raise ValueError(
                "resume_from_checkpoint must be a checkpoint of this model, but "
                f"{resume_from_checkpoint!r} is not: {reason}"
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self._check_optimizer(checkpoint)
        given = self._hyperparameters()
        super()._load_optimizer_and_scheduler(checkpoint)
        kept = self._hyperparameters()
        for name, value in given.items():
            if kept[name] != value:
                logger.warning(
                    f"{name} is kept from the checkpoint in a resumed run: it stays {kept[name]}, not {value}."
                )

    def _hyperparameters(self) -> dict[str, Any]:
        # Of the group with the largest weight decay, for biases and norms have none.
        alsals = unwrap_alsals(self.optimizer)
        if alsals is None or self.args.optim not in PRESETS:  # one of the user's own has no training arguments
            return {}
        group = max(alsals.param_groups, key=lambda group: group["weight_decay"])
        beta1, beta2 = group["betas"]
        return {
            "learning_rate": group.get("initial_lr"),
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "adam_epsilon": group["eps"],
            "weight_decay": group["weight_decay"],
        }

    def _check_optimizer(self, checkpoint: str) -> None:
        optim, state = self.args.optim, checkpoint_state(checkpoint)
        settings = saved_attributes(state, "StepSizeCallback").get("settings") if state else None
        was = settings.get("optim") if isinstance(settings, dict) else None
        if was in PRESETS and optim in PRESETS and was != optim:
            raise ValueError(
                f"optim must be {was!r}, as that of {checkpoint!r}, got {optim!r}: go on with that, or start from the "
                "model alone."
            )
        is_ours, names = unwrap_alsals(self.optimizer) is not None, os.listdir(checkpoint)
        missing = [] if any(name.startswith("optimizer") for name in names) else [OPTIMIZER_NAME]
        missing += [] if SCHEDULER_NAME in names else [SCHEDULER_NAME]
        if is_ours and missing:  # the Trainer begins anew without a word
            raise ValueError(
                "resume_from_checkpoint must be a checkpoint that the search can go on with, but "
                f"{checkpoint!r} has no {' and no '.join(missing)}, as with save_only_model: "
                "start from its model instead."
            )
        was_ours = was_searched(checkpoint)
        if was_ours not in (is_ours, None):
            kinds = ("one of the Trainer's own", "one of ALSALS, such as alsals")
            raise ValueError(
                f"optim must be {kinds[was_ours]}, as that of {checkpoint!r}, got {self.args.optim!r}: "
                "go on with that, or start from the model alone."
            )
