import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from tiny_training import Sequences, arguments, gpt2
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_alsals import ALSALS, AlsalsTrainer, AlsalsTrainingArguments, FailureCallback, StepSizeCallback
from hf_alsals.report import load_run

ALSALS_LOGS = [
    {"step": step, "loss": 3 / step, "learning_rate": 1e-3, "step_size": 1e-3 * step, "lr_multiplier": 1 / step}
    for step in range(1, 6)
]
ADAMW_LOGS = [{"step": step, "loss": 3 / step, "learning_rate": 1e-3 / step} for step in range(1, 6)]
EVAL_LOGS = [{"step": step, "eval_loss": 4 / step} for step in (2, 4)]


def draw(logs, tmp_path):
    state = TrainerState(log_history=logs, is_world_process_zero=True)
    StepSizeCallback().on_train_end(TrainingArguments(str(tmp_path)), state, TrainerControl())
    return tmp_path / "step_size.png"


@pytest.mark.parametrize("logs", [ALSALS_LOGS, ADAMW_LOGS], ids=["alsals", "adamw"])
def test_the_picture_shows_more_with_more_in_the_logs(logs, tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "more").mkdir()
    few = imread(draw(logs[:1], tmp_path / "few"))
    more = imread(draw(logs + EVAL_LOGS, tmp_path / "more"))
    assert few.shape == more.shape
    assert (more < 0.99).any(axis=-1).sum() > (few < 0.99).any(axis=-1).sum() > 0


@pytest.mark.parametrize("logs", [ALSALS_LOGS, ADAMW_LOGS], ids=["alsals", "adamw"])
def test_a_single_log_entry_shows(logs, tmp_path):
    (tmp_path / "other").mkdir()
    one, other = (imread(draw([entry], tmp_path / name)) for entry, name in ((logs[0], ""), (logs[1], "other")))
    blue = [(abs(picture[..., :3] - (0.12, 0.47, 0.71)) < 0.05).all(axis=-1).sum() for picture in (one, other)]
    assert min(blue) > 100  # the lines in the legends have 69


def test_an_entry_that_is_not_the_trainers_own_is_left_out(tmp_path):
    assert draw([*ALSALS_LOGS, {"step": 6, "loss": 1.0}], tmp_path).exists()


def test_nothing_is_drawn_without_a_training_log(tmp_path):
    assert not draw(EVAL_LOGS, tmp_path).exists()


class Copies(TrainerCallback):
    """Keeps what is on disk at every log."""

    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, **kwargs):
        path = os.path.join(args.output_dir, "trainer_state.json")
        self.steps.append(TrainerState.load_from_json(path).global_step)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, [1, 2, 3, 3]), (1e6, [1, 1, 1, 1])])
def test_the_logs_of_a_run_that_goes_on_are_on_disk(seconds, steps, tmp_path):
    copies = Copies()
    trainer = AlsalsTrainer(
        gpt2(),
        arguments(tmp_path, max_steps=3),
        train_dataset=Sequences(),
        callbacks=[StepSizeCallback(seconds), copies],
    )
    trainer.train()
    assert copies.steps == steps
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert state.log_history == trainer.state.log_history
    assert not (tmp_path / "trainer_state.json.part").exists()


def test_the_state_says_what_a_report_needs_and_neither_paths_nor_tokens(tmp_path):
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    args.load_best_model_at_end, args.metric_for_best_model, args.hub_token = True, "loss", "hf_secret"
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), eval_dataset=Sequences())
    trainer.train()
    text = (tmp_path / "trainer_state.json").read_text()
    assert str(tmp_path) not in text and "hf_secret" not in text and "TOKEN" not in text
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    attributes = json.loads(text)["stateful_callbacks"]["StepSizeCallback"]["attributes"]
    assert attributes["settings"]["optim"] == "alsals"
    assert attributes["settings"]["max_steps"] == 4 and attributes["settings"]["output_dir"] == tmp_path.name
    assert "weight_decay" not in attributes["settings"]
    assert (attributes["c"], attributes["growth_metrics"]) == (0.1, ["path_slope"])
    assert attributes["search_seconds"] == trainer.alsals.search_seconds > 0
    assert (tmp_path / "step_size.png").exists()


def settings_of(trainer, tmp_path):
    trainer.train()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["StepSizeCallback"]["attributes"]


def test_an_evaluation_without_training_leaves_the_logs_of_a_run_alone(tmp_path):
    AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences()).train()
    logs = (tmp_path / "trainer_state.json").read_text()
    AlsalsTrainer(gpt2(), arguments(tmp_path), eval_dataset=Sequences()).evaluate()
    assert (tmp_path / "trainer_state.json").read_text() == logs


def test_defaults_of_the_optimizer_are_no_settings(tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, max_steps=2, optim_args="c=0.4"), train_dataset=Sequences())
    attributes = settings_of(trainer, tmp_path)
    assert attributes["c"] == 0.4 and attributes["settings"]["optim_args"] == "c=0.4"
    assert not {"learning_rate", "lr_scheduler_type", "adam_beta1"} & set(attributes["settings"])
    args = arguments(tmp_path, max_steps=2, learning_rate=0.5, lr_scheduler_type="cosine")
    settings = settings_of(AlsalsTrainer(gpt2(), args, train_dataset=Sequences()), tmp_path)["settings"]
    assert (settings["learning_rate"], settings["lr_scheduler_type"]) == (0.5, "cosine")


def test_an_optimizer_given_as_an_object_is_named(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    model = gpt2()
    optimizers = (ALSALS(model.parameters(), c=0.45), None)
    attributes = settings_of(AlsalsTrainer(model, args, train_dataset=Sequences(), optimizers=optimizers), tmp_path)
    assert attributes["settings"]["optim"] == "ALSALS" and attributes["c"] == 0.45


@dataclass
class ArgumentsOfItsOwn(AlsalsTrainingArguments):
    data_dir: Path | None = None
    class_weights: Any = None


def test_an_argument_that_json_does_not_know_is_noted_as_text(tmp_path):
    own = {"data_dir": Path("data") / "here", "class_weights": torch.tensor([1.0, 2.0])}
    args = arguments(tmp_path, ArgumentsOfItsOwn, max_steps=2, **own)
    settings = settings_of(AlsalsTrainer(gpt2(), args, train_dataset=Sequences()), tmp_path)["settings"]
    assert settings["data_dir"] == os.path.join("data", "here")
    assert settings["class_weights"] == "tensor([1., 2.])"


class LogsATensor(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history[-1]["of my own"] = torch.tensor(1.0)


def test_logs_that_json_does_not_know_do_not_end_the_run(tmp_path, caplog):
    args = arguments(tmp_path, max_steps=3, save_strategy="no")
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), callbacks=[LogsATensor()])
    trainer.train()
    assert trainer.state.global_step == 3
    assert any("trainer_state.json is not written" in message and "Tensor" in message for message in caplog.messages)


def test_a_checkpoint_without_the_callbacks_is_resumed(tmp_path):
    saving = {"save_strategy": "steps", "lr_scheduler_type": "constant"}  # which does not depend on max_steps
    args = arguments(tmp_path, max_steps=2, save_steps=2, **saving)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    for callback in (FailureCallback, StepSizeCallback):
        trainer.remove_callback(callback)
    trainer.train()
    args = arguments(tmp_path, max_steps=4, save_steps=1, logging_steps=10, **saving)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FailureCallback"]["attributes"] == {"warnings": []}
    assert state["stateful_callbacks"]["StepSizeCallback"]["attributes"]["first_step"] == 2


@pytest.mark.parametrize(
    ("optim", "given", "name"),
    [
        ("alsals", None, "alsals"),
        ("salsa", None, "salsa"),
        ("adamw_torch", None, "adamw_torch"),
        ("adafactor", None, "adafactor"),
        ("adamw_torch", ALSALS, "ALSALS"),
        ("adamw_torch", torch.optim.SGD, "SGD"),
        ("alsals", torch.optim.AdamW, "AdamW"),
    ],
)
def test_the_optimizer_of_every_run_is_recorded(optim, given, name, tmp_path):
    model = gpt2()
    args = arguments(tmp_path, max_steps=1, optim=optim, optim_args=None)
    optimizer = given and given(model.parameters(), lr=1e-3)
    AlsalsTrainer(model, args, train_dataset=Sequences(), optimizers=(optimizer, None)).train()
    assert load_run(str(tmp_path)).summary()["optimizer"] == name


def test_ratio_and_probes_are_drawn_for_a_search_only(tmp_path):
    (tmp_path / "adamw").mkdir()
    searched = [entry | {"armijo_ratio": 0.5, "probes": 1.0} for entry in ALSALS_LOGS]
    assert imread(draw(searched, tmp_path)).shape[0] > imread(draw(ADAMW_LOGS, tmp_path / "adamw")).shape[0]
    blue = [
        (abs(imread(draw(logs, tmp_path))[600:, :, :3] - (0.12, 0.47, 0.71)) < 0.05).all(axis=-1).sum()
        for logs in (ALSALS_LOGS, searched)  # the first as of runs that did not log a ratio
    ]
    assert blue[1] > blue[0] + 1000


@pytest.mark.parametrize("name", ["run_$a_$b", r"$\frac$", r"cost \$5_$", "a$"])
def test_a_run_of_any_name_is_drawn(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    assert draw(ALSALS_LOGS, folder).exists()


@pytest.mark.parametrize("name", ["step_size.png", "trainer_state.json"])
def test_what_cannot_be_written_costs_a_warning_and_not_the_run(name, tmp_path, caplog):
    (tmp_path / name).mkdir()
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, max_steps=3), train_dataset=Sequences())
    trainer.train()
    assert trainer.state.global_step == 3
    messages = [message for message in caplog.messages if str(tmp_path / name) in message]
    assert len(messages) == (1 if name == "step_size.png" else 2)  # at the first log and at the end
    assert all("training goes on" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize("odd", [{"step_size": "big"}, {"loss": None}, {"lr_multiplier": ...}, {"step": ...}])
def test_odd_logs_end_no_run(odd, tmp_path):
    # `...` stands for a name that is not there.
    entries = [{name: value for name, value in (entry | odd).items() if value is not ...} for entry in ALSALS_LOGS]
    callback, state = StepSizeCallback(), TrainerState(log_history=entries)
    callback.on_save(arguments(tmp_path), state, TrainerControl())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("of\nmatplotlib")])
def test_a_picture_that_fails_ends_no_run(error, tmp_path, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert not draw(ALSALS_LOGS, tmp_path).exists()
    (message,) = caplog.messages
    assert str(tmp_path / "step_size.png") in message and "\n" not in message
