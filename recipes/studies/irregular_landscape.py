"""What a rough loss does to the line search, and to the clean loss that training ends at.

To the loss of a perceptron on scikit-learn's digits is added `amplitude * mean(1 - cos(frequency * w))`, the mean
over all parameters `w`: waves of length `2 pi / frequency` in every weight, with a valley at 0. Training sees the sum,
and the results are those of the loss without it.

    python recipes/studies/irregular_landscape.py
"""

import math
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import torch
from matplotlib.figure import Figure
from study import HERE, LEARNING_RATES, digits, evaluate, mean_and_error, network, train, write
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from transformers import HfArgumentParser

AMPLITUDES = (0.01, 0.1, 1.0)
FREQUENCIES = (30, 300, 3000)
LANDSCAPES = ((0.0, 0), *product(AMPLITUDES, FREQUENCIES))
SEARCHES = ("alsals", "alsals_paper")
BATCH_SIZE = 64


@dataclass
class IrregularLandscapeArguments:
    """How long to train, and how often."""

    output_dir: str = field(default=HERE, metadata={"help": "The folder for the json file and the picture."})
    steps: int = field(default=500, metadata={"help": "Optimizer steps of each run."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "The seeds of each run."})


def roughness(model: torch.nn.Module, amplitude: float, frequency: float) -> Tensor:
    """Return the rough term of the loss."""
    return amplitude * (1 - torch.cos(frequency * parameters_to_vector(model.parameters()))).mean()


def search_numbers(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return what the searches of a run did."""
    sizes = [record["step_size"] for record in records if record["searched"]]
    jumps = [abs(math.log(later / earlier)) for earlier, later in pairwise(sizes[1:])]  # the first looks up and down
    ratios = [record["ratio"] for record in records if record["searched"]][1:]
    probes = sum(record["probes"] for record in records)
    path_slopes = [record["path_slope"] for record in records[: len(records) // 2] if "path_slope" in record]
    return {
        "first_step_size": sizes[0],
        **({"path_slope": statistics.mean(path_slopes)} if path_slopes else {}),
        "probes": probes / len(records),
        "probes_a_search": probes / sum(record["searched"] for record in records),
        "ratio": statistics.median([ratio for ratio in ratios if not math.isnan(ratio)] or [math.nan]),
        # Of the second quarter: found by then, and not annealed yet.
        "step_size": statistics.median(
            record["step_size"] for record in records[len(records) // 4 : len(records) // 2]
        ),
        "jump": statistics.mean(jumps) if jumps else 0.0,
    }


def run(
    amplitude: float, frequency: float, optimizer: str, learning_rate: float | None, seed: int, steps: int
) -> dict[str, Any]:
    """Train once."""
    x, y, x_validation, y_validation = digits()
    model = network(seed)
    records = train(
        model,
        optimizer,
        learning_rate,
        lambda batch: cross_entropy(model(x[batch]), y[batch]) + roughness(model, amplitude, frequency),
        rows=len(x),
        batch_size=BATCH_SIZE,
        steps=steps,
        seed=seed,
    )
    loss, accuracy = evaluate(model, x_validation, y_validation)
    setting = {"amplitude": amplitude, "frequency": frequency, "optimizer": optimizer, "learning_rate": learning_rate}
    result = {"training_loss": evaluate(model, x, y)[0], "validation_loss": loss, "accuracy": accuracy}
    with torch.no_grad():
        result["roughness"] = roughness(model, amplitude, frequency).item()
    return setting | {"seed": seed} | result | (search_numbers(records) if optimizer in SEARCHES else {})


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each landscape, optimizer and learning rate: means over seeds."""
    setting = ("amplitude", "frequency", "optimizer", "learning_rate")
    groups = defaultdict(list)
    for one in runs:
        groups[tuple(one[name] for name in setting)].append(one)
    rows = []
    for values, group in groups.items():
        row = dict(zip(setting, values, strict=True)) | {"seeds": len(group)}
        for name in group[0].keys() - {*setting, "seed"}:
            row[name], row[f"{name}_error"] = mean_and_error([one[name] for one in group])
        rows.append(row)
    return rows


def best(rows: list[dict[str, Any]], amplitude: float, frequency: float, optimizer: str) -> dict[str, Any]:
    """Return an optimizer's row on a landscape, that of the best learning rate if there are several."""
    landscape = (amplitude, frequency, optimizer)
    mine = [row for row in rows if (row["amplitude"], row["frequency"], row["optimizer"]) == landscape]
    return min(mine, key=lambda row: row["validation_loss"])


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table: a line for each landscape and optimizer."""
    lines = [
        "| amplitude | frequency | optimizer | probes per step | probes a search | Armijo ratio | step size | jump |"
        " clean validation loss | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for amplitude, frequency in LANDSCAPES:
        for optimizer in (*SEARCHES, "adamw"):
            row = best(report["rows"], amplitude, frequency, optimizer)
            cells = [f"{amplitude:g}", str(frequency) if amplitude else "", optimizer]
            if optimizer in SEARCHES:
                cells += [f"{row['probes']:.2f}", f"{row['probes_a_search']:.2f}", f"{row['ratio']:.2f}"]
                cells += [f"{row['step_size']:.2g}", f"{row['jump']:.1%}"]
            else:
                cells += ["", "", "", f"{row['learning_rate']:g}", ""]
            cells += [f"{row['validation_loss']:.3f} ± {row['validation_loss_error']:.3f}", f"{row['accuracy']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: str) -> None:
    """Draw each number against the amplitude, a colour for each frequency, a mark for each optimizer."""
    titles = {
        "probes_a_search": "probes a search",
        "ratio": "Armijo ratio, median",
        "step_size": "step size",
        "jump": "jump from search to search",
        "validation_loss": "clean validation loss",
    }
    figure = Figure(figsize=(12, 7), layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    marks = {"alsals": "o-", "alsals_paper": "s--", "adamw": "x:"}
    places = [0, *(i + 1 for i in range(len(AMPLITUDES)))]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for color, frequency in enumerate(FREQUENCIES):
            for optimizer, mark in marks.items():
                landscapes = [(0.0, 0), *((amplitude, frequency) for amplitude in AMPLITUDES)]
                rows = [best(report["rows"], *landscape, optimizer) for landscape in landscapes]
                if name in rows[0]:
                    label = f"{'best AdamW' if optimizer == 'adamw' else optimizer}, frequency {frequency}"
                    axes.plot(places, [row[name] for row in rows], mark, color=f"C{color}", ms=4, label=label)
        axes.set_xticks(places, ["0", *(f"{amplitude:g}" for amplitude in AMPLITUDES)])
        axes.set(xlabel="amplitude", title=title)
        if name in ("step_size", "jump", "validation_loss"):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    last.axis("off")
    last.legend(*axes.get_legend_handles_labels(), frameon=False, loc="center")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = HfArgumentParser(IrregularLandscapeArguments, description=__doc__.splitlines()[0])
    (args,) = parser.parse_args_into_dataclasses()
    runs = []
    for amplitude, frequency in LANDSCAPES:
        for optimizer, rates in (*((name, (None,)) for name in SEARCHES), ("adamw", LEARNING_RATES)):
            for rate, seed in product(rates, args.seeds):
                runs.append(run(amplitude, frequency, optimizer, rate, seed, args.steps))
    numbers = {"steps": args.steps, "rows": summarize(runs), "runs": runs}
    report = write("irregular_landscape", args.output_dir, numbers)
    draw(report, os.path.join(args.output_dir, "irregular_landscape.png"))
    print(table(report))


if __name__ == "__main__":
    main()
