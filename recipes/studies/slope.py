"""How well each estimate of the slope tracks the true slope of the batch's loss along Adam's direction.

A small GPT-2 is trained by `alsals` on the language reference that every Python carries. Every few steps the slope is
estimated in four precisions, at the very weights, on the very batch and along the very direction of that step.

    python recipes/studies/slope.py
"""

import os
import statistics
from dataclasses import dataclass, field
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from study import HERE, write
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, get_scheduler

from hf_alsals import ALSALS

# Of the weights.
PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16 autocast": torch.float32,
    "bfloat16 weights": torch.bfloat16,
}
PUBLISHED_H = 5e-9
# 3.5e-4 and 0.088 are what slope=finite_difference takes for float32 and bfloat16: the root of machine epsilon.
H = (1e-9, PUBLISHED_H, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 3.5e-4, 1e-3, 3e-3, 1e-2, 0.088)
BETA3 = 0.99  # of the published average of slopes
BATCH_SIZE, LENGTH = 8, 128


@dataclass
class SlopeArguments:
    """How long to train, and how often to measure."""

    output_dir: str = field(default=HERE, metadata={"help": "The folder for slope.json and slope.png."})
    steps: int = field(default=400, metadata={"help": "Optimizer steps."})
    every: int = field(default=8, metadata={"help": "Steps from one measurement to the next."})
    seed: int = field(default=1, metadata={"help": "The seed of weights and batches."})


def gpt2() -> GPT2LMHeadModel:
    """Return the small GPT-2 of run_clm.py for bytes, with the attention that has a forward-mode derivative."""
    size = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": LENGTH, "vocab_size": 256}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**size, **dropout, **tokens, attn_implementation="eager"))


def loss_of(model: GPT2LMHeadModel, batch: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Return the loss of predicting each next byte, from other weights if there are any."""
    logits = functional_call(model, weights or {}, (batch,), {"use_cache": False}).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # as transformers' own loss does
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def adam_direction(optimizer: ALSALS) -> tuple[Tensor, Tensor]:
    """Return Adam's direction of the last step, and its denominator, from the optimizer's moments."""
    group = optimizer.param_groups[0]
    directions, denominators = [], []
    for state in optimizer.state.values():
        correction1, correction2 = (1 - beta ** state["step"].item() for beta in group["betas"])
        denominator = (state["exp_avg_sq"] / correction2).sqrt() + group["eps"]
        directions.append((state["exp_avg"] / correction1 / denominator).flatten())
        denominators.append(denominator.flatten())
    return torch.cat(directions), torch.cat(denominators)


def true_slope(model: GPT2LMHeadModel, batch: Tensor, direction: Tensor) -> float:
    """Return the derivative of a float64 model's loss along a direction, by forward-mode differentiation."""
    names, sizes, shapes = zip(*((name, p.numel(), p.shape) for name, p in model.named_parameters()), strict=True)

    def named(vector: Tensor) -> dict[str, Tensor]:
        return {name: v.view(shape) for name, v, shape in zip(names, vector.split(sizes), shapes, strict=True)}

    weights = parameters_to_vector(model.parameters()).detach()
    _, slope = jvp(lambda weights: loss_of(model, batch, weights), (named(weights),), (named(direction.double()),))
    return slope.item()


def estimate(
    model: GPT2LMHeadModel, autocast: bool, weights: Tensor, batch: Tensor, direction: Tensor, denominator: Tensor
) -> dict[str, Any]:
    """Return each estimate of the slope, from a model in some precision, whose weights it replaces."""
    at = weights.to(model.dtype)
    # Without its cache: that would keep the bfloat16 copies of the first weights.
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        vector_to_parameters(at, model.parameters())
        loss = loss_of(model, batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        gradient = torch.cat([gradient.flatten() for gradient in gradients]).to(
            torch.promote_types(model.dtype, torch.float32)  # as the optimizer does
        )
        finite_difference = {}
        for h in H:
            vector_to_parameters((at.to(gradient.dtype) - h * direction).to(model.dtype), model.parameters())
            with torch.no_grad():
                finite_difference[f"{h:g}"] = (loss.item() - loss_of(model, batch).item()) / h
    direction, denominator = direction.to(gradient.dtype), denominator.to(gradient.dtype)
    return {
        "exact": (gradient @ direction).item(),
        "preconditioned": (gradient @ (gradient / denominator)).item(),
        "finite_difference": finite_difference,
    }


def measure(models: dict[str, GPT2LMHeadModel], *at: Tensor) -> dict[str, Any]:
    """Return, for each precision, the estimates and the true slope at the weights as that precision rounds them.

    Args:
        models (`dict[str, GPT2LMHeadModel]`): A model in each precision, whose weights are replaced.
        at (`Tensor`): Weights, batch, Adam's direction and its denominator.
    """
    weights, batch, direction, _ = at
    measured = {}
    for precision, model in models.items():
        measured[precision] = estimate(model, precision.endswith("autocast"), *at)
    for precision, dtype in PRECISIONS.items():
        vector_to_parameters(weights.to(dtype).double(), models["float64"].parameters())
        measured[precision]["true"] = true_slope(models["float64"], batch, direction)
    return measured


def train(args: SlopeArguments) -> list[dict[str, Any]]:
    """Train the GPT-2 by `alsals`, and return what was measured on the way."""
    text = torch.frombuffer(bytearray("\n".join(topics[name] for name in sorted(topics)), "utf-8"), dtype=torch.uint8)
    torch.manual_seed(args.seed)
    model = gpt2()
    models = {precision: gpt2().to(dtype) for precision, dtype in PRECISIONS.items()}
    optimizer = ALSALS(model.parameters())
    scheduler = get_scheduler("cosine", optimizer, 0, args.steps)
    smoothed, points = 0.0, []
    for step in range(args.steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH_SIZE,)).tolist()
        batch = torch.stack([text[start : start + LENGTH] for start in starts]).long()
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        weights = parameters_to_vector(model.parameters()).detach()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step(partial(loss_of, model, batch), loss)
        direction, denominator = adam_direction(optimizer)
        smoothed = BETA3 * smoothed + (1 - BETA3) * (gradient @ direction).item()
        if step % args.every == 0:
            point = {"step": step, "loss": loss.item(), "step_size": optimizer.step_size, "smoothed": smoothed}
            point["searched_slope"] = optimizer.slope if optimizer.searched else None
            points.append(point | measure(models, weights, batch, direction, denominator))
        scheduler.step()
    return points


def summarize(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each estimate and precision: how far it is from the true slope."""

    def row(name: str, precision: str, estimates: list[float]) -> dict[str, Any]:
        true = [point[precision]["true"] for point in points]
        errors = [(one - truth) / abs(truth) for one, truth in zip(estimates, true, strict=True)]
        quarter, _, three_quarters = statistics.quantiles(errors, n=4)
        varies = len(set(estimates)) > 1  # else it has no correlation
        return {
            "estimate": name,
            "precision": precision,
            "correlation": float(np.corrcoef(estimates, true)[0, 1]) if varies else None,
            "rank_correlation": float(spearmanr(estimates, true).statistic) if varies else None,
            "bias": statistics.median(errors),
            "spread": three_quarters - quarter,
            "error": statistics.median(abs(error) for error in errors),
            "wrong_sign": statistics.mean(one * truth <= 0 for one, truth in zip(estimates, true, strict=True)),
        }

    rows = []
    for precision in PRECISIONS:
        for name in ("exact", "preconditioned"):
            rows.append(row(name, precision, [point[precision][name] for point in points]))
        for h in points[0][precision]["finite_difference"]:
            estimates = [point[precision]["finite_difference"][h] for point in points]
            rows.append(row(h, precision, estimates))
    return [*rows, row("smoothed", "float32", [point["smoothed"] for point in points])]


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table of the estimates in float32, and one of the errors in every precision."""
    rows = {(row["estimate"], row["precision"]): row for row in report["rows"]}
    names = {"exact": "exact", "preconditioned": "preconditioned"}
    names |= {f"{h:g}": f"finite difference, h = {h:g}" for h in H}
    lines = [
        "| estimate, in float32 | correlation | of ranks | bias | spread | zero or wrong sign |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in (names | {"smoothed": f"smoothed slope, beta3 = {BETA3}"}).items():
        row = rows[name, "float32"]
        correlations = [row["correlation"], row["rank_correlation"]]
        cells = [title, *("" if one is None else f"{one:.3f}" for one in correlations)]
        cells += [f"{round(row['bias'], 4) + 0.0:+.2%}", f"{row['spread']:.2%}", f"{row['wrong_sign']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| median error | {' | '.join(PRECISIONS)} |", "| --- | --- | --- | --- | --- |"]
    for name, title in names.items():
        errors = [f"{rows[name, precision]['error']:.2g}" for precision in PRECISIONS]
        lines.append(f"| {title} | {' | '.join(errors)} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: str) -> None:
    """Draw the slopes along training, and the error of the finite difference against its h."""
    points = report["points"]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    along, errors = figure.subplots(1, 2)
    steps = [point["step"] for point in points]
    curves = {
        "true slope": ([point["float32"]["true"] for point in points], {"color": "black", "lw": 4}),
        "exact": ([point["float32"]["exact"] for point in points], {"color": "gold"}),
        "preconditioned": ([point["float32"]["preconditioned"] for point in points], {"color": "tab:purple"}),
        f"smoothed, beta3 = {BETA3}": ([point["smoothed"] for point in points], {"color": "tab:brown"}),
        f"finite difference, h = {PUBLISHED_H:g}": (
            [point["float32"]["finite_difference"][f"{PUBLISHED_H:g}"] for point in points],
            {"color": "tab:cyan", "marker": ".", "ls": ""},
        ),
    }
    for label, (slopes, style) in curves.items():
        along.plot(steps, slopes, label=label, **style)
    along.set_yscale("symlog", linthresh=10)
    along.set_ylim(-100, 1e5)  # room for the legend
    along.set(xlabel="optimizer step", ylabel="slope", title="the slope and its estimates in float32")
    along.legend(frameon=False, fontsize="small", loc="upper right")
    for precision in PRECISIONS:
        rows = {row["estimate"]: row["error"] for row in report["rows"] if row["precision"] == precision}
        (line,) = errors.plot(H, [rows[f"{h:g}"] for h in H], ".-", label=precision)
        errors.axhline(rows["exact"], color=line.get_color(), ls=":", lw=1)
    errors.axvline(PUBLISHED_H, color="0.6", lw=1)
    errors.text(PUBLISHED_H, 1e-11, " of the published code", color="0.4", fontsize="small")
    errors.set(xscale="log", yscale="log", xlabel="h", title="median error of (f(w) - f(w - h d)) / h; dotted: exact")
    errors.legend(frameon=False, fontsize="small")
    for axes in (along, errors):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    (args,) = HfArgumentParser(SlopeArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
    points = train(args)
    report = write("slope", args.output_dir, {"rows": summarize(points), "points": points})
    draw(report, os.path.join(args.output_dir, "slope.png"))
    print(table(report))


if __name__ == "__main__":
    main()
