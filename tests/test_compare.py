import importlib.util
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "recipes" / "benchmarks" / "compare.py"
spec = importlib.util.spec_from_file_location("compare", PATH)
compare = importlib.util.module_from_spec(spec)
sys.modules["compare"] = compare
spec.loader.exec_module(compare)


def test_a_matrix_is_run_once_and_grown(monkeypatch, tmp_path, capsys):
    task = compare.Task("run_image_classification.py", max_steps=4, learning_rates=(1e-4, 1e-2, 1e-3))
    monkeypatch.setattr(compare, "TASKS", {"digits": task})
    results = tmp_path / "results"

    def main(*seeds):
        flags = ["--tasks", "digits", "--results", str(results), "--seeds", *seeds, "--jobs", "2"]
        monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
        compare.main()
        return {path.name: path.read_text() for path in results.iterdir()}

    first = main("1")
    runs = {name: json.loads(text) for name, text in first.items()}
    assert set(runs) == {"digits-alsals-seed1.json"} | {
        f"digits-adamw-{rate}-seed1.json" for rate in ("0.0001", "0.001", "0.01")
    }
    assert capsys.readouterr().out.count(" seed 1: ") == 4
    assert tmp_path.joinpath("results.png").stat().st_size > 10_000
    run = runs["digits-adamw-0.01-seed1.json"]
    assert "--learning_rate 0.01 --lr_scheduler_type cosine" in run["command"]
    assert str(tmp_path) not in json.dumps(runs)
    assert [entry["step"] for entry in run["curve"]] == [1]
    assert [one["warnings"] for one in runs.values()] == [[]] * 4
    assert run["revision"] and run["versions"]["torch"] and run["results"]["train_runtime"] > 0

    second = main("1", "2")
    assert {name: second[name] for name in first} == first
    by_loss = sorted(
        (1e-4, 1e-3, 1e-2), key=lambda rate: runs[f"digits-adamw-{rate:g}-seed1.json"]["results"]["eval_loss"]
    )
    grown = {"digits-alsals-seed2.json"} | {f"digits-adamw-{rate:g}-seed2.json" for rate in by_loss[:2]}
    assert set(second) - set(first) == grown


@pytest.mark.parametrize("name", compare.PEERS)
def test_a_rival_that_transformers_does_not_have_is_trained(name, monkeypatch, tmp_path):
    task = compare.Task("run_image_classification.py", max_steps=2, learning_rates=(1e-3,))
    monkeypatch.setattr(compare, "TASKS", {"digits": task})
    flags = ["--tasks", "digits", "--optimizers", name, "--seeds", "1", "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    compare.main()
    (path,) = (tmp_path / "results").iterdir()
    run = json.loads(path.read_text())
    assert f"recipes/benchmarks/peer.py {compare.PEERS[name]} recipes/run_image_classification.py" in run["command"]
    assert run["results"]["eval_loss"] > 0


def test_the_optimizer_of_a_rival_is_that_of_its_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, types\nfrom hf_alsals import AlsalsTrainer\nargs = types.SimpleNamespace(learning_rate=0.5)\n"
        "optimizer, kwargs = AlsalsTrainer.get_optimizer_cls_and_kwargs(args)\n"
        "print(optimizer.__name__, kwargs, sys.argv[1:])\n"
    )
    command = [sys.executable, PATH.parent / "peer.py", "Lamb", script, "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Lamb {'lr': 0.5} ['--seed', '3']"


def test_fewer_steps_are_a_share_of_them():
    assert compare.Task("run_clm.py", max_steps=600).length(0.95) == "--max_steps 570"
    assert compare.Task("run_clm.py").length(0.95) == "--num_train_epochs 2.85"


def row(optimizer, learning_rate, loss, seed):
    run = {"task": "bert-mlm", "optimizer": optimizer, "learning_rate": learning_rate, "seed": seed}
    run["command"] = compare.OPTIMIZERS[optimizer]
    curve = [{"step": 1, "probes": 9}, {"step": 5, "probes": 1}] if optimizer == "alsals" else []
    return run | {"results": {"eval_loss": loss}, "curve": curve}


def test_means_have_their_standard_error_and_one_lucky_seed_does_not_win():
    losses = [2.0, 2.5, 2.1]
    runs = [row("adamw", 1e-3, loss, seed) for seed, loss in enumerate(losses, 1)]
    runs += [row("adamw", 3e-3, 1.9, 1), row("adamw", 1e-2, math.nan, 1), row("alsals", None, 2.2, 1)]
    rows = compare.summarize(runs)
    best = compare.chosen_row(rows, "bert-mlm", "adamw")
    assert best["learning_rate"] == 1e-3
    assert best["eval_loss"] == pytest.approx(2.2)
    assert best["eval_loss_error"] == pytest.approx(math.sqrt(statistics.variance(losses) / 3))
    assert [one["learning_rate"] for one in compare.best_rows(rows, "bert-mlm", "adamw")] == [3e-3, 1e-3, 1e-2]
    assert compare.table(rows, compare.OPTIMIZERS).splitlines()[2:] == [
        "| bert-mlm | alsals | none chosen | 1 | 2.200 |  | 2.60 |",
        "| bert-mlm | adamw | 0.001, best of 3 | 3 | 2.200 ± 0.153 |  |  |",
    ]


def test_a_row_by_other_flags_than_todays_says_so():
    today, before = row("alsals, linear", None, 2.0, 1), row("alsals, cosine", None, 2.0, 1)
    before["command"] = "python recipes/run_mlm.py --optim alsals --seed 1"
    lines = compare.table(compare.summarize([today, before]), compare.OPTIMIZERS).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["alsals, linear", "alsals, cosine (by other flags)"]


def test_of_equal_metrics_the_lower_loss_is_better():
    runs = [row("adamw", rate, loss, 1) | {"task": "digits"} for rate, loss in ((1e-3, 0.4), (3e-3, 0.3), (6e-3, 0.1))]
    for run, accuracy in zip(runs, (0.9, 0.9, 0.8), strict=True):
        run["results"]["eval_accuracy"] = accuracy
    rows = compare.summarize(runs)
    assert [one["learning_rate"] for one in compare.best_rows(rows, "digits", "adamw")] == [3e-3, 1e-3, 6e-3]


@pytest.mark.parametrize(
    ("flag", "value"), [("--tasks", "mnist"), ("--optimizers", "sgd"), ("--jobs", "0"), ("--data_dir", "nowhere")]
)
def test_a_wrong_argument_is_named_with_its_value(flag, value, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--results", str(tmp_path), flag, value])
    with pytest.raises(SystemExit):
        compare.main()
    message = capsys.readouterr().err.splitlines()[-1]
    assert flag[2:] in message and value in message


def test_a_run_that_fails_does_not_end_the_matrix(monkeypatch, tmp_path, capsys):
    tasks = {
        "digits": compare.Task("run_image_classification.py", max_steps=2),
        "broken": compare.Task("run_image_classification.py", "--image_size 1", 2),
    }
    monkeypatch.setattr(compare, "TASKS", dict(reversed(tasks.items())))
    flags = ["--tasks", "broken", "digits", "--optimizers", "alsals", "--seeds", "1", "--results", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    with pytest.raises(SystemExit, match="1 runs failed"):
        compare.main()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["digits-alsals-seed1.json"]
    captured = capsys.readouterr()
    assert "image_size must be at least 8, got 1" in captured.err
    assert "| digits | alsals | none chosen | 1 |" in captured.out
