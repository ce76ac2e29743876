import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import Sequences, arguments, gpt2, weights
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, TrainerState

from hf_alsals import AlsalsTrainer
from hf_alsals.checkpoint import last_complete_checkpoint, was_searched
from hf_alsals.report import load_run

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 6 of the 12 steps of an epoch, with a checkpoint at step 3 and at the last."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = AlsalsTrainer(gpt2(), arguments(folder, **ENDING), train_dataset=Sequences())
    trainer.train()
    return folder, trainer


ENDING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


def copy_of(saved, tmp_path):
    shutil.copytree(saved[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    return tmp_path / "checkpoint-6"


def test_a_run_that_had_come_to_its_end_takes_no_further_step(saved, tmp_path):
    _, trainer = saved
    checkpoint = copy_of(saved, tmp_path)
    resumed = AlsalsTrainer(gpt2(), arguments(tmp_path, **ENDING), train_dataset=Sequences())
    output = resumed.train(resume_from_checkpoint=True)
    assert (output.global_step, resumed.state.global_step) == (6, 6)
    assert "train_loss" not in output.metrics
    assert torch.equal(weights(resumed), weights(trainer))
    assert resumed.alsals.search == trainer.alsals.search
    assert (tmp_path / "step_size.png").exists() and not resumed.is_in_train
    assert resumed.state.log_history == TrainerState.load_from_json(checkpoint / "trainer_state.json").log_history
    longer = AlsalsTrainer(gpt2(), arguments(tmp_path, **ENDING | {"max_steps": 7}), train_dataset=Sequences())
    assert longer.train(resume_from_checkpoint=True).global_step == 7


def test_a_run_killed_before_it_wrote_its_results_has_those_of_an_undisturbed_one(saved, tmp_path):
    folder, trainer = saved
    copy_of(saved, tmp_path)
    shutil.copy(folder / "trainer_state.json", tmp_path)
    resumed = AlsalsTrainer(gpt2(), arguments(tmp_path, **ENDING), train_dataset=Sequences())
    output = resumed.train(resume_from_checkpoint=True)
    end = trainer.state.log_history[-1]
    assert output.metrics == {name: value for name, value in end.items() if name != "step"}
    assert output.training_loss == end["train_loss"]
    assert resumed.state.log_history == trainer.state.log_history
    before, after = (load_run(str(one)) for one in (folder, tmp_path))
    assert before.summary() == after.summary() and "time in the search" in after.summary()


@pytest.mark.parametrize("other", ["steps", "logs", "nothing"])
def test_the_end_of_another_training_is_not_taken_for_ones_own(other, saved, tmp_path, caplog):
    copy_of(saved, tmp_path)
    state = TrainerState.load_from_json(saved[0] / "trainer_state.json")
    if other == "steps":
        state.log_history[-1]["step"] = 5
    if other == "logs":
        state.log_history[0]["loss"] += 1
    if other != "nothing":
        state.save_to_json(tmp_path / "trainer_state.json")
    resumed = AlsalsTrainer(gpt2(), arguments(tmp_path, **ENDING), train_dataset=Sequences())
    assert "train_loss" not in resumed.train(resume_from_checkpoint=True).metrics
    assert "Its train_loss is not known" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("content", ["half", "none"])
def test_a_broken_file_of_a_checkpoint_is_named(name, content, saved, tmp_path):
    path = copy_of(saved, tmp_path) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else b"")
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, **ENDING | {"max_steps": 8}), train_dataset=Sequences())
    with pytest.raises(ValueError, match=f"^resume_from_checkpoint must be a whole checkpoint, but {name} in "):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_the_state_of_the_search_is_refused(name, saved, tmp_path):
    (copy_of(saved, tmp_path) / name).unlink()
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, **ENDING | {"max_steps": 8}), train_dataset=Sequences())
    with pytest.raises(ValueError, match=f"has no {name}, as with save_only_model: start from its model instead"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_optimizer_is_refused(saved, tmp_path):
    copy_of(saved, tmp_path)
    settings = ENDING | {"max_steps": 8}
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, optim="adamw_torch", **settings), train_dataset=Sequences())
    with pytest.raises(ValueError, match=r"^optim must be one of ALSALS, such as alsals, as that of .*'adamw_torch'"):
        trainer.train(resume_from_checkpoint=True)
    other = arguments(tmp_path / "other", optim="adamw_torch", **ENDING)
    AlsalsTrainer(gpt2(), other, train_dataset=Sequences()).train()
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path / "other", **settings), train_dataset=Sequences())
    with pytest.raises(ValueError, match=r"^optim must be one of the Trainer's own, as that of .*, got 'alsals'"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("was", "optim"), [("alsals_paper", "adam_sls"), ("adam_sls", "salsa")])
def test_a_checkpoint_of_another_preset_is_refused(was, optim, tmp_path):
    AlsalsTrainer(gpt2(), arguments(tmp_path, optim=was, **ENDING), train_dataset=Sequences()).train()
    args = arguments(tmp_path, optim=optim, **ENDING | {"max_steps": 8})
    with pytest.raises(ValueError, match=f"^optim must be '{was}', as that of .*checkpoint-6', got '{optim}': go on"):
        AlsalsTrainer(gpt2(), args, train_dataset=Sequences()).train(resume_from_checkpoint=True)


def test_a_hyperparameter_that_a_resumed_run_cannot_change_is_named(saved, tmp_path, caplog):
    copy_of(saved, tmp_path)
    given = {"adam_beta1": 0.5, "adam_epsilon": 1e-6, "weight_decay": 0.1, "learning_rate": 0.5}
    for changes in ({}, given):
        args = arguments(tmp_path, **ENDING | {"max_steps": 7, "save_strategy": "no"} | changes)
        AlsalsTrainer(gpt2(), args, train_dataset=Sequences()).train(resume_from_checkpoint=True)
        kept = {"adam_beta1": 0.9, "adam_epsilon": 1e-8, "weight_decay": 0.0, "learning_rate": 1.0}
        assert sorted(message for message in caplog.messages if "kept" in message) == [
            f"{name} is kept from the checkpoint in a resumed run: it stays {kept[name]}, not {changes[name]}."
            for name in sorted(changes)
        ]


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize(("saved_by", "resumed_by"), [("alsals", "adamw_torch"), ("adamw_torch", "alsals")])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_optimizer_is_refused_where_accelerate_saved_it_under_fsdp(kind, saved_by, resumed_by, tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, optim=saved_by, **ENDING), train_dataset=Sequences())
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    (checkpoint / "optimizer.pt").unlink()
    state = get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer)
    if kind == "full":
        torch.save(state, checkpoint / "optimizer.bin")
    else:
        torch.distributed.checkpoint.save({"optimizer": state}, checkpoint_id=checkpoint / "optimizer_0")
    assert was_searched(str(checkpoint)) == (saved_by == "alsals")
    settings = ENDING | {"max_steps": 8}
    other = AlsalsTrainer(gpt2(), arguments(tmp_path, optim=resumed_by, **settings), train_dataset=Sequences())
    with pytest.raises(ValueError, match=rf"^optim must be one of .*, as that of .*, got '{resumed_by}'"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("change", [{"n_embd": 8}, {"n_layer": 1}, {"n_layer": 3}])
def test_a_checkpoint_of_another_model_is_refused(change, saved, tmp_path):
    copy_of(saved, tmp_path)
    model = GPT2LMHeadModel(GPT2Config(**gpt2().config.to_dict() | change))
    trainer = AlsalsTrainer(model, arguments(tmp_path, **ENDING | {"max_steps": 8}), train_dataset=Sequences())
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint must be a checkpoint of this model, but "):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("content", ["null", "[]", "{", '{"no": 1}', "\xff"])
def test_a_state_that_cannot_be_read_is_no_checkpoint(content, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(content, encoding="latin-1")
    (tmp_path / "checkpoint-2").write_text("a file")
    assert last_complete_checkpoint(str(tmp_path)) is None


def test_the_best_checkpoint_is_found_where_the_run_has_been_moved(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    settings |= ENDING | {"metric_for_best_model": "distance", "greater_is_better": False}

    def trainer_in(folder, max_steps):
        args = arguments(folder, **settings | {"max_steps": max_steps})
        trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), eval_dataset=Sequences(4))
        trainer.compute_metrics = lambda _: {"distance": abs(trainer.state.global_step - 3)}
        return trainer

    trainer_in(tmp_path / "first", 6).train()
    (tmp_path / "first").rename(tmp_path / "moved")
    resumed = trainer_in(tmp_path / "moved", 6)
    resumed.train(resume_from_checkpoint=True)
    best = tmp_path / "moved" / "checkpoint-3"
    assert resumed.state.best_model_checkpoint == str(best)
    state = resumed.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in load_file(best / "model.safetensors").items())
