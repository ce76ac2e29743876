"""What the studies share: digits, a small network and its training on them, and the report that a study writes."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import sklearn
import torch
import transformers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from hf_alsals import ALSALS, PRESETS

HERE = os.path.dirname(os.path.abspath(__file__))
LEARNING_RATES = (3e-3, 1e-2, 3e-2)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1437 scans of digits and their labels to train on, and 360 to validate on, always the same ones."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=360, random_state=0, stratify=labels)
    x, x_validation, y, y_validation = (torch.tensor(part) for part in parts)
    return x.float(), y, x_validation.float(), y_validation


def network(seed: int) -> torch.nn.Module:
    """Return a new perceptron for the digits, of 26 122 parameters."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )


def train(
    model: torch.nn.Module,
    optimizer_name: str,
    learning_rate: float | None,
    loss_of: Callable[[Tensor], Tensor],
    rows: int,
    batch_size: int,
    steps: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Train, `alsals` with a linear schedule and AdamW with warm-up and cosine, and return a record of each step.

    Args:
        model (`torch.nn.Module`): The model.
        optimizer_name (`str`): `"adamw"`, or one of `PRESETS`.
        learning_rate (`float`, *optional*): That of AdamW.
        loss_of (`Callable[[Tensor], Tensor]`): Returns the model's loss on the training rows of those numbers.
        rows (`int`): How many training rows there are; each batch is drawn from all of them.
        batch_size (`int`): Rows in a batch.
        steps (`int`): Optimizer steps.
        seed (`int`): That of the batches.

    Returns:
        `list[dict]`: Of each step the loss before it and, where the optimizer searches, the step size, the number of
        probes, whether it searched, the decrease of the loss as a share of the predicted one, and the path slope.
    """
    if optimizer_name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        scheduler = get_scheduler("cosine", optimizer, steps // 10, steps)
    else:
        optimizer = ALSALS(model.parameters(), **PRESETS[optimizer_name])
        scheduler = get_scheduler("linear" if optimizer_name == "alsals" else "constant", optimizer, 0, steps)
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(steps):
        batch = torch.randperm(rows, generator=generator)[:batch_size]
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        if optimizer_name == "adamw":
            optimizer.step()
            records.append({"loss": loss.item()})
        else:
            optimizer.step(partial(loss_of, batch), loss)
            record = {"loss": loss.item(), "step_size": optimizer.step_size, "probes": optimizer.probes}
            record["searched"] = optimizer.searched
            predicted = optimizer.step_size * optimizer.slope
            has_ratio = optimizer.searched and predicted > 0
            record["ratio"] = optimizer.actual_reduction / predicted if has_ratio else math.nan
            records.append(record | optimizer.line_search.growth.metrics(optimizer.search.growth))
        scheduler.step()
    return records


@torch.no_grad()
def evaluate(model: torch.nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss and accuracy of a model."""
    logits = model(x)
    return cross_entropy(logits, y).item(), (logits.argmax(dim=1) == y).float().mean().item()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error, 0.0 for one seed."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error


def write(name: str, output_dir: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """Write the numbers of a study, with its command, revision and versions, to a json file, and return all of it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()

    has_changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py") != ""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, sklearn)}
    report = {
        "command": " ".join(["python", f"recipes/studies/{name}.py", *sys.argv[1:]]),
        "revision": git("rev-parse", "HEAD") + ("+changes" if has_changes else ""),
        "versions": {"python": platform.python_version(), **versions},
        **numbers,
    }
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, f"{name}.json"), "w") as file:
        json.dump(report, file, separators=(",", ":"))
    return report
