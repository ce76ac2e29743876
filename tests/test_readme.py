import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from hf_alsals import ALSALS, PathSearch

README = (Path(__file__).parent.parent / "README.md").read_text()
BENCHMARKS = Path(__file__).parent.parent / "recipes" / "benchmarks"

spec = importlib.util.spec_from_file_location("compare", BENCHMARKS / "compare.py")
compare = importlib.util.module_from_spec(spec)
sys.modules["compare"] = compare
spec.loader.exec_module(compare)


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
    runs = compare.load(BENCHMARKS / "compare")
    assert len(runs) > 50
    rows = compare.summarize(runs)
    assert compare.table(rows, [name for name in compare.OPTIMIZERS if name not in compare.VARIANTS]) in README
    assert compare.table(rows, compare.OPTIMIZERS) in (BENCHMARKS / "compare.md").read_text()


def test_the_times_are_those_of_the_committed_json():
    for row in json.loads((BENCHMARKS / "overhead.json").read_text())["rows"]:
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
