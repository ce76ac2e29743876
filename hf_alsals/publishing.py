"""Publishing a run: its files on the Hub, without the Hub token and without the paths of this machine."""

import contextlib
import copy
import inspect
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainingArguments
from transformers.modelcard import TrainingSummary
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy

from .mixin_base import TrainerMixinBase
from .model_card import add_results_to_card, add_search_to_card, correct_start_in_card
from .optimizer import ALSALS

logger = logging.getLogger(__name__)

# A path of two parts or more that text goes on to; neither part of an address nor a name on the Hub.
_PATH_IN_TEXT = re.compile(
    r"(?:(?<=file://)|(?<![\w.~/<\\-]))(?:~/[^\s\"'`,;:|<>()\[\]{}]+|(?:/[^\s\"'`,;:|<>()\[\]{}/]+){2,}/?)"
)


def is_local_path(value: Any) -> bool:
    """Return whether a value is a path of this machine, not a name on the Hub.

    Args:
        value: Any value; only text can be a path.
    """
    return isinstance(value, str) and (os.path.isabs(os.path.expanduser(value)) or os.path.exists(value))


def without_local_paths(value: Any) -> Any:
    """Return a value with only the last part of every local path in it.

    Args:
        value: A path, text with paths in it or any other value, or dicts, lists and tuples of such.
    """
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_local_paths(item) for item in value)
    if isinstance(value, pathlib.PurePath):
        return type(value)(value.name)
    if type(value) is not str:
        return value
    if is_local_path(value):
        return os.path.basename(os.path.abspath(value))
    home = os.path.expanduser("~").rstrip(os.sep)
    if home:  # it may have spaces in it
        value = value.replace(home + os.sep, "~/")
    return _PATH_IN_TEXT.sub(lambda match: os.path.basename(match.group().rstrip("/")), value)


class PublishedArguments:
    """Stands for training arguments while they are saved: pickles as these, without the Hub token and local paths.

    Args:
        args (`TrainingArguments`): The training arguments, which every attribute is read from.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.__dict__["_args"] = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_args"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_args"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        published = copy.copy(self.__dict__["_args"])
        vars(published).update(without_local_paths(vars(published)), hub_token=None)
        return published.__reduce_ex__(1)  # from 2 on, pickle wants the object itself to be of that class


def remove_local_base_model(folder: str) -> None:
    """Take the base model out of an adapter's config and out of a model card where it is a local path.

    `PeftModel.from_pretrained(base_model, folder)` does without it.

    Args:
        folder (`str`): The folder with the files; either may be missing.
    """
    path = os.path.join(folder, "adapter_config.json")
    if os.path.isfile(path):
        with open(path) as file:
            config = json.load(file)
        if is_local_path(config["base_model_name_or_path"]):
            config["base_model_name_or_path"] = None
            with open(path, "w") as file:
                json.dump(config, file, indent=2, sort_keys=True)
    path = os.path.join(folder, "README.md")
    if os.path.isfile(path):
        card = ModelCard.load(path)
        if is_local_path(base_model := card.data.base_model):
            card.data.base_model = None
            card.data.tags = [tag for tag in card.data.tags or [] if base_model not in tag]
            card.save(path)


class PublishingMixin(TrainerMixinBase):
    """Saves and pushes a run without secrets, loses nothing if the Hub fails, and completes the model card.

    Attributes:
        alsals (`ALSALS` or `None`): The optimizer, without Accelerate's wrapper, once training has begun.
    """

    args: Any
    alsals: ALSALS | None = None
    _hub_failed = False

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model, with training arguments that hold neither the Hub token nor a local path.

        Args:
            output_dir (`str`, *optional*): The folder, `args.output_dir` if left out.
            args, kwargs: Passed on to the Trainer.
        """
        with self._published_arguments():
            super().save_model(output_dir, *args, **kwargs)
        folder = output_dir or self.args.output_dir
        # Only then is the card there one that PEFT has just written.
        if self.args.should_save and os.path.isfile(os.path.join(folder, "adapter_config.json")):
            remove_local_base_model(folder)

    def save_state(self) -> None:
        """Save the Trainer's state, naming the best checkpoint without its path."""
        best_model_checkpoint = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = without_local_paths(best_model_checkpoint)
        try:
            super().save_state()
        finally:
            self.state.best_model_checkpoint = best_model_checkpoint

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository on the Hub; where that fails, warn, train, and try again in `push_to_hub`.

        Args:
            args, kwargs: Passed on to the Trainer.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
            self._hub_failed = False
        except Exception as error:  # whatever the Hub or the network does must not cost a run
            self._hub_failed = True
            self.push_in_progress = None
            self.hub_model_id = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            logger.warning(f"The Hub did not open the repository {self.hub_model_id}: {' '.join(str(error).split())}")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model, write the model card and push the output directory to the Hub.

        Args:
            args, kwargs: Passed on to the Trainer: `commit_message`, `blocking`, `token` and the fields of the card.

        Returns:
            `CommitInfo`, or a `Future` of it if `blocking=False`.

        Raises:
            Exception: What the Hub or the network answered; the results are on disk by then.
        """
        if self._hub_failed:
            self.init_hf_repo(token=kwargs.get("token", args[2] if len(args) > 2 else None))
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception:
            output_dir = self.args.output_dir
            logger.error(
                f"The push to the Hub failed, the results are in {output_dir}: push them later with "
                f"hf upload {self.hub_model_id} {output_dir} --exclude 'checkpoint-*'"
            )
            raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, with the results in its metadata and a section on the step size.

        Args:
            args, kwargs: Passed on to the Trainer; a local path among them is left out of the card.
        """
        if not self.is_world_process_zero():
            return
        start = kwargs.get("finetuned_from") or getattr(getattr(self.model, "config", None), "_name_or_path", None)
        for name in ("finetuned_from", "dataset_tags", "dataset", "dataset_args", "dataset_name"):
            if is_local_path(kwargs.get(name)):
                kwargs[name] = None
        super().create_model_card(*args, **kwargs)
        remove_local_base_model(self.args.output_dir)
        path = os.path.join(self.args.output_dir, "README.md")
        correct_start_in_card(path, from_local_model=is_local_path(start))
        known = inspect.signature(TrainingSummary.from_trainer).parameters
        fields = {name: value for name, value in kwargs.items() if name in known}
        if "dataset_name" in kwargs:  # as TRL's trainers call it
            fields["dataset"] = kwargs["dataset_name"]
        # A license is given so that the Hub is not asked for that of the base model.
        summary = TrainingSummary.from_trainer(self, **{"license": "unknown", **fields})
        dataset = {
            "dataset_type": _first(summary.dataset_tags) or "custom",
            "dataset_name": _first(summary.dataset) or "unknown",
            "dataset_config": _first(summary.dataset_args),
        }
        add_results_to_card(path, self.state.log_history, dataset, _first(summary.tasks) or "other")
        if self.alsals is not None:
            seconds = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
            steps = self.state.global_step
            add_search_to_card(path, self.args.optim, self.alsals, steps, seconds[-1] if seconds else None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Private, but it pickles self.args and pushes it at once, with the checkpoint (transformers 5.0 to 5.24).
        is_pushed = self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        if is_pushed and self.is_world_process_zero():
            path = os.path.join(checkpoint_folder, TRAINER_STATE_NAME)
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(without_local_paths(state), file, indent=2, sort_keys=True)
        with self._published_arguments():
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _published_arguments(self) -> Iterator[None]:
        args = self.args
        self.args = args if isinstance(args, PublishedArguments) else PublishedArguments(args)
        try:
            yield
        finally:
            self.args = args


def _first(names: str | list[str] | None) -> str | None:
    return next(iter(names), None) if isinstance(names, list) else names
