"""Runs as they leave their logs on disk, without a training."""

from transformers import TrainerState

ALSALS_LOGS = [
    {
        "step": step,
        "loss": 3 / step,
        "learning_rate": 1e-3 * step,
        "step_size": 1e-3 * step,
        "lr_multiplier": 1 / step,
        "armijo_ratio": 0.5,
        "path_slope": -0.1,
        "probes": 3.0 if step == 10 else 0.5,
    }
    for step in (10, 20, 40)
]
ADAMW_LOGS = [{"step": step, "loss": 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3} for step in (10, 20, 40)]
EVAL_LOGS = [
    {"step": step, "eval_loss": loss, "eval_accuracy": accuracy, "eval_runtime": 9.87}
    for step, loss, accuracy in ((20, 0.25, 0.5), (40, 0.375, 0.25))
]
END_LOG = {"step": 40, "train_runtime": 8.0, "train_steps_per_second": 5.0, "train_loss": 1.0}


def write_run(folder, logs, step=40, max_steps=40, **callbacks):
    folder.mkdir(parents=True, exist_ok=True)
    attributes = {name: {"args": {}, "attributes": value} for name, value in callbacks.items()}
    state = TrainerState(global_step=step, max_steps=max_steps, log_history=logs, stateful_callbacks=attributes)
    state.save_to_json(folder / "trainer_state.json")
    return str(folder)
