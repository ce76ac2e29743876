import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from hf_alsals import ALSALS, PathSearch

README = (Path(__file__).parent.parent / "README.md").read_text()


def code_of(heading):
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


@pytest.mark.parametrize("heading", ["In a plain PyTorch loop", "In a plain Accelerate loop"])
def test_the_loops_of_the_readme_learn_what_they_are_taught(heading, capsys):
    torch.manual_seed(0)
    exec(code_of(heading), {})
    loss, step_size = map(float, capsys.readouterr().out.split())
    assert loss < 0.6  # the targets' variance is 1
    assert 1e-5 < step_size < 0.1


def test_the_results_are_those_of_the_committed_json():
    path = Path(__file__).parent.parent / "recipes" / "benchmarks" / "gpt2-embedded.json"
    losses = {}
    for run in json.loads(path.read_text()):
        losses.setdefault(run["optimizer"], []).append(f"{run['eval_loss']:.3f}")
    table = README.split("\n## Results\n")[1].split("\n## ")[0]
    for name, values in losses.items():
        row = name.split()[-1] if name.startswith("adamw_torch") else f"`{name}`"
        rows = [
            line for line in table.splitlines() if f"| {row} |" in line or (row == "default" and "default" in line)
        ]
        assert len(rows) == 1 and rows[0].endswith(f"| {', '.join(values)} |"), (name, rows)


def test_the_times_are_those_of_the_committed_json():
    path = Path(__file__).parent.parent / "recipes" / "benchmarks" / "overhead.json"
    for row in json.loads(path.read_text())["rows"]:
        assert (
            f"| {row['accumulation']} | {row['optimizer']} | {row['milliseconds']:.0f} | {row['ratio']:.2f} "
            f"| {row['probes']:.2f} | {row['peak_ratio']:.2f} |"
        ) in README


def test_the_option_table_names_every_option_and_its_default():
    options = ALSALS.__init__.__kwdefaults__
    assert options["growth"] == "path"
    own = {name: parameter.default for name, parameter in inspect.signature(PathSearch).parameters.items()}
    defaults = {name: str(own.get(name, value)) for name, value in options.items()}
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w.]+) \|", README, re.MULTILINE))
    assert {name: rows[name] for name in defaults} == defaults
