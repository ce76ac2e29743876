"""What the slopes along the path say at each learning rate of AdamW's grid, in the first half of training.

AdamW trains the design tasks of the benchmarks at each rate of their grids: the rate is constant there but for the
warm-up. Of the hidden matrices, the vectors and the others (embeddings and heads) it notes what could steer a step
size. Wants the data of recipes/benchmarks/compare.py, and the runs of AdamW's sweep in its folder.

    python recipes/studies/grid_slopes.py
"""

import os
import runpy
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from multiprocessing import get_context
from typing import Any

import torch
from matplotlib.figure import Figure
from study import HERE, write
from torch import Tensor
from transformers import HfArgumentParser, TrainerCallback

import hf_alsals
from hf_alsals.direction import hidden_matrices
from hf_alsals.optimizer_direction import set_hidden_matrices

RECIPES = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(RECIPES, "benchmarks"))
import compare  # noqa: E402
import matrix  # noqa: E402
import runs as benchmark_runs  # noqa: E402

TASKS = ("gpt2-shakespeare", "bert-mlm", "t5", "cifar10", "topics", "sst2", "digits")
SCHEDULE = "adamw, warmup_stable_decay"
KINDS = ("hidden", "vectors", "others")
SUMS = ("path", "path_size", "settled", "settled_size", "gradient", "predicted")
WINDOWS = 20  # of a whole training
LEVEL = -0.3  # where the rule of `alsals` stands still
STATISTICS: dict[str, Callable[[dict[str, Any]], float]] = {
    "r": lambda row: row["late_hidden_r"],
    "q": lambda row: row["late_hidden_q"],
    "(r + q) / 2": lambda row: (row["late_hidden_r"] + row["late_hidden_q"]) / 2,
}
EARLY, LATE = range(2, 5), range(5, 10)  # after the warm-up to a quarter, and from there to half


@dataclass
class GridArguments:
    """Which tasks to train on, and where their data is."""

    output_dir: str = field(default=HERE, metadata={"help": "The folder for grid_slopes.json and grid_slopes.png."})
    tasks: list[str] = field(default_factory=lambda: [*TASKS], metadata={"help": "Tasks of recipes/benchmarks."})
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "The learning rates; by default each task's own."}
    )
    data_dir: str = field(default="data", metadata={"help": "The folder with text/, glue/ and cifar10/."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time."})


class SlopeRecorder(TrainerCallback):
    """Sums up, by kind and window, the path slopes of AdamW's steps, and stops training half way.

    Of a step `k` from `w_k` to `w_{k+1}` with the gradient `g_k`, and `w_0` the first weights: `path` is
    `<g_k, w_0 - w_k>`, `settled` leaves out the last three steps, `path - 3 <g_k, w_{k-1} - w_k>`, `gradient` is what
    the path slope gains by a step along the gradient alone, `eta <g_k, g_k / den>`, and `predicted` the decrease of
    the loss that the step predicts, `<g_k, w_k - w_{k+1}>`. The sizes are absolute values.
    """

    def __init__(self) -> None:
        self.sums = {kind: {name: [0.0] * (WINDOWS // 2) for name in SUMS} for kind in KINDS}
        self.weights: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}
        self.kinds: dict[Tensor, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Copy the first weights."""
        set_hidden_matrices(optimizer, model)
        hidden = {id(p) for p in hidden_matrices(optimizer.param_groups)}
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.weights[p] = (p.detach().clone(),) * 3
                self.kinds[p] = "vectors" if p.ndim < 2 else "hidden" if id(p) in hidden else "others"

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        """Add the step that was just taken."""
        window = state.global_step * WINDOWS // state.max_steps
        slopes: dict[str, list[float]] = {kind: [0.0] * 4 for kind in KINDS}
        for group in optimizer.param_groups:
            _, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                first, before, start = self.weights[p]
                of = optimizer.state[p]
                den = (of["exp_avg_sq"] / (1 - beta2 ** of["step"].item())).sqrt() + group["eps"]
                path, last, predicted = (
                    (p.grad * way).sum().item() for way in (first - start, before - start, start - p)
                )
                gradient = group["lr"] * (p.grad * p.grad / den).sum().item()
                for i, value in enumerate((path, path - 3 * last, gradient, predicted)):
                    slopes[self.kinds[p]][i] += value
                self.weights[p] = (first, start, p.detach().clone())
        for kind, (path, settled, gradient, predicted) in slopes.items():
            values = (path, abs(path), settled, abs(settled), gradient, predicted)
            for name, value in zip(SUMS, values, strict=True):
                self.sums[kind][name][window] += value

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop half way, where the schedule begins to fall."""
        control.should_training_stop |= state.global_step >= state.max_steps // 2


def record(argv: list[str]) -> dict[str, dict[str, list[float]]]:
    """Return what a recipe's training sums up, in a process of its own."""
    recorder = SlopeRecorder()

    class RecordingTrainer(hf_alsals.AlsalsTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(recorder)

    hf_alsals.AlsalsTrainer = RecordingTrainer
    sys.argv = argv
    sys.path.insert(0, RECIPES)
    runpy.run_path(argv[0], run_name="__main__")
    return {
        kind: {name: [float(f"{value:.6g}") for value in values] for name, values in sums.items()}
        for kind, sums in recorder.sums.items()
    }


def command_of(task: str, learning_rate: float) -> str:
    """Return the command of the run of a task's sweep at a rate, on seed 1."""
    return matrix.command_of(task, SCHEDULE, learning_rate, 1)


def swept_losses(grid: list[tuple[str, float]]) -> list[float]:
    """Return the validation losses at which the benchmark's runs ended.

    Raises:
        SystemExit: If one of them is not on record.
    """
    found = {
        one["key"]: one["results"]["eval_loss"] for one in benchmark_runs.load(os.path.join(RECIPES, "benchmarks"))
    }
    keys = [matrix.key_of(matrix.options_of(command_of(*one)), None) for one in grid]
    for (task, rate), key in zip(grid, keys, strict=True):
        if key not in found:
            raise SystemExit(
                f"grid_slopes.py: {task} has no run at {rate:g}, which recipes/benchmarks/compare.py --tasks {task} "
                f"--optimizers '{SCHEDULE}' --seeds 1 does."
            )
    return [found[key] for key in keys]


def run_all(args: GridArguments) -> list[dict[str, Any]]:
    """Train at each rate of each task, and return a record of each run, with the loss that the sweep ended at."""
    grid = [(task, rate) for task in args.tasks for rate in args.learning_rates or matrix.TASKS[task].learning_rates]
    losses = swept_losses(grid)
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        flags = " ".join(matrix.TASKS[task].flags for task in args.tasks)
        places = compare.pretrained_models(os.path.join(folder, "minilm")) if "MINILM" in flags else {}
        jobs = []
        for number, one in enumerate(grid):
            _, recipe, *flags = command_of(*one).split()
            flags[-1] = os.path.join(folder, str(number))
            flags = [places.get(part, part).replace("DATA/", f"{args.data_dir}/") for part in flags]
            flags += ["--do_train", "true", "--disable_tqdm", "true"]
            jobs.append(pool.submit(record, [os.path.join(os.path.dirname(RECIPES), recipe), *flags]))
        return [
            {"task": task, "learning_rate": rate, "loss": loss, "sums": job.result()}
            for (task, rate), loss, job in zip(grid, losses, jobs, strict=True)
        ]


def statistics_of(one: dict[str, Any], kind: str, windows: range) -> dict[str, float]:
    """Return r, q, rho and the share of the predicted decrease of one kind over some windows of a run."""
    total = {name: sum(one["sums"][kind][name][i] for i in windows) for name in SUMS}
    predicted = sum(one["sums"][other]["predicted"][i] for other in KINDS for i in windows)
    ratios = {
        "r": (total["path"], total["path_size"]),
        "q": (total["settled"], total["settled_size"]),
        "rho": (total["path"], total["gradient"]),
        "share": (total["predicted"], predicted),
    }
    return {name: above / below if below else 0.0 for name, (above, below) in ratios.items()}


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each run: its statistics by kind, early and late, and whether its rate is the best."""
    losses = defaultdict(list)
    for one in runs:
        losses[one["task"]].append(one["loss"])
    return [
        {name: one[name] for name in ("task", "learning_rate", "loss")}
        | {"is_best": one["loss"] == min(losses[one["task"]])}
        | {
            f"{when}_{kind}_{name}": value
            for when, windows in (("early", EARLY), ("late", LATE))
            for kind in KINDS
            for name, value in statistics_of(one, kind, windows).items()
        }
        for one in runs
    ]


def crossing(rows: list[dict[str, Any]], statistic: Callable[[dict[str, Any]], float]) -> str:
    """Return where a statistic of the hidden matrices first falls below `LEVEL`, late, over a task's best rate.

    Between two rates it is by their logarithms.
    """
    best = next(row["learning_rate"] for row in rows if row["is_best"])
    points = [(row["learning_rate"] / best, statistic(row)) for row in rows]
    if points[0][1] < LEVEL:
        return f"below {points[0][0]:.2g}"
    for (low, above), (high, below) in pairwise(points):
        if below < LEVEL:
            return f"{low * (high / low) ** ((above - LEVEL) / (above - below)):.2g}"
    return f"above {points[-1][0]:.2g}"


def table(report: dict[str, Any]) -> str:
    """Return three Markdown tables: each statistic at the best rates, where it crosses a level, and all rows."""
    by_task = {task: list(rows) for task, rows in groupby(report["rows"], lambda row: row["task"])}
    crossings = [f"| | {' | '.join(by_task)} |", f"|{' --- |' * (1 + len(by_task))}"]
    for name, statistic in STATISTICS.items():
        crossings.append(f"| {name} | {' | '.join(crossing(rows, statistic) for rows in by_task.values())} |")
    best = [row for row in report["rows"] if row["is_best"]]
    spread = ["| of | when | r | q | rho |", "| --- | --- | --- | --- | --- |"]
    for kind in KINDS:
        for when in ("early", "late"):
            cells = []
            for name in ("r", "q", "rho"):
                values = sorted(row[f"{when}_{kind}_{name}"] for row in best)
                cells.append(f"{values[0]:.2f}, {values[len(values) // 2]:.2f}, {values[-1]:.2f}")
            spread.append(f"| {kind} | {when} | {' | '.join(cells)} |")
    lines = [
        "| task | rate | loss | hidden: r | q | rho | share | vectors: r | q | rho | share "
        "| others: r | q | rho | share |",
        f"|{' --- |' * 15}",
    ]
    for row in report["rows"]:
        cells = [f"{row[f'late_{kind}_{name}']:.2f}" for kind in KINDS for name in ("r", "q", "rho", "share")]
        rate = f"**{row['learning_rate']:g}**" if row["is_best"] else f"{row['learning_rate']:g}"
        lines.append(f"| {row['task']} | {rate} | {row['loss']:.3f} | {' | '.join(cells)} |")
    return "\n\n".join("\n".join(part) for part in (spread, crossings, lines))


def draw(report: dict[str, Any], path: str) -> None:
    """Draw r, q and rho of the hidden matrices, late, against the rate over the best."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for name, axes in zip(("r", "q", "rho"), figure.subplots(1, 3), strict=True):
        for task in dict.fromkeys(row["task"] for row in report["rows"]):
            rows = [row for row in report["rows"] if row["task"] == task]
            best = next(row["learning_rate"] for row in rows if row["is_best"])
            rates = [row["learning_rate"] / best for row in rows]
            axes.plot(rates, [row[f"late_hidden_{name}"] for row in rows], ".-", label=task)
        axes.axvline(1, color="gray", linewidth=0.8)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set(title=name, xlabel="learning rate over the best", xscale="log")
        axes.grid(alpha=0.3)
    axes.set_yscale("symlog", linthresh=1)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=90)


def main() -> None:
    (args,) = HfArgumentParser(GridArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
    runs = run_all(args)
    report = write("grid_slopes", args.output_dir, {"rows": summarize(runs), "runs": runs})
    draw(report, os.path.join(args.output_dir, "grid_slopes.png"))
    print(table(report))


if __name__ == "__main__":
    main()
