"""Fine-tune a model on a GLUE task, or on sentences or pairs of your own, with `--optim alsals`.

The flags are those of transformers' examples/pytorch/text-classification/run_glue.py. Without a model it builds a
small BERT, without data it asks of paragraphs of Python's language reference which topic they belong to, without a
tokenizer it trains on bytes.

    python recipes/run_glue.py --optim alsals --output_dir out
    python recipes/run_glue.py recipes/configs/glue.yaml --task_name rte --output_dir out/rte
"""

import csv
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import evaluate
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from recipe import (
    LoraArguments,
    TextModelArguments,
    add_adapter,
    check_counts,
    check_file,
    finish,
    load_config,
    load_model,
    load_tokenizer,
    logger,
    make_parser,
    match_labels,
    one_line_error,
    start,
    train,
    train_tokenizer,
)
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_alsals import AlsalsTrainer, AlsalsTrainingArguments

# Of each task the columns of text and the labels, in the order of their numbers; stsb is a regression.
TASKS = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "stsb": (["sentence1", "sentence2"], None),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
}

METRIC = os.path.join(os.path.dirname(os.path.abspath(__file__)), "glue_metric.py")

# What the benchmark's site calls the files that it takes; where it wants a number for a label, it is that of TASKS.
SUBMISSIONS = {
    "cola": "CoLA",
    "mnli": "MNLI-m",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "sst2": "SST-2",
    "stsb": "STS-B",
    "wnli": "WNLI",
}
SUBMITTED_BY_NAME = ("mnli", "qnli", "rte")

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)

# What programs write into a cell that has no value.
GAPS = ("na", "n/a", "#n/a", "nan", "-nan", "null", "none", "nil", "inf", "-inf", "-", "?", ".")

# 0.7 M parameters: three epochs of the embedded pairs in a minute on two CPU cores.
SMALL_BERT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}


@dataclass
class GlueModelArguments(TextModelArguments):
    """Which model and tokenizer to fine-tune."""

    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Whether to start with a new head if the checkpoint's has another size."}
    )


@dataclass
class GlueDataArguments:
    """Which sentences or pairs to train on."""

    task_name: str | None = field(default=None, metadata={"help": f"The GLUE task, one of: {', '.join(TASKS)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "The data set on the Hub, or its local path."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of the data set."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer sentences or pairs are cut to so many tokens."})
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Whether to preprocess again what is in the cache."}
    )
    pad_to_max_length: bool = field(
        default=True, metadata={"help": "Whether to pad to max_seq_length; else to the longest of each batch."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Take this many training examples only, for debugging or quicker training."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Take this many evaluation examples only, for debugging or quicker training."}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Take this many test examples only, for debugging or quicker training."}
    )
    train_file: str | None = field(default=None, metadata={"help": "The training data: a csv or json file."})
    validation_file: str | None = field(default=None, metadata={"help": "The evaluation data: a csv or json file."})
    test_file: str | None = field(default=None, metadata={"help": "The data to predict: a csv or json file."})

    def __post_init__(self) -> None:
        if self.task_name is not None and self.task_name not in TASKS:
            raise ValueError(f"task_name must be one of {', '.join(TASKS)}, got {self.task_name!r}.")
        if self.dataset_name is not None and (self.task_name or self.files):
            raise ValueError(
                "dataset_name cannot be combined with task_name, train_file, validation_file or test_file."
            )
        check_counts(self, max_train_samples=1, max_eval_samples=1, max_predict_samples=1, max_seq_length=8)
        for split, path in self.files.items():
            check_file(f"{split}_file", path, ("csv", "json", "jsonl"))

    @property
    def files(self) -> dict[str, str]:
        """The local files by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in files.items() if path is not None}


def topic_pairs() -> DatasetDict:
    """Pair every paragraph of eight topics of Python's language reference with its topic and with another of them."""
    paragraphs = {}
    for name in topics:
        texts = (" ".join(text.split()) for text in topics[name].split("\n\n"))
        paragraphs[name] = {text for text in texts if len(text) >= 60}
    # The largest first; many topics are sections of others, and a paragraph must belong to one only.
    chosen: list[str] = []
    for name in sorted(topics, key=lambda name: (-len(paragraphs[name]), name)):
        if len(chosen) < 8 and not any(paragraphs[name] & paragraphs[other] for other in chosen):
            chosen.append(name)
    rng = random.Random(0)
    owned = [(text, name) for name in chosen for text in sorted(paragraphs[name])]
    rng.shuffle(owned)
    held_out = len(owned) // 5
    label = ClassLabel(names=["other_topic", "same_topic"])
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": label})
    splits = {"train": owned[held_out:], "validation": owned[:held_out]}
    return DatasetDict(
        {
            split: Dataset.from_list(
                [
                    {"sentence1": topic.replace("-", " "), "sentence2": text, "label": int(topic == name)}
                    for text, name in rows
                    for topic in (name, rng.choice([other for other in chosen if other != name]))
                ],
                features,
            )
            for split, rows in splits.items()
        }
    )


def load_examples(data_args: GlueDataArguments, model_args: GlueModelArguments) -> DatasetDict:
    """Load the sentences or pairs with their labels, by split."""
    if data_args.files:
        examples = DatasetDict()
        for split, path in data_args.files.items():
            # One by one, for a test file may have no labels; an empty cell of a csv file is no text, and NA is one.
            kind, options = ("csv", {"keep_default_na": False}) if path.endswith(".csv") else ("json", {})
            try:
                if kind == "csv":
                    with open(path, encoding="utf-8-sig", newline="") as file:
                        header = Counter(next(csv.reader(file), []))
                    if twice := [name for name, count in header.items() if count > 1]:
                        raise ValueError(f"it has the column {twice[0]} twice.")
                examples[split] = load_dataset(
                    kind, data_files=path, split="train", cache_dir=model_args.cache_dir, **options
                )
            except (DatasetGenerationError, ValueError, csv.Error) as error:
                raise ValueError(f"{path} cannot be read as {kind}: {error.__cause__ or error}") from error
        return examples
    if data_args.task_name is None and data_args.dataset_name is None:
        return topic_pairs()
    path, name = data_args.dataset_name, data_args.dataset_config_name
    if data_args.task_name is not None:
        path, name = "nyu-mll/glue", data_args.task_name
    try:
        examples = load_dataset(path, name, cache_dir=model_args.cache_dir, token=model_args.token)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded, and there is no train_file in its place: {error}") from error
    # Some data sets have others besides, which need not have labels.
    splits = ("train", "validation", "test")
    return DatasetDict({split: rows for split, rows in examples.items() if split.split("_")[0] in splits})


def is_text(rows: Dataset, column: str) -> bool:
    """Return whether a column holds text."""
    return rows.features[column] in (Value("string"), Value("large_string"))


def text_columns(examples: DatasetDict, task_name: str | None) -> list[str]:
    """Return the names of the one or two columns of text, which every split must have."""
    for split, rows in examples.items():
        if len(rows) == 0:
            raise ValueError(f"the {split} data must hold at least one example, but it is empty.")
    first, rows = next(iter(examples.items()))
    columns = [name for name in rows.column_names if is_text(rows, name) and name not in ("label", "idx")]
    if task_name is not None:
        columns = TASKS[task_name][0]
    elif {"sentence1", "sentence2"} <= set(columns):
        columns = ["sentence1", "sentence2"]
    if not 1 <= len(columns) <= 2:
        raise ValueError(f"the {first} data must have one or two columns of text, got {', '.join(columns) or 'none'}.")
    for split, rows in examples.items():
        for column in columns:
            if column not in rows.column_names:
                raise ValueError(f"the {split} data must have a column {column}, got {', '.join(rows.column_names)}.")
            if not is_text(rows, column):
                raise ValueError(f"the column {column} of the {split} data must be text.")
        if "label" not in rows.column_names and not split.startswith("test"):
            raise ValueError(f"the {split} data must have a column label, got {', '.join(rows.column_names)}.")
    return columns


def check_kinds(split: str, column: list) -> None:
    """Raise a ValueError if a column of labels has text among its numbers, as a csv file with a cell NA has."""
    numbers = [isinstance(value, str) and NUMBER.fullmatch(value.strip()) is not None for value in column]
    rest = [(i, value) for i, value in enumerate(column) if isinstance(value, str) and not numbers[i]]
    # Names such as 2020 and politics are no numbers with a gap.
    is_regression = any(number and not value.strip().isdigit() for number, value in zip(numbers, column))
    if any(numbers) and rest and (is_regression or all(value.strip().lower() in GAPS for _, value in rest)):
        row, value = rest[0]
        raise ValueError(
            f"the column label of the {split} data must hold either numbers or names, got {value!r} in row {row}."
        )


def read_labels(examples: DatasetDict, task_name: str | None) -> list[str] | None:
    """Turn the labels into names or, for a regression, into floats, in place; take them out of the test data.

    Returns:
        The names of the labels, in the order of their numbers; `None` for a regression. Empty if there is neither a
        task nor a label.
    """
    for split, rows in examples.items():
        if split.startswith("test") and "label" in rows.column_names:
            examples[split] = rows.remove_columns("label")
    features = {split: rows.features["label"] for split, rows in examples.items() if "label" in rows.column_names}
    if not features:
        return TASKS[task_name][1] if task_name is not None else []

    values = {split: examples[split]["label"][:] for split in features}
    for split, column in values.items():
        if not isinstance(features[split], (Value, ClassLabel)):
            raise ValueError(f"the column label of the {split} data must hold either text or numbers.")
        if any(value is None or value == "" or value != value for value in column):
            raise ValueError(f"the column label of the {split} data must have no empty cell.")
        check_kinds(split, column)
    feature, first = next(iter(features.values())), next(iter(values.values()))
    if task_name == "stsb" or (task_name is None and isinstance(first[0], float)):
        for split, column in values.items():
            for value in column:
                if not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise ValueError(f"the column label of the {split} data must hold numbers, got {value!r}.")
            column = [float(value) for value in column]
            examples[split] = examples[split].remove_columns("label").add_column("label", column)
        return None

    if task_name is not None:
        names = TASKS[task_name][1]
    elif isinstance(feature, ClassLabel):
        names = feature.names
    else:
        names = [str(value) for value in sorted(set(first))]
    name_of = {name: name for name in names}
    if task_name is not None or isinstance(feature, ClassLabel):
        name_of |= {str(number): name for number, name in enumerate(names)}
    for split, column in values.items():
        for value in column:
            if str(value) not in name_of:
                known = ", ".join(name_of)
                raise ValueError(f"the column label of the {split} data must hold {known}, got {str(value)!r}.")
        column = [name_of[str(value)] for value in column]
        examples[split] = examples[split].remove_columns("label").add_column("label", column)
    return names


def load_metric(config_name: str, cache_dir: str | None) -> evaluate.Metric:
    """Load the metric from this folder: the Hub's is code of that moment."""
    return evaluate.load(METRIC, config_name, cache_dir=cache_dir)


def main() -> None:
    parser = make_parser(
        __doc__.splitlines()[0], GlueModelArguments, GlueDataArguments, LoraArguments, AlsalsTrainingArguments
    )
    model_args, data_args, lora_args, training_args = start(parser, predicts=True)
    task = data_args.task_name

    with one_line_error(parser):
        examples = load_examples(data_args, model_args)
        columns = text_columns(examples, task)
        labels = read_labels(examples, task)
    logger.info(f"Taking the text from {' and '.join(columns)}")

    # Tokenizer and config: by name or path, else WordPiece of the data and a small BERT.
    with one_line_error(parser):
        tokenizer = load_tokenizer(model_args)
        if tokenizer is None:
            rows = next(iter(examples.values()))
            tokenizer = train_tokenizer(text or "" for column in columns for text in rows[column])
        small = BertConfig(
            **SMALL_BERT, vocab_size=len(tokenizer), max_position_embeddings=max(data_args.max_seq_length, 128)
        )
        config = load_config(model_args, lambda: small)
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or math.inf)
    if data_args.max_seq_length > longest:
        parser.error(
            f"max_seq_length must be at most {longest}, what model and tokenizer take, got {data_args.max_seq_length}."
        )

    is_regression = labels is None or (not labels and config.num_labels == 1)
    label_ids: dict[str, int] = {}
    if is_regression:
        config.num_labels = 1
    else:
        label_ids = match_labels(config, labels, is_trained=model_args.model_name_or_path is not None)
        if config.num_labels == 1:
            parser.error(f"the column label must hold two labels or more, got only {labels[0]!r}.")
    config.problem_type = "regression" if is_regression else "single_label_classification"

    with one_line_error(parser):
        model_kwargs = {"ignore_mismatched_sizes": model_args.ignore_mismatched_sizes}
        model = load_model(AutoModelForSequenceClassification, model_args, config, **model_kwargs)
        model = add_adapter(model, lora_args, "SEQ_CLS")

    # Preprocessing: tokenize the sentences or pairs.
    def preprocess(rows: dict[str, list]) -> dict[str, list]:
        texts = [[text or "" for text in rows[column]] for column in columns]
        padding = "max_length" if data_args.pad_to_max_length else False
        result = tokenizer(*texts, padding=padding, max_length=data_args.max_seq_length, truncation=True)
        if "label" in rows:
            result["label"] = rows["label"] if is_regression else [label_ids[name] for name in rows["label"]]
        return result

    with training_args.main_process_first(desc="preprocessing"):
        tokenized = DatasetDict(
            {
                split: rows.map(
                    preprocess,
                    batched=True,
                    remove_columns=rows.column_names,
                    load_from_cache_file=not data_args.overwrite_cache,
                    desc=f"Tokenizing the {split} data",
                )
                for split, rows in examples.items()
            }
        )

    def take(split: str, most: int | None) -> dict[str, Dataset]:
        # MNLI has a matched and a mismatched split to evaluate on and to predict.
        names = [name for name in (split, f"{split}_matched", f"{split}_mismatched") if name in tokenized]
        if not names:
            parser.error(f"there are no {split} data: name a {split}_file or another data set.")
        return {name: tokenized[name].select(range(min(most or math.inf, len(tokenized[name])))) for name in names}

    train_dataset = take("train", data_args.max_train_samples)["train"] if training_args.do_train else None
    eval_datasets = take("validation", data_args.max_eval_samples) if training_args.do_eval else {}
    predict_datasets = take("test", data_args.max_predict_samples) if training_args.do_predict else {}

    metric = load_metric(task or ("regression" if is_regression else "classification"), model_args.cache_dir)

    def compute_metrics(eval_preds: Any) -> dict[str, float]:
        predictions = eval_preds.predictions
        predictions = predictions[0] if isinstance(predictions, tuple) else predictions
        predictions = np.squeeze(predictions, axis=1) if is_regression else np.argmax(predictions, axis=1)
        metrics = metric.compute(predictions=predictions, references=eval_preds.label_ids)
        if task is not None and len(metrics) > 1:
            metrics["combined_score"] = float(np.mean(list(metrics.values())))
        return metrics

    with one_line_error(parser):
        trainer = AlsalsTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=next(iter(eval_datasets.values()), None),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
        )

    if training_args.do_train:
        train(parser, trainer, lora_args)

    metrics = {}
    for split, eval_dataset in eval_datasets.items():
        prefix = "eval_mm" if split.endswith("_mismatched") else "eval"
        part = trainer.evaluate(eval_dataset, metric_key_prefix=prefix)
        part[f"{prefix}_samples"] = len(eval_dataset)
        # transformers' script appends the _mm.
        metrics |= {f"eval_{key[8:]}_mm" if key.startswith("eval_mm_") else key: part[key] for key in part}
    if metrics:
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    for split, predict_dataset in predict_datasets.items():
        predictions = trainer.predict(predict_dataset, metric_key_prefix="predict").predictions
        predictions = predictions[0] if isinstance(predictions, tuple) else predictions
        if is_regression:
            answers = [f"{value:.3f}" for value in predictions[:, 0]]
        else:
            names = config.id2label | {i: label for label, i in label_ids.items()}
            answers = [names[i] for i in predictions.argmax(axis=1)]
            if task is not None and task not in SUBMITTED_BY_NAME:
                answers = [TASKS[task][1].index(answer) for answer in answers]
        name = "predict_results.txt" if task is None else f"{SUBMISSIONS[task]}.tsv"
        if split.endswith("_mismatched"):
            name = "MNLI-mm.tsv"
        if trainer.is_world_process_zero():
            with open(os.path.join(training_args.output_dir, name), "w", newline="") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerow(("index", "prediction"))
                writer.writerows(enumerate(answers))

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-classification"}
    if task is not None:
        card |= {"language": "en", "dataset_tags": "nyu-mll/glue", "dataset_args": task}
        card["dataset"] = f"GLUE {task.upper()}"
    elif data_args.dataset_name is not None:
        card |= {"dataset_tags": data_args.dataset_name, "dataset_args": data_args.dataset_config_name}
        card["dataset"] = " ".join(filter(None, (data_args.dataset_name, data_args.dataset_config_name)))
    elif not data_args.files:
        card["dataset"] = "topics of the Python language reference"
    finish(parser, trainer, **card)


if __name__ == "__main__":
    main()
