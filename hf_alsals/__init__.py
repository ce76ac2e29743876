"""ALSALS: Adam with a line search instead of a learning rate, for PyTorch and the Hugging Face Trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from .line_search import LineSearch
from .optimizer import ALSALS
from .presets import LINE_SEARCHES, PRESETS
from .version import __version__

if TYPE_CHECKING:
    from .argument_parser import AlsalsArgumentParser
    from .callbacks import StepSizeCallback
    from .failure_callback import FailureCallback
    from .line_profile import LineProfileCallback
    from .loss_replay import LossReplay
    from .trainer import AlsalsSeq2SeqTrainer, AlsalsTrainer, AlsalsTrainerMixin
    from .training_args import AlsalsArgumentsMixin, AlsalsSeq2SeqTrainingArguments, AlsalsTrainingArguments

# What needs accelerate or transformers is imported when it is asked for: the optimizer alone needs torch alone.
_LAZY = {
    "AlsalsArgumentParser": "argument_parser",
    "AlsalsArgumentsMixin": "training_args",
    "AlsalsSeq2SeqTrainer": "trainer",
    "AlsalsSeq2SeqTrainingArguments": "training_args",
    "AlsalsTrainer": "trainer",
    "AlsalsTrainerMixin": "trainer",
    "AlsalsTrainingArguments": "training_args",
    "FailureCallback": "failure_callback",
    "LineProfileCallback": "line_profile",
    "LossReplay": "loss_replay",
    "StepSizeCallback": "callbacks",
}

__all__ = [
    "ALSALS",
    "LINE_SEARCHES",
    "PRESETS",
    "AlsalsArgumentParser",
    "AlsalsArgumentsMixin",
    "AlsalsSeq2SeqTrainer",
    "AlsalsSeq2SeqTrainingArguments",
    "AlsalsTrainer",
    "AlsalsTrainerMixin",
    "AlsalsTrainingArguments",
    "FailureCallback",
    "LineProfileCallback",
    "LineSearch",
    "LossReplay",
    "StepSizeCallback",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
