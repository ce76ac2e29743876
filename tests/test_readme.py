import re
from pathlib import Path

import pytest
import runs
import tables
import torch

import hf_alsals
from hf_alsals import LINE_SEARCHES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
METHOD = (ROOT / "hf_alsals" / "README.md").read_text()
PAGES = ["README.md", "hf_alsals/README.md", "recipes/README.md", "recipes/benchmarks/README.md"]
PAGES += ["recipes/benchmarks/NOTES.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/studies/*.md"))]


def code_of(page, heading):
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def option_rows(page):
    """Return the option tables of a page: the cells of each row by what its first cell names."""
    rows = re.findall(r"^\| `(?:--optim_args )?(\w+)(?:=\.\.\.)?` \| (.*) \|$", page, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_it_is_read_in_three_minutes_and_in_this_order():
    assert len(README.split()) <= 900
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == [
        "Use it",
        "When not to use it",
        "Results",
        "Options",
        "PyTorch, Accelerate, several GPUs",
        "Watching a run",
        "How it works",
        "Citation, contributing, releases",
    ]


@pytest.mark.parametrize(
    ("page", "heading", "optimizer"),
    [
        (README, "PyTorch, Accelerate, several GPUs", "optimizer"),
        (METHOD, "A loop with dropout and accumulation", "optimizer"),
        (METHOD, "An Accelerate loop", "alsals"),
    ],
)
def test_the_loops_learn_what_they_are_taught(page, heading, optimizer):
    torch.manual_seed(0)
    names = {}
    exec(code_of(page, heading), names)
    assert names["loss"] < 0.6  # the targets' variance is 1
    assert 1e-5 < names[optimizer].step_size < 0.1


def test_the_option_tables_have_every_option_and_its_defaults():
    path, constant = LINE_SEARCHES["path"].options, LINE_SEARCHES["constant"].options
    rows = option_rows(METHOD)
    assert set(path) == set(constant) == set(rows) - {"growth", "direction", "slope", "probe_micro_batches"}
    for name in path:
        assert rows[name][:2] == [str(path[name]), str(constant[name])]
    shown = option_rows(README)
    assert {name: shown[name][0] for name in ("c", "search_interval")} == {"c": "0.1", "search_interval": "10"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_what_is_there(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_links_into_a_page_lead_to_a_heading(page):
    for link, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent.joinpath(link) if link else ROOT / page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_the_page_of_the_method_names_every_module():
    modules = {path.name for path in (ROOT / "hf_alsals").glob("*.py")}
    named = set(re.findall(r"\]\((\w+\.py)\)", METHOD))
    assert modules - named == {"__init__.py", "__main__.py", "checks.py", "mixin_base.py", "version.py"}
    assert hf_alsals.__doc__.startswith("ALSALS")


def test_the_results_are_those_of_the_committed_runs():
    rows = tables.summarize(runs.load(ROOT / "recipes" / "benchmarks"))
    assert tables.front_table(rows) in README
