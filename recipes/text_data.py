"""The text of the recipes that train language models: where it comes from, and how it is cut into blocks."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from recipe import ModelArguments, TextModelArguments, check_counts, check_file, logger, override
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments


@dataclass
class TextDataArguments:
    """Which text to train on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "The data set on the Hub, or its local path; by default Python's language reference."},
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
        check_counts(self, max_train_samples=1, max_eval_samples=1)
        for name in ("train_file", "validation_file"):
            if (path := getattr(self, name)) is not None:
                check_file(name, path, ("txt", "csv", "json", "jsonl"))
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage must be between 0 and 100, got {self.validation_split_percentage}."
            )


@dataclass
class LanguageModelArguments(TextModelArguments):
    """Which model and tokenizer to train, or what new model to make."""

    model_type: str | None = field(
        default=None, metadata={"help": "The type of a new model, such as gpt2, bert or t5; by default a small one."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Overrides of a new model's config, as in n_embd=10,resid_pdrop=0.2."}
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
        if self.model_type is not None and (self.config_name or self.model_name_or_path):
            raise ValueError("model_type cannot be combined with config_name or model_name_or_path.")

    @property
    def dtype(self) -> Any:
        """The `dtype` of `from_pretrained`."""
        return self.torch_dtype if self.torch_dtype in ("auto", None) else getattr(torch, self.torch_dtype)

    def check_model_type(self, mapping: Any) -> None:
        """Raise a ValueError if no model of an auto class's mapping is of the type."""
        known = sorted(config.model_type for config in mapping)
        if self.model_type is not None and self.model_type not in known:
            raise ValueError(f"model_type must be one of {', '.join(known)}, got {self.model_type!r}.")

    def new_config(self, small: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
        """Return the config of a new model: that of its type, or the small one, with the overrides."""
        config = CONFIG_MAPPING[self.model_type]() if self.model_type else small
        config.vocab_size = len(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.bos_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        override(config, self.config_overrides)
        return config


def load_texts(data_args: TextDataArguments, model_args: ModelArguments) -> DatasetDict | IterableDatasetDict:
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
    except (DatasetGenerationError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        if "data_files" not in arguments:
            raise ValueError(f"dataset_name {path!r} cannot be loaded: {reason}") from error
        source = " and ".join(arguments["data_files"].values())
        raise ValueError(f"{source} cannot be read as {path}: {reason}") from error
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
    if len(train) < 2:
        raise ValueError("the train text must have two lines or rows to keep one to evaluate: name a validation_file.")
    held_out = max(1, len(train) * percentage // 100)
    return DatasetDict(
        {"train": train.select(range(held_out, len(train))), "validation": train.select(range(held_out))}
    )


def longest_input(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> float:
    """Return the most tokens that tokenizer and model take, infinity if there is no limit."""
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if "roberta" in config.model_type:  # counts positions from the padding token's on
        positions -= config.pad_token_id + 1
    limit = min(tokenizer.model_max_length, positions)
    return math.inf if limit > 1e9 else limit  # tokenizers write 1e30 for none


def text_column(texts: DatasetDict | IterableDatasetDict) -> str:
    """Return the name of the column of text."""
    split, rows = next(iter(texts.items()))
    example = next(iter(rows), None)
    if example is None:
        raise ValueError(f"the {split} text must hold at least one line or row, but it is empty.")
    column = "text" if "text" in example else next(iter(example))
    if not isinstance(example[column], (str, type(None))) and column != "text":
        raise ValueError(f"the data must have a column of text named text, got {', '.join(example)}.")
    for split, rows in texts.items():
        # Of streamed rows the first says what the others hold.
        features = rows.features or {column: Value("string")}
        if column not in features:
            raise ValueError(f"the {split} data must have the column {column}, got {', '.join(features)}.")
        dtype = getattr(features[column], "dtype", None)
        if dtype not in ("string", "large_string", "null"):
            raise ValueError(f"the column {column} of the {split} data must hold text, got {dtype or 'lists'}.")
    return column


def cut_into_blocks(
    texts: DatasetDict | IterableDatasetDict,
    tokenize: Callable[[list[str]], dict[str, list[list[int]]]],
    block_size: int,
    data_args: TextDataArguments,
    training_args: TrainingArguments,
) -> DatasetDict | IterableDatasetDict:
    """Tokenize all texts, then concatenate what that gives and cut it into blocks of equal size."""
    column = text_column(texts)
    column_names = list(next(iter(next(iter(texts.values())))))
    logger.info(f"Taking the text from the column {column!r}")

    def tokenize_rows(rows: dict[str, list]) -> dict[str, list]:
        return tokenize([text or "" for text in rows[column]])

    def group(rows: dict[str, list]) -> dict[str, list]:
        columns = {name: list(chain(*row_lists)) for name, row_lists in rows.items()}
        starts = range(0, len(columns["input_ids"]) - block_size + 1, block_size)
        return {name: [ids[i : i + block_size] for i in starts] for name, ids in columns.items()}

    map_kwargs: dict[str, Any] = {"batched": True}
    if not data_args.streaming:
        map_kwargs |= {
            "num_proc": data_args.preprocessing_num_workers,
            "load_from_cache_file": not data_args.overwrite_cache,
            "desc": f"Tokenizing, in blocks of {block_size}",
        }
    with training_args.main_process_first(desc="preprocessing"):
        return texts.map(tokenize_rows, remove_columns=column_names, **map_kwargs).map(group, **map_kwargs)


def take_blocks(
    blocks: DatasetDict | IterableDatasetDict, split: str, most: int | None, flag: str, block_size: int
) -> Any:
    """Return the blocks of a split, at most so many; their size was set by the flag."""
    if split not in blocks:
        raise ValueError(f"there is no {split} text: name a {split}_file or another data set.")
    chosen = blocks[split]
    if next(iter(chosen), None) is None:
        raise ValueError(
            f"{flag} must leave the {split} text at least one whole block, got {block_size}: take a smaller one, or "
            "more text."
        )
    if most is None:
        return chosen
    return chosen.select(range(min(most, len(chosen)))) if isinstance(chosen, Dataset) else chosen.take(most)


def card_of_text(data_args: TextDataArguments, model_args: ModelArguments) -> dict[str, str | None]:
    """Return what the model card says of model and text."""
    card = {"finetuned_from": model_args.model_name_or_path}
    if data_args.dataset_name is not None:
        card["dataset_tags"] = data_args.dataset_name
        card["dataset_args"] = data_args.dataset_config_name
        card["dataset"] = " ".join(filter(None, (data_args.dataset_name, data_args.dataset_config_name)))
    elif data_args.train_file is None and data_args.validation_file is None:
        card["dataset"] = "Python language reference"
    return card
