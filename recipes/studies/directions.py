"""Whether the line search finds a step size along the directions of LAMB and Adafactor too.

A byte GPT-2 learns the language reference that every Python carries. Each optimizer takes its own steps, once with the
search of `alsals` for their size and once at the best learning rate of a grid. Needs the package pytorch_optimizer.

    python recipes/studies/directions.py
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_optimizer import Lamb
from study import HERE, mean_and_error, write
from torch import Tensor
from transformers import Adafactor, GPT2Config, GPT2LMHeadModel, HfArgumentParser, get_scheduler

from hf_alsals import LINE_SEARCHES
from hf_alsals.direction import Direction
from hf_alsals.line import Line
from hf_alsals.shards import to_floats

# Optimizers whose step is proportional to their learning rate, and the grid of each.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "Adam": (torch.optim.Adam, (1e-3, 3e-3, 1e-2, 3e-2)),
    "LAMB": (Lamb, (3e-3, 1e-2, 3e-2, 1e-1)),
    # As the Trainer's --optim adafactor.
    "Adafactor": (
        lambda params, lr: Adafactor(params, lr=lr, scale_parameter=False, relative_step=False),
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
}
BLOCK, BATCH_SIZE = 64, 16


@dataclass
class DirectionsArguments:
    """How long to train, and how often."""

    output_dir: str = field(default=HERE, metadata={"help": "The folder for directions.json and directions.png."})
    steps: int = field(default=600, metadata={"help": "Optimizer steps of each run."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "The seeds of each run."})


class OptimizerDirection(Direction):
    """The step of an optimizer that is proportional to its learning rate, as a direction: its step at rate 1.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, at learning rate 1 and without weight decay.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.state)
        self.optimizer = optimizer

    def update(self) -> None:
        """Take the step, note it, and take it back."""
        self.starts = [p.clone() for p in self.params]
        self.grads = [p.grad.clone() for p in self.params]
        self.optimizer.step()
        self.steps = [start - p for start, p in zip(self.starts, self.params, strict=True)]
        self.restore()

    @property
    def is_saved(self) -> bool:
        """Whether the parameters are noted, as they are from `update` on."""
        return True

    @property
    def is_updated(self) -> bool:
        """Whether the step is there to move along, as it is from `update` on."""
        return self.is_saved

    def slope(self, momentum: bool = True) -> list[Tensor]:
        """Return the parts of `<g, d>`, one for each parameter."""
        return self.slope_along(self.steps)

    def slope_along(self, displacement: list[Tensor]) -> list[Tensor]:
        """Return the parts of `<g, displacement>`, one for each parameter."""
        return [torch.sum(g * d) for g, d in zip(self.grads, displacement, strict=True)]

    def restore(self) -> None:
        """Put the parameters back to where they were before the step."""
        for p, start in zip(self.params, self.starts, strict=True):
            p.copy_(start)

    def move(self, step_size: float) -> None:
        """Move the parameters by `step_size` times the step."""
        for p, start, d in zip(self.params, self.starts, self.steps, strict=True):
            p.copy_(start - step_size * d)


class SearchedStep:
    """The step of any optimizer that is proportional to its learning rate, its size found by the search of `alsals`.

    Args:
        params (iterable): The parameters, all with a gradient.
        make (`Callable`): Returns the optimizer for parameters and a learning rate; without weight decay.
    """

    def __init__(self, params: Iterable[Tensor], make: Callable[..., torch.optim.Optimizer]) -> None:
        self.params = list(params)
        self.optimizer = make(self.params, lr=1.0)
        self.line_search = LINE_SEARCHES["path"]
        self.search = self.line_search.init()
        self.initial = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], loss: float, schedule: float) -> None:
        """Take a step; `schedule` multiplies the step size that is found."""
        direction = OptimizerDirection(self.optimizer)
        direction.update()
        path = direction.slope_along([w0 - w for w0, w in zip(self.initial, direction.starts, strict=True)])
        with Line(direction, closure, loss) as line:
            self.search = self.line_search.step(self.search, line, sum(to_floats(path)), schedule)
            direction.move(schedule * self.search.taken)


def text() -> tuple[Tensor, Tensor]:
    """Return the bytes of the language reference, in blocks: nine tenths to train on, and the rest to validate on."""
    data = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    blocks = data[: len(data) // BLOCK * BLOCK].view(-1, BLOCK)
    return blocks[: len(blocks) * 9 // 10], blocks[len(blocks) * 9 // 10 :][:256]


def run(name: str, learning_rate: float | None, seed: int, steps: int) -> dict[str, Any]:
    """Train once, at a learning rate with 10 % warm-up and cosine, or with the search and a linear schedule."""
    make, _ = OPTIMIZERS[name]
    train_blocks, validation_blocks = text()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_positions=BLOCK, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    if learning_rate is None:
        searched = SearchedStep(model.parameters(), make)
    else:
        optimizer = make(model.parameters(), lr=learning_rate)
        scheduler = get_scheduler("cosine", optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(seed)
    losses, step_sizes = [], []
    for step in range(steps):
        batch = train_blocks[torch.randint(len(train_blocks), (BATCH_SIZE,), generator=generator)]

        def closure(batch: Tensor = batch) -> Tensor:
            return model(input_ids=batch, labels=batch).loss

        loss = closure()
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if learning_rate is None:
            searched.step(closure, loss.item(), 1 - step / steps)
            step_sizes.append(searched.search.step_size)
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
        result["probes"] = searched.search.total_probes / steps
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
