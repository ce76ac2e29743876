import json
import math

import pytest
import torch
from tiny_training import VOCABULARY, Observer, Sequences, arguments, gpt2, training_logs, weights
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from hf_alsals import (
    ALSALS,
    PRESETS,
    AlsalsSeq2SeqTrainer,
    AlsalsSeq2SeqTrainingArguments,
    AlsalsTrainer,
    AlsalsTrainerMixin,
    FailureCallback,
)


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


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
def test_the_logged_slope_is_that_of_the_unclipped_gradients_along_the_direction_of_the_clipped_ones(
    max_grad_norm, accumulation, tmp_path
):
    unclipped = []

    class Watching(AlsalsTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                unclipped.append([p.grad.clone() for p in self.model.parameters()])
            return loss

    settings = {"max_grad_norm": max_grad_norm, "lr_scheduler_type": "constant", "max_steps": 4}
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, **settings)
    trainer = Watching(gpt2(dtype=torch.float64), args, train_dataset=Sequences())
    trainer.train()
    exp_avg = exp_avg_sq = 0.0
    for step, (grads, entry) in enumerate(zip(unclipped, training_logs(trainer), strict=True), start=1):
        grad = torch.cat([one.flatten() for one in grads])
        assert (grad.norm() > 0.05) and (grad.norm() < 100)  # clipped in every step, or in none
        clipped = grad * min(1.0, max_grad_norm / (grad.norm() + 1e-6))
        exp_avg = 0.9 * exp_avg + 0.1 * clipped
        exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * clipped**2
        momentum = (0.9 * exp_avg + 0.1 * clipped) / (1 - 0.9 ** (step + 1))  # Nesterov's
        direction = momentum / ((exp_avg_sq / (1 - 0.999**step)).sqrt() + 1e-8)
        assert entry["slope"] == pytest.approx((grad @ direction).item(), rel=1e-9)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_closure_is_set_once_in_a_training(accumulation, tmp_path):
    class Counting(ALSALS):
        def set_closure(self, closure, loss=None):
            closures.append((closure, loss))
            super().set_closure(closure, loss)

    closures = []
    model = gpt2()
    optimizer = Counting(model.parameters(), search_interval=1)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = AlsalsTrainer(model, args, train_dataset=Sequences(), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.global_step == 6
    assert closures[1:] == [(trainer.loss_replay, None)]  # after what stands for it before the first step
    trainer.train()  # another training has another closure
    assert closures[2:] == [(trainer.loss_replay, None)]
    assert closures[1][0] is not trainer.loss_replay


def test_weight_decay_skips_biases_and_norms_as_in_the_trainer(tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, weight_decay=0.1), train_dataset=Sequences())
    trainer.create_optimizer()
    decayed, rest = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 1 for p in rest["params"]) and all(p.ndim == 2 for p in decayed["params"])


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
    probes, before = trainer.alsals.search.total_probes, weights(trainer).clone()
    seen = []
    trainer.add_callback(
        Observer(lambda: seen.append((trainer.loss_replay().item(), trainer.loss_replay.loss.item())))
    )
    trainer.train()
    assert trainer.alsals.search.total_probes > probes
    assert not torch.equal(weights(trainer), before)
    assert len(seen) == trainer.state.global_step == 6
    assert all(replayed == trained for replayed, trained in seen)
    logs = training_logs(trainer)
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4, 5, 6]
    assert sum(entry["probes"] for entry in logs) == trainer.alsals.search.total_probes - probes


def test_a_hand_made_optimizer_works_with_plain_arguments(tmp_path):
    model = gpt2()
    optimizer = ALSALS(model.parameters(), c=0.5)
    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch", learning_rate=1.0)
    trainer = AlsalsTrainer(model, args, train_dataset=Sequences(), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.alsals is optimizer
    assert optimizer.search.total_probes >= 6


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


def test_a_training_step_that_leaves_out_the_mixins_is_named_with_what_it_must_call(tmp_path):
    class Own(AlsalsTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    class Ours(Own):
        pass

    message = (
        r"^The training_step of Own must call super\(\).training_step\(\), .*self.compute_loss and self.accelerator"
    )
    with pytest.raises(RuntimeError, match=message):
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
            Counting.calls += 1  # a probe leaves the numbers of the trainer itself as they were
            return super().compute_loss(*args, **kwargs)

    for name, probed in (("", 4), (",probe_micro_batches=1", 1)):
        optim_args = f"initial_step_size=1e-4{name}"
        args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=3, optim_args=optim_args)
        trainer = Counting(gpt2(), args, train_dataset=Sequences())
        trainer.remove_callback(FailureCallback)  # which probes once more
        Counting.calls = 0
        trainer.train()
        assert Counting.calls == 3 * 4 + probed * trainer.alsals.search.total_probes


@pytest.mark.parametrize("scale", [10.0, 0.5])
def test_a_training_step_that_scales_its_loss_is_refused_with_both_values(scale, tmp_path):
    class Scaling(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(scale * loss)
            return loss.detach()

    class Ours(AlsalsTrainerMixin, Scaling):
        pass

    trainer = Ours(gpt2(), arguments(tmp_path), train_dataset=Sequences())
    before = weights(trainer).clone()
    with pytest.raises(RuntimeError, match="training_step of Ours must give"):
        trainer.train()
    assert torch.equal(weights(trainer), before)
