"""The cost of an optimizer step alone: time and bytes a parameter, for `overhead.py --mode optimizer`.

The parameters are those of a GPT-2, the gradients random, and the loss of a probe costs nothing. On a CPU it is the
time of the process that counts, which other processes disturb less.
"""

import dataclasses
import itertools
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_alsals import ALSALS

BASELINE = "adamw, fused"
NEVER = 10**6

# Each makes an optimizer of its parameters.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    BASELINE: lambda params: torch.optim.AdamW(params, fused=True),
    "adamw, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "adamw, for-loop": lambda params: torch.optim.AdamW(params, foreach=False),
    "alsals, without a search": lambda params: alsals(params, NEVER),
    "alsals, without a search, norm known": lambda params: alsals(params, NEVER),
    "alsals, a search of one probe": lambda params: alsals(params, 1),
    "schedule-free": lambda params: package("schedulefree", "AdamWScheduleFree", params, lr=1e-3),
    "prodigy": lambda params: package("prodigyopt", "Prodigy", params),
}


def alsals(params: list[nn.Parameter], search_interval: int) -> ALSALS:
    """Return ALSALS after its first search."""
    optimizer = ALSALS(params, search_interval=search_interval)
    interval = dataclasses.replace(optimizer.search.interval, steps_left=search_interval - 1)
    optimizer.search = dataclasses.replace(
        optimizer.search, is_initialized=True, step_size=1e-3, taken=1e-3, interval=interval
    )
    return optimizer


def package(module: str, name: str, params: list[nn.Parameter], **options: Any) -> Any:
    """Return an optimizer of another package, in training mode if it has modes."""
    optimizer = getattr(__import__(module), name)(params, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def parameters(config: GPT2Config) -> list[nn.Parameter]:
    """Return parameters of the shapes of a GPT-2."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        shapes = [p.shape for p in GPT2LMHeadModel(config).parameters()]
    return [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]


def peak_bytes() -> float:
    """Return the most memory that was in use so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(name: str, config: GPT2Config, warmup: int, steps: int) -> dict[str, Any]:
    """Take steps of one optimizer, and return the seconds of each, and its bytes a parameter with the gradient."""
    torch.manual_seed(0)
    params = parameters(config)
    count = sum(p.numel() for p in params)
    sources = [1e-3 * torch.randn_like(p) for p in params]
    grads = [torch.empty_like(p).copy_(source) for p, source in zip(params, sources)]
    before = peak_bytes()
    optimizer = OPTIMIZERS[name](params)
    losses = itertools.count(0, -1e6)  # any step size is accepted
    seconds = []
    for _ in range(warmup + steps):
        for p, grad, source in zip(params, grads, sources):
            p.grad = grad.copy_(source)
        begin = now()
        take_step(name, optimizer, losses)
        seconds.append(now() - begin)
    probes = {"probes": optimizer.probes} if isinstance(optimizer, ALSALS) else {}
    bytes_per_parameter = (peak_bytes() - before) / count + 8
    return {"seconds": seconds[warmup:], "parameters": count, "bytes_per_parameter": bytes_per_parameter, **probes}


def take_step(name: str, optimizer: Any, losses: Any) -> None:
    """Take one step, as a training loop calls it."""
    if not isinstance(optimizer, ALSALS):
        optimizer.step()
        return
    if name.endswith("norm known"):
        optimizer.set_clip_coef(torch.tensor(0.5), torch.tensor(2.0))

    def closure() -> Tensor:
        return torch.tensor(next(losses))

    optimizer.step(closure, closure())


def now() -> float:
    """Return the seconds that the process has taken so far, or the time once the GPU is done, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each optimizer: medians over the rounds, ratios taken within each round."""
    bases = {one["round"]: statistics.median(one["seconds"]) for one in runs if one["optimizer"] == BASELINE}
    rows = []
    for name in dict.fromkeys(one["optimizer"] for one in runs):
        mine = [one for one in runs if one["optimizer"] == name]
        ratios = [statistics.median(one["seconds"]) / bases[one["round"]] for one in mine]
        seconds = statistics.median(statistics.median(one["seconds"]) for one in mine)
        rows.append(
            {
                "optimizer": name,
                "milliseconds": 1000 * seconds,
                "nanoseconds_per_parameter": 1e9 * seconds / mine[0]["parameters"],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "bytes_per_parameter": statistics.median(one["bytes_per_parameter"] for one in mine),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| optimizer | step, ms | ns a parameter | times fused AdamW | range over rounds | bytes a parameter |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['optimizer']} | {row['milliseconds']:.0f} | {row['nanoseconds_per_parameter']:.2f} "
            f"| {row['ratio']:.2f} | {min(row['ratios']):.2f} to {max(row['ratios']):.2f} "
            f"| {row['bytes_per_parameter']:.1f} |"
        )
    return "\n".join(lines)
