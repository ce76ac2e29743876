import json
import logging

import pytest
import torch
from tiny_training import VOCABULARY, Sequences, arguments, gpt2
from torch import nn

from hf_alsals import AlsalsTrainer, FailureCallback, StepSizeCallback


class OwnDropout(nn.Module):
    """Draws from a generator that no probe can know."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return 100 * x * (torch.rand(x.shape, generator=self.generator) < 0.5)  # far above rounding in every draw


class OtherWithoutGradients(nn.Module):
    """Computes something else in a probe than in training, the same in all probes."""

    def forward(self, x):
        return x if torch.is_grad_enabled() else x + 10


@pytest.mark.parametrize("optim", ["alsals", "alsals_paper"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_healthy_run_has_no_warning(optim, accumulation, tmp_path, caplog):
    args = arguments(tmp_path, optim=optim, max_steps=60, gradient_accumulation_steps=accumulation)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.train()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FailureCallback"]["attributes"]["warnings"] == []
    assert not [record for record in caplog.records if record.name.startswith("hf_alsals")]


@pytest.mark.parametrize(
    ("module", "cause"),
    [(OwnDropout(), "transformer.h.1.mlp.act (OwnDropout)"), (OtherWithoutGradients(), "no single module")],
    ids=["own generator", "without gradients"],
)
def test_a_probe_that_does_not_repeat_training_is_named_once_and_kept_over_a_resume(module, cause, tmp_path, caplog):
    def trainer(**kwargs):
        model = gpt2()
        model.transformer.h[1].mlp.act = module
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **kwargs)
        return AlsalsTrainer(model, args, train_dataset=Sequences())

    def warnings():
        state = json.loads((tmp_path / "trainer_state.json").read_text())
        return state["stateful_callbacks"]["FailureCallback"]["attributes"]["warnings"]

    with caplog.at_level(logging.WARNING, logger="hf_alsals"):
        trainer().train()
    (warning,) = warnings()
    assert warning["step"] == 0
    assert cause in warning["message"] and "step size 0" in warning["message"]
    assert sum(warning["message"] in record.message for record in caplog.records) == 1
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [one["step"] for one in warnings()] == [0, 2]


@pytest.mark.parametrize("first_step", [2, 3, 60])
def test_a_probe_that_becomes_inexact_later_is_named(first_step, tmp_path):
    class Changing(AlsalsTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step >= first_step:
                inputs["input_ids"].add_(1).remainder_(VOCABULARY)
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(tmp_path, max_steps=first_step + 5, optim_args="search_interval=10")
    trainer = Changing(gpt2(), args, train_dataset=Sequences())
    trainer.train()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    (warning,) = state["stateful_callbacks"]["FailureCallback"]["attributes"]["warnings"]
    assert warning["step"] == {2: 2, 3: 4, 60: 64}[first_step]
    assert "probes do not repeat training" in warning["message"]


def test_the_check_changes_nothing_in_training(tmp_path):
    logs = []
    for remove in (False, True):
        trainer = AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences())
        if remove:
            trainer.remove_callback(FailureCallback)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1]


def test_the_callbacks_are_there_once_and_failures_for_alsals_only(tmp_path):
    def names(*callbacks, **kwargs):
        trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, **kwargs), callbacks=[*callbacks])
        return [type(one).__name__ for one in trainer.callback_handler.callbacks]

    for callbacks in ([], [FailureCallback()], [StepSizeCallback()]):
        assert [names(*callbacks).count(name) for name in ("FailureCallback", "StepSizeCallback")] == [1, 1]
    assert "FailureCallback" not in names(optim="adamw_torch")
    assert names(optim="adamw_torch").count("StepSizeCallback") == 1  # for a comparison


def test_a_run_that_learns_nothing_is_told_so_half_way_but_not_one_that_is_resumed(tmp_path):
    def trainer(max_steps):
        saving = {"save_strategy": "steps", "save_steps": 10} if max_steps == 10 else {}
        options = {"learning_rate": 1e-9, "optim_args": "search_interval=10", "logging_steps": 10}
        args = arguments(tmp_path, max_steps=max_steps, lr_scheduler_type="constant", **saving, **options)
        return AlsalsTrainer(gpt2(), args, train_dataset=Sequences())

    def warnings():
        state = json.loads((tmp_path / "trainer_state.json").read_text())
        return state["stateful_callbacks"]["FailureCallback"]["attributes"]["warnings"]

    trainer(10).train()
    trainer(211).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert warnings() == []
    trainer(201).train()
    (warning,) = warnings()
    assert warning["step"] == 200 and "nothing has been learned" in warning["message"]


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, None),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 5}}, ("0.5714", "0.8")),
        ({"max_steps": 20}, ("0.5714", "1")),
        ({"lr_scheduler_type": "linear"}, ("0.5714", "0.4")),
    ],
    ids=["none", "decay", "steps", "type"],
)
def test_a_resumed_run_with_another_schedule_is_told_so(changes, rates, tmp_path, caplog):
    def trainer(**kwargs):
        args = arguments(tmp_path, **{"max_steps": 10, "save_strategy": "steps", "save_steps": 6} | kwargs)
        return AlsalsTrainer(gpt2(), args, train_dataset=Sequences())

    trainer().train()
    caplog.clear()
    trainer(**changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    said = [record.message for record in caplog.records if "the checkpoint was saved with" in record.message]
    assert len(said) == (rates is not None)
    if rates:
        assert f"with the learning rate {rates[0]}, and the schedule has {rates[1]} at this step" in said[0]
        assert said[0].startswith("Step 6: ")
