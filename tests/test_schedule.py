import math

import pytest
from tiny_training import Sequences, arguments, gpt2, training_logs

from hf_alsals import AlsalsTrainer

COSINE_IN_SEVEN = [(1 + math.cos(math.pi * step / 7)) / 2 for step in range(1, 7)]
LINEAR_IN_SEVEN = [1 - step / 7 for step in range(1, 7)]


@pytest.mark.parametrize(
    ("settings", "multipliers"),
    [
        ({}, [1, 1, 1, 1, *LINEAR_IN_SEVEN]),
        ({"warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 4}}, [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_kwargs": {"num_stable_steps": 0}}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"lr_scheduler_kwargs": {"num_stable_steps": None}}, [1, 1, 1, 1, *LINEAR_IN_SEVEN]),
        ({"lr_scheduler_kwargs": {"num_stable_steps": 8}}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
        ({"warmup_steps": 2, "lr_scheduler_kwargs": {"num_stable_steps": 6}}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.5]),
        ({"lr_scheduler_kwargs": {"decay_type": "cosine"}}, [1, 1, 1, 1, *COSINE_IN_SEVEN]),
        ({"lr_scheduler_kwargs": {"min_lr_ratio": 0.5}}, [1, 1, 1, 1, *((1 + rate) / 2 for rate in LINEAR_IN_SEVEN)]),
        ({"lr_scheduler_type": "linear"}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_the_schedule_falls_over_the_last_70_per_cent_unless_told_otherwise(settings, multipliers, tmp_path):
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
def test_adamw_s_schedule_falls_in_the_second_half_where_the_trainer_has_none(changes, rates, tmp_path):
    settings = {"optim": "adamw_torch", "learning_rate": 6e-4, "lr_scheduler_type": "warmup_stable_decay"}
    args = arguments(tmp_path, max_steps=6, lr_scheduler_kwargs=changes, **settings)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.train()
    assert [1e4 * entry["learning_rate"] for entry in training_logs(trainer)] == pytest.approx(rates)
