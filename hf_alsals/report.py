"""Web pages of a single file: what a run did, and how several runs compare."""

import base64
import datetime
import glob
import io
import json
import logging
import math
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jinja2
import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .callbacks import as_text
from .checkpoint import saved_attributes
from .optimizer import KINDS
from .publishing import without_local_paths

logger = logging.getLogger(__name__)

# What an evaluation gives beside its metrics.
_NO_METRICS = ("runtime", "per_second", "preparation_time", "samples")

_LOSS_NOTE = "The training loss is faint as logged, and full as the mean of 5 logs."

# Pairs of optimizer step (or seconds) and value.
Points = list[tuple[float, float]]

# What matplotlib draws: points and their style.
Line = tuple[Points, dict[str, Any]]


@dataclass
class Run:
    """What a run has left in its output directory; see [`load_run`].

    Attributes:
        name (`str`): The last part of the directory's path.
        state (`TrainerState`): The newest state that the run has saved.
        updated (`str`): When it was saved, in ISO format.
        settings (`dict`): The training arguments that are not the default; empty if the run has not saved them.
        c (`float`, *optional*): The sufficient-decrease constant of the search.
        growth_metrics (`list[str]`): What the growth rule logs.
        first_step (`int`): The step that the run was resumed at.
        search_seconds (`float`, *optional*): Time spent in searches.
        warnings (`list[dict]`): `step` and `message` of each warning.
        logs (`list[dict]`): The logs of training.
        metrics (`dict[str, list[tuple]]`): The values of each evaluation metric.
        end (`dict`): The log of the end of training; empty before.
    """

    name: str
    state: TrainerState
    updated: str
    settings: dict[str, Any]
    c: float | None
    growth_metrics: list[str]
    first_step: int
    search_seconds: float | None
    warnings: list[dict[str, Any]]
    logs: list[dict[str, Any]]
    metrics: dict[str, Points]
    end: dict[str, Any]

    @property
    def progress(self) -> str:
        """Whether the run has come to its end."""
        step, max_steps = self.state.global_step, self.state.max_steps
        if 0 < max_steps <= step:
            return "finished"
        # As by early stopping; a run that is killed does not log its end.
        return f"{'finished' if self.end.get('step') == step else 'running or stopped'} at step {step} of {max_steps}"

    @property
    def seconds_per_step(self) -> float | None:
        """The seconds that a step has taken since the run was begun or resumed, once it has ended."""
        seconds = self.end.get("train_runtime", 0)
        return seconds / max(self.end["step"] - self.first_step, 1) if seconds > 0 else None

    @property
    def losses(self) -> dict[str, Points]:
        """The evaluation metrics that are losses."""
        return {name: points for name, points in self.metrics.items() if name.endswith("loss")}

    @property
    def taken(self) -> Points:
        """The step sizes that were taken: those of the search, or of another optimizer, times the schedule."""
        sizes = [entry.get("step_size", entry["learning_rate"]) for entry in self.logs]
        return [(entry["step"], size * entry.get("lr_multiplier", 1)) for entry, size in zip(self.logs, sizes)]

    def points(self, name: str) -> Points:
        """Return the values that the logs of training have under a name."""
        return [(entry["step"], entry[name]) for entry in self.logs if name in entry]

    def summary(self) -> dict[str, str]:
        """Return the run in a few numbers: texts by their names."""
        rows = {
            "optimizer": self.settings.get("optim", "not recorded"),
            "optimizer steps": str(self.state.global_step),
        }
        if self.logs:
            rows["training loss, last"] = f"{self.logs[-1]['loss']:.4g}"
        for name, points in self.metrics.items():
            # As in the Trainer, less is better of a loss, and more of everything else.
            word, best = ("lowest", min) if name in self.losses else ("highest", max)
            finite = [point for point in points if math.isfinite(point[1])] or points
            step, value = best(finite, key=lambda point: point[1])
            rows[f"{name}, {word}"] = f"{value:.4g} (step {step})"
            rows[f"{name}, last"] = f"{points[-1][1]:.4g}"
        if searched := self.points("step_size"):
            rows["step size of the search, last"] = f"{searched[-1][1]:.4g}"
        if self.logs:
            rows["step size taken, last"] = f"{self.taken[-1][1]:.4g}"
        if probes := self.points("probes"):
            # Each log has the probes per step since the log before.
            steps = [0, *(step for step, _ in probes)]
            total = sum(value * (step - last) for (step, value), last in zip(probes, steps))
            rows["probes per step"] = f"{total / max(steps[-1], 1):.2f}"
        if self.seconds_per_step is not None and searched and self.search_seconds is not None:
            rows["time in the search"] = f"{self.search_seconds / self.end['train_runtime']:.1%}"
        if self.seconds_per_step is not None:
            rows["steps per second"] = f"{1 / self.seconds_per_step:.4g}"
        return rows


def load_run(run_dir: str) -> Run:
    """Read a run, be it at its end or still going on.

    Args:
        run_dir (`str`): The output directory of the run.

    Raises:
        ValueError: If neither it nor a checkpoint in it holds a trainer_state.json that can be read, or if there is an
            all_results.json that cannot.
    """
    names = [TRAINER_STATE_NAME, *glob.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}", root_dir=run_dir)]
    states = []
    for path in (os.path.join(run_dir, name) for name in names):
        try:
            state = TrainerState.load_from_json(path)
            time = datetime.datetime.fromtimestamp(os.path.getmtime(path)).astimezone()
        except (OSError, TypeError, ValueError):  # not there, or not written to its end
            continue
        if not (_is_number(state.global_step) and _is_number(state.max_steps)):
            continue
        updated: Any = saved_attributes(state, "StepSizeCallback").get("updated")
        try:
            time = datetime.datetime.fromisoformat(updated).astimezone()
        except (OverflowError, TypeError, ValueError):  # not noted, or not by StepSizeCallback
            updated = time.isoformat(timespec="seconds")
        states.append((time, state.global_step, updated, state))
    if not states:
        raise ValueError(
            f"run_dir must be a folder with a {TRAINER_STATE_NAME} in it or in a checkpoint of it, got {run_dir!r}."
        )
    # A checkpoint is newer than the last update of the logs that it holds, and an earlier run's is older.
    *_, updated, state = max(states, key=lambda one: one[:2])
    steps, failures = (saved_attributes(state, name) for name in ("StepSizeCallback", "FailureCallback"))
    logs = _numbers_of(state.log_history)
    ends = (entry for entry in reversed(logs) if "train_runtime" in entry)
    end: dict[str, Any] = next(ends, {})
    evaluations = list(logs)
    results_path = os.path.join(run_dir, "all_results.json")
    if end.get("step") == state.global_step and os.path.exists(results_path):
        try:
            with open(results_path) as file:
                evaluations += _numbers_of([json.load(file) | {"step": state.global_step}])
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"all_results.json in run_dir must hold names and values, that of {run_dir!r} does not: remove it."
            ) from error
    metrics: dict[str, Points] = {}
    for entry in evaluations:
        for name in entry:
            if name.startswith("eval_") and not name.endswith(_NO_METRICS):
                points = metrics.setdefault(name, [])
                # The results repeat an evaluation that is in the log.
                if points[-1:] != [(entry["step"], entry[name])]:
                    points.append((entry["step"], entry[name]))
    return Run(
        name=os.path.basename(os.path.abspath(run_dir)),
        state=state,
        updated=updated,
        settings=without_local_paths(_typed(steps, "settings", dict, {})),
        c=_typed(steps, "c", (int, float), None),
        growth_metrics=[name for name in _typed(steps, "growth_metrics", list, []) if isinstance(name, str)],
        first_step=_typed(steps, "first_step", int, 0),
        search_seconds=_typed(steps, "search_seconds", (int, float), None),
        warnings=[
            warning
            for warning in _typed(failures, "warnings", list, [])
            if isinstance(warning, dict) and {"step", "message"} <= set(warning)
        ],
        logs=[entry for entry in logs if {"loss", "learning_rate"} <= set(entry)],
        metrics=metrics,
        end=end,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers_of(entries: Any) -> list[dict[str, Any]]:
    """Return the numbers of the log entries that have a step; a metric may be a matrix, and others may write logs."""
    numbers = [
        {name: value for name, value in entry.items() if _is_number(value)}
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    ]
    return [entry for entry in numbers if "step" in entry]


def _typed(values: dict[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = values.get(name)
    return value if isinstance(value, kind) else default


def report(run_dir: str) -> str:
    """Return a web page on a run: warnings, numbers, curves, line profiles and settings.

    Args:
        run_dir (`str`): The output directory of the run.

    Raises:
        ValueError: If there is no run in it.
    """
    run = load_run(run_dir)
    losses = _loss_lines(run.points("loss"), "C0", "training loss")
    losses += [
        (points, {"color": f"C{number}", "label": name})
        for number, (name, points) in enumerate(run.losses.items(), start=1)
    ]
    step_sizes = [
        (run.points("step_size"), {"color": "C0", "label": "of the search"}),
        (run.taken, {"color": "C1", "label": "taken"}),
    ]
    by_kind: list[Line] = []
    for number, kind in enumerate(KINDS):
        by_kind.append((run.points(f"step_size_{kind}"), {"color": f"C{number}", "label": kind}))
        for end in ("q1", "q3"):
            by_kind.append((run.points(f"step_size_{kind}_{end}"), {"color": f"C{number}", "alpha": 0.4}))
    ratios = [(step, min(max(ratio, -1), 2)) for step, ratio in run.points("armijo_ratio")]
    armijo = [(ratios, {"color": "C0", "label": "of the last search"})]
    if run.c is not None:
        armijo.append(([(step, run.c) for step, _ in ratios], {"color": "C1", "label": f"c = {run.c:g}"}))
    pictures = [
        *_draw("loss", losses),
        *_draw("step size", step_sizes, log=True),
        *_draw("step sizes of tensors: median and quartiles", by_kind, log=True),
        *_draw("Armijo ratio, cut off at -1 and 2", armijo),
        *_draw("probes per step", [(run.points("probes"), {"color": "C0"})]),
        *(
            picture
            for name in run.growth_metrics
            for picture in _draw(name.replace("_", " "), [(run.points(name), {"color": "C0"})])
        ),
    ]
    profiles = []
    for name in sorted(glob.glob("line_profile/step-*.png", root_dir=run_dir)):
        path = os.path.join(run_dir, name)
        if os.path.realpath(path) != os.path.join(os.path.realpath(run_dir), name):
            logger.warning(f"{path} is a link, or lies behind one, and is left out")
            continue
        with open(path, "rb") as file:
            profiles.append(_picture(os.path.basename(name).removesuffix(".png"), file.read()))
    return _render(
        title=f"Run {run.name}",
        progress=f"{run.progress}, last update {run.updated}",
        warnings=[f"Step {warning['step']}: {warning['message']}" for warning in run.warnings],
        sections=[
            {"heading": "Summary", "rows": run.summary().items()},
            {"heading": "Curves", "note": _LOSS_NOTE, "pictures": pictures},
            {"heading": "Loss along the search direction", "pictures": profiles},
            {"heading": "Settings that are not the default", "rows": sorted(run.settings.items())},
        ],
    )


def compare(run_dirs: list[str]) -> str:
    """Return a web page on several runs: numbers, curves in the same pictures, and the settings that differ.

    Args:
        run_dirs (`list[str]`): The output directories of the runs.

    Raises:
        ValueError: If there is no run in one of them.
    """
    runs = [load_run(run_dir) for run_dir in run_dirs]
    if len({run.name for run in runs}) < len(runs):
        for number, run in enumerate(runs, start=1):
            run.name = f"{number}: {run.name}"
    spectrum = matplotlib.colormaps["turbo"].resampled(len(runs))
    colors = [to_hex(f"C{number}" if len(runs) <= 10 else spectrum(number)) for number in range(len(runs))]
    names = [run.name for run in runs]
    summaries = [run.summary() for run in runs]
    columns = dict.fromkeys(name for summary in summaries for name in summary)
    numbers = [
        [run.name, run.progress, *(summary.get(column, "") for column in columns), len(run.warnings)]
        for run, summary in zip(runs, summaries)
    ]
    seconds_per_step = [run.seconds_per_step for run in runs]
    settings = []
    for name in sorted({name for run in runs for name in run.settings}):
        # A run without StepSizeCallback has saved none.
        values = [str(run.settings.get(name, "default")) if run.settings else "not recorded" for run in runs]
        if len(set(values)) > 1:
            settings.append([name, *values])
    return _render(
        title=f"Comparison of {len(runs)} runs",
        sections=[
            {"heading": "Summary", "header": ["run", "state", *columns, "warnings"], "rows": numbers},
            {
                "heading": "Curves against optimizer steps",
                "note": _LOSS_NOTE,
                "legend": list(zip(colors, names)),
                "pictures": _overlays(runs, colors, [1.0] * len(runs), "optimizer step"),
            },
            {
                "heading": "Curves against seconds",
                "note": "Of runs that have ended; the time of the training is spread evenly over its steps.",
                "legend": list(zip(colors, names)),
                "pictures": _overlays(runs, colors, seconds_per_step, "seconds"),
            },
            {"heading": "Settings that differ", "header": ["setting", *names], "rows": settings},
        ],
    )


def _overlays(runs: list[Run], colors: list[str], scales: list[float | None], x_label: str) -> list[dict[str, str]]:
    """Return pictures of losses and step sizes of the runs, with the steps multiplied by the scale of each run."""
    lines: dict[str, list[Line]] = defaultdict(list)
    for run, color, scale in zip(runs, colors, scales):
        if scale is None:
            continue
        curves = {"training loss": run.points("loss"), **run.losses, "step size taken": run.taken}
        for title, points in curves.items():
            scaled = [(step * scale, value) for step, value in points]
            lines[title] += _loss_lines(scaled, color) if title == "training loss" else [(scaled, {"color": color})]
    step_sizes = lines.pop("step size taken", [])
    pictures = [picture for title in lines for picture in _draw(title, lines[title], x_label)]
    return pictures + _draw("step size taken", step_sizes, x_label, log=True)


def _loss_lines(points: Points, color: str, label: str | None = None) -> list[Line]:
    """Return the losses as logged, faint, and the mean of the 5 around each."""
    values = [value for _, value in points]
    means = [(step, statistics.mean(values[max(0, i - 2) : i + 3])) for i, (step, _) in enumerate(points)]
    return [(points, {"color": color, "alpha": 0.3}), (means, {"color": color, "label": label})]


def _draw(title: str, lines: list[Line], x_label: str = "optimizer step", log: bool = False) -> list[dict[str, str]]:
    """Return a picture of the lines that have points, in a list that is empty if none has."""
    lines = [(points, style) for points, style in lines if points]
    if not lines:
        return []
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for points, style in lines:
        style = style | {"label": as_text(style["label"])} if style.get("label") else style
        axes.plot(*zip(*points), marker="." if len(points) < 50 else "", **style)
    if log and any(value > 0 for points, _ in lines for _, value in points):
        axes.set_yscale("log", nonpositive="mask")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, dpi=200, metadata={"Software": None})
    return [_picture(title, file.getvalue())]


def _picture(title: str, png: bytes) -> dict[str, str]:
    return {"title": title, "source": f"data:image/png;base64,{base64.b64encode(png).decode()}"}


def _render(**content: Any) -> str:
    loader = jinja2.FileSystemLoader(os.path.dirname(__file__))
    return jinja2.Environment(loader=loader, autoescape=True).get_template("report.html").render(content)
