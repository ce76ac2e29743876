import pytest
from matplotlib.image import imread
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_alsals.callbacks import StepSizeCallback

ALSALS_LOGS = [
    {"step": step, "loss": 3 / step, "learning_rate": 1e-3, "step_size": 1e-3 * step, "lr_multiplier": 1 / step}
    for step in range(1, 6)
]
ADAMW_LOGS = [{"step": step, "loss": 3 / step, "learning_rate": 1e-3 / step} for step in range(1, 6)]
EVAL_LOGS = [{"step": step, "eval_loss": 4 / step} for step in (2, 4)]


def draw(logs, tmp_path):
    state = TrainerState(log_history=logs, is_world_process_zero=True)
    StepSizeCallback().on_train_end(TrainingArguments(str(tmp_path)), state, TrainerControl())
    return tmp_path / "step_size.png"


@pytest.mark.parametrize("logs", [ALSALS_LOGS, ADAMW_LOGS], ids=["alsals", "adamw"])
def test_the_picture_shows_more_with_more_in_the_logs(logs, tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "more").mkdir()
    few = imread(draw(logs[:1], tmp_path / "few"))
    more = imread(draw(logs + EVAL_LOGS, tmp_path / "more"))
    assert few.shape == more.shape
    assert (more < 0.99).any(axis=-1).sum() > (few < 0.99).any(axis=-1).sum() > 0


def test_nothing_is_drawn_without_a_training_log(tmp_path):
    assert not draw(EVAL_LOGS, tmp_path).exists()
