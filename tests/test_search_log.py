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
