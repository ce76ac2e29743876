import json
import re
from pathlib import Path

import pytest
import runs
import tables

RECIPES = Path(__file__).parent.parent / "recipes"
README = (RECIPES / "README.md").read_text()

ROWS = tables.summarize(runs.load(RECIPES / "benchmarks"))


def results(task, optimizer, learning_rate, metric):
    """Return the results of one row, by seed."""
    key = (task, optimizer, learning_rate)
    newest = max(
        (row for row in ROWS if (row["task"], row["optimizer"], row["learning_rate"]) == key),
        key=lambda row: row["method_version"] or 0,
    )
    return {run["options"]["seed"]: f"{run['results'][metric]:.3f}" for run in newest["runs"]}


def row(start):
    (line,) = [line for line in README.splitlines() if line.startswith(start)]
    return line


def test_every_recipe_and_config_has_its_line():
    for path in [*RECIPES.glob("run_*.py"), *(RECIPES / "configs").glob("*.yaml")]:
        assert str(path.relative_to(RECIPES.parent)) in README


@pytest.mark.parametrize(
    ("recipe", "task", "metric", "rates"),
    [
        ("run_clm.py", "gpt2-reference", "eval_loss", [0.001, 0.003, 0.006]),
        ("run_mlm.py", "bert-mlm", "eval_loss", [0.0003, 0.001, 0.003]),
        ("run_t5_mlm.py", "t5", "eval_loss", [0.001, 0.003, 0.01]),
        ("run_image_classification.py", "digits", "eval_accuracy", [0.001, 0.003, 0.01]),
        ("run_glue.py", "topics", "eval_accuracy", [0.0001, 0.0003, 0.001]),
    ],
)
def test_the_results_are_those_of_the_committed_runs(recipe, task, metric, rates):
    by_seed = results(task, "alsals", None, metric)
    ours = [by_seed[seed] for seed in (1, 2, 3)]
    theirs = [f"{results(task, 'adamw', rate, metric)[1]} at {rate:g}" for rate in rates]
    assert row(f"| {recipe}, ").endswith(f" | {', '.join(ours)} | {', '.join(theirs)} |")
    (line,) = [line for line in README.splitlines() if f"`python recipes/{recipe} --optim alsals" in line]
    assert f" {ours[0]} ({', '.join(ours[1:])})" in line


def test_fine_tuning_reaches_its_bar_with_adamw_and_says_what_alsals_reaches():
    adamw, alsals = json.loads((RECIPES / "benchmarks" / "sst2-minilm.json").read_text())
    assert adamw["eval_accuracy"] >= 0.85
    accuracies = re.findall(r"0\.\d{3}", row("| MiniLM on SST-2"))
    assert accuracies == [f"{adamw['eval_accuracy']:.3f}", f"{alsals['eval_accuracy']:.3f}"]
