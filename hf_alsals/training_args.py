"""Training arguments that take `--optim alsals`."""

import contextlib
import json
import logging
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from .loss_replay import check_count
from .mixin_base import ArgumentsMixinBase
from .optimizer import ALSALS, check_hyperparameters
from .presets import LINE_SEARCHES, PRESETS, line_search_of
from .schedule import DEFAULT_SCHEDULES

logger = logging.getLogger(__name__)

# What the training arguments call the hyperparameters of ALSALS.
_HYPERPARAMETERS = {"lr": "learning_rate", "eps": "adam_epsilon", "betas": "adam_beta1 and adam_beta2"}


def defaults_of(optim: str) -> dict[str, Any]:
    """Return the training arguments whose default depends on `optim`, with that default; none of the Trainer's own.

    Args:
        optim (`str`): The optimizer.
    """
    if optim not in PRESETS:
        return {
            name: getattr(TrainingArguments, name) for name in ("learning_rate", "lr_scheduler_type", "adam_beta1")
        }
    return {
        "learning_rate": 1.0,
        "lr_scheduler_type": DEFAULT_SCHEDULES[optim],
        "adam_beta1": PRESETS[optim].get("betas", (TrainingArguments.adam_beta1,))[0],
    }


def check_schedule(args: TrainingArguments) -> None:
    """Raise unless the schedule takes the names and values in `lr_scheduler_kwargs`.

    Args:
        args (`TrainingArguments`): The training arguments.

    Raises:
        ValueError: If it does not.
    """
    kind, changes = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    if kind == SchedulerType.WARMUP_STABLE_DECAY:  # see ScheduleMixin
        changes = {"num_decay_steps": 1} | changes if isinstance(changes, dict) else changes
    try:
        optimizer = torch.optim.SGD([torch.empty(0)], lr=1.0)
        get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=2, scheduler_specific_kwargs=changes)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs must be names and values for {kind.value}, got {args.lr_scheduler_kwargs!r}: {error}"
        ) from error


def check_configs(args: TrainingArguments) -> None:
    """Raise where the Trainer would take what it cannot read or does not know, or would do without it in silence.

    Args:
        args (`TrainingArguments`): The training arguments, as they were given.

    Raises:
        ValueError: If it would.
    """
    configs = {}
    for name in ("accelerator_config", "fsdp_config"):
        value = configs[name] = getattr(args, name)
        if not isinstance(value, str):
            continue
        try:
            if value.startswith("{"):
                configs[name] = json.loads(value)
            else:
                with open(value, encoding="utf-8") as file:
                    configs[name] = json.load(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{name} must be a json file that can be read, got {value!r}: {reason}.") from error
        if not isinstance(configs[name], dict):
            raise ValueError(f"{name} must be a json file of names and values, got {value!r}.")
    if isinstance(configs["accelerator_config"], dict):
        known = [one.name for one in fields(AcceleratorConfig)]
        for name in configs["accelerator_config"]:
            if name not in known:
                raise ValueError(f"accelerator_config must have names out of {', '.join(known)}, got {name!r}.")
    # accelerate launch --use_fsdp says so to its processes.
    if args.fsdp_config and not args.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        raise ValueError(f"fsdp_config needs fsdp, got {args.fsdp_config!r} without: set fsdp, or leave it out.")
    for name in args.include_for_metrics:
        if name not in ("inputs", "loss"):
            raise ValueError(f"include_for_metrics must be of inputs, loss, got {name!r}.")
    backend = args.torch_compile_backend or "inductor"
    backends = [one.value.lower() for one in DynamoBackend]
    if backend.lower() not in backends:
        raise ValueError(f"torch_compile_backend must be one of {', '.join(backends)}, got {backend!r}.")
    if args.torch_compile_mode is not None and backend.lower() == "inductor":
        from torch._inductor import list_mode_options  # takes a second

        if args.torch_compile_mode not in (modes := list_mode_options()):
            raise ValueError(f"torch_compile_mode must be one of {', '.join(modes)}, got {args.torch_compile_mode!r}.")


@dataclass
class AlsalsArgumentsMixin(ArgumentsMixinBase):
    """Makes any [`~transformers.TrainingArguments`] class take the optimizers of this package.

    Put it first: `class MyArguments(AlsalsArgumentsMixin, SFTConfig)`, with `@dataclass` above.

    Args:
        optim (`str`, defaults to the Trainer's own default): One of the Trainer's optimizers, or `"alsals"`,
            `"alsals_muon"`, `"alsals_paper"`, `"salsa"`, `"adam_sls"`.
        optim_args (`str`, *optional*): Options of the line search, as in `"c=0.5,growth_factor=1.02"`: those of
            [`ALSALS`] and `probe_micro_batches` of [`LossReplay`].
        learning_rate (`float`, *optional*): For these optimizers the multiplier on the searched step size, 1.0 if left
            out. For all others the Trainer's own default.
        lr_scheduler_type (`str`, *optional*): The schedule of that multiplier. If left out
            `"warmup_stable_decay"` for `alsals`, which falls linearly to 0 over the last 70 % of training unless
            `lr_scheduler_kwargs` say otherwise, and `"constant"` for the published methods. For all others the
            Trainer's own default.
        adam_beta1 (`float`, *optional*): 0.0 for `adam_sls`, else the Trainer's own default, if left out.

    Raises:
        TypeError: If a number is not one.
        ValueError: If `optim` is unknown, `optim_args` or `lr_scheduler_kwargs` have an unknown key, or a value is out
            of range.
    """

    optim: str = field(
        default=TrainingArguments.optim,
        metadata={
            "help": f"The optimizer to use: {', '.join(PRESETS)}, or one of the Trainer's own.",
            "choices": [*PRESETS, *(name.value for name in OptimizerNames)],
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The initial learning rate. For alsals and its relatives it multiplies the searched step size and "
            "defaults to 1.0; for all others it is the Trainer's own default."
        },
    )
    lr_scheduler_type: SchedulerType | None = field(
        default=None,
        metadata={
            "help": "The scheduler type to use. Defaults to warmup_stable_decay for alsals, to constant for "
            "alsals_paper, salsa and adam_sls, to the Trainer's own default for all others."
        },
    )
    adam_beta1: float | None = field(
        default=None, metadata={"help": "Beta1 of the Adam optimizers. Defaults to 0.0 for adam_sls, else to 0.9."}
    )

    def __post_init__(self) -> None:
        optim = self.optim
        ours = optim in PRESETS
        for name, value in defaults_of(optim).items():
            if getattr(self, name) is None:
                setattr(self, name, value if ours else getattr(super(), name))
        if not ours and optim not in list(OptimizerNames):
            raise ValueError(
                f"optim must be one of {', '.join(PRESETS)} or of the Trainer's own, such as adamw_torch, "
                f"got {optim!r}."
            )
        # A bad value must show before the model is loaded.
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} must be a number, got {value}.")
        for name in self._VALID_DICT_FIELDS:
            text = getattr(self, name)
            if isinstance(text, str) and text.startswith("{"):
                try:
                    json.loads(text)
                except ValueError as error:
                    raise ValueError(f'{name} must be json like {{"name": 1}}, got {text!r}: {error}') from error
        check_configs(self)
        if ours:
            self.optim = super().optim  # the Trainer's checks know its own names only (transformers 5.0 to 5.24)
        super().__post_init__()
        self.optim = optim
        hyperparameters = {"lr": self.learning_rate, "betas": (self.adam_beta1, self.adam_beta2)}
        hyperparameters |= {"eps": self.adam_epsilon, "weight_decay": self.weight_decay}
        check_hyperparameters(hyperparameters, _HYPERPARAMETERS)
        check_schedule(self)
        if not ours:
            return
        options = self._read_optim_args()
        try:
            check_count("probe_micro_batches", options.pop("probe_micro_batches", None))
            ALSALS([torch.empty(0)], **(PRESETS[optim] | options))
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"optim_args: {error}") from error
        if self.learning_rate is not None and self.learning_rate < 0.1:
            logger.warning(
                f"learning_rate multiplies the step size that {optim} finds, and {self.learning_rate:g} makes it much "
                "smaller: leave it out, or keep it near 1."
            )

    @property
    def probe_micro_batches(self) -> int | None:
        """The number of micro-batches that a probe computes the loss of; `None` for all of them."""
        return self._read_optim_args().get("probe_micro_batches") if self.optim in PRESETS else None

    def alsals_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of [`ALSALS`] that these training arguments stand for.

        Raises:
            TypeError: If `optim_args` is not text.
            ValueError: If it cannot be read.
        """
        options = self._read_optim_args()
        options.pop("probe_micro_batches", None)
        return {
            **PRESETS[self.optim],
            **options,
            "lr": self.learning_rate,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_epsilon,
        }

    def _read_optim_args(self) -> dict[str, Any]:
        if not isinstance(self.optim_args, (str, type(None))):
            raise TypeError(f'optim_args must be text like "c=0.5,growth_factor=1.02", got {self.optim_args!r}.')
        options: dict[str, Any] = {}
        for item in (self.optim_args or "").replace(" ", "").split(","):
            if not item:
                continue
            key, separator, text = item.partition("=")
            if not separator:
                raise ValueError(f'optim_args must look like "c=0.5,growth_factor=1.02", got {self.optim_args!r}.')
            if key in options:
                raise ValueError(f"optim_args must have every name once, got {key} twice in {self.optim_args!r}.")
            options[key] = _number_or_text(text)
        if options.get("probe_micro_batches") == "all":
            options["probe_micro_batches"] = None
        # An unknown growth is named later, with its value.
        search = LINE_SEARCHES.get(options.get("growth", "")) or line_search_of(PRESETS[self.optim]["growth"])
        names = ["growth", "slope", "direction", "probe_micro_batches", *search.options]
        for key in options:
            if key not in names:
                raise ValueError(f"optim_args has the unknown key {key!r}: {self.optim} takes {', '.join(names)}.")
        return options


def _number_or_text(text: str) -> int | float | str:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


@dataclass
class AlsalsTrainingArguments(AlsalsArgumentsMixin, TrainingArguments):
    """[`~transformers.TrainingArguments`] that take `optim="alsals"`; see [`AlsalsArgumentsMixin`]."""


@dataclass
class AlsalsSeq2SeqTrainingArguments(AlsalsArgumentsMixin, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] that take `optim="alsals"`; see [`AlsalsArgumentsMixin`]."""
