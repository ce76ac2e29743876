"""What batch size and wrong labels do to the step size that `alsals` finds, and to the loss, beside AdamW.

A perceptron learns scikit-learn's digits; a share of the training labels is replaced by wrong ones, and the validation
labels stay as they are.

    python recipes/studies/batch_noise.py
"""

import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from study import HERE, LEARNING_RATES, digits, evaluate, mean_and_error, network, train, write
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import HfArgumentParser

BATCH_SIZES = (8, 16, 32, 64, 128)
SHARES = (0.0, 0.1, 0.2, 0.4)


@dataclass
class BatchNoiseArguments:
    """How long to train, and how often."""

    output_dir: str = field(default=HERE, metadata={"help": "The folder for batch_noise.json and batch_noise.png."})
    steps: int = field(default=500, metadata={"help": "Optimizer steps of each run, whatever the batch size."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "The seeds of each run."})


def replace_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """Return labels of which a share is replaced, each by one of the nine others."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    replaced = labels.clone()
    replaced[chosen] = (labels[chosen] + torch.randint(1, 10, (len(chosen),), generator=generator)) % 10
    return replaced


def run(batch_size: int, share: float, learning_rate: float | None, seed: int, steps: int) -> dict[str, Any]:
    """Train once, by AdamW if there is a learning rate, else by `alsals`."""
    x, y, x_validation, y_validation = digits()
    labels = replace_labels(y, share, seed)
    model = network(seed)
    name = "alsals" if learning_rate is None else "adamw"
    records = train(
        model,
        name,
        learning_rate,
        lambda batch: cross_entropy(model(x[batch]), labels[batch]),
        rows=len(x),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
    )
    loss, accuracy = evaluate(model, x_validation, y_validation)
    setting = {"batch_size": batch_size, "share": share, "learning_rate": learning_rate, "seed": seed}
    result = {"training_loss": evaluate(model, x, labels)[0], "validation_loss": loss, "accuracy": accuracy}
    if name == "alsals":
        # Of the second quarter: it has found its step size by then, and the schedule does not anneal yet.
        sizes = [record["step_size"] for record in records[steps // 4 : steps // 2]]
        result["step_size"] = statistics.median(sizes)
        result["probes"] = statistics.mean(record["probes"] for record in records)
    return setting | result


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each batch size, share of wrong labels and learning rate: means over seeds."""
    groups = defaultdict(list)
    for one in runs:
        groups[one["batch_size"], one["share"], one["learning_rate"]].append(one)
    rows = []
    for (batch_size, share, learning_rate), group in groups.items():
        row = {"batch_size": batch_size, "share": share, "learning_rate": learning_rate, "seeds": len(group)}
        for name in group[0].keys() - {"batch_size", "share", "learning_rate", "seed"}:
            row[name], row[f"{name}_error"] = mean_and_error([one[name] for one in group])
        rows.append(row)
    return rows


def best_adamw(rows: list[dict[str, Any]], batch_size: int, share: float) -> dict[str, Any]:
    """Return the row of AdamW's best learning rate."""
    mine = [row for row in rows if (row["batch_size"], row["share"]) == (batch_size, share)]
    return min((row for row in mine if row["learning_rate"]), key=lambda row: row["validation_loss"])


def alsals(rows: list[dict[str, Any]], batch_size: int, share: float) -> dict[str, Any]:
    """Return the row of `alsals`."""
    mine = [row for row in rows if (row["batch_size"], row["share"]) == (batch_size, share)]
    return next(row for row in mine if row["learning_rate"] is None)


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table: a line for each batch size and share of wrong labels."""
    rates = " | ".join(f"AdamW {rate:g}, loss" for rate in LEARNING_RATES)
    lines = [
        f"| wrong labels | batch size | `alsals` step size | `alsals` loss | {rates} | accuracy, and of best AdamW |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for share in SHARES:
        for batch_size in BATCH_SIZES:
            ours, best = alsals(report["rows"], batch_size, share), best_adamw(report["rows"], batch_size, share)
            mine = [row for row in report["rows"] if (row["batch_size"], row["share"]) == (batch_size, share)]
            losses = {row["learning_rate"]: f"{row['validation_loss']:.3f}" for row in mine}
            losses[best["learning_rate"]] = f"**{losses[best['learning_rate']]}**"
            cells = [f"{share:.0%}", str(batch_size), f"{ours['step_size']:.2g}"]
            cells += [f"{ours['validation_loss']:.3f} ± {ours['validation_loss_error']:.3f}"]
            cells += [losses[rate] for rate in LEARNING_RATES]
            cells += [f"{ours['accuracy']:.3f}, {best['accuracy']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: str) -> None:
    """Draw step size and validation loss against batch size, a colour for each share of wrong labels."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    sizes, losses = figure.subplots(1, 2)
    rows = report["rows"]
    for i, share in enumerate(SHARES):
        ours = [alsals(rows, batch_size, share) for batch_size in BATCH_SIZES]
        best = [best_adamw(rows, batch_size, share) for batch_size in BATCH_SIZES]
        label, style = f"{share:.0%} wrong labels", {"color": f"C{i}"}
        sizes.plot(BATCH_SIZES, [row["step_size"] for row in ours], "o-", **style)
        shifted = [batch_size * 1.04**i for batch_size in BATCH_SIZES]  # the learning rates lie on a grid of three
        sizes.plot(shifted, [row["learning_rate"] for row in best], "x", ms=8, **style)
        for mine, mark, name in ((ours, "o-", "alsals"), (best, "x--", "best AdamW")):
            means, bars = ([row[key] for row in mine] for key in ("validation_loss", "validation_loss_error"))
            losses.errorbar(BATCH_SIZES, means, bars, fmt=mark, label=f"{name}, {label}", **style)
    sizes.set_title("step size of alsals, and best of AdamW's learning rates")
    losses.set_title("validation loss, right labels")
    for axes, ticks in ((sizes, LEARNING_RATES), (losses, (0.1, 0.2, 0.4, 0.8))):
        axes.set(xscale="log", yscale="log", xlabel="batch size")
        axes.set_xticks(BATCH_SIZES, [str(batch_size) for batch_size in BATCH_SIZES])
        axes.minorticks_off()
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside right")
    figure.savefig(path, dpi=90)


def main() -> None:
    (args,) = HfArgumentParser(BatchNoiseArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
    runs = []
    for share in SHARES:
        for batch_size in BATCH_SIZES:
            for learning_rate in (None, *LEARNING_RATES):
                runs += [run(batch_size, share, learning_rate, seed, args.steps) for seed in args.seeds]
    report = write("batch_noise", args.output_dir, {"steps": args.steps, "rows": summarize(runs), "runs": runs})
    draw(report, os.path.join(args.output_dir, "batch_noise.png"))
    print(table(report))


if __name__ == "__main__":
    main()
