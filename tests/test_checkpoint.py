import shutil

import pytest
import torch
from tiny_training import Sequences, arguments, gpt2, weights
from transformers import TrainerState

from hf_alsals import AlsalsTrainer
from hf_alsals.checkpoint import last_complete_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 12, "gradient_accumulation_steps": 2}


def test_only_a_checkpoint_written_to_its_end_counts(tmp_path):
    assert last_complete_checkpoint(str(tmp_path / "nowhere")) is None
    assert last_complete_checkpoint(str(tmp_path)) is None
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, **SAVING), train_dataset=Sequences())
    trainer.train()
    state = tmp_path / "checkpoint-12" / "trainer_state.json"
    assert last_complete_checkpoint(str(tmp_path)) == str(state.parent)
    state.write_text(state.read_text()[:-100])
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
    shutil.rmtree(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")
    resumed = AlsalsTrainer(gpt2(), arguments(tmp_path, **SAVING), train_dataset=Sequences())
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(trainer))


def test_without_a_complete_checkpoint_there_is_none_to_resume_from(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) is None
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path / "empty"), train_dataset=Sequences())
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)


def test_the_number_of_a_checkpoint_counts_not_its_name(tmp_path):
    for step in (2, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        TrainerState(global_step=step).save_to_json(folder / "trainer_state.json")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
