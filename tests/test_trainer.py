import json
import math

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_alsals import (
    ALSALS,
    PRESETS,
    AlsalsSeq2SeqTrainer,
    AlsalsSeq2SeqTrainingArguments,
    AlsalsTrainer,
    AlsalsTrainerMixin,
    AlsalsTrainingArguments,
    FailureCallback,
)

VOCABULARY, LENGTH = 31, 16


class Sequences(Dataset):
    """Arithmetic sequences, with a different number of labels in each."""

    def __init__(self, size=48):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        input_ids = (torch.arange(LENGTH) * (index % 7 + 1) + index) % VOCABULARY
        labels = input_ids.clone()
        labels[: index % 5] = -100
        return {"input_ids": input_ids, "labels": labels}


def gpt2(dropout=0.1, dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        n_positions=LENGTH,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config).to(dtype)


def arguments(tmp_path, cls=AlsalsTrainingArguments, **kwargs):
    defaults = {
        "output_dir": str(tmp_path),
        "optim": "alsals",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if kwargs.get("optim", "alsals") == "alsals":
        defaults["optim_args"] = "search_interval=1"  # runs of a few steps have to search
    return cls(**defaults | kwargs)


class Observer(TrainerCallback):
    """Calls a function before every optimizer step, when gradients are clipped and the closure is handed over."""

    def __init__(self, function):
        self.function = function

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.function()


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset, tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, optim=preset, max_steps=100), train_dataset=Sequences())
    trainer.train()
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_at_step_size_zero_the_closure_is_the_training_loss_to_the_bit(accumulation, tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=-1, num_train_epochs=1)
    seen = []
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.add_callback(
        Observer(lambda: seen.append((trainer.loss_replay().item(), trainer.loss_replay.loss.item())))
    )
    trainer.train()
    assert len(seen) == math.ceil(12 / accumulation)
    assert all(replayed == trained for replayed, trained in seen)


def test_accumulated_micro_batches_find_the_step_sizes_of_one_large_batch(tmp_path):
    logs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=12,
        )
        trainer = AlsalsTrainer(gpt2(dropout=0, dtype=torch.float64), args, train_dataset=Sequences())
        trainer.train()
        logs.append(training_logs(trainer))
    for one_piece, accumulated in zip(*logs):
        assert accumulated["step_size"] == pytest.approx(one_piece["step_size"], rel=1e-6)
        assert accumulated["loss"] == pytest.approx(one_piece["loss"], rel=1e-6)


def test_the_search_leaves_the_random_numbers_of_training_alone(tmp_path):
    states = []
    for optim in ("alsals", "adamw_torch"):
        AlsalsTrainer(gpt2(), arguments(tmp_path, optim=optim), train_dataset=Sequences()).train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_other_optimizers_train_as_in_the_plain_trainer(tmp_path):
    ours = AlsalsTrainer(gpt2(), arguments(tmp_path, optim="adamw_torch"), train_dataset=Sequences())
    ours.train()
    plain = Trainer(gpt2(), arguments(tmp_path, TrainingArguments, optim="adamw_torch"), train_dataset=Sequences())
    plain.train()
    assert torch.equal(weights(ours), weights(plain))
    assert training_logs(ours) == training_logs(plain)


def test_the_slope_is_that_of_the_loss_however_the_gradients_are_clipped(tmp_path):
    slopes = []
    for max_grad_norm in (0.0, 1e6, 1e-2):
        # Adam's first direction is the same for a gradient and a multiple of it, but for eps.
        args = arguments(tmp_path, max_steps=1, max_grad_norm=max_grad_norm, adam_epsilon=1e-30)
        trainer = AlsalsTrainer(gpt2(dtype=torch.float64), args, train_dataset=Sequences())
        trainer.train()
        slopes.append(trainer.alsals.slope)
    assert slopes == pytest.approx([slopes[0]] * 3, rel=1e-4)


def test_weight_decay_skips_biases_and_norms_as_in_the_trainer(tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, weight_decay=0.1), train_dataset=Sequences())
    trainer.create_optimizer()
    decayed, rest = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 1 for p in rest["params"]) and all(p.ndim == 2 for p in decayed["params"])


def test_the_logs_carry_the_search_and_reach_the_trackers(tmp_path):
    reported = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    args = arguments(tmp_path, logging_steps=3, lr_scheduler_type="linear")
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), callbacks=[Tracker()])
    trainer.train()
    logs = training_logs(trainer)
    assert [entry["lr_multiplier"] for entry in logs] == pytest.approx([4 / 6, 1 / 6])
    for entry, seen in zip(logs, reported):
        assert entry["learning_rate"] == entry["step_size"] > 0
        assert {name: entry[name] for name in seen} == seen
    searched, annealed = logs
    assert searched["slope"] > 0
    assert math.isfinite(searched["decrease"])
    assert -1 <= searched["path_slope"] <= 1
    assert searched["armijo_ratio"] >= 0.3
    assert not {"slope", "decrease", "path_slope", "armijo_ratio"} & set(annealed)
    assert logs[-1]["step_size"] == trainer.alsals.step_size
    assert sum(entry["probes"] * 3 for entry in logs) == pytest.approx(trainer.alsals.line_search.total_probes)


COSINE_IN_FIVE = [(1 + math.cos(math.pi * step / 5)) / 2 for step in range(1, 5)]


@pytest.mark.parametrize(
    ("settings", "multipliers"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 2 / 3, 1 / 3]),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 4}}, [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_kwargs": {"num_stable_steps": 0}}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"lr_scheduler_kwargs": {"num_stable_steps": None}}, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"lr_scheduler_kwargs": {"num_stable_steps": 8}}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
        ({"warmup_steps": 2, "lr_scheduler_kwargs": {"num_stable_steps": 6}}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.5]),
        ({"lr_scheduler_kwargs": {"decay_type": "cosine"}}, [1, 1, 1, 1, 1, 1, *COSINE_IN_FIVE]),
        ({"lr_scheduler_kwargs": {"min_lr_ratio": 0.5}}, [1, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6]),
        ({"lr_scheduler_type": "linear"}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_the_schedule_falls_in_the_second_half_unless_told_otherwise(settings, multipliers, tmp_path):
    args = arguments(tmp_path, max_steps=10, **settings)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10, optimizer)
    seen = []
    for _ in multipliers:
        seen += scheduler.get_last_lr()[:1]
        optimizer.step(lambda: 0.0, 0.0)
        scheduler.step()
    assert seen == pytest.approx(multipliers)
    assert trainer.args is args and args.lr_scheduler_kwargs == settings.get("lr_scheduler_kwargs")


@pytest.mark.parametrize(
    ("changes", "rates"),
    [(None, [6, 6, 6, 6, 4, 2]), ({"num_decay_steps": 3}, [6, 6, 6, 6, 4.5, 1.5])],
    ids=["ours", "the Trainer's own"],
)
def test_adamw_takes_the_same_schedule_where_the_trainer_has_none(changes, rates, tmp_path):
    settings = {"optim": "adamw_torch", "learning_rate": 6e-4, "lr_scheduler_type": "warmup_stable_decay"}
    args = arguments(tmp_path, max_steps=6, lr_scheduler_kwargs=changes, **settings)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.train()
    assert [1e4 * entry["learning_rate"] for entry in training_logs(trainer)] == pytest.approx(rates)


@pytest.mark.parametrize("preset", ["alsals", "salsa"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_continues_bit_for_bit(preset, accumulation, tmp_path):
    settings = {"optim": preset, "gradient_accumulation_steps": accumulation, "max_steps": 14}
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = AlsalsTrainer(gpt2(), arguments(tmp_path / "whole", **settings, **saving), train_dataset=Sequences())
    whole.train()
    resumed = AlsalsTrainer(gpt2(), arguments(tmp_path / "resumed", **settings, **saving), train_dataset=Sequences())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert torch.equal(weights(whole), weights(resumed))
    assert training_logs(whole) == training_logs(resumed)
    with open(tmp_path / "resumed" / "checkpoint-14" / "trainer_state.json") as file:
        assert json.load(file)["log_history"][-1]["step_size"] == whole.alsals.step_size


def test_a_second_call_of_train_works(tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences())
    trainer.train()
    probes = trainer.alsals.line_search.total_probes
    trainer.train()
    assert trainer.alsals.line_search.total_probes > probes


def test_a_hand_made_optimizer_works_with_plain_arguments(tmp_path):
    model = gpt2()
    optimizer = ALSALS(model.parameters(), c=0.5)
    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch", learning_rate=1.0)
    trainer = AlsalsTrainer(model, args, train_dataset=Sequences(), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.alsals is optimizer
    assert optimizer.line_search.total_probes >= 6


class DoubledLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")
        outputs = model(**inputs)
        loss = 2 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class MixedIn(AlsalsTrainerMixin, DoubledLoss):
    pass


class Derived(AlsalsTrainer):
    compute_loss = DoubledLoss.compute_loss


@pytest.mark.parametrize("cls", [MixedIn, Derived])
def test_a_users_own_compute_loss_is_replayed_whichever_way_it_is_combined(cls, tmp_path):
    seen = []
    trainer = cls(gpt2(), arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=Sequences())
    trainer.add_callback(
        Observer(lambda: seen.append((trainer.loss_replay().item(), trainer.loss_replay.loss.item())))
    )
    trainer.train()
    assert len(seen) == 6
    assert all(replayed == trained for replayed, trained in seen)
    assert training_logs(trainer)[-1]["loss"] < training_logs(trainer)[0]["loss"]


class Copying(AlsalsTrainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs).clone()


class Before(Trainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs).clone()


class Mixed(AlsalsTrainerMixin, Before):
    pass


@pytest.mark.parametrize("cls", [Copying, Mixed])
def test_an_overridden_training_step_changes_nothing(cls, tmp_path):
    trained = []
    for each in (AlsalsTrainer, cls):
        trainer = each(gpt2(), arguments(tmp_path, gradient_accumulation_steps=4), train_dataset=Sequences())
        trainer.train()
        trained.append(training_logs(trainer))
    assert trained[0] == trained[1]


def test_a_training_step_that_cannot_be_repeated_is_refused(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Ours(AlsalsTrainerMixin, Own):
        pass

    with pytest.raises(RuntimeError, match=r"training_step of Ours must call self.compute_loss.*0 and 1 times"):
        Ours(gpt2(), arguments(tmp_path), train_dataset=Sequences()).train()


def test_what_compute_loss_logs_is_logged_once(tmp_path):
    class Logging(AlsalsTrainer):
        def compute_loss(self, *args, **kwargs):
            self.log({"seen": 1.0})
            return super().compute_loss(*args, **kwargs)

    trainer = Logging(gpt2(), arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=Sequences())
    trainer.train()
    assert sum("seen" in entry for entry in trainer.state.log_history) == 12


def test_the_seq2seq_trainer_trains_and_generates(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    args = arguments(
        tmp_path, AlsalsSeq2SeqTrainingArguments, max_steps=30, predict_with_generate=True, generation_max_length=8
    )
    model = T5ForConditionalGeneration(config)
    trainer = AlsalsSeq2SeqTrainer(model, args, train_dataset=Sequences(), eval_dataset=Sequences(4))
    trainer.train()
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert losses[-1] < losses[0]
    assert trainer.predict(Sequences(4)).predictions.shape[0] == 4


def test_two_runs_of_one_seed_are_equal(tmp_path):
    runs = []
    for _ in range(2):
        trainer = AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences())
        trainer.train()
        runs.append(weights(trainer))
    assert torch.equal(*runs)


def test_ten_losses_in_a_row_that_are_not_finite_end_training(tmp_path):
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[3] = math.nan
    before = model.transformer.h[0].attn.c_attn.weight.clone()
    trainer = AlsalsTrainer(model, arguments(tmp_path, max_steps=20), train_dataset=Sequences())
    with pytest.raises(RuntimeError, match="not finite in 10 steps in a row"):
        trainer.train()
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, before)


def test_a_probe_computes_the_loss_of_as_many_micro_batches_as_asked_for(tmp_path):
    class Counting(AlsalsTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            return super().compute_loss(*args, **kwargs)

    for name, probed in (("", 4), (",probe_micro_batches=1", 1)):
        optim_args = f"initial_step_size=1e-4{name}"
        args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=3, optim_args=optim_args)
        trainer = Counting(gpt2(), args, train_dataset=Sequences())
        trainer.remove_callback(FailureCallback)  # which probes once more
        trainer.train()
        assert trainer.calls == 3 * 4 + probed * trainer.alsals.line_search.total_probes
