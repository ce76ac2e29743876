import ast
import doctest
import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import hf_alsals

FOLDER = Path(hf_alsals.__file__).parent
ROOT = Path(__file__).parents[1]
MODULES = [module.name for module in pkgutil.iter_modules([str(FOLDER)])]
# Numbers in, a decision out.
LINE_SEARCH = {"checks", "growth", "acceptance", "interval", "initial_search", "line_search", "path_growth", "presets"}
# What moves the weights.
OPTIMIZER = {"shards", "path_slope", "direction", "adam", "closure", "optimizer_direction", "line", "optimizer"}


def run(program):
    """Run a program in a process of its own and return what it prints."""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def imports_of(module):
    """Return the modules of this package, and the packages of others, that a module imports anywhere in it."""
    own, others = set(), set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            own |= {node.module} if node.module else {alias.name for alias in node.names}
    return own, others


def reached_from(module):
    """Return the modules of this package that a module imports, and those that they import."""
    reached, left = set(), [module]
    while left:
        own, _ = imports_of(left.pop())
        left += own - reached
        reached |= own
    return reached


# ---- names ----


@pytest.mark.parametrize("name", hf_alsals.__all__)
def test_every_public_name_is_the_object_of_its_module(name):
    value = getattr(hf_alsals, name)
    homes = {"LINE_SEARCHES": "presets", "PRESETS": "presets", "__version__": "version"}
    module = f"hf_alsals.{homes[name]}" if name in homes else value.__module__
    assert module.startswith("hf_alsals.")
    assert getattr(importlib.import_module(module), name) is value
    assert name in dir(hf_alsals)


def test_all_public_names_are_imported_by_a_star():
    names = {}
    exec("from hf_alsals import *", names)
    assert set(hf_alsals.__all__) <= set(names)


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="module 'hf_alsals' has no attribute 'AlsalsTrainr'"):
        _ = hf_alsals.AlsalsTrainr
    with pytest.raises(ImportError, match="AlsalsTrainr"):
        exec("from hf_alsals import AlsalsTrainr", {})


# ---- what is imported ----

TRAINING = """
import sys
for name in ("transformers", "accelerate", "datasets", "huggingface_hub", "matplotlib", "jinja2", "yaml"):
    sys.modules[name] = None  # importing it fails

import torch
from hf_alsals import ALSALS, PRESETS, LineSearch

for name, preset in PRESETS.items():
    w = torch.tensor([3.0, -2.0], requires_grad=True)
    optimizer = ALSALS([w], **preset)
    assert isinstance(optimizer.line_search, LineSearch)
    loss = (w**2).sum()
    loss.backward()
    optimizer.step(lambda: (w**2).sum(), loss)
    print(name, (w**2).sum().item() < 13.0)

try:
    from hf_alsals import AlsalsTrainer
except ImportError as error:
    print("the trainer needs", error.name)
"""


def test_the_optimizer_trains_where_there_is_torch_alone():
    *presets, trainer = run(TRAINING).splitlines()
    assert presets == [f"{name} True" for name in hf_alsals.PRESETS]
    assert trainer.split()[-1] in ("transformers", "accelerate")


SEARCHING = f"""
import importlib, sys, types
sys.modules["torch"] = sys.modules["numpy"] = None  # importing it fails
package = types.ModuleType("hf_alsals")  # whose own file imports torch
package.__path__ = [{str(FOLDER)!r}]
sys.modules["hf_alsals"] = package
for name in {sorted(LINE_SEARCH)}:
    importlib.import_module("hf_alsals." + name)

from hf_alsals.presets import LINE_SEARCHES

class Falling:
    loss, slope = 0.0, 1.0
    def probe(self, step_size):
        return -step_size

for name, search in LINE_SEARCHES.items():
    print(name, search.step(search.init(), Falling()).taken > 0)
"""


def test_the_line_search_needs_no_torch():
    assert run(SEARCHING).splitlines() == ["path True", "constant True"]


@pytest.mark.parametrize("module", sorted(LINE_SEARCH))
def test_the_line_search_imports_the_standard_library_and_itself(module):
    own, others = imports_of(module)
    assert own <= LINE_SEARCH
    assert others <= sys.stdlib_module_names


@pytest.mark.parametrize("module", sorted(OPTIMIZER))
def test_the_optimizer_imports_torch_and_nothing_of_the_trainer(module):
    own, others = imports_of(module)
    assert own <= LINE_SEARCH | OPTIMIZER
    lazily = {"pytorch_optimizer", "transformers"} if module == "optimizer_direction" else set()
    assert others <= sys.stdlib_module_names | {"torch"} | lazily


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("direction", {"adam", "line", "optimizer", *LINE_SEARCH}),
        ("adam", {"line", "optimizer", *LINE_SEARCH}),
        ("line", {"adam", "optimizer", *LINE_SEARCH}),
        ("path_slope", {"adam", "line", "optimizer", *LINE_SEARCH}),
        ("closure", {"adam", "direction", "line", "optimizer", *LINE_SEARCH}),
        ("shards", OPTIMIZER | LINE_SEARCH),
        ("loss_replay", {"optimizer", "trainer", "line", "direction"}),
        ("optimizer", {"loss_replay", "trainer", "callbacks"}),
    ],
)
def test_parts_are_known_in_one_direction_only(module, others):
    assert reached_from(module) & others == set()


def test_no_module_imports_one_that_imports_it():
    assert [module for module in MODULES if module in reached_from(module)] == []


def test_what_is_said_here_is_said_of_modules_that_there_are():
    assert set(MODULES) >= LINE_SEARCH | OPTIMIZER
    assert "transformers" in imports_of("trainer")[1]
    assert {"line", "line_search"} <= imports_of("optimizer")[0]


# ---- examples ----


@pytest.mark.parametrize("name", [name for name in MODULES if ">>>" in (FOLDER / f"{name}.py").read_text()])
def test_the_examples_of_a_module_run(name):
    module = importlib.import_module(f"hf_alsals.{name}")
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted >= inspect.getsource(module).count(">>>")


def test_the_parts_of_the_line_search_and_the_optimizer_have_examples():
    for name in ("growth", "acceptance", "line_search", "line", "optimizer"):
        tests = doctest.DocTestFinder().find(importlib.import_module(f"hf_alsals.{name}"))
        assert any(test.examples for test in tests)


# ---- what is packed ----


@pytest.fixture
def checkout(tmp_path):
    """Return a copy of the files of the repository, for packing writes beside them."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("setup.py", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE", ".ruff.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("hf_alsals", "recipes", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def files_in(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in paths}


def setup_py(folder, *command):
    subprocess.run([sys.executable, "setup.py", *command], cwd=folder, check=True, capture_output=True, timeout=120)


def test_the_sdist_holds_what_its_tests_read(checkout, tmp_path):
    expected = files_in(checkout)
    setup_py(checkout, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert expected <= names
    assert archive.stat().st_size < 3e6


def test_an_install_holds_the_package_alone(checkout, tmp_path):
    setup_py(checkout, "build_py", "--build-lib", str(tmp_path / "installed"))
    expected = {f"{module}.py" for module in ["__init__", *MODULES]} | {"py.typed", "report.html"}
    assert files_in(tmp_path / "installed") == {f"hf_alsals/{name}" for name in expected}
