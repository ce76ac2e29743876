"""Every Trainer and all training arguments of a script, whatever subclass they are of, with an optimizer of ours."""

import dataclasses
import os
import sys
from typing import Any, ClassVar

import torch
from transformers import Trainer, TrainingArguments

from .trainer import AlsalsTrainerMixin
from .training_args import AlsalsArgumentsMixin, defaults_of


@dataclasses.dataclass
class ScriptRun:
    """A run of a script with an optimizer of this package.

    Args:
        script (`str`): The script as it was given, for messages.
        optim (`str`): One of `PRESETS`.
        optim_args (`str`, *optional*): Options of the line search.
        flags (`frozenset[str]`): The names of the options on the script's command line, without dashes.
        has_trainer, has_trained (`bool`): Whether a Trainer has been made, and whether one has begun to train.
    """

    script: str
    optim: str
    optim_args: str | None
    flags: frozenset[str]
    has_trainer: bool = False
    has_trained: bool = False

    def say(self, text: str) -> None:
        """Print a line on standard error, once for all processes of a node."""
        if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
            print(f"hf-alsals run: {text}", file=sys.stderr, flush=True)


def take_over(run: ScriptRun) -> None:
    """Have every Trainer and all training arguments that are made from now on be of this package.

    Their constructors are left alone, so it does not matter where a script has the classes from, or which subclasses
    of them other libraries define.

    Args:
        run (`ScriptRun`): The run.
    """
    classes: dict[type, type] = {}

    def with_mixin(mixin: type, cls: type, **same: Any) -> type:
        if issubclass(cls, mixin):
            return cls
        if cls not in classes:
            names = ("__module__", "__qualname__", "__doc__")
            own = {name: getattr(cls, name) for name in names} | same | {"script_run": run, "script_class": cls}
            classes[cls] = type(cls.__name__, (mixin, cls), own)
        return classes[cls]

    def new_arguments(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Constructor and fields are the script's: a default is told from what it gives by its value.
        same = {name: getattr(cls, name) for name in ("__init__", "__dataclass_fields__", "__repr__", "__eq__")}
        return object.__new__(with_mixin(ScriptArgumentsMixin, cls, **same))

    def new_trainer(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(with_mixin(ScriptTrainerMixin, cls))

    TrainingArguments.__new__, Trainer.__new__ = new_arguments, new_trainer


def _unpickled(cls: type[TrainingArguments]) -> TrainingArguments:
    """Return training arguments without values: of this package where there is a run, else the script's own."""
    args: TrainingArguments = cls.__new__(cls)  # type: ignore[call-overload]
    return args


class ScriptArgumentsMixin(AlsalsArgumentsMixin):
    """Training arguments of a script that was written for another optimizer."""

    script_run: ClassVar[ScriptRun]
    script_class: ClassVar[type]
    replaced: dict[str, tuple[Any, Any]]

    def __post_init__(self) -> None:
        run = self.script_run
        theirs = {name: getattr(self, name) for name in ("optim", *defaults_of(run.optim))}
        self.optim, self.optim_args = run.optim, run.optim_args
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in theirs.items():
            # A learning rate in the script is one for Adam, whether it is the default of its class or not.
            if name != "optim" and name not in run.flags and (name == "learning_rate" or value == defaults[name]):
                setattr(self, name, None)
        super().__post_init__()
        ours = {name: getattr(self, name) for name in theirs}
        self.replaced = {
            name: (value, ours[name]) for name, value in theirs.items() if value not in (None, ours[name])
        }

    def __reduce__(self) -> Any:
        return _unpickled, (self.script_class,), self.__dict__


class ScriptTrainerMixin(AlsalsTrainerMixin):
    """Trainer of a script that was written for another optimizer."""

    script_run: ClassVar[ScriptRun]
    script_class: ClassVar[type]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        run = self.script_run
        run.has_trainer = True
        if self.args.optim != run.optim:
            raise ValueError(
                f"{run.script} gives its {self.script_class.__name__} training arguments of an earlier run, with "
                f"optim {_text(self.args.optim)}: --optim {run.optim} needs some that the script makes."
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer; raise if the script has brought one of its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        run, name = self.script_run, self.script_class.__name__
        if self.alsals is None:
            raise ValueError(
                f"{run.script} gives its {name} an optimizer of its own ({type(optimizer).__name__}), which --optim "
                f"{run.optim} cannot replace: leave it out there, or give it an ALSALS."
            )
        changes = [f"{key} {_text(new)} in place of {_text(old)}" for key, (old, new) in self.args.replaced.items()]
        # Set after the arguments were made, by the script's own parameter groups, or by a hyperparameter search.
        rates = sorted({group["lr"] for group in self.alsals.param_groups if group["lr"] != 1.0})
        if rates and "learning_rate" not in run.flags:
            changes.append(f"lr 1 in place of {', '.join(map(_text, rates))} in parameter groups")
            for group in self.alsals.param_groups:
                group["lr"] = 1.0
        if not run.has_trained:
            run.say(f"{name} trains with {', '.join(changes) or run.optim}.")
        run.has_trained = True
        return optimizer


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
