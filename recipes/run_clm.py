"""Train a causal language model (GPT-2 and others) from scratch or from a checkpoint, with `--optim alsals`.

The flags are those of transformers' examples/pytorch/language-modeling/run_clm.py. Without a model it builds a small
GPT-2, without data it takes the language reference that every Python has, without a tokenizer it trains on bytes.

    python recipes/run_clm.py --optim alsals --output_dir out
    python recipes/run_clm.py recipes/configs/gpt2-openwebtext.yaml --per_device_train_batch_size 16
"""

import logging
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pydoc_data.topics import topics
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from sklearn.metrics import accuracy_score
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    default_data_collator,
    set_seed,
)

from hf_alsals import AlsalsArgumentParser, AlsalsTrainer, AlsalsTrainingArguments
from hf_alsals.callbacks import StepSizeCallback
from hf_alsals.trainer import last_whole_checkpoint

logger = logging.getLogger(__name__)

MODEL_TYPES = tuple(config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING)

# 0.9 M parameters: three epochs of the embedded text in two minutes on two CPU cores.
SMALL_GPT2 = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@dataclass
class ModelArguments:
    """Which model and tokenizer to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The checkpoint to start from. Leave out to train from scratch."}
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": f"If training from scratch, one of: {', '.join(MODEL_TYPES)}. Default: a small GPT-2.",
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Overrides of the config when training from scratch, as in n_embd=10,resid_pdrop=0.2."},
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Config name or path if not the same as model_name_or_path."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer name or path if not the same as model_name_or_path. Default: bytes."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where to store what is downloaded from the Hub."})
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "Whether to use a fast tokenizer (of the tokenizers library)."}
    )
    model_revision: str = field(default="main", metadata={"help": "The branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "The Hub token. Default: the one of `hf auth login`."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code from the model's repository on the Hub."}
    )
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "The dtype to load the model under; auto takes that of the checkpoint.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--dtype"],
        },
    )

    def __post_init__(self) -> None:
        if self.config_overrides is not None and (self.config_name or self.model_name_or_path):
            raise ValueError("config_overrides cannot be combined with config_name or model_name_or_path.")
        if self.model_type is not None and self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {self.model_type!r}.")


@dataclass
class DataTrainingArguments:
    """Which text to train on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "The data set on the Hub, or its local path. Default: Python's language reference."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "The training text: a txt, csv or json file."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The evaluation text: a txt, csv or json file."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Take this many training blocks only, for debugging or quicker training."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Take this many evaluation blocks only, for debugging or quicker training."}
    )
    streaming: bool = field(default=False, metadata={"help": "Stream the data set instead of downloading it first."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens in a training sequence. Default: what the model takes, at most 1024."},
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Whether to preprocess again what is in the cache."}
    )
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "The percentage of the training text to evaluate on, if there is no other to do so."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "The number of processes for the preprocessing."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Whether to keep the line breaks of txt files."})

    def __post_init__(self) -> None:
        if self.dataset_name is not None and (self.train_file or self.validation_file):
            raise ValueError("dataset_name cannot be combined with train_file or validation_file.")
        for name, least in (("max_train_samples", 1), ("max_eval_samples", 1), ("block_size", 2)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("train_file", "validation_file"):
            path = getattr(self, name)
            if path is not None and not path.endswith((".txt", ".csv", ".json", ".jsonl")):
                raise ValueError(f"{name} must be a txt, csv or json file, got {path!r}.")
            if path is not None and not os.path.isfile(path):
                raise ValueError(f"{name} must be a file, but there is none at {path!r}.")
            if path is not None and os.path.getsize(path) == 0:
                raise ValueError(f"{name} must hold text, but {path!r} is empty.")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage must be between 0 and 100, got {self.validation_split_percentage}."
            )


@dataclass
class ClmTrainingArguments(AlsalsTrainingArguments):
    """The Trainer's arguments, with a log entry at the first and at every tenth step."""

    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first optimizer step too."})


def load_texts(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict | IterableDatasetDict:
    """Load the text to train and to evaluate on, as splits `train` and `validation`."""
    if data_args.dataset_name is None and data_args.train_file is None and data_args.validation_file is None:
        # Many topics are sections of others: only one that shares no line with another can be held out.
        lines = {name: {line.strip() for line in text.splitlines() if len(line) > 30} for name, text in topics.items()}
        occurrences = Counter(chain(*lines.values()))
        held_out = [name for name in sorted(topics) if all(occurrences[line] == 1 for line in lines[name])][::2]
        split = {"train": [name for name in sorted(topics) if name not in held_out], "validation": held_out}
        return DatasetDict(
            {key: Dataset.from_dict({"text": [topics[name] for name in names]}) for key, names in split.items()}
        )

    arguments: dict[str, Any] = {"cache_dir": model_args.cache_dir, "streaming": data_args.streaming}
    if data_args.dataset_name is not None:
        path = data_args.dataset_name
        arguments |= {"name": data_args.dataset_config_name, "token": model_args.token}
    else:
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        arguments["data_files"] = {split: file for split, file in files.items() if file is not None}
        extensions = {file.split(".")[-1] for file in arguments["data_files"].values()}
        if len(extensions) > 1:
            raise ValueError(f"train_file and validation_file must be of one type, got {' and '.join(extensions)}.")
        path = {"txt": "text", "jsonl": "json"}.get(extension := extensions.pop(), extension)
        if path == "text":
            arguments["keep_linebreaks"] = data_args.keep_linebreaks
    try:
        texts = load_dataset(path, **arguments)
    except (DatasetGenerationError, ValueError) as error:
        source = " and ".join(arguments["data_files"].values()) if "data_files" in arguments else path
        raise ValueError(f"{source} cannot be read as {path}: {error.__cause__ or error}") from error
    if "validation" in texts:
        return texts
    train, percentage = texts["train"], data_args.validation_split_percentage
    if data_args.streaming:
        return IterableDatasetDict(
            {
                "train": train.filter(lambda _, index: index % 100 >= percentage, with_indices=True),
                "validation": train.filter(lambda _, index: index % 100 < percentage, with_indices=True),
            }
        )
    held_out = max(1, len(train) * percentage // 100)
    return DatasetDict(
        {"train": train.select(range(held_out, len(train))), "validation": train.select(range(held_out))}
    )


def main() -> None:
    parser = AlsalsArgumentParser(
        (ModelArguments, DataTrainingArguments, ClmTrainingArguments), description=__doc__.splitlines()[0]
    )
    model_args, data_args, training_args = parser.parse_args_and_config()
    # An eval_strategy sets do_eval by itself, and is nothing without training.
    if not training_args.do_train and (not training_args.do_eval or training_args.eval_strategy != "no"):
        training_args.do_train = training_args.do_eval = True

    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    log_level = training_args.get_process_log_level()
    logger.setLevel(logging.INFO if training_args.should_log else log_level)
    datasets.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.set_verbosity(log_level)
    logger.warning(
        f"Process rank: {training_args.local_process_index}, device: {training_args.device}, "
        f"distributed training: {training_args.parallel_mode.value == 'distributed'}, "
        f"mixed precision: {training_args.mixed_precision}"
    )
    set_seed(training_args.seed)

    try:
        texts = load_texts(data_args, model_args)
    except ValueError as error:
        parser.error(str(error))

    # Tokenizer and config: by name or path, else bytes and a small GPT-2.
    hub_kwargs = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    tokenizer_name = model_args.tokenizer_name or model_args.model_name_or_path
    if tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, use_fast=model_args.use_fast_tokenizer, **hub_kwargs)
    else:
        tokenizer = ByT5Tokenizer(extra_ids=0)

    config_name = model_args.config_name or model_args.model_name_or_path
    if config_name is not None:
        config = AutoConfig.from_pretrained(config_name, **hub_kwargs)
    else:
        config = CONFIG_MAPPING[model_args.model_type]() if model_args.model_type else GPT2Config(**SMALL_GPT2)
        if data_args.block_size is not None and model_args.model_type is None:
            config.n_positions = data_args.block_size
        config.vocab_size = len(tokenizer)
        config.bos_token_id = tokenizer.bos_token_id or tokenizer.eos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        if model_args.config_overrides is not None:
            config.update_from_string(model_args.config_overrides)

    # Preprocessing: tokenize, then concatenate and cut into blocks.
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or math.inf)
    block_size = data_args.block_size or int(min(longest, 1024))
    if block_size > longest:
        parser.error(f"block_size must be at most {longest}, what model and tokenizer take, got {block_size}.")
    split = "train" if "train" in texts else "validation"
    example = next(iter(texts[split]), None)
    if example is None:
        parser.error(f"the {split} text must hold at least one line or row, but it is empty.")
    column_names = list(example)
    text_column = "text" if "text" in column_names else column_names[0]
    if not isinstance(example[text_column], (str, type(None))):
        parser.error(f"the data must have a column of text named text, got {', '.join(column_names)}.")
    logger.info(f"Taking the text from the column {text_column!r}")
    lines = (data_args.train_file or data_args.validation_file or "").endswith(".txt")

    def tokenize(examples: dict[str, list]) -> dict[str, list]:
        # The lines of a txt file are one text: no special tokens between them.
        texts = [text or "" for text in examples[text_column]]
        return {"input_ids": tokenizer(texts, add_special_tokens=not lines, verbose=False)["input_ids"]}

    def group_texts(examples: dict[str, list]) -> dict[str, list]:
        ids = list(chain(*examples["input_ids"]))
        blocks = [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    map_kwargs: dict[str, Any] = {"batched": True}
    if not data_args.streaming:
        map_kwargs |= {
            "num_proc": data_args.preprocessing_num_workers,
            "load_from_cache_file": not data_args.overwrite_cache,
            "desc": f"Tokenizing, in blocks of {block_size}",
        }
    with training_args.main_process_first(desc="preprocessing"):
        blocks = texts.map(tokenize, remove_columns=column_names, **map_kwargs).map(group_texts, **map_kwargs)

    def take(split: str, most: int | None) -> Any:
        if split not in blocks:
            parser.error(f"there is no {split} text: name a {split}_file or another data set.")
        chosen = blocks[split]
        if data_args.streaming:
            return chosen if most is None else chosen.take(most)
        if len(chosen) == 0:
            parser.error(f"the {split} text has fewer than block_size = {block_size} tokens: take a smaller one.")
        return chosen if most is None else chosen.select(range(min(most, len(chosen))))

    train_dataset = take("train", data_args.max_train_samples) if training_args.do_train else None
    eval_dataset = take("validation", data_args.max_eval_samples) if training_args.do_eval else None

    if model_args.model_name_or_path is not None:
        dtype = model_args.torch_dtype
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            dtype=dtype if dtype in ("auto", None) else getattr(torch, dtype),
            **hub_kwargs,
        )
    else:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code)
        logger.info(f"Training a new {config.model_type} with {model.num_parameters() / 1e6:.2f}M parameters")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    def predictions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(eval_preds: Any) -> dict[str, float]:
        predicted, labels = eval_preds.predictions[:, :-1], eval_preds.label_ids[:, 1:]  # position i predicts i + 1
        return {"accuracy": accuracy_score(labels.reshape(-1), predicted.reshape(-1))}

    trainer = AlsalsTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=predictions,
        callbacks=[StepSizeCallback()],
    )

    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        if checkpoint is not None and checkpoint.lower() == "true":  # from the last one, if there is any
            checkpoint = last_whole_checkpoint(training_args.output_dir)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()  # with the tokenizer
        if not data_args.streaming:
            metrics["train_samples"] = len(train_dataset)
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        if not data_args.streaming:
            metrics["eval_samples"] = len(eval_dataset)
        metrics["perplexity"] = math.exp(metrics["eval_loss"]) if metrics["eval_loss"] < 700 else math.inf
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation"}
    if data_args.dataset_name is not None:
        card["dataset_tags"] = data_args.dataset_name
        card["dataset_args"] = data_args.dataset_config_name
        card["dataset"] = " ".join(filter(None, (data_args.dataset_name, data_args.dataset_config_name)))
    elif data_args.train_file is None and data_args.validation_file is None:
        card["dataset"] = "Python language reference"
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)

    # On every process: under FSDP each holds a shard of the model.
    prompt = tokenizer("The ", add_special_tokens=False, return_tensors="pt")["input_ids"].to(training_args.device)
    prompt = prompt[:, : int(min(longest - 1, prompt.shape[1]))]
    length = int(min(longest, prompt.shape[1] + 120))
    sample = trainer.model.eval().generate(
        prompt, max_length=length, do_sample=True, top_k=40, synced_gpus=training_args.world_size > 1
    )
    if trainer.is_world_process_zero():
        logger.info(f"A sample: {tokenizer.decode(sample[0], skip_special_tokens=True)!r}")
        logger.info(f"Wrote {', '.join(sorted(os.listdir(training_args.output_dir)))} to {training_args.output_dir}")


if __name__ == "__main__":
    main()
