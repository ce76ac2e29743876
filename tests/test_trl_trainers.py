"""TRL's trainers: plain under AdamW, and under alsals exact, with every metric counted once."""

import importlib
import os
from dataclasses import make_dataclass

import pytest
import torch
from tiny_training import Observer, training_logs, weights
from tiny_trl import count_of_one_word, dataset_of, model_for, tokenizer

from hf_alsals import AlsalsArgumentsMixin, AlsalsTrainerMixin, FailureCallback
from hf_alsals.optimizer import KINDS as TENSOR_KINDS

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

REASON = "TRL is optional: its newest release may not run on the oldest transformers"
pytest.importorskip("trl", reason=REASON)
pytest.importorskip("datasets")

GENERATED = {"num_generations": 4, "max_completion_length": 6}
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.05, "entropy_target": 9.0}
# Class, and its arguments.
KINDS = {
    "SFT": ("SFT", {"max_length": 32}),
    "SFT dft": ("SFT", {"max_length": 32, "loss_type": "dft"}),
    "DPO": ("DPO", {"max_length": 32}),
    "Reward": ("Reward", {"max_length": 32}),
    "KTO": ("KTO", {"max_length": 32}),
    "ORPO": ("ORPO", {"max_length": 32}),
    "CPO": ("CPO", {"max_length": 32}),
    "RLOO": ("RLOO", GENERATED),
    "GRPO": ("GRPO", GENERATED),
    "GRPO adaptive": ("GRPO", GENERATED | ADAPTIVE),
}


def classes_of(kind):
    """Return TRL's trainer and the class of its arguments."""
    module = f"trl.experimental.{kind.lower()}" if kind in ("ORPO", "CPO") else "trl"
    try:
        module = importlib.import_module(module)
        return getattr(module, f"{kind}Trainer"), getattr(module, f"{kind}Config")
    except (ImportError, AttributeError, RuntimeError) as error:
        pytest.skip(f"{REASON}: {error}")


def build(name, tmp_path, optim, mixed=True, **kwargs):
    kind, options = KINDS[name]
    trainer_class, config_class = classes_of(kind)
    if mixed:
        trainer_class = type(f"Alsals{kind}Trainer", (AlsalsTrainerMixin, trainer_class), {})
        config_class = make_dataclass(f"Alsals{kind}Config", [], bases=(AlsalsArgumentsMixin, config_class))
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "optim": optim,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    if optim == "alsals":
        defaults["optim_args"] = "search_interval=1"
    model_for(kind).save_pretrained(tmp_path / "model")  # reference models are loaded from there
    model = type(model_for(kind)).from_pretrained(tmp_path / "model")
    options = {
        "args": config_class(**defaults | options | kwargs),
        "train_dataset": dataset_of(kind),
        "processing_class": tokenizer(),
    }
    if kind in ("GRPO", "RLOO"):
        options["reward_funcs"] = count_of_one_word
    torch.manual_seed(1)
    return trainer_class(model, **options)


SEARCH = {"learning_rate", "step_size", "lr_multiplier", "slope", "decrease", "armijo_ratio", "path_slope", "probes"}
SEARCH |= {f"step_size_{kind}{end}" for kind in TENSOR_KINDS for end in ("_q1", "", "_q3")}


def logged(trainer, without=()):
    return [
        {key: value for key, value in entry.items() if "time" not in key and key not in without}
        for entry in training_logs(trainer)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_under_adamw_it_is_the_plain_trainer(name, tmp_path):
    runs = []
    for mixed in (True, False):
        trainer = build(name, tmp_path, "adamw_torch", mixed, learning_rate=1e-2)
        trainer.train()
        runs.append(trainer)
    ours, plain = runs
    assert torch.equal(weights(ours), weights(plain))
    assert logged(ours) == logged(plain)
    assert len(logged(ours)) == 4


@pytest.mark.parametrize("name", KINDS)
def test_under_alsals_a_probe_is_the_training_loss_to_the_bit(name, tmp_path):
    trainer = build(name, tmp_path, "alsals")
    seen = []

    def compare():
        replay = trainer.loss_replay
        seen.append((replay().item(), replay.loss.item()))

    trainer.add_callback(Observer(compare))
    trainer.train()
    assert len(seen) == 4
    assert [probe for probe, _ in seen] == [loss for _, loss in seen]
    assert trainer.alsals.search.total_probes > 0


@pytest.mark.parametrize("name", KINDS)
def test_probes_change_none_of_the_metrics(name, tmp_path):
    runs = []
    for optim in ("alsals", "adamw_torch"):
        # Steps of size 0 leave the weights alone, so the metrics are those of the same forward passes.
        trainer = build(name, tmp_path, optim, learning_rate=0.0, max_steps=6, logging_steps=3)
        trainer.train()
        runs.append(trainer)
    ours, plain = runs
    assert ours.alsals.search.total_probes > 0
    assert logged(ours, without=SEARCH) == logged(plain, without=SEARCH)
    assert len(logged(plain)) == 2 and len(logged(plain)[0]) > 5


@pytest.mark.parametrize(
    ("name", "metric", "batch_size"), [("GRPO", "reward", 16), ("SFT dft", "mean_token_accuracy", 4)]
)
def test_a_loss_that_hides_its_gradient_is_named_and_trains(name, metric, batch_size, tmp_path):
    kwargs = {"max_steps": 150, "gradient_accumulation_steps": 1, "per_device_train_batch_size": batch_size}
    trainer = build(name, tmp_path, "alsals", optim_args=None, **kwargs)
    trainer.train()
    logs = training_logs(trainer)
    (first,) = (entry for entry in logs if entry["probes"] > 0)
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, FailureCallback))
    (warning,) = callback.warnings
    assert warning["step"] == first["step"] <= 3  # no search without a slope, as where all rewards are the same
    assert "the loss's value does not show its gradient" in warning["message"]
    assert first["step_size"] == 1e-4
    assert logs[-1]["step_size"] > 10 * first["step_size"]
    values = [entry[metric] for entry in logs]
    assert sum(values[-30:]) > 2 * sum(values[:30])
