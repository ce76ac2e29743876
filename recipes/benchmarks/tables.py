"""Tables and pictures of the runs, and the pages that they go into."""

import itertools
import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import matrix
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from hf_alsals.presets import METHOD_VERSION

# The rows of the front page's table.
FRONT = {
    "gpt2-shakespeare": "GPT-2, tinyshakespeare",
    "gpt2-reference": "GPT-2, Python's reference",
    "t5": "T5",
    "bert-mlm": "masked BERT",
    "topics": "BERT, topics",
    "sst2": "MiniLM, SST-2",
    "cifar10": "ResNet, CIFAR-10",
    "digits": "ResNet, digits",
}
FRONT_PICTURE = "t5"


def probes_per_step(curve: list[dict[str, Any]]) -> float:
    """Return the probes per optimizer step of a run, whose logs have those per step since the log before."""
    steps = [0, *(entry["step"] for entry in curve)]
    return sum(entry["probes"] * (step - last) for entry, last, step in zip(curve, steps, steps[1:])) / steps[-1]


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for all runs that differ by nothing but the seed: means, and standard errors over seeds."""
    names = matrix.names()
    groups = defaultdict(list)
    for run in runs:
        shared = {name: value for name, value in run["options"].items() if name != "seed"}
        groups[matrix.key_of(shared, run.get("method_version"))].append(run)
    rows = []
    for group in groups.values():
        options = group[0]["options"]
        task, optimizer = names.get(matrix.row_of(options), (None, None))
        if task is None:  # of a task or an optimizer that is no longer in the matrix
            continue
        has_grid = "{learning_rate}" in matrix.OPTIMIZERS[optimizer]
        row = {"task": task, "optimizer": optimizer, "seeds": len(group), "runs": group}
        row["learning_rate"] = options["learning_rate"] if has_grid else None
        row["method_version"] = group[0].get("method_version")
        for metric in ("eval_loss", "eval_accuracy", "eval_matthews_correlation"):
            values = [run["results"][metric] for run in group if metric in run["results"]]
            if values:
                row[metric] = statistics.mean(values)
            if len(values) > 1:
                row[f"{metric}_error"] = statistics.stdev(values) / math.sqrt(len(values))
        probes = [run["probes_per_step"] for run in group if "probes_per_step" in run]
        if probes:
            row["probes_per_step"] = statistics.mean(probes)
        rows.append(row)
    return rows


def best_rows(rows: list[dict[str, Any]], task: str, optimizer: str) -> list[dict[str, Any]]:
    """Return an optimizer's rows of its newest version on a task, the best first; of those that are equal, by loss."""
    mine = [row for row in rows if (row["task"], row["optimizer"]) == (task, optimizer)]
    newest = max((row["method_version"] or 0 for row in mine), default=0)
    sign = -1 if matrix.TASKS[task].higher_is_better else 1

    def rank(row: dict[str, Any]) -> tuple[float, ...]:
        values = (sign * row[matrix.TASKS[task].metric], row["eval_loss"])
        return tuple(value if math.isfinite(value) else math.inf for value in values)

    return sorted((row for row in mine if (row["method_version"] or 0) == newest), key=rank)


def chosen_row(rows: list[dict[str, Any]], task: str, optimizer: str) -> dict[str, Any] | None:
    """Return the row of an optimizer's best learning rate on a task, of those that were run on the most seeds."""
    mine = best_rows(rows, task, optimizer)
    # A learning rate that was run on one seed only does not win over one of three by luck.
    most = max((row["seeds"] for row in mine), default=0)
    return next((row for row in mine if row["seeds"] == most), None)


SWEEP = ("adamw", "adamw, warmup_stable_decay")
WHOLE_SWEEP = 12  # settings
# The lines of the regret table and of the performance profile, beside the sweep and one rate for all tasks.
PROFILE = (
    "alsals",
    "c-adamw",
    "nesterov-adamw",
    "alsals_muon",
    "muon",
    "schedule-free",
    "prodigy",
    "mechanic",
    "alsals_paper",
    "salsa",
)


GRID_SEED = 1  # on which learning rates are chosen, and most of the rules of alsals were


def fresh_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without the runs of the grid's seed, where there are others: its best is so by luck."""
    return summarize(
        [run for row in rows for run in row["runs"] if row["seeds"] == 1 or run["options"]["seed"] != GRID_SEED]
    )


def swept_row(rows: list[dict[str, Any]], task: str) -> dict[str, Any] | None:
    """Return the best row on a task of a sweep of AdamW over learning rates and two schedules, of most seeds."""
    found = [row for name in SWEEP if (row := chosen_row(rows, task, name)) is not None]
    most = max((row["seeds"] for row in found), default=0)
    sign = -1 if matrix.TASKS[task].higher_is_better else 1
    found = [row for row in found if row["seeds"] == most]
    return min(found, key=lambda row: sign * row[matrix.TASKS[task].metric], default=None)


def swept_beside(row: dict[str, Any], best: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best of AdamW's sweep on the seed of the grid alone, where a row was run on no other."""
    if any(run["options"]["seed"] != GRID_SEED for run in row["runs"]):
        return best
    of_best = [
        run
        for one in best_rows(rows, best["task"], best["optimizer"])
        for run in one["runs"]
        if one["learning_rate"] == best["learning_rate"] and run["options"]["seed"] == GRID_SEED
    ]
    return next(iter(summarize(of_best)), best)


def one_rate_rows(rows: list[dict[str, Any]], all_rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by task the rows of the one learning rate and schedule of AdamW that is the best over tasks.

    Those are the tasks judged by loss whose sweep is whole, of all if there are none, and settings run on all of them.

    Args:
        rows, all_rows (`list[dict]`): The rows of fresh seeds, and those with all seeds.
    """
    by_rate = defaultdict(dict)
    for row in rows:
        if row["optimizer"] in SWEEP:
            by_rate[row["optimizer"], row["learning_rate"]][row["task"]] = row
    tasks = {task for some in by_rate.values() for task in some if matrix.TASKS[task].metric == "eval_loss"}
    whole = {task for task in tasks if sum(task in some for some in by_rate.values()) >= WHOLE_SWEEP} or tasks

    def mean_regret(some: dict[str, dict[str, Any]]) -> float:
        return statistics.mean(
            regret(some[task], swept_beside(some[task], swept_row(rows, task), all_rows)) for task in whole
        )

    candidates = [some for some in by_rate.values() if whole and some.keys() >= whole]
    return min(candidates, key=mean_regret, default={})


def regret(row: dict[str, Any], best: dict[str, Any]) -> float:
    """Return by how much a row's loss is above another one's, in per cent of it."""
    return 100 * (row["eval_loss"] / best["eval_loss"] - 1)


def steps_needed(rows: list[dict[str, Any]], best: dict[str, Any], loss: float) -> str:
    """Return how many times the steps the best of AdamW's sweep needs for a loss, between lengths by their logarithms.

    It is empty where the other lengths were not run at its learning rate.
    """
    curve = {1.0: best["eval_loss"]}
    for share in matrix.OTHER_LENGTHS:
        for row in best_rows(rows, best["task"], f"adamw, {share:g} times the steps"):
            if best["optimizer"] == "adamw, warmup_stable_decay" and row["learning_rate"] == best["learning_rate"]:
                curve[share] = row["eval_loss"]
    if len(curve) <= len(matrix.OTHER_LENGTHS):
        return ""
    points = sorted(curve.items())
    if loss > points[0][1]:
        return f"under {points[0][0]:g}"
    for (shorter, worse), (longer, better) in itertools.pairwise(points):
        if better <= loss <= worse and better < worse:
            return f"{shorter * (longer / shorter) ** ((worse - loss) / (worse - better)):.2f}"
    return f"over {points[-1][0]:g}"


def regret_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: on each task the best of AdamW's sweep, and by how much others are worse.

    It is per cent of the loss, or, where a task is judged by accuracy or correlation, points of that, of fresh seeds
    where there are any; what was run on the grid's seed alone is held against AdamW on that. Mean, with a bootstrap
    interval of 95 % over tasks, and worst are those of today's version.
    """
    all_rows, rows = rows, fresh_rows(rows)
    one_rate = one_rate_rows(rows, all_rows)
    tasks = [task for task in matrix.TASKS if swept_row(rows, task) is not None]
    columns = ("task", "AdamW's sweep", "steps that it needs for alsals", "one rate", *PROFILE)
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    regrets: dict[str, list[float]] = defaultdict(list)
    for task in tasks:
        best = swept_row(rows, task)
        runs_of = sum(len(best_rows(rows, task, name)) for name in SWEEP)
        schedule = matrix.TASKS[task].schedule if best["optimizer"] == "adamw" else "stable, then linear"
        metric = matrix.TASKS[task].metric
        ours = chosen_row(rows, task, "alsals")
        cells = [
            f"{_with_error(best, metric)} ({best['learning_rate']:g}, {schedule}, best of {runs_of})",
            steps_needed(rows, best, ours["eval_loss"])
            if ours is not None and not _mark(ours) and metric == "eval_loss"
            else "",
        ]
        for name in ("one rate", *PROFILE):
            row = one_rate.get(task) if name == "one rate" else chosen_row(rows, task, name)
            if row is None:
                cells.append("")
                continue
            mark = f" {_mark(row).replace('version ', 'v')}".rstrip()
            swept = swept_beside(row, best, all_rows)
            if metric == "eval_loss":
                cells.append(f"{regret(row, swept):+.1f} %{mark}")
                if not mark:
                    regrets[name].append(regret(row, swept))
            else:
                cells.append(f"{100 * (swept[metric] - row[metric]):+.1f} points{mark}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    for title, of in (("mean in loss", _mean_with_interval), ("worst in loss", _worst)):
        cells = [of(values) if (values := regrets[name]) else "" for name in ("one rate", *PROFILE)]
        lines.append(f"| **{title}** | | | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_with_interval(values: list[float]) -> str:
    mean = f"{statistics.mean(values):+.1f} %"
    if len(values) > 1:
        found = bootstrap((values,), statistics.mean, vectorized=False, method="percentile", rng=0)
        mean += " ({:+.1f} to {:+.1f})".format(*found.confidence_interval)
    return f"{mean}, {_count(values)}"


def _worst(values: list[float]) -> str:
    return f"{max(values):+.1f} %, {_count(values)}"


def _count(values: list[float]) -> str:
    return f"{len(values)} task" + "s" * (len(values) > 1)


def draw_profile(rows: list[dict[str, Any]], path: str) -> None:
    """Draw performance profiles (arXiv 2306.07179): the share of tasks whose loss is within a factor of the best.

    Tasks are those that are judged by loss and that AdamW and today's `alsals` were run on; losses are over that of
    the best of AdamW's sweep, as in [`regret_table`].
    """
    all_rows, rows = rows, fresh_rows(rows)
    one_rate = one_rate_rows(rows, all_rows)
    lines: dict[str, dict[str, float]] = {"AdamW, swept": {}, "AdamW, one rate": {}} | {name: {} for name in PROFILE}
    for task in matrix.TASKS:
        if matrix.TASKS[task].metric != "eval_loss" or swept_row(rows, task) is None:
            continue
        best = swept_row(rows, task)
        found = {"AdamW, swept": best, "AdamW, one rate": one_rate.get(task)}
        found |= {name: chosen_row(rows, task, name) for name in PROFILE}
        if found["alsals"] is None or _mark(found["alsals"]):
            continue
        for name, row in found.items():
            if row is not None and not _mark(row):
                lines[name][task] = row["eval_loss"] / swept_beside(row, best, all_rows)["eval_loss"]
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab20"].colors
    axes.set_prop_cycle(color=[*colors[::2], *colors[1::2]])
    for name, losses in lines.items():
        if not losses:
            continue
        # On the tasks that it was run on.
        ratios = sorted(
            loss / min(other[task] for other in lines.values() if task in other) for task, loss in losses.items()
        )
        shares = [(i + 1) / len(ratios) for i in range(len(ratios))]
        axes.step([1, *ratios, 2], [0, *shares, *shares[-1:]], where="post", label=f"{name} ({_count(ratios)})")
    axes.set_xlim(1, 1.3)
    axes.set_xlabel("loss over the best one on the task")
    axes.set_ylabel("share of tasks")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def _with_error(row: dict[str, Any], metric: str) -> str:
    error = f" ± {row[f'{metric}_error']:.3f}" if f"{metric}_error" in row else ""
    return f"{row[metric]:.3f}{error}" if metric in row else ""


def _mark(row: dict[str, Any]) -> str:
    is_today = row["method_version"] in (None, METHOD_VERSION)
    return "" if is_today else f"version {row['method_version']}"


ACCURACY = "accuracy (cola: Matthews correlation)"
COLUMNS = ("task", "optimizer", "learning rate", "seeds", "loss", ACCURACY, "probes per step")


def table(rows: list[dict[str, Any]], optimizers: Iterable[str]) -> str:
    """Return a Markdown table: a line for each task and optimizer, at its best learning rate."""
    lines = [
        f"Rows marked with a version were run by that version of the method; today's is {METHOD_VERSION}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for task in matrix.TASKS:
        for optimizer in optimizers:
            row = chosen_row(rows, task, optimizer)
            if row is None:
                continue
            name = f"{optimizer} ({_mark(row)})" if _mark(row) else optimizer
            rate = "untuned"
            if row["learning_rate"] is not None:
                rate = f"{row['learning_rate']:g}, best of {len(best_rows(rows, task, optimizer))}"
            score = _with_error(row, "eval_accuracy") or _with_error(row, "eval_matthews_correlation")
            loss = _with_error(row, "eval_loss")
            probes = f"{row['probes_per_step']:.2f}" if "probes_per_step" in row else ""
            lines.append(f"| {task} | {name} | {rate} | {row['seeds']} | {loss} | {score} | {probes} |")
    return "\n".join(lines)


def front_table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table of the front page: validation losses along both directions, beside AdamW and Muon."""
    lines = [
        f"Validation loss ± standard error over seeds, or one seed, by version {METHOD_VERSION} unless marked v.",
        "",
        "| task | `alsals` | AdamW, best of a sweep | `alsals_muon` | Muon, best of six |",
        "| --- | --- | --- | --- | --- |",
    ]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        return f"{_with_error(row, 'eval_loss')} {_mark(row).replace('version ', 'v')}".rstrip()

    for task, title in FRONT.items():
        alsals, alsals_muon, muon = (chosen_row(rows, task, name) for name in ("alsals", "alsals_muon", "muon"))
        cells = [cell(row) for row in (alsals, swept_row(rows, task), alsals_muon, muon)]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(path: str, name: str, text: str) -> None:
    """Put a text between the markers of a name in a page; one that has none of them, or is not there, stays."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        page = file.read()
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    between = re.compile(f"(?<={re.escape(start)}).*?(?={re.escape(end)})", re.DOTALL)
    filled = between.sub(lambda match: f"\n\n{text}\n\n", page)
    if filled != page:
        with open(path + ".part", "w") as file:
            file.write(filled)
        os.replace(path + ".part", path)


def _plot(curve: list[dict[str, Any]], loss_axes: Any, size_axes: Any, **style: Any) -> None:
    steps = [entry["step"] for entry in curve]
    # By steps and not by logs, of which some runs have one in ten steps and some one in fifty.
    losses = [statistics.mean(entry["loss"] for entry in curve if step - 50 < entry["step"] <= step) for step in steps]
    sizes = [entry.get("learning_rate", 0) * entry.get("lr_multiplier", 1) for entry in curve]
    loss_axes.plot(steps, losses, **style)
    size_axes.plot(*zip(*((step, size) for step, size in zip(steps, sizes) if size > 0)), **style)


def _finish(loss_axes: Any, size_axes: Any) -> None:
    size_axes.set_yscale("log")
    # The last steps of a schedule are next to nothing, and would take most of the axis.
    size_axes.set_ylim(bottom=max(max(line.get_ydata()) for line in size_axes.lines) / 1000)
    for axes in (loss_axes, size_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def draw(rows: list[dict[str, Any]], curves: dict[str, Any], path: str) -> None:
    """Draw, for each task, training loss and step size against steps, of the first seed."""
    shown = ("alsals", "adamw", "schedule-free", "alsals_paper")
    tasks = [task for task in matrix.TASKS if any(chosen_row(rows, task, optimizer) for optimizer in shown)]
    if not tasks:
        return
    height = math.ceil(len(tasks) / 2)
    figure = Figure(figsize=(13, 2.5 * height), layout="constrained")
    grid = figure.subplots(height, 4, squeeze=False)
    places = [pair for line in grid for pair in (line[:2], line[2:])]
    for task, (loss_axes, size_axes) in zip(tasks, places):
        for optimizer in shown:
            row = chosen_row(rows, task, optimizer)
            if row is not None:
                first = min(row["runs"], key=lambda run: run["options"]["seed"])
                rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
                label = " ".join(filter(None, (optimizer, rate, _mark(row))))
                _plot(curves[first["key"]], loss_axes, size_axes, label=label)
        _finish(loss_axes, size_axes)
        loss_axes.set_title(f"{task}: training loss", fontsize="medium")
        size_axes.set_title("step size", fontsize="medium")
        loss_axes.legend(frameon=False, fontsize="small")
    for axes in (axes for pair in places[len(tasks) :] for axes in pair):
        axes.set_axis_off()
    figure.savefig(path, dpi=80)


def draw_front(rows: list[dict[str, Any]], curves: dict[str, Any], path: str) -> None:
    """Draw training loss and step size of alsals and of AdamW at the best of its sweep, on all seeds of one task."""
    chosen = [chosen_row(rows, FRONT_PICTURE, "alsals"), swept_row(rows, FRONT_PICTURE)]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss_axes, size_axes = figure.subplots(1, 2)
    labels = ("alsals, untuned", f"AdamW, the best of its sweep, {chosen[1]['learning_rate']:g}")
    for row, label, color in zip(chosen, labels, ("C0", "C1")):
        for i, run in enumerate(row["runs"]):
            style = {"label": label} if i == 0 else {}
            _plot(curves[run["key"]], loss_axes, size_axes, color=color, linewidth=1.2, alpha=0.8, **style)
    _finish(loss_axes, size_axes)
    loss_axes.set_title("training loss, one line per seed")
    size_axes.set_title("step size (alsals) and learning rate (AdamW)")
    loss_axes.legend(frameon=False)
    for axes in (loss_axes, size_axes):
        axes.set_xlabel("training step")
    figure.savefig(path, dpi=100)
