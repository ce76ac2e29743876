"""Resuming from the last checkpoint that is complete."""

import json
import os
import re
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .mixin_base import TrainerMixinBase


def last_complete_checkpoint(output_dir: str) -> str | None:
    """Return the last checkpoint that was written to its end.

    The Trainer writes a checkpoint's trainer_state.json last: where a run was killed while it saved, there is none or
    a broken one.

    Args:
        output_dir (`str`): The output directory of a run.

    Returns:
        `str` or `None`: The checkpoint's folder, if there is one.
    """
    if not os.path.isdir(output_dir):
        return None
    steps = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in os.listdir(output_dir)]
    for step in sorted((int(match.group(1)) for match in steps if match), reverse=True):
        checkpoint = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        try:
            TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return checkpoint
    return None


class CheckpointMixin(TrainerMixinBase):
    """Resumes from the last complete checkpoint."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint to resume from.
            args, kwargs: Passed on to the Trainer.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir or "") or True
        return super().train(resume_from_checkpoint, *args, **kwargs)
