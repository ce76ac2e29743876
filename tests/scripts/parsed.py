"""A script as in transformers' examples: all arguments from the command line, classes from the top of transformers."""

import sys
from dataclasses import dataclass, field

import torch
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class ModelArguments:
    width: int = field(default=16, metadata={"help": "Width of the model."})


def collate(rows):
    tokens = torch.stack([row[0] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


def main():
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    config = GPT2Config(n_layer=1, n_embd=model_args.width, n_head=2, n_positions=16, vocab_size=32)
    config.update({"bos_token_id": 0, "eos_token_id": 0})
    tokens = (torch.arange(64).view(64, 1) + torch.arange(1, 17)) % 32
    model = GPT2LMHeadModel(config)
    trainer = Trainer(model, training_args, train_dataset=TensorDataset(tokens), data_collator=collate)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    print(__name__, sys.argv[0], type(trainer.args).__name__, training_args.learning_rate, file=sys.stderr)


if __name__ == "__main__":
    main()
