"""How `alsals` trains on losses whose value does not show their gradient: TRL's GRPO, DFT and RLOO.

A tiny pretrained GPT-2 learns to write words in order (GRPO, RLOO: the reward counts pairs) or other sequences (DFT),
by `alsals` and by AdamW at each of four learning rates. It needs `pip install trl==1.16.0` beside the studies' own.

    python recipes/studies/surrogate.py
"""

import contextlib
import functools
import io
import os
import statistics
import tempfile
import warnings
from collections import defaultdict
from dataclasses import dataclass, field, make_dataclass
from itertools import pairwise
from typing import Any

import datasets
import torch
from matplotlib.figure import Figure
from study import HERE, mean_and_error, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_alsals import AlsalsArgumentsMixin, AlsalsTrainerMixin, FailureCallback

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WORDS = 30
LENGTH = 8  # of a completion
GENERATED = {"num_generations": 8, "max_completion_length": LENGTH, "per_device_train_batch_size": 16}
CONFIG = GPT2Config(
    n_layer=2,
    n_head=2,
    n_embd=32,
    n_positions=32,
    vocab_size=WORDS + 2,
    bos_token_id=1,
    eos_token_id=1,
    pad_token_id=0,
)
# TRL's trainer, its arguments, and what is measured.
SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "GRPO": ("GRPO", GENERATED | {"beta": 0.0}, "reward"),
    "GRPO, beta 0.04": ("GRPO", GENERATED | {"beta": 0.04}, "reward"),
    "RLOO": ("RLOO", GENERATED, "reward"),
    "DFT": ("SFT", {"loss_type": "dft", "max_length": 32, "per_device_train_batch_size": 16}, "mean_token_accuracy"),
}


@dataclass
class SurrogateArguments:
    """How long to train, and how often."""

    output_dir: str = field(default=HERE, metadata={"help": "The folder for surrogate.json and surrogate.png."})
    steps: int = field(default=130, metadata={"help": "Optimizer steps."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of weights and batches."})


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 30 words, a token for padding and one for the end."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def sequences(steps: tuple[int, ...], length: int) -> list[list[int]]:
    """Return sequences of words, from each word on, that go on by each of some steps through the vocabulary."""
    return [[(first + step * i) % WORDS for i in range(length)] for first in range(WORDS) for step in steps]


@functools.cache
def pretrained(seed: int) -> dict[str, torch.Tensor]:
    """Return the weights of a GPT-2 of two layers of width 32 that writes sequences with the steps 1, 2 and 3."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(CONFIG)
    rows = torch.tensor(sequences((1, 2, 3), 12)) + 2  # the first two tokens are no words
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        batch = rows[torch.randperm(len(rows))[:32]]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def texts(kind: str) -> datasets.Dataset:
    """Return what is trained on: single words as prompts, or for SFT whole sequences, with other steps than before."""
    name, rows = ("text", sequences((4, 5, 6), 12)) if kind == "SFT" else ("prompt", sequences((1,), 1))
    return datasets.Dataset.from_dict({name: [" ".join(f"w{i}" for i in row) for row in rows]})


def count_of_pairs(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Return a reward for each completion: how often a word is followed by the next one in the vocabulary."""
    return [float(sum(after == before + 1 for before, after in pairwise(ids))) for ids in completion_ids]


def trainer_of(setting: str, learning_rate: float | None, seed: int, steps: int, folder: str) -> Any:
    """Return TRL's trainer of a setting, by `alsals` with its defaults if there is no learning rate, else by AdamW."""
    import trl  # it may not run on the oldest transformers

    kind, options, _ = SETTINGS[setting]
    trainer_class = type("Trainer", (AlsalsTrainerMixin, getattr(trl, f"{kind}Trainer")), {})
    config_class = make_dataclass("Config", [], bases=(AlsalsArgumentsMixin, getattr(trl, f"{kind}Config")))
    options = options | {"optim": "alsals", "output_dir": folder, "max_steps": steps, "seed": seed}
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False}
    if learning_rate is not None:
        options |= {"optim": "adamw_torch", "learning_rate": learning_rate, "lr_scheduler_type": "cosine"}
        options |= {"warmup_steps": steps // 10}
    model = GPT2LMHeadModel(CONFIG)
    model.load_state_dict(pretrained(seed))
    model.save_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder)  # the reference model is loaded from there
    rewards = {} if kind == "SFT" else {"reward_funcs": count_of_pairs}
    with warnings.catch_warnings(action="ignore"):
        args = config_class(**options, gradient_checkpointing=False, disable_tqdm=True)
        return trainer_class(model, args=args, train_dataset=texts(kind), processing_class=tokenizer(), **rewards)


def run(setting: str, learning_rate: float | None, seed: int, steps: int) -> dict[str, Any]:
    """Train once, and return the reward or accuracy on the way and, for `alsals`, what the search did."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(setting, learning_rate, seed, steps, folder)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    values = [entry[SETTINGS[setting][2]] for entry in logs]
    last = values[-max(1, steps // 5) :]
    result = {"setting": setting, "learning_rate": learning_rate, "seed": seed}
    result |= {"last": statistics.mean(last), "mean": statistics.mean(values)}
    result["values"] = [round(statistics.mean(values[max(0, i - 9) : i + 1]), 4) for i in range(4, steps, 5)]
    if learning_rate is None:
        (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, FailureCallback))
        result["is_blind"] = trainer.alsals.search.is_blind
        result["warnings"] = len(callback.warnings)
        result["step_size"] = trainer.alsals.step_size
        result["step_sizes"] = [float(f"{entry['step_size']:.3g}") for entry in logs[4::5]]
        result["probes"] = trainer.alsals.search.total_probes / steps
    return result


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each setting and learning rate: means over seeds."""
    groups = defaultdict(list)
    for one in runs:
        groups[one["setting"], one["learning_rate"]].append(one)
    rows = []
    for (setting, learning_rate), group in groups.items():
        row = {"setting": setting, "learning_rate": learning_rate, "seeds": len(group)}
        for key in ("last", "mean", "step_size", "probes"):
            if key in group[0]:
                row[key], row[f"{key}_error"] = mean_and_error([one[key] for one in group])
        if learning_rate is None:
            row["blind"] = sum(one["is_blind"] for one in group)
        rows.append(row)
    return rows


def table(report: dict[str, Any]) -> str:
    """Return two Markdown tables: the end of training, and the mean over all of it."""
    rates = [f"AdamW {rate:g}" for rate in LEARNING_RATES]
    head = f"| | `alsals` | {' | '.join(rates)} |"
    tables = []
    for key, title in (("last", "last fifth"), ("mean", "all steps")):
        lines = [head.replace("| |", f"| {title} |", 1), f"|{' --- |' * (2 + len(rates))}"]
        for setting in SETTINGS:
            rows = [row for row in report["rows"] if row["setting"] == setting]
            cells = [f"{row[key]:.2f} ± {row[f'{key}_error']:.2f}" for row in rows]
            lines.append(f"| {setting} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    lines = [
        "| `alsals` | found to hide its gradient | probes per step | last step size |",
        "| --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        if row["learning_rate"] is None:
            found = f"{row['blind']} of {row['seeds']}"
            lines.append(f"| {row['setting']} | {found} | {row['probes']:.2f} | {row['step_size']:.2g} |")
    return "\n\n".join([*tables, "\n".join(lines)])


def draw(report: dict[str, Any], path: str) -> None:
    """Draw reward or accuracy, and the step size of `alsals`, against steps, of the first seed."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, len(SETTINGS), sharex=True)
    steps = range(5, report["steps"] + 1, 5)
    for i, (setting, (_, _, metric)) in enumerate(SETTINGS.items()):
        runs = [one for one in report["runs"] if one["setting"] == setting]
        for one in runs:
            if one["seed"] == runs[0]["seed"]:
                rate = one["learning_rate"]
                label = "alsals" if rate is None else f"AdamW, {rate:g}"
                axes[0, i].plot(steps, one["values"], "k-" if rate is None else "--", label=label)
                if rate is None:
                    axes[1, i].plot(steps, one["step_sizes"], "k-")
        axes[0, i].set(title=setting, ylabel=metric.replace("_", " "))
        axes[1, i].set(xlabel="optimizer step", ylabel="step size", yscale="log")
    for one in axes.flat:
        one.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=90)


def main() -> None:
    (args,) = HfArgumentParser(SurrogateArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    runs = []
    for setting in SETTINGS:
        for learning_rate in (None, *LEARNING_RATES):
            runs += [run(setting, learning_rate, seed, args.steps) for seed in args.seeds]
    report = write("surrogate", args.output_dir, {"steps": args.steps, "rows": summarize(runs), "runs": runs})
    draw(report, os.path.join(args.output_dir, "surrogate.png"))
    print(table(report))


if __name__ == "__main__":
    main()
