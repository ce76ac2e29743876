"""What mixins derive from: the class that they are mixed into for a type checker, nothing at run time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as TrainerMixinBase
    from transformers import TrainingArguments as ArgumentsMixinBase
else:
    TrainerMixinBase = ArgumentsMixinBase = object
