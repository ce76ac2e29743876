import json
import re
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"
README = (RECIPES / "README.md").read_text()


def runs(recipe, optimizer):
    path = RECIPES / "benchmarks" / "recipes-embedded.json"
    return [
        run
        for run in json.loads(path.read_text())
        if run["recipe"] == recipe and f"--optim {optimizer} " in run["command"]
    ]


def row(start):
    (line,) = [line for line in README.splitlines() if line.startswith(start)]
    return line


def test_every_recipe_and_config_has_its_line():
    for path in [*RECIPES.glob("run_*.py"), *(RECIPES / "configs").glob("*.yaml")]:
        assert str(path.relative_to(RECIPES.parent)) in README


def test_the_results_are_those_of_the_committed_json():
    for recipe, metric in (
        ("run_mlm.py", "eval_loss"),
        ("run_t5_mlm.py", "eval_loss"),
        ("run_image_classification.py", "eval_accuracy"),
        ("run_glue.py", "eval_accuracy"),
    ):
        ours = [f"{run[metric]:.3f}" for run in runs(recipe, "alsals")]
        theirs = [
            f"{run[metric]:.3f} at {run['command'].split('--learning_rate ')[1].split()[0]}"
            for run in runs(recipe, "adamw_torch")
        ]
        assert row(f"| {recipe}, ").endswith(f" | {', '.join(ours)} | {', '.join(theirs)} |")
        (line,) = [line for line in README.splitlines() if f"`python recipes/{recipe} --optim alsals" in line]
        assert f" {ours[0]} ({', '.join(ours[1:])})" in line


def test_the_causal_model_is_that_of_its_own_benchmark():
    path = RECIPES / "benchmarks" / "gpt2-embedded.json"
    losses = [f"{run['eval_loss']:.3f}" for run in json.loads(path.read_text()) if run["optimizer"] == "alsals"]
    (line,) = [line for line in README.splitlines() if "`python recipes/run_clm.py --optim alsals" in line]
    assert f"{losses[0]} ({', '.join(losses[1:])})" in line


def test_fine_tuning_reaches_its_bar_with_adamw_and_says_what_alsals_reaches():
    adamw, alsals = json.loads((RECIPES / "benchmarks" / "sst2-minilm.json").read_text())
    assert adamw["eval_accuracy"] >= 0.85
    accuracies = re.findall(r"0\.\d{3}", row("| MiniLM on SST-2"))
    assert accuracies == [f"{adamw['eval_accuracy']:.3f}", f"{alsals['eval_accuracy']:.3f}"]
