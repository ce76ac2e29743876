"""What trackers get of a run, read back from their own files."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from tiny_training import Sequences, arguments, gpt2
from hf_alsals import AlsalsTrainer

args = arguments("out", report_to=[sys.argv[1]], trackio_space_id=None)
AlsalsTrainer(gpt2(), args, train_dataset=Sequences()).train()
if sys.argv[1] == "wandb":
    import json
    import wandb
    print("SUMMARY", json.dumps({key: value for key, value in dict(wandb.run.summary).items() if "/" in key}))
"""


def tensorboard(folder, output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [scalar.value for scalar in accumulator.Scalars(tag)] for tag in tags}


def trackio(folder, output):
    (database,) = folder.rglob("*.db")
    rows = [
        json.loads(text) for (text,) in sqlite3.connect(database).execute("SELECT metrics FROM metrics ORDER BY step")
    ]
    return {name: [row[name] for row in rows if name in row] for name in {name for row in rows for name in row}}


def wandb(folder, output):
    summary = next(line for line in output.splitlines() if line.startswith("SUMMARY "))
    return {name: [value] for name, value in json.loads(summary.removeprefix("SUMMARY ")).items()}


@pytest.mark.parametrize("read", [tensorboard, trackio, wandb])
def test_a_tracker_shows_step_size_path_slope_and_probes_by_our_names(read, tmp_path):
    pytest.importorskip(read.__name__, reason=f"{read.__name__} is optional")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, read.__name__]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = read(tmp_path, done.stdout)
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    for name in ("step_size", "path_slope", "probes", "armijo_ratio", "lr_multiplier"):
        logged = [entry[name] for entry in logs if name in entry]
        assert len(logged) >= 5
        expected = logged[-1:] if read is wandb else logged
        assert seen[f"train/{name}"] == pytest.approx(expected, rel=1e-6)
