import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "recipes" / "benchmarks"
TINY = "--n_layer 1 --n_embd 16 --n_head 2 --vocab_size 64 --batch_size 2 --sequence_length 16 --warmup 2 --steps 3"

spec = importlib.util.spec_from_file_location("overhead", BENCHMARKS / "overhead.py")
overhead = importlib.util.module_from_spec(spec)
sys.modules["overhead"] = overhead
spec.loader.exec_module(overhead)


def test_a_step_over_a_run_counts_its_kinds_of_steps_by_how_many_there_are():
    run = {"seconds": [1.0, 9.0, 3.0, 2.0, 5.0, 0.5], "probes": [0, 2, 0, 0, 1, 0], "annealing": [False] * 5 + [True]}
    assert overhead.seconds_a_step(run) == pytest.approx((3 * 2.0 + 2 * 7.0 + 0.5) / 6)
    one_kind = {"seconds": [1.0, 50.0, 3.0], "probes": [0, 0, 0], "annealing": [False] * 3}
    assert overhead.seconds_a_step(one_kind) == 3.0


def test_the_benchmark_runs_through_and_its_ratios_are_those_of_its_times(tmp_path):
    output = tmp_path / "overhead.json"
    rows = ["adamw_torch_fused", "alsals", "alsals, a search at every step, probe_micro_batches=1"]
    flags = [*TINY.split(), "--rounds", "1", "--gradient_accumulation_steps", "2", "--processes", "1", "2"]
    flags += ["--optimizers", *rows]
    command = [sys.executable, BENCHMARKS / "overhead.py", "--output", output, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(output.read_text())
    assert [(row["processes"], row["optimizer"]) for row in report["rows"]] == [
        (n, row) for n in (1, 2) for row in rows
    ]
    seconds = {(run["processes"], run["optimizer"]): overhead.seconds_a_step(run) for run in report["runs"]}
    for row in report["rows"]:
        processes, name = row["processes"], row["optimizer"]
        assert row["ratio"] == seconds[processes, name] / seconds[processes, "adamw_torch_fused"]
        assert f"| {processes} | 2 | {name} | {row['milliseconds']:.0f} | {row['ratio']:.2f} |" in done.stdout
    assert report["rows"][0]["probes"] == 0 < report["rows"][2]["probes"]
    assert 0.2 < sum(report["breakdown"].values()) < 1
    assert f"| backward | {report['breakdown']['backward']:.1%} |" in done.stdout
    assert (tmp_path / "overhead.png").stat().st_size > 1000


def test_the_optimizer_alone_is_measured_too(tmp_path):
    output = tmp_path / "optimizer.json"
    rows = ["adamw, fused", "alsals, without a search", "alsals, a search of one probe"]
    flags = [*TINY.split(), "--rounds", "2", "--mode", "optimizer", "--optimizers", *rows]
    command = [sys.executable, BENCHMARKS / "overhead.py", "--output", output, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(output.read_text())
    assert [row["optimizer"] for row in report["rows"]] == rows
    assert [run.get("probes") for run in report["runs"]] == [None, 0, 1] * 2
    assert report["rows"][0]["ratios"] == [1.0, 1.0]
    assert done.stdout.endswith(overhead.bare_step.table(report["rows"]) + "\n")


@pytest.mark.parametrize("name", ["overhead-optimizer", "overhead-optimizer-124m", "overhead-optimizer-nesterov"])
def test_the_page_holds_the_tables_of_the_optimizer_alone(name):
    report = json.loads((BENCHMARKS / f"{name}.json").read_text())
    page = (BENCHMARKS.parent / "studies" / "overhead.md").read_text()
    assert overhead.bare_step.table(overhead.bare_step.summarize(report["runs"])) in page


@pytest.mark.parametrize(
    "name",
    [
        "overhead",
        "overhead-ddp",
        "overhead-5m-512",
        "overhead-60m-512",
        "overhead-124m-512",
        "overhead-5m-4096",
        "overhead-muon",
    ],
)
def test_the_page_holds_the_tables_of_its_numbers(name):
    report = json.loads((BENCHMARKS / f"{name}.json").read_text())
    page = (BENCHMARKS.parent / "studies" / "overhead.md").read_text()
    assert overhead.table(overhead.summarize(report["runs"])) in page
    if name == "overhead":
        assert overhead.breakdown_table(report["breakdown"]) in page


def test_a_row_that_there_is_not_is_named(tmp_path):
    command = [sys.executable, BENCHMARKS / "overhead.py", "--output", tmp_path / "x.json", "--optimizers", "adam"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "optimizers must be some of adamw_torch_fused, " in done.stderr.strip().splitlines()[-1]
