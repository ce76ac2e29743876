"""Train an LSTM or an MLP in a loop of plain PyTorch, with the flags and the results of a recipe.

The LSTM learns the bytes of the language reference that every Python carries, the MLP scikit-learn's digits. `ALSALS`
gets the model's parameters and nothing else, as in any loop: all its matrices count as hidden. Gradients are not
clipped, and there is no weight decay. Of the flags of training it reads those of the optimizer, its schedule and
--max_steps, --seed and --output_dir.

    python recipes/benchmarks/plain.py --model lstm --optim alsals --max_steps 600 --output_dir out
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import SchedulerType, get_scheduler

from hf_alsals import ALSALS, PRESETS, AlsalsArgumentParser, AlsalsTrainingArguments
from hf_alsals.schedule import default_decay_steps

BLOCK = 65  # bytes, of which 64 are predicted
Data = tuple[Tensor, Tensor]


@dataclass
class ModelArguments:
    """Which model to train."""

    model: str = field(default="lstm", metadata={"help": "The model.", "choices": ["lstm", "mlp"]})


class ByteLSTM(nn.Module):
    """A language model of bytes: an embedding, an LSTM of width 128 and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.lstm = nn.LSTM(64, 128, batch_first=True)
        self.head = nn.Linear(128, 256)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each next byte, of shape (batch, 256, length)."""
        return self.head(self.lstm(self.embedding(x))[0]).transpose(1, 2)


def reference() -> tuple[Data, Data]:
    """Return bytes and next bytes in blocks: nine tenths to train on, and 512 of the rest to validate on."""
    data = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    blocks = data[: len(data) // BLOCK * BLOCK].view(-1, BLOCK)
    x, y = blocks[:, :-1], blocks[:, 1:]
    n = len(x) * 9 // 10
    return (x[:n], y[:n]), (x[n : n + 512], y[n : n + 512])


def digits() -> tuple[Data, Data]:
    """Return the pixels and labels of 1437 scans to train on, and of 360 to validate on, always the same ones."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=360, random_state=0, stratify=labels)
    x, x_validation, y, y_validation = (torch.tensor(part) for part in parts)
    return (x.float(), y), (x_validation.float(), y_validation)


def mlp() -> nn.Module:
    """Return a perceptron for the digits, with two hidden layers of width 128."""
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Data, Data]], int]] = {
    "lstm": (ByteLSTM, reference, 16),  # with the size of its batches
    "mlp": (mlp, digits, 64),
}


def create_scheduler(args: AlsalsTrainingArguments, optimizer: torch.optim.Optimizer) -> Any:
    """Return the schedule of the flags; `warmup_stable_decay` falls when it falls in the Trainer."""
    warmup, kwargs = args.get_warmup_steps(args.max_steps), {}
    if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
        kwargs = {"num_decay_steps": default_decay_steps(args.optim, args.max_steps - warmup), "decay_type": "linear"}
    return get_scheduler(args.lr_scheduler_type, optimizer, warmup, args.max_steps, scheduler_specific_kwargs=kwargs)


def main() -> None:
    parser = AlsalsArgumentParser((ModelArguments, AlsalsTrainingArguments), description=__doc__.splitlines()[0])
    model_args, args = parser.parse_args_into_dataclasses()
    if args.optim not in PRESETS and args.optim != "adamw_torch":
        parser.error(f"--optim must be adamw_torch or one of {', '.join(PRESETS)}, got {args.optim}.")
    if args.max_steps < 1:
        parser.error(f"--max_steps must be at least 1, got {args.max_steps}.")
    if args.optim in PRESETS and args.probe_micro_batches is not None:
        parser.error("--optim_args probe_micro_batches needs micro-batches, and this loop has none: leave it out.")
    create_model, load_data, batch_size = MODELS[model_args.model]
    (x, y), (x_validation, y_validation) = load_data()
    torch.manual_seed(args.seed)
    model = create_model()
    if args.optim in PRESETS:
        optimizer = ALSALS(model.parameters(), **args.alsals_kwargs())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    scheduler = create_scheduler(args, optimizer)

    def loss_of(rows: Tensor) -> Tensor:
        return cross_entropy(model(x[rows]), y[rows])

    logs = []
    for step in range(1, args.max_steps + 1):
        rows = torch.randint(len(x), (batch_size,))
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        lr = scheduler.get_last_lr()[0]
        if isinstance(optimizer, ALSALS):
            optimizer.step(partial(loss_of, rows), loss)
            taken = {"learning_rate": optimizer.step_size, "lr_multiplier": lr, "probes": optimizer.probes}
        else:
            optimizer.step()
            taken = {"learning_rate": lr}
        scheduler.step()
        logs.append({"step": step, "loss": loss.item()} | taken)

    with torch.no_grad():
        logits = model(x_validation)
    accuracy = (logits.argmax(1) == y_validation).double().mean().item()
    results = {"eval_loss": cross_entropy(logits, y_validation).item(), "eval_accuracy": accuracy}
    os.makedirs(args.output_dir, exist_ok=True)
    state = {"log_history": logs, "stateful_callbacks": {}}
    for name, content in (("trainer_state.json", state), ("all_results.json", results)):
        with open(os.path.join(args.output_dir, name), "w") as file:
            json.dump(content, file)
    print(results)


if __name__ == "__main__":
    main()
