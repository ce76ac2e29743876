"""What a model card says of a run: its results, and how its step size was found."""

import os
import sys
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard

from .optimizer import ALSALS
from .presets import METHOD_VERSION, PRESETS
from .version import __version__

# What transformers 5.0 to 5.24 writes of a model that was not loaded from anywhere, or from a local path.
_FROM_NOWHERE = (
    "This model is a fine-tuned version of [](https://huggingface.co/)",
    "This model is a fine-tuned version of [None](https://huggingface.co/None)",  # TRL 1.16
)
_FROM_SCRATCH = "This model was trained from scratch"


def correct_start_in_card(path: str, from_local_model: bool) -> None:
    """Correct what the model card that the Trainer wrote says of a model that has no name on the Hub.

    Args:
        path (`str`): The card, a README.md.
        from_local_model (`bool`): Whether it was fine-tuned from a model on disk, else it was trained from scratch.
    """
    card = ModelCard.load(path)
    for start in _FROM_NOWHERE:
        card.text = card.text.replace(start, _FROM_SCRATCH)
    if from_local_model:
        card.text = card.text.replace(_FROM_SCRATCH, "This model is a fine-tuned version of a local model")
    card.save(path)


def add_results_to_card(path: str, log_history: list[dict[str, Any]], dataset: dict[str, Any], task: str) -> None:
    """Write the last evaluation into the metadata (model-index) of the model card that the Trainer wrote.

    Args:
        path (`str`): The card, a README.md.
        log_history (`list[dict]`): The Trainer's logs.
        dataset (`dict[str, str]`): `dataset_type` (its name on the Hub), `dataset_name` and `dataset_config`.
        task (`str`): The task's name on the Hub, such as `"text-classification"`.
    """
    evaluations = [entry for entry in log_history if any(key.startswith("eval_") for key in entry)]
    metrics: dict[str, Any] = {}
    for entry in evaluations:
        # Several data sets, or parts of one, may have been evaluated at the last step.
        if entry["step"] == evaluations[-1]["step"]:
            metrics |= {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
    card = ModelCard.load(path)
    results = [
        EvalResult(task_type=task, metric_type=name, metric_name=name, metric_value=value, **dataset)
        for name, value in metrics.items()
        if not name.endswith(("runtime", "per_second", "preparation_time"))
    ]
    if results:
        # The metadata cannot be read again without a name, which the cards of TRL leave out if none is given.
        card.data.model_name = card.data.model_name or os.path.basename(os.path.dirname(os.path.abspath(path)))
        card.data.eval_results = results
        card.save(path)


def add_search_to_card(path: str, optim: str, alsals: ALSALS, steps: int, train_seconds: float | None) -> None:
    """Add the tag `alsals` and a section on the step size to the model card that the Trainer wrote.

    Args:
        path (`str`): The card, a README.md. The picture of [`StepSizeCallback`] is shown if it lies beside it.
        optim (`str`): The `--optim` of the run.
        alsals (`ALSALS`): The optimizer after training.
        steps (`int`): Optimizer steps of the run.
        train_seconds (`float`, *optional*): Duration of the training, for the share of the search in it.
    """
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or []), "alsals"})
    search, growth = alsals.line_search, alsals.line_search.growth
    options = [
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:.6g}"
        for name, value in search.options.items()
    ]
    options += [f"growth {growth.name}", f"slope {alsals.slope_method}"]
    rows = {
        "script": os.path.basename(sys.argv[0]),
        "optimizer": f"`{optim}`" if optim in PRESETS else "ALSALS",
        "options": ", ".join(options),
        "last step size": f"{alsals.step_size:.4g}",
        "probes per step": f"{alsals.search.total_probes / max(steps, 1):.2f}",
        "steps skipped (loss or gradient not finite)": str(alsals.skipped_steps),
        "versions": f"hf_alsals {__version__} (method {METHOD_VERSION}), transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
    }
    if train_seconds:
        rows["share of the time in the search"] = f"{alsals.search_seconds / train_seconds:.0%}"
    lines = [
        "## Step size",
        f"No learning rate was chosen: {growth.description} along {alsals.direction.description} "
        "(ALSALS, [arXiv 2403.18519](https://arxiv.org/abs/2403.18519)).",
        "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    if os.path.exists(os.path.join(os.path.dirname(path), "step_size.png")):
        lines.append("![Loss and step size over the optimizer steps](step_size.png)")
    card.text = card.text.rstrip("\n") + "\n\n" + "\n\n".join(lines) + "\n"
    card.save(path)
