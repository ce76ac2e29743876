"""ALSALS: Adam with a line search instead of a learning rate, for PyTorch and the Hugging Face Trainer."""

__version__ = "0.1.0"

from .argument_parser import AlsalsArgumentParser
from .callbacks import StepSizeCallback
from .failures import FailureCallback
from .line_profile import LineProfileCallback
from .line_search import ArmijoLineSearch
from .loss_replay import LossReplay
from .optimizer import ALSALS, PRESETS
from .path_search import PathSearch
from .trainer import AlsalsSeq2SeqTrainer, AlsalsTrainer, AlsalsTrainerMixin
from .training_args import AlsalsArgumentsMixin, AlsalsSeq2SeqTrainingArguments, AlsalsTrainingArguments

__all__ = [
    "ALSALS",
    "PRESETS",
    "AlsalsArgumentParser",
    "AlsalsArgumentsMixin",
    "AlsalsSeq2SeqTrainer",
    "AlsalsSeq2SeqTrainingArguments",
    "AlsalsTrainer",
    "AlsalsTrainerMixin",
    "AlsalsTrainingArguments",
    "ArmijoLineSearch",
    "FailureCallback",
    "LineProfileCallback",
    "LossReplay",
    "PathSearch",
    "StepSizeCallback",
]
