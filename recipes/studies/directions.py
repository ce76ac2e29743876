"""Whether step sizes are found along the directions of LAMB, Adafactor and Lion too.

A byte GPT-2 learns the language reference that every Python carries, by ALSALS along the direction of each optimizer
and by the optimizer itself at each learning rate of a grid. Needs the package pytorch_optimizer.

    python recipes/studies/directions.py
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_optimizer import Lamb, Lion
from study import HERE, mean_and_error, write
from torch import Tensor
from transformers import Adafactor, GPT2Config, GPT2LMHeadModel, HfArgumentParser, get_scheduler

from hf_alsals import ALSALS
from hf_alsals.optimizer_direction import set_hidden_matrices

# The directions of ALSALS, and the optimizer and the grid of each.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "adam": (torch.optim.Adam, (1e-3, 3e-3, 1e-2, 3e-2)),
    "lamb": (partial(Lamb, weight_decay=0.0), (3e-3, 1e-2, 3e-2, 1e-1)),
    # As the Trainer's --optim adafactor.
    "adafactor": (partial(Adafactor, scale_parameter=False, relative_step=False), (1e-3, 3e-3, 1e-2, 3e-2)),
    "lion": (partial(Lion, weight_decay=0.0), (1e-4, 3e-4, 1e-3, 3e-3)),
}
BLOCK, BATCH_SIZE = 64, 16


@dataclass
class DirectionsArguments:
    """How long to train, and how often."""

    output_dir: str = field(default=HERE, metadata={"help": "The folder for directions.json and directions.png."})
    steps: int = field(default=600, metadata={"help": "Optimizer steps of each run."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "The seeds of each run."})


def text() -> tuple[Tensor, Tensor]:
    """Return the bytes of the language reference, in blocks: nine tenths to train on, and the rest to validate on."""
    data = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    blocks = data[: len(data) // BLOCK * BLOCK].view(-1, BLOCK)
    return blocks[: len(blocks) * 9 // 10], blocks[len(blocks) * 9 // 10 :][:256]


def run(name: str, learning_rate: float | None, seed: int, steps: int) -> dict[str, Any]:
    """Train once, with step sizes found and a decay over the last half, or at a rate with 10 % warm-up and cosine."""
    make, _ = OPTIMIZERS[name]
    train_blocks, validation_blocks = text()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_positions=BLOCK, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    if learning_rate is None:
        optimizer = alsals = ALSALS(model.parameters(), direction=name)
        set_hidden_matrices(alsals, model)
        shape = {"num_decay_steps": steps // 2, "decay_type": "linear"}
        scheduler = get_scheduler("warmup_stable_decay", optimizer, 0, steps, scheduler_specific_kwargs=shape)
    else:
        optimizer = make(model.parameters(), lr=learning_rate)
        scheduler = get_scheduler("cosine", optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(seed)
    losses, step_sizes = [], []
    for _ in range(steps):
        batch = train_blocks[torch.randint(len(train_blocks), (BATCH_SIZE,), generator=generator)]

        def closure(batch: Tensor = batch) -> Tensor:
            return model(input_ids=batch, labels=batch).loss

        loss = closure()
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if learning_rate is None:
            alsals.step(closure, loss)
            step_sizes.append(alsals.step_size)
        else:
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        validation_loss = model(input_ids=validation_blocks, labels=validation_blocks).loss.item()
    result = {"optimizer": name, "learning_rate": learning_rate, "seed": seed, "validation_loss": validation_loss}
    result["losses"] = [round(statistics.mean(losses[max(0, i - 19) : i + 1]), 4) for i in range(9, steps, 10)]
    if learning_rate is None:
        # Of the second quarter: found by then, and not annealed yet.
        result["step_size"] = statistics.median(step_sizes[steps // 4 : steps // 2])
        result["step_sizes"] = [float(f"{size:.3g}") for size in step_sizes[9::10]]
        result["probes"] = alsals.search.total_probes / steps
    return result


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each optimizer and learning rate: means over seeds."""
    groups = defaultdict(list)
    for one in runs:
        groups[one["optimizer"], one["learning_rate"]].append(one)
    rows = []
    for (name, learning_rate), group in groups.items():
        row = {"optimizer": name, "learning_rate": learning_rate, "seeds": len(group)}
        for key in ("validation_loss", "step_size", "probes"):
            if key in group[0]:
                row[key], row[f"{key}_error"] = mean_and_error([one[key] for one in group])
        rows.append(row)
    return rows


def row_of(rows: list[dict[str, Any]], name: str, searched: bool) -> dict[str, Any]:
    """Return an optimizer's row with the search, or that of its best learning rate."""
    mine = [row for row in rows if row["optimizer"] == name and (row["learning_rate"] is None) == searched]
    return min(mine, key=lambda row: row["validation_loss"])


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table: a line for each optimizer."""
    lines = [
        "| direction of | step size found | loss with the search | best learning rate | loss at it "
        "| probes per step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["optimizer"] for row in report["rows"]):
        ours, best = row_of(report["rows"], name, True), row_of(report["rows"], name, False)
        losses = [f"{row['validation_loss']:.3f} ± {row['validation_loss_error']:.3f}" for row in (ours, best)]
        cells = [name, f"{ours['step_size']:.2g}", losses[0], f"{best['learning_rate']:g}", losses[1]]
        lines.append(f"| {' | '.join(cells)} | {ours['probes']:.2f} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: str) -> None:
    """Draw loss and step size against steps, of the first seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, sizes = figure.subplots(1, 2)
    names = dict.fromkeys(row["optimizer"] for row in report["rows"])
    for i, name in enumerate(names):
        for searched, style in ((True, "-"), (False, "--")):
            rate = row_of(report["rows"], name, searched)["learning_rate"]
            one = next(r for r in report["runs"] if (r["optimizer"], r["learning_rate"]) == (name, rate))
            steps = range(10, report["steps"] + 1, 10)
            label = f"{name}, searched" if searched else f"{name}, {rate:g}"
            losses.plot(steps, one["losses"], style, color=f"C{i}", label=label)
            if searched:
                sizes.plot(steps, one["step_sizes"], style, color=f"C{i}", label=label)
            else:
                sizes.axhline(rate, linestyle=style, color=f"C{i}", label=label)
    losses.set(title="training loss, mean of 20 steps", xlabel="optimizer step")
    sizes.set(title="step size, and best learning rate", xlabel="optimizer step", yscale="log")
    for axes in (losses, sizes):
        axes.grid(alpha=0.3)
    losses.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=90)


def main() -> None:
    (args,) = HfArgumentParser(DirectionsArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
    runs = []
    for name, (_, learning_rates) in OPTIMIZERS.items():
        for learning_rate in (None, *learning_rates):
            runs += [run(name, learning_rate, seed, args.steps) for seed in args.seeds]
    report = write("directions", args.output_dir, {"steps": args.steps, "rows": summarize(runs), "runs": runs})
    draw(report, os.path.join(args.output_dir, "directions.png"))
    print(table(report))


if __name__ == "__main__":
    main()
