"""What a run shows to others: its files without the Hub token and without the paths of this machine."""

import copy
import json
import os
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainingArguments


def is_local_path(value: Any) -> bool:
    """Return whether a value is a path of this machine, not a name on the Hub.

    Args:
        value: Any value; only text can be a path.
    """
    return isinstance(value, str) and (os.path.isabs(os.path.expanduser(value)) or os.path.exists(value))


def without_local_paths(value: Any) -> Any:
    """Return a value with only the last part of every local path in it.

    Args:
        value: A path or any other value, or dicts and lists of such.
    """
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    return os.path.basename(os.path.abspath(value)) if is_local_path(value) else value


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
