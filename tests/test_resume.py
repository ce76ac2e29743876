"""Interrupted runs: killed, resumed, or ended by an exception in the middle of a probe."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import resumable_run
import torch
from safetensors.torch import load_file
from tiny_training import Sequences, arguments, gpt2, training_logs, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_alsals import AlsalsTrainer


class Poisoned(AlsalsTrainer):
    """The loss of optimizer step 4 is not finite, so it is skipped."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss


@pytest.mark.parametrize("save_steps", [1, 5, 7])
@pytest.mark.parametrize("cls", [AlsalsTrainer, Poisoned])
def test_a_run_resumed_at_any_step_continues_bit_for_bit(cls, save_steps, tmp_path):
    settings = resumable_run.SAVING | {"save_steps": save_steps, "optim_args": "search_interval=3"}
    whole = cls(gpt2(), arguments(tmp_path, **settings), train_dataset=Sequences())
    whole.train()
    for step in range(save_steps, 20, save_steps):
        resumed = cls(
            gpt2(), arguments(tmp_path / "again", **settings | {"save_strategy": "no"}), train_dataset=Sequences()
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(weights(whole), weights(resumed))
        logs = [json.dumps(training_logs(trainer), sort_keys=True) for trainer in (whole, resumed)]  # NaN is not NaN
        assert logs[0] == logs[1]
        for mine, theirs in zip(whole.alsals.state.values(), resumed.alsals.state.values()):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert whole.alsals.search == resumed.alsals.search
        assert whole.alsals.skipped_steps == resumed.alsals.skipped_steps == (1 if cls is Poisoned else 0)


def start(output_dir):
    return subprocess.Popen(
        [sys.executable, resumable_run.__file__, str(output_dir)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_as_soon_as(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_a_run_killed_between_and_during_saves_ends_at_the_weights_of_an_undisturbed_run(tmp_path):
    undisturbed = start(tmp_path / "whole")
    assert undisturbed.wait(120) == 0, undisturbed.stderr.read()
    output = tmp_path / "killed"
    # As soon as the folder of a checkpoint is there, its files are still to be written.
    kill_as_soon_as(start(output), (output / "checkpoint-6").exists)
    kill_as_soon_as(start(output), lambda: (output / "checkpoint-12" / "optimizer.pt").exists())
    kill_as_soon_as(start(output), lambda: (output / "checkpoint-15" / "trainer_state.json").exists())
    last = start(output)
    assert last.wait(120) == 0, last.stderr.read()
    whole, killed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", output))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_probe", [1, 2, 3])
def test_an_exception_in_a_probe_leaves_the_weights_where_they_were(error, failing_probe, tmp_path):
    class Failing(AlsalsTrainer):
        probes = 0

        def compute_loss(self, *args, **kwargs):
            if not torch.is_grad_enabled():
                Failing.probes += 1
                if Failing.probes == failing_probe:
                    raise error("in a probe")
            return super().compute_loss(*args, **kwargs)

    model = gpt2()
    before = [p.detach().clone() for p in model.parameters()]
    trainer = Failing(model, arguments(tmp_path), train_dataset=Sequences())
    with pytest.raises(error, match="in a probe"):
        trainer.train()
    assert Failing.probes == failing_probe
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_batch_that_is_not_finite_costs_one_step(value, tmp_path):
    class OneBadBatch(AlsalsTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * value if self.state.global_step == 3 else loss

    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(weights(trainer).clone())

    args = arguments(tmp_path, max_steps=8)
    trainer = OneBadBatch(gpt2(), args, train_dataset=Sequences(), callbacks=[Watch()])
    trainer.train()
    assert torch.equal(seen[3], seen[2])
    assert not torch.equal(seen[4], seen[3])
    assert trainer.alsals.skipped_steps == 1
    assert seen[-1].isfinite().all()


def test_a_label_out_of_range_ends_training_with_the_weights_intact(tmp_path):
    class WrongLabel(Sequences):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            item["labels"][-1] = 10_000
            return item

    model = gpt2()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(IndexError, match="out of bounds"):
        AlsalsTrainer(model, arguments(tmp_path), train_dataset=WrongLabel()).train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_the_best_model_is_loaded_at_the_end_and_training_stops_early(tmp_path):
    args = arguments(
        tmp_path,
        max_steps=40,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_on_each_node=True,
        load_best_model_at_end=True,
        metric_for_best_model="distance",
        greater_is_better=False,
    )
    trainer = AlsalsTrainer(
        gpt2(),
        args,
        train_dataset=Sequences(),
        eval_dataset=Sequences(4),
        compute_metrics=lambda _: {"distance": abs(trainer.state.global_step - 4)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    trainer.train()
    assert trainer.state.global_step == 10
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], best[name]) for name in best)


@pytest.mark.parametrize("optims", [("alsals", "adamw_torch"), ("adamw_torch", "adam_sls"), ("salsa", "adam_sls")])
def test_hyperparameter_search_over_optim_is_refused_and_over_the_trainers_own_it_is_not(optims, tmp_path):
    def search(*optims):
        args = arguments(tmp_path, max_steps=2, optim=optims[0])
        trainer = AlsalsTrainer(
            None, args, model_init=lambda trial: gpt2(), train_dataset=Sequences(), eval_dataset=Sequences(4)
        )
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"optim": trial.suggest_categorical("optim", optims[1:])},
            n_trials=1,
            backend="optuna",
            direction="minimize",
        )
        return trainer.args.optim

    with pytest.raises(ValueError, match=f"^hp_space must leave out optim, got '{optims[1]}' where .* '{optims[0]}':"):
        search(*optims)
    assert search("adamw_torch", "adafactor") == "adafactor"


def test_hyperparameter_search_tries_line_search_options(tmp_path):
    args = arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=4)
    trainer = AlsalsTrainer(
        None, args, model_init=lambda trial: gpt2(), train_dataset=Sequences(), eval_dataset=Sequences(4)
    )
    seen = []

    def space(trial):
        return {"optim_args": f"c={trial.suggest_float('c', 0.1, 0.9)}"}

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append((trainer.alsals.line_search.acceptance.c, trainer.alsals.search.total_probes))

    trainer.add_callback(Watch())
    trainer.hyperparameter_search(hp_space=space, n_trials=3, backend="optuna", direction="minimize")
    assert len({c for c, _ in seen}) == 3
    assert all(probes == 0 for _, probes in seen)
