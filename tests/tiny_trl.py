"""Model, tokenizer, data and reward of a second for TRL's trainers."""

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(20)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer():
    words = ["<pad>", "<eos>", *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(["<pad>", "<eos>"])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<eos>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special)


def model_for(kind):
    torch.manual_seed(0)
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 22}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    config = GPT2Config(**size, **dropout, bos_token_id=1, eos_token_id=1, pad_token_id=0, num_labels=1)
    return (GPT2ForSequenceClassification if kind == "Reward" else GPT2LMHeadModel)(config)


def words(start, step, length):
    return " ".join(WORDS[(start + step * i) % len(WORDS)] for i in range(length))


def count_of_one_word(completions, **kwargs):
    return [float(completion.split().count(WORDS[3])) for completion in completions]


def dataset_of(kind):
    rows = range(32)
    prompts = [words(i, 1, 2 + i % 3) for i in rows]
    chosen, rejected = [" " + words(i, 1, 4 + i % 2) for i in rows], [" " + words(i, 3, 3 + i % 4) for i in rows]
    columns = {"prompt": prompts}
    if kind == "SFT":
        columns = {"text": [prompt + answer for prompt, answer in zip(prompts, chosen)]}
    elif kind in ("DPO", "ORPO", "CPO", "Reward"):
        columns |= {"chosen": chosen, "rejected": rejected}
    elif kind == "KTO":
        answers = [chosen[i] if i % 2 else rejected[i] for i in rows]
        columns |= {"completion": answers, "label": [bool(i % 2) for i in rows]}
    return datasets.Dataset.from_dict(columns)
