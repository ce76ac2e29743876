"""The command line of the recipes: a config file, and flags that override it."""

import argparse
import json
import re
import sys
from typing import Any

import yaml
from transformers import HfArgumentParser


class OneLineHelpFormatter(argparse.HelpFormatter):
    """Shows a line for each flag: its name, its default and the first sentence of its help."""

    def _format_action(self, action: argparse.Action) -> str:
        # Private, but argparse has had no other hook since Python 2.7.
        flag = action.option_strings[-1 if action.option_strings[0] == "-h" else 0]
        text = action.help or ""
        if action.default not in (None, argparse.SUPPRESS) and not callable(action.default):
            text = f"({getattr(action.default, 'value', action.default)}) {text}"
        text = re.sub(r" \(default: .*\)$", "", " ".join(text.split()))
        text = re.split(r"(?<=[a-z\d)`'\"]{2})\. ", text)[0]
        room = self._width - 38
        text = text if len(text) <= room else text[: room - 3] + "..."
        return f"  {flag:<35} {text}\n"


class AlsalsArgumentParser(HfArgumentParser):
    """[`~transformers.HfArgumentParser`] that reads a yaml or json config before the flags.

    Args:
        dataclass_types (`type` or `list[type]`): The dataclasses to fill.
        kwargs: Passed on to `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        usage = "%(prog)s [config.yaml | config.json] [--flag value ...]"
        super().__init__(dataclass_types, usage=usage, formatter_class=OneLineHelpFormatter, **kwargs)

    def parse_args_and_config(self, args: list[str] | None = None) -> tuple[Any, ...]:
        """Parse flags, or a config file whose values the flags after it override.

        A bad flag or value ends the program with one line that names it.

        Args:
            args (`list[str]`, *optional*): The command line, without the program; that of the process if left out.

        Returns:
            One instance of each dataclass.
        """
        args = sys.argv[1:] if args is None else list(args)
        if args and args[0].endswith((".yaml", ".yml", ".json")):
            args = self._flags_of(args[0]) + args[1:]
        try:
            parsed: tuple[Any, ...] = self.parse_args_into_dataclasses(args=args)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            self.error(" ".join(str(error).split()))
        return parsed

    def _flags_of(self, path: str) -> list[str]:
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            config = yaml.safe_load(text)  # json is yaml
            written = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar as text: `no` is no boolean here
        except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
            self.error(f"the config {path!r} cannot be read: {' '.join(str(error).split())}")
        if not isinstance(config, dict):
            self.error(f"the config {path!r} must hold names and values, got {config!r}")
        flags = []
        for name, value in config.items():
            if value is None or value == []:
                continue
            if not isinstance(name, str):
                self.error(f"the config {path!r} must hold names and values, got the name {name!r}")
            values, texts = (value, written[name]) if isinstance(value, list) else ([value], [written[name]])
            if any(isinstance(item, (list, tuple, set)) for item in values):
                self.error(f"the config {path!r} must hold values, or lists of them, got {value!r} for {name}")
            flags += [f"--{name}"]
            flags += [json.dumps(item) if isinstance(item, dict) else text for item, text in zip(values, texts)]
        return flags
