"""How well a sample of the elements tells the path slope that `alsals` follows on large models.

GPT-2 and BERT learn bytes of Python's language reference by `alsals`. At every step the path slope of all elements is
compared with those of samples of several sizes.

    python recipes/studies/path_sample.py
"""

import os
import statistics
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from study import HERE, write
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, HfArgumentParser, get_scheduler

from hf_alsals import ALSALS, path_slope
from hf_alsals.adam import AdamDirection
from hf_alsals.path_growth import PathGrowth
from hf_alsals.shards import to_floats

MASK = 0  # a byte that the text does not have
MODELS = {
    "GPT-2, width 128": (GPT2LMHeadModel, GPT2Config(n_embd=128, n_layer=4, n_head=4)),
    "GPT-2, width 384": (GPT2LMHeadModel, GPT2Config(n_embd=384, n_layer=6, n_head=6)),
    "BERT, width 384": (
        BertForMaskedLM,
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536),
    ),
}


@dataclass
class SampleArguments:
    """How long to train, and which samples to compare."""

    output_dir: str = field(default=HERE, metadata={"help": "The folder for path_sample.json and path_sample.png."})
    steps: int = field(default=240, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of 128 bytes in a batch."})
    sizes: list[int] = field(
        default_factory=lambda: [2**20, 2**19, 2**17], metadata={"help": "Elements of the samples."}
    )


def model_of(name: str) -> nn.Module:
    """Return a new model for bytes, without dropout."""
    kind, config = MODELS[name]
    config.update({"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    config.update({key: 0.0 for key in config.to_dict() if key.endswith(("pdrop", "dropout_prob"))})
    torch.manual_seed(1)
    return kind(config)


def batch_of(name: str, text: Tensor, size: int) -> dict[str, Tensor]:
    """Return random pieces of 128 bytes; for BERT 15 % of them are masked."""
    starts = torch.randint(len(text) - 128, (size, 1))
    labels = text[starts + torch.arange(128)]
    if name.startswith("GPT-2"):
        return {"input_ids": labels, "labels": labels}
    is_masked = torch.rand(labels.shape) < 0.15
    return {"input_ids": labels.masked_fill(is_masked, MASK), "labels": labels.masked_fill(~is_masked, -100)}


def slope_of(params: list[Tensor], state: dict[Tensor, dict[str, Any]], size: int | None) -> float:
    """Return the path slope by a sample of a size, or by all elements."""
    whole_size = 0 if size else 2**62
    with patch.multiple(path_slope, WHOLE_SIZE=whole_size, SAMPLE_SIZE=size or path_slope.SAMPLE_SIZE):
        direction = AdamDirection([{"params": params, "betas": (0.9, 0.999), "eps": 1e-8}], state)
        return sum(to_floats(path_slope.path_slopes(direction).path))


def run(name: str, args: SampleArguments) -> dict[str, Any]:
    """Train once and return every step's path slope, by all elements and by each sample."""
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    model = model_of(name)
    optimizer = ALSALS(model.parameters())
    scheduler = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        0,
        args.steps,
        scheduler_specific_kwargs={"num_decay_steps": args.steps // 2, "decay_type": "linear"},
    )
    params = list(model.parameters())
    states = {size: {p: {} for p in params} for size in (None, *args.sizes)}
    slopes: dict[int | None, list[float]] = {size: [] for size in states}
    losses, step_sizes = [], []
    for _ in range(args.steps):
        batch = batch_of(name, text, args.batch_size)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        for size, state in states.items():
            slopes[size].append(slope_of(params, state, size))
        optimizer.step(lambda batch=batch: model(**batch).loss, loss)
        scheduler.step()
        losses.append(loss.item())
        step_sizes.append(optimizer.step_size)
    followed = slopes[None][: args.steps // 2]  # what the schedule leaves to the path slope
    rows = [row_of(size, slopes[size][: len(followed)], followed) for size in args.sizes]
    parameters = sum(p.numel() for p in params)
    result = {"model": name, "parameters": parameters, "rows": rows, "losses": losses, "step_sizes": step_sizes}
    return result | {"slopes": {str(size or "all"): values for size, values in slopes.items()}}


def row_of(size: int, sampled: list[float], whole: list[float]) -> dict[str, float]:
    """Return by how much a sample misses: its bias, its noise, and what that does to the step size.

    Bias and noise are in units of the mean size of a path slope; `drift` is the logarithm of the step size that the
    sample leads to over the one that all elements lead to, where nothing else moves it.
    """
    unit = statistics.mean(abs(value) for value in whole)
    errors = [(one - other) / unit for one, other in zip(sampled, whole, strict=True)]
    growth = PathGrowth()
    states, step_sizes, differences = [growth.init(1.0), growth.init(1.0)], [1.0, 1.0], []
    for pair in zip(sampled, whole, strict=True):
        for i, value in enumerate(pair):
            states[i], step_sizes[i] = growth.follow(states[i], step_sizes[i], value)
        differences.append(states[0].path_slope - states[1].path_slope)
    return {
        "size": size,
        "bias": statistics.mean(errors),
        "noise": statistics.stdev(errors),
        "ratio_error": statistics.mean(abs(one) for one in differences),
        "step_size_ratio": step_sizes[0] / step_sizes[1],
    }


def table(report: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| model | parameters | elements sampled | bias | noise | mean error of r | step size, times |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in report["runs"]:
        for row in one["rows"]:
            lines.append(
                f"| {one['model']} | {one['parameters'] / 1e6:.1f} M | {row['size']} | {row['bias']:+.3f} "
                f"| {row['noise']:.3f} | {row['ratio_error']:.3f} | {row['step_size_ratio']:.2f} |"
            )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: str) -> None:
    """Draw the path slopes of all elements and of the samples against steps."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(report["runs"]), squeeze=False)[0]
    for one, place in zip(report["runs"], axes):
        for size, values in reversed(one["slopes"].items()):
            style = {"color": "black", "linewidth": 1.5} if size == "all" else {"alpha": 0.7, "linewidth": 1}
            place.plot(range(1, len(values) + 1), values, label=size, **style)
        place.set(title=one["model"], xlabel="optimizer step", ylabel="path slope")
        place.grid(alpha=0.3)
    axes[0].legend(title="elements", frameon=False)
    figure.savefig(path, dpi=90)


def main() -> None:
    (args,) = HfArgumentParser(SampleArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
    report = write("path_sample", args.output_dir, {"steps": args.steps, "runs": [run(name, args) for name in MODELS]})
    draw(report, os.path.join(args.output_dir, "path_sample.png"))
    print(table(report))


if __name__ == "__main__":
    main()
