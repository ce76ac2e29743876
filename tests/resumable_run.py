"""The run that test_resume.py kills: `python resumable_run.py OUTPUT_DIR` begins it, or goes on with it."""

import sys

from tiny_training import Sequences, arguments, gpt2

from hf_alsals import AlsalsTrainer
from hf_alsals.checkpoint import last_complete_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 20, "gradient_accumulation_steps": 2}

if __name__ == "__main__":
    trainer = AlsalsTrainer(gpt2(), arguments(sys.argv[1], **SAVING), train_dataset=Sequences())
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(sys.argv[1]) is not None or None)
    trainer.save_model()
