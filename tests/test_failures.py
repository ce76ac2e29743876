import itertools
import json
import logging
import math

import pytest
import torch
from test_trainer import Sequences, arguments, gpt2
from torch import nn

from hf_alsals import ALSALS, AlsalsTrainer, FailureCallback
from hf_alsals.failures import FailureMonitor


def watch(optimizer, losses, steps, low_precision=False):
    """Train on the losses, one function a step, and return the failures by the step at which they were named."""
    monitor = FailureMonitor(optimizer, low_precision)
    named = {}
    for step in range(steps):
        closure = losses(step)
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step(closure, loss)
        for name, message in monitor.update().items():
            assert name not in named
            named[name] = (step, message)
    return named


def parameter(value, dtype=torch.float32):
    return nn.Parameter(torch.tensor(value, dtype=dtype))


def rising_loss():
    """A parameter, and a loss of it that is higher at every call."""
    w, calls = parameter([1.0]), itertools.count(1)
    return w, lambda: w.sum() + next(calls)


def test_a_loss_that_rises_at_every_step_size_pins_it_at_the_smallest():
    w, closure = rising_loss()
    optimizer = ALSALS([w], growth="constant")
    named = watch(optimizer, lambda step: closure, 30)
    assert list(named) == ["smallest step size"]
    step, message = named["smallest step size"]
    assert step == 9 and "slope=exact" in message and "smaller c" in message
    assert f"{0.1 * 0.9**9 * 0.9**99:.1e}" in message


@pytest.mark.parametrize(("initial_step_size", "first"), [(0.1, 0.1), (0.7, 0.7), (1e-6, 1e-6 * 2**17)])
def test_a_first_search_that_finds_nothing_is_named_by_where_it_looked(initial_step_size, first):
    w, closure = rising_loss()
    named = watch(ALSALS([w], initial_step_size=initial_step_size), lambda step: closure, 12)
    assert list(named) == ["smallest step size"]
    assert f"down to {first * 0.5**29:.1e}" in named["smallest step size"][1]


def test_a_search_that_goes_on_at_the_next_steps_is_one_cut():
    w = parameter([1.0] * 4)
    optimizer = ALSALS([w], search_interval=5)

    def losses(step):
        # Now and then the loss rises at any step, four optimizer steps in a row.
        start, slope = w.detach().clone(), 1e4 if step % 60 in range(20, 24) else 0.0
        return lambda: w.square().sum() + slope * (w.detach() - start).abs().sum()

    searches, rejected = [], []
    monitor = FailureMonitor(optimizer)
    for step in range(240):
        closure = losses(step)
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step(closure, loss)
        assert "jumping step size" not in monitor.update()
        if optimizer.searched:
            searches.append(step)
            rejected.append(not optimizer.line_search.accepted)
    assert len(searches) > 40 and sum(rejected) >= 16
    assert sum(one["cut"] for one in monitor.searches) <= 2


def test_in_low_precision_it_is_named_as_the_cause():
    w, closure = rising_loss()
    named = watch(ALSALS([w], growth="constant"), lambda step: closure, 12, low_precision=True)
    assert "float32" in named["smallest step size"][1]


def test_a_loss_that_bears_any_step_pins_the_step_size_at_the_largest():
    w = parameter([1.0])
    optimizer = ALSALS([w], growth="constant", growth_factor=1.2)
    named = watch(optimizer, lambda step: lambda: 1e3 - 1e-3 * w.sum(), 80)
    assert list(named) == ["largest step size"]
    assert named["largest step size"][0] == math.ceil(math.log(10, 1.2)) + 49


def test_batches_of_very_different_curvature_make_the_step_size_jump():
    w = parameter([1.0] * 4)
    optimizer = ALSALS([w], growth="constant", growth_factor=3.0, beta3=0.0, betas=(0.0, 0.999))
    named = watch(optimizer, lambda step: lambda: (1e4 if step % 3 == 0 else 1.0) * w.square().sum(), 40)
    assert "jumping step size" in named
    assert "per_device_train_batch_size" in named["jumping step size"][1]


def test_growth_on_a_loss_that_does_not_fall_is_named():
    torch.manual_seed(0)
    w = parameter([0.0] * 10)
    gradients = torch.randn(600, 10)
    optimizer = ALSALS([w], growth="constant", growth_factor=1.02, initial_step_size=1e-5, betas=(0.0, 0.999))

    def losses(step):
        shift = w.detach() @ gradients[step]
        return lambda: 1.0 + w @ gradients[step] - shift

    named = watch(optimizer, losses, 600)
    assert list(named) == ["run-away step size"]
    step, message = named["run-away step size"]
    assert step == 200 and "lr_scheduler_type=linear" in message and "growth=path" in message


def test_a_momentum_that_points_uphill_is_named():
    w = parameter([1.0])
    optimizer = ALSALS([w], growth="constant", betas=(0.99, 0.999), beta3=0.5, initial_step_size=1e-3)
    named = watch(optimizer, lambda step: lambda: (1 if step < 30 else -1) * w.sum(), 60)
    assert list(named) == ["uphill direction"]
    step, message = named["uphill direction"]
    assert step >= 39 and "adam_beta1" in message


def test_probes_that_are_not_finite_are_named():
    w = parameter([1.0])
    optimizer = ALSALS([w], growth="constant", growth_factor=1.5)

    def losses(step):
        start = w.item()
        return lambda: w.sum() if abs(w.item() - start) < 0.01 else w.sum() * math.inf

    named = watch(optimizer, losses, 40)
    assert "non-finite probes" in named
    assert named["non-finite probes"][0] == 4 and "bf16 in place of fp16" in named["non-finite probes"][1]


def test_weights_too_coarse_for_the_step_are_named():
    w = parameter([256.0], torch.bfloat16)  # the next smaller one is 255
    named = watch(ALSALS([w], growth="constant"), lambda step: lambda: w.float().sum(), 30, low_precision=True)
    assert list(named) == ["unseen decrease"]
    assert named["unseen decrease"][0] == 9 and "bf16" in named["unseen decrease"][1]


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_a_healthy_search_has_no_failure(growth):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = ALSALS(model.parameters(), growth=growth)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=600)

    def losses(step):
        if step > 0:
            schedule.step()
        x = torch.randn(64, 8)
        return lambda: nn.functional.mse_loss(model(x), x[:, :1] * x[:, 1:2])

    assert watch(optimizer, losses, 600) == {}  # with growth=path 30 searches


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


def test_the_check_changes_nothing_in_training(tmp_path):
    logs = []
    for remove in (False, True):
        trainer = AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences())
        if remove:
            trainer.remove_callback(FailureCallback)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1]


def test_the_callbacks_are_there_once_and_for_alsals_only(tmp_path):
    def names(**kwargs):
        trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, **kwargs), callbacks=[FailureCallback()])
        return [type(one).__name__ for one in trainer.callback_handler.callbacks]

    assert names().count("FailureCallback") == names().count("StepSizeCallback") == 1
    assert "StepSizeCallback" not in names(optim="adamw_torch")
