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


@pytest.mark.parametrize("logs", [ALSALS_LOGS, ADAMW_LOGS], ids=["alsals", "adamw"])
def test_a_single_log_entry_shows(logs, tmp_path):
    (tmp_path / "other").mkdir()
    one, other = (imread(draw([entry], tmp_path / name)) for entry, name in ((logs[0], ""), (logs[1], "other")))
    blue = [(abs(picture[..., :3] - (0.12, 0.47, 0.71)) < 0.05).all(axis=-1).sum() for picture in (one, other)]
    assert min(blue) > 100  # the lines in the legends have 69


def test_an_entry_that_is_not_the_trainers_own_is_left_out(tmp_path):
    assert draw([*ALSALS_LOGS, {"step": 6, "loss": 1.0}], tmp_path).exists()


def test_nothing_is_drawn_without_a_training_log(tmp_path):
    assert not draw(EVAL_LOGS, tmp_path).exists()
