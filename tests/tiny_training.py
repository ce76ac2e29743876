"""A training run of a second: data, model, arguments, and what tests look at."""

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_alsals import AlsalsTrainingArguments

VOCABULARY, LENGTH = 31, 16


class Sequences(Dataset):
    """Arithmetic sequences, with a different number of labels in each."""

    def __init__(self, size=48):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        input_ids = (torch.arange(LENGTH) * (index % 7 + 1) + index) % VOCABULARY
        labels = input_ids.clone()
        labels[: index % 5] = -100
        return {"input_ids": input_ids, "labels": labels}


def gpt2(dropout=0.1, dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        n_positions=LENGTH,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config).to(dtype)


def arguments(tmp_path, cls=AlsalsTrainingArguments, **kwargs):
    defaults = {
        "output_dir": str(tmp_path),
        "optim": "alsals",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if kwargs.get("optim", "alsals") == "alsals":
        defaults["optim_args"] = "search_interval=1"  # runs of a few steps have to search
    return cls(**defaults | kwargs)


class Observer(TrainerCallback):
    """Calls a function before every optimizer step, when gradients are clipped and the closure is handed over."""

    def __init__(self, function):
        self.function = function

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.function()


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]
