"""A script with its arguments in the code, its classes from their modules, and subclasses of its own."""

import sys
from dataclasses import dataclass

import torch
from torch.utils.data import TensorDataset
from transformers import T5Config, T5ForConditionalGeneration, set_seed
from transformers.trainer_seq2seq import Seq2SeqTrainer
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments


@dataclass
class Arguments(Seq2SeqTrainingArguments):
    learning_rate: float = 1e-3
    smoothing: float = 0.0


class SmoothingTrainer(Seq2SeqTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.loss - self.args.smoothing * torch.log_softmax(outputs.logits, dim=-1).mean()
        return (loss, outputs) if return_outputs else loss


def collate(rows):
    tokens = torch.stack([row[0] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


set_seed(3)
size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
model = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0))
args = Arguments(
    sys.argv[1],
    max_steps=12,
    lr_scheduler_type="cosine",
    optim="adafactor",
    smoothing=0.1,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
)
data = TensorDataset((torch.arange(64).view(64, 1) + torch.arange(1, 9)) % 32)
trainer = SmoothingTrainer(model, args, train_dataset=data, data_collator=collate)
trainer.train()
trainer.save_model()
