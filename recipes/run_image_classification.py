"""Train an image classifier (ResNet, ViT and others) from scratch or from a checkpoint, with `--optim alsals`.

The flags are those of transformers' examples/pytorch/image-classification/run_image_classification.py. Without a model
it builds a small ResNet, without data it takes scikit-learn's 1797 scans of handwritten digits.

    python recipes/run_image_classification.py --optim alsals --output_dir out
    python recipes/run_image_classification.py recipes/configs/cifar10-resnet.yaml
"""

import os
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import ImageOps
from recipe import (
    ModelArguments,
    check_counts,
    check_file,
    evaluate,
    finish,
    load_config,
    load_model,
    loading,
    make_parser,
    match_labels,
    one_line_error,
    override,
    start,
    train,
)
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
    ResNetConfig,
    ViTImageProcessor,
)

from hf_alsals import AlsalsTrainer, AlsalsTrainingArguments
from hf_alsals.callbacks import one_line

# 0.2 M parameters.
SMALL_RESNET = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 64],
    "depths": [1, 1, 1],
    "layer_type": "basic",
}


@dataclass
class ImageModelArguments(ModelArguments):
    """Which model and image processor to train."""

    model_type: str | None = field(
        default=None, metadata={"help": "The type of a new model, such as resnet or vit; by default a small ResNet."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Overrides of a new model's config, as in patch_size=4,num_hidden_layers=6."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor name or path if not the same as model_name_or_path."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Images are scaled to so many pixels a side; by default as the model's, 32 for a new one."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Whether to start with a new head if the checkpoint's has another size."}
    )

    def __post_init__(self) -> None:
        for name in ("model_type", "config_overrides"):
            if getattr(self, name) is not None and (self.config_name or self.model_name_or_path):
                raise ValueError(f"{name} cannot be combined with config_name or model_name_or_path.")
        known = sorted(config.model_type for config in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
        if self.model_type is not None and self.model_type not in known:
            raise ValueError(f"model_type must be one of {', '.join(known)}, got {self.model_type!r}.")
        check_counts(self, image_size=8)

    def new_config(self) -> PretrainedConfig:
        """Return the config of a new model: that of its type, or the small one, with the overrides."""
        config = CONFIG_MAPPING[self.model_type]() if self.model_type else ResNetConfig(**SMALL_RESNET)
        if hasattr(config, "image_size"):
            config.image_size = self.image_size or 32
        override(config, self.config_overrides)
        return config


@dataclass
class ImageDataArguments:
    """Which images to train on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "The data set on the Hub, or its local path; by default scikit-learn's digits."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of the data set."})
    train_dir: str | None = field(default=None, metadata={"help": "The training images: a folder for each label."})
    validation_dir: str | None = field(default=None, metadata={"help": "The evaluation images, in the same way."})
    train_file: str | None = field(default=None, metadata={"help": "The training images: a parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "The evaluation images: a parquet file."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "The share of the training images to evaluate on, if there are no other."}
    )
    image_column_name: str = field(default="image", metadata={"help": "The column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "The column of the labels."})
    augment: bool | None = field(
        default=None,
        metadata={"help": "Whether to shift and mirror training images; by default yes, but not the digits."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Take this many training images only, for debugging or quicker training."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Take this many evaluation images only, for debugging or quicker training."}
    )

    def __post_init__(self) -> None:
        files = [self.train_file, self.validation_file]
        folders = [self.train_dir, self.validation_dir]
        if sum((self.dataset_name is not None, any(files), any(folders))) > 1:
            raise ValueError("only one of dataset_name, train_dir and train_file can be used.")
        for name in ("train_dir", "validation_dir"):
            path = getattr(self, name)
            if path is not None and not os.path.isdir(path):
                raise ValueError(f"{name} must be a folder, but there is none at {path!r}.")
        for name in ("train_file", "validation_file"):
            if (path := getattr(self, name)) is not None:
                check_file(name, path, ("parquet",))
        check_counts(self, max_train_samples=1, max_eval_samples=1)
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split must be in (0, 1), got {self.train_val_split}.")
        if self.augment is None:
            self.augment = not self.is_embedded

    @property
    def is_embedded(self) -> bool:
        """Whether the images are scikit-learn's digits."""
        sources = (self.dataset_name, self.train_dir, self.validation_dir, self.train_file, self.validation_file)
        return not any(sources)


def load_images(data_args: ImageDataArguments, model_args: ModelArguments, seed: int) -> DatasetDict:
    """Load the images, as splits `train` and `validation` with the columns `image` and `label`."""
    if data_args.is_embedded:
        digits = load_digits()
        columns = {"image": (digits.images * (255 / 16)).astype(np.uint8), "label": digits.target}
        images = DatasetDict(train=Dataset.from_dict(columns))
    else:
        options: dict[str, Any] = {"cache_dir": model_args.cache_dir}
        if data_args.dataset_name is not None:
            path, name = data_args.dataset_name, data_args.dataset_config_name
            options["token"] = model_args.token
        elif data_args.train_file or data_args.validation_file:
            path, name = "parquet", None
            files = {"train": data_args.train_file, "validation": data_args.validation_file}
            options["data_files"] = {split: file for split, file in files.items() if file is not None}
        else:
            path, name = "imagefolder", None
            folders = {"train": data_args.train_dir, "validation": data_args.validation_dir}
            options["data_files"] = {
                split: os.path.join(folder, "**") for split, folder in folders.items() if folder is not None
            }
        try:
            images = load_dataset(path, name, **options)
        except (DatasetGenerationError, OSError, ValueError) as error:
            raise ValueError(f"the images cannot be loaded as {path}: {error.__cause__ or error}") from error
        if "test" in images and "validation" not in images:
            images["validation"] = images.pop("test")

    for split, rows in images.items():
        if len(rows) == 0:
            raise ValueError(f"the {split} data must hold at least one image, but it is empty.")
        wanted = {"image": data_args.image_column_name, "label": data_args.label_column_name}
        if len(set(wanted.values())) == 1:
            raise ValueError(f"image_column_name and label_column_name must differ, got {wanted['label']!r} twice.")
        for kind, column in wanted.items():
            if column not in rows.column_names and (data_args.train_dir or data_args.validation_dir):
                raise ValueError(f"{split}_dir must hold a folder of images for each label, two or more.")
            if column not in rows.column_names:
                raise ValueError(
                    f"{kind}_column_name must be a column of the {split} data ({', '.join(rows.column_names)}), "
                    f"got {column!r}."
                )
        rows = rows.select_columns(list(wanted.values()))
        images[split] = rows.rename_columns({column: kind for kind, column in wanted.items() if column != kind})
        # They are decoded where an error can name the image.
        images[split] = images[split].cast_column("image", Image(decode=False))
        images[split] = images[split].add_column("row", range(len(rows)))

    # The labels by name, in the order of their numbers if there are any.
    first = next(iter(images.values()))
    feature = first.features["label"]
    names = feature.names if isinstance(feature, ClassLabel) else None
    for split, rows in images.items():
        feature = rows.features["label"]
        if not isinstance(feature, (ClassLabel, Value)):
            raise ValueError(
                f"label_column_name must be a column of names or numbers, that of the {split} data is not."
            )
        column = rows["label"][:]
        if None in column:
            raise ValueError(f"the {split} data must have a label for every image, row {column.index(None)} has none.")
        column = [feature.int2str(label) if isinstance(feature, ClassLabel) else str(label) for label in column]
        if split == next(iter(images)):
            present = set(column)
            # Numbers in their order, not 10 before 2.
            names = names or [str(label) for label in sorted(set(rows["label"]))]
        if unknown := sorted(set(column) - present):
            known = ", ".join(name for name in names if name in present)
            raise ValueError(f"the {split} data has the label {unknown[0]!r}, the training data {known}.")
        rows = rows.remove_columns("label").add_column("label", [names.index(label) for label in column])
        images[split] = rows.cast_column("label", ClassLabel(names=names))
    if "train" in images and "validation" not in images:
        halves = images["train"].train_test_split(data_args.train_val_split, seed=seed)
        images = DatasetDict(train=halves["train"], validation=halves["test"])
    return images


def make_image_processor(model_args: ImageModelArguments, config: PretrainedConfig) -> Any:
    """Load the image processor by its name or path, or else make one that scales and normalizes."""
    name = model_args.image_processor_name or model_args.model_name_or_path
    size = model_args.image_size or getattr(config, "image_size", 32)
    if name is None:
        return ViTImageProcessor(size={"height": size, "width": size})
    size = {} if model_args.image_size is None else {"size": {"height": size, "width": size}}
    with loading("image_processor_name" if model_args.image_processor_name else "model_name_or_path", name):
        return AutoImageProcessor.from_pretrained(name, **size, **model_args.hub_kwargs)


def open_image(image: dict[str, Any] | None, row: int) -> Any:
    """Decode an image of a data set, given as its bytes or its path."""
    try:
        picture = Image().decode_example(image)
        if picture.mode.startswith(("I", "F")) and picture.getextrema()[1] > 255:  # which RGB would clip
            raise ValueError(f"its mode is {picture.mode}, with values above 255: save it with 8 bits a channel.")
        return picture.convert("RGB")
    except (AttributeError, OSError, SyntaxError, TypeError, ValueError) as error:
        name = (image or {}).get("path") or f"of row {row}"
        raise ValueError(f"the image {name} cannot be read: {one_line(error)}") from error


def shift_and_mirror(image: Any) -> Any:
    """Shift an image by up to an eighth of its sides over black, and mirror every other one."""
    width, height = image.size
    margin = max(width, height) // 8
    left, top = random.randint(0, 2 * margin), random.randint(0, 2 * margin)
    image = ImageOps.expand(image, margin).crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], ImageModelArguments, ImageDataArguments, AlsalsTrainingArguments)
    model_args, data_args, training_args = start(parser)
    training_args.remove_unused_columns = False  # the columns become pixel values when they are read

    with one_line_error(parser):
        images = load_images(data_args, model_args, training_args.seed)
    labels = next(iter(images.values())).features["label"].names

    with one_line_error(parser):
        config = load_config(model_args, model_args.new_config)
        label_ids = match_labels(config, labels, is_trained=model_args.model_name_or_path is not None)
        if config.num_labels < 2:
            raise ValueError(f"the images must have two labels or more, got only {labels[0]!r}.")
        image_processor = make_image_processor(model_args, config)
        model_kwargs = {"ignore_mismatched_sizes": model_args.ignore_mismatched_sizes}
        model = load_model(AutoModelForImageClassification, model_args, config, **model_kwargs)

    # Preprocessing, when images are read: shift and mirror those to train on, then what the model's processor does.
    def pixels(rows: dict[str, list], augment: bool) -> dict[str, Any]:
        pictures = [open_image(image, row) for image, row in zip(rows["image"], rows["row"])]
        if augment:
            pictures = [shift_and_mirror(picture) for picture in pictures]
        return {
            "pixel_values": image_processor(pictures, return_tensors="pt")["pixel_values"],
            "labels": [label_ids[labels[label]] for label in rows["label"]],
        }

    def take(split: str, most: int | None, augment: bool) -> Dataset:
        if split not in images:
            parser.error(f"there are no {split} images: name a {split}_dir, a {split}_file or another data set.")
        rows = images[split].shuffle(seed=training_args.seed) if most is not None else images[split]
        rows = rows.select(range(min(most or len(rows), len(rows))))
        return rows.with_transform(lambda batch: pixels(batch, augment))

    train_dataset = eval_dataset = None
    if training_args.do_train:
        train_dataset = take("train", data_args.max_train_samples, data_args.augment)
    if training_args.do_eval:
        eval_dataset = take("validation", data_args.max_eval_samples, False)

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    def compute_metrics(eval_preds: Any) -> dict[str, float]:
        return {"accuracy": accuracy_score(eval_preds.label_ids, eval_preds.predictions.argmax(axis=1))}

    with one_line_error(parser):
        trainer = AlsalsTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            data_collator=collate,
            compute_metrics=compute_metrics,
        )

    if training_args.do_train:
        train(parser, trainer)
    if training_args.do_eval:
        evaluate(parser, trainer)

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "image-classification"}
    if data_args.dataset_name is not None:
        card |= {"dataset_tags": data_args.dataset_name, "dataset_args": data_args.dataset_config_name}
        card["dataset"] = data_args.dataset_name
    elif data_args.is_embedded:
        card["dataset"] = "digits of scikit-learn"
    finish(parser, trainer, **card)


if __name__ == "__main__":
    main()
