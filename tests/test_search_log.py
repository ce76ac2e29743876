import math

import pytest
from tiny_training import Sequences, arguments, gpt2, training_logs
from transformers import TrainerCallback

from hf_alsals import AlsalsTrainer


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
    assert sum(entry["probes"] * 3 for entry in logs) == pytest.approx(trainer.alsals.search.total_probes)


def test_a_learning_rate_that_a_log_of_ones_own_sets_stays(tmp_path):
    class Own(AlsalsTrainer):
        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                logs["learning_rate"] = 7.0
            super().log(logs, *args, **kwargs)

        def training_step(self, *args, **kwargs):
            self.log({"learning_rate": 8.0, "of": "mine"})
            return super().training_step(*args, **kwargs)

    trainer = Own(gpt2(), arguments(tmp_path, max_steps=4, lr_scheduler_type="linear"), train_dataset=Sequences())
    trainer.train()
    logs = training_logs(trainer)
    assert [entry["learning_rate"] for entry in logs] == [7.0] * 4
    assert [entry["lr_multiplier"] for entry in logs] == [1.0, 0.75, 0.5, 0.25]
    assert all(entry["step_size"] > 0 for entry in logs)
    mine = [entry for entry in trainer.state.log_history if entry.get("of") == "mine"]
    assert len(mine) == 4
    for entry in mine:
        assert entry["learning_rate"] == 8.0
        assert set(entry) <= {"learning_rate", "of", "step", "epoch"}
    assert sum(entry["probes"] for entry in logs) == trainer.alsals.search.total_probes


def test_a_probe_logs_nothing(tmp_path):
    class Loud(AlsalsTrainer):
        def compute_loss(self, *args, **kwargs):
            self.log({"mine": 1.0})
            return super().compute_loss(*args, **kwargs)

    trainer = Loud(gpt2(), arguments(tmp_path), train_dataset=Sequences())
    trainer.train()
    assert trainer.alsals.search.total_probes > 0
    assert sum("mine" in entry for entry in trainer.state.log_history) == 6
