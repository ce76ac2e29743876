import math

import numpy as np
import pytest
from tiny_training import Sequences, arguments, gpt2, training_logs
from transformers import TrainerCallback

from hf_alsals import AlsalsTrainer
from hf_alsals.path_growth import TensorState


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
        assert entry["learning_rate"] == entry["step_size"] * entry["lr_multiplier"] > 0
        assert {name: entry[name] for name in seen} == seen
    searched, annealed = logs
    assert searched["slope"] > 0
    assert math.isfinite(searched["decrease"])
    assert -1 <= searched["path_slope"] <= 1
    assert searched["armijo_ratio"] >= 0.3
    assert not {"slope", "decrease", "path_slope", "armijo_ratio"} & set(annealed)
    assert logs[-1]["step_size"] == trainer.alsals.step_size
    assert sum(entry["probes"] * 3 for entry in logs) == pytest.approx(trainer.alsals.search.total_probes)


def test_the_step_sizes_of_each_kind_of_tensor_are_logged_by_their_quartiles(tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path, max_steps=2), train_dataset=Sequences())
    trainer.train()
    vectors = [p for p in trainer.model.parameters() if p.ndim < 2]
    assert len(vectors) > 4
    for k, p in enumerate(vectors):
        trainer.alsals.tensors[p] = TensorState(log_multiplier=k * math.log(2) / 4)
    multipliers = [2 ** (k / 4) for k in range(len(vectors))]
    logs = {"loss": 1.0, "learning_rate": 1.0}
    trainer.log(logs)
    found = [logs[f"step_size_vectors{end}"] / logs["step_size"] for end in ("_q1", "", "_q3")]
    assert found == pytest.approx(list(np.quantile(multipliers, [0.25, 0.5, 0.75])))
    assert found != [1.0] * 3
    for kind in ("hidden", "others"):
        assert logs[f"step_size_{kind}_q1"] == logs[f"step_size_{kind}"] == logs[f"step_size_{kind}_q3"]


def test_a_method_with_one_step_size_logs_one(tmp_path):
    args = arguments(tmp_path, max_steps=2, optim="alsals_paper")
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.train()
    assert not [name for entry in training_logs(trainer) for name in entry if name.startswith("step_size_")]


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
