"""A script that trains in a way of its own, which its first argument names."""

import sys

import torch
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()


def collate(rows):
    tokens = torch.stack([row[0] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


kind, output_dir = sys.argv[1:]
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0))
data = TensorDataset(torch.arange(64).view(8, 8) % 32)
if kind == "own loop":
    optimizer = torch.optim.AdamW(model.parameters())
    model(**collate(data)).loss.backward()
    optimizer.step()
    sys.exit(0)
elif kind == "own rates":
    args = TrainingArguments(output_dir, max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    args.learning_rate = 3e-4
    trainer = Trainer(model, args, train_dataset=data, data_collator=collate)
    trainer.train()
    print("step size", trainer.optimizer.param_groups[0]["initial_lr"])
else:
    cls = OwnStep if kind == "own step" else Trainer
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None) if kind == "own optimizer" else (None, None)
    args = TrainingArguments(output_dir, max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    cls(model, args, train_dataset=data, data_collator=collate, optimizers=optimizers).train()
