import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import recipe
import run_image_classification
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as DatasetImage
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from hf_alsals import AlsalsTrainingArguments

RECIPE = Path(run_image_classification.__file__)
TINY = ["--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it was read when it was imported


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run_image_classification.py", *map(str, flags)])
    run_image_classification.main()


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def digit_images(count):
    digits = load_digits()
    images = [Image.fromarray((image * 15).astype(np.uint8)) for image in digits.images[:count]]
    return images, digits.target[:count].tolist()


def write_folder(folder, count=24):
    for i, (image, label) in enumerate(zip(*digit_images(count), strict=True)):
        (folder / f"digit-{label}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"digit-{label}" / f"{i}.png")
    return folder


def write_parquet(path, tmp_path, count=24, labels=None):
    """Write a parquet file of bytes and numbers, without what datasets adds of its own."""
    rows = []
    images, targets = digit_images(count)
    for image in images:
        image.save(tmp_path / "one.png")
        rows.append({"bytes": (tmp_path / "one.png").read_bytes(), "path": None})
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")})
    Dataset.from_dict({"image": rows, "label": labels or targets}, features).to_parquet(str(path))
    return path


def test_the_digits_are_learned_without_a_learning_rate(tmp_path, monkeypatch):
    output = tmp_path / "out"
    run(monkeypatch, "--optim", "alsals", *TINY, "--output_dir", output)
    assert results(output)["eval_accuracy"] > 0.95
    assert results(output)["train_samples"] + results(output)["eval_samples"] == 1797
    expected = {"model.safetensors", "preprocessor_config.json", "README.md", "step_size.png", "trainer_state.json"}
    assert expected <= {path.name for path in output.iterdir()}
    model = AutoModelForImageClassification.from_pretrained(output)
    processor = AutoImageProcessor.from_pretrained(output)
    assert model.config.id2label == {i: str(i) for i in range(10)}
    images, labels = digit_images(100)
    pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")
    assert (model.eval()(**pixels).logits.argmax(1).numpy() == labels).mean() > 0.9
    again = tmp_path / "again"
    run(monkeypatch, "--model_name_or_path", output, *TINY, "--do_eval", "--output_dir", again)
    assert results(again)["eval_loss"] == pytest.approx(results(output)["eval_loss"])


def test_a_vision_transformer_is_made_to_the_size_of_the_images(tmp_path, monkeypatch):
    overrides = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,patch_size=8"
    flags = ["--model_type", "vit", "--config_overrides", overrides, "--image_size", 24, "--max_steps", 2]
    run(monkeypatch, "--optim", "alsals", *flags, *TINY, "--output_dir", tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.vit.embeddings.position_embeddings.shape == (1, 10, 32)
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 24


def test_folders_of_images_with_and_without_a_validation_folder(tmp_path, monkeypatch):
    train, validation = write_folder(tmp_path / "train", 40), write_folder(tmp_path / "validation", 12)
    flags = ["--optim", "alsals", "--train_dir", train, *TINY, "--max_steps", 2]
    run(monkeypatch, *flags, "--output_dir", tmp_path / "one")
    assert (results(tmp_path / "one")["train_samples"], results(tmp_path / "one")["eval_samples"]) == (34, 6)
    run(monkeypatch, *flags, "--validation_dir", validation, "--output_dir", tmp_path / "two")
    assert (results(tmp_path / "two")["train_samples"], results(tmp_path / "two")["eval_samples"]) == (40, 12)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "two")
    assert model.config.id2label[3] == "digit-3"
    assert "digit" not in (tmp_path / "two" / "README.md").read_text()


def test_parquet_files_and_a_folder_of_them(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    train = write_parquet(folder / "train.parquet", tmp_path, 40)
    test = write_parquet(folder / "test.parquet", tmp_path, 12)
    flags = ["--optim", "alsals", *TINY, "--max_steps", 2]
    run(monkeypatch, *flags, "--dataset_name", folder, "--output_dir", tmp_path / "one")
    files = ["--train_file", train, "--validation_file", test]
    run(monkeypatch, *flags, *files, "--max_train_samples", 20, "--output_dir", tmp_path / "two")
    assert (results(tmp_path / "one")["train_samples"], results(tmp_path / "one")["eval_samples"]) == (40, 12)
    assert (results(tmp_path / "two")["train_samples"], results(tmp_path / "two")["eval_samples"]) == (20, 12)
    assert str(tmp_path) not in (tmp_path / "one" / "README.md").read_text()


def test_training_images_are_shifted_and_mirrored():
    set_seed(0)
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) // 2 + 100)
    seen = set()
    for _ in range(400):
        moved = np.asarray(run_image_classification.shift_and_mirror(image))
        assert moved.shape == (16, 16)
        matches = [
            (left, top, flip)
            for flip in (False, True)
            for left in range(-2, 3)
            for top in range(-2, 3)
            if (shifted(np.asarray(image), left, top, flip) == moved).all()
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) == 50


def shifted(pixels, left, top, flip):
    padded = np.zeros((20, 20), pixels.dtype)
    padded[2:18, 2:18] = pixels
    window = padded[2 + top : 18 + top, 2 + left : 18 + left]
    return window[:, ::-1] if flip else window


def test_only_images_to_train_on_are_changed_and_the_digits_never(tmp_path, monkeypatch):
    seen = []

    class SeenTrainer(run_image_classification.AlsalsTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            seen.append(self)

    monkeypatch.setattr(run_image_classification, "AlsalsTrainer", SeenTrainer)
    folder = write_folder(tmp_path / "train", 40)
    flags = [*TINY, "--max_steps", 1]
    run(monkeypatch, *flags, "--output_dir", tmp_path / "digits")
    run(monkeypatch, *flags, "--train_dir", folder, "--output_dir", tmp_path / "folder")
    run(monkeypatch, *flags, "--train_dir", folder, "--augment", "false", "--output_dir", tmp_path / "still")

    def moves(dataset):
        return len({dataset[0]["pixel_values"].numpy().tobytes() for _ in range(10)}) > 1

    assert [moves(trainer.train_dataset) for trainer in seen] == [False, True, False]
    assert not any(moves(trainer.eval_dataset) for trainer in seen)


def test_the_shipped_config_is_valid(monkeypatch):
    monkeypatch.chdir(RECIPE.parent.parent)
    parser = recipe.make_parser(
        "",
        run_image_classification.ImageModelArguments,
        run_image_classification.ImageDataArguments,
        AlsalsTrainingArguments,
    )
    config = "recipes/configs/cifar10-resnet.yaml"
    _, model_args, data_args, training_args = parser.parse_args_and_config([config])
    assert (data_args.dataset_name, data_args.augment) == ("uoft-cs/cifar10", True)
    assert (training_args.optim, training_args.per_device_train_batch_size) == ("alsals", 128)
    model = AutoModelForImageClassification.from_config(recipe.load_config(model_args, None))
    convolutions = [name for name, value in model.named_parameters() if value.ndim == 4 and "shortcut" not in name]
    assert len(convolutions) == 33  # and the classifier are 34
    assert 21e6 < model.num_parameters() < 23e6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_dir", "nowhere"], "train_dir must be a folder, but there is none at 'nowhere'."),
        (["--train_file", "x.csv"], "train_file must be a parquet file, got 'x.csv'."),
        (["--train_val_split", "1.5"], "train_val_split must be in (0, 1), got 1.5."),
        (["--dataset_name", "x", "--train_dir", "."], "only one of dataset_name, train_dir and train_file"),
        (["--model_type", "gpt2"], "got 'gpt2'."),
        (["--image_size", "4"], "image_size must be at least 8, got 4."),
        (["--dataset_name", "no-such/data"], "no-such/data"),
        (["--train_file", "label.parquet"], "image_column_name must be a column of the train data (label), got 'im"),
        (["--train_file", "one.parquet"], "the images must have two labels or more, got only '5'."),
        (["--train_dir", "empty"], "the images cannot be loaded as imagefolder"),
        (["--train_dir", "one"], "train_dir must hold a folder of images for each label, two or more."),
        (["--do_predict"], "do_predict must be left out"),
        (["--image_column_name", "label"], "image_column_name and label_column_name must differ"),
        (["--config_overrides", "hidden_sizes"], "config_overrides must look like a=10,b=0.2, got 'hidden_sizes'"),
        (["--image_processor_name", "nowhere"], "image_processor_name must be a name on the Hub or a path, and 'nowh"),
        (["--report_to", "nothing"], "nothing"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0."),
        (["--model_name_or_path", "nowhere"], "model_name_or_path must be a name on the Hub or a path, and 'nowhere'"),
    ],
)
def test_a_fault_is_named_in_the_last_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "one" / "only", 3)
    for path in (tmp_path / "one").rglob("*.png"):
        path.rename(tmp_path / "one" / path.name)
    for path in (tmp_path / "one" / "only").iterdir():
        path.rmdir()
    (tmp_path / "one" / "only").rmdir()
    Dataset.from_dict({"label": [1, 2]}).to_parquet("label.parquet")
    write_parquet(tmp_path / "one.parquet", tmp_path, 3, labels=[5, 5, 5])
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, *TINY, "--output_dir", "out")
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_keeps_its_own_labels_on_images_with_some_of_them(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    run(monkeypatch, "--train_dir", write_folder(tmp_path / "all", 60), *TINY, "--max_steps", 2, "--output_dir", first)
    some = tmp_path / "some"
    for name in ("digit-7", "digit-3"):
        shutil.copytree(tmp_path / "all" / name, some / name)
    seen = []

    class SeenTrainer(run_image_classification.AlsalsTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            seen.append(self)

    monkeypatch.setattr(run_image_classification, "AlsalsTrainer", SeenTrainer)
    flags = ["--model_name_or_path", first, "--train_dir", some, "--augment", "false", *TINY, "--max_steps", 1]
    run(monkeypatch, *flags, "--output_dir", second)
    assert {row["labels"] for row in seen[0].train_dataset} == {3, 7}
    assert AutoModelForImageClassification.from_pretrained(second).config.num_labels == 10


def test_labels_that_were_not_trained_on_are_refused(tmp_path, monkeypatch, capsys):
    train = write_parquet(tmp_path / "train.parquet", tmp_path, 3, labels=[1, 2, 3])
    validation = write_parquet(tmp_path / "validation.parquet", tmp_path, 3, labels=[1, 2, 7])
    with pytest.raises(SystemExit):
        run(monkeypatch, "--train_file", train, "--validation_file", validation, *TINY, "--output_dir", tmp_path / "o")
    message = "the validation data has the label '7', the training data 1, 2, 3."
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_labels_named_are_those_that_were_trained_on(tmp_path, monkeypatch, capsys):
    # The names of a data set may be more than its training images have.
    labels = ClassLabel(names=["a", "b", "c"])
    features = Features({"image": DatasetImage(), "label": labels})
    images, _ = digit_images(3)
    files = []
    for split, numbers in (("train", [0, 1, 1]), ("validation", [0, 1, 2])):
        path = tmp_path / f"{split}.parquet"
        Dataset.from_dict({"image": images, "label": numbers}, features).to_parquet(path)
        files += [f"--{split}_file", path]
    with pytest.raises(SystemExit):
        run(monkeypatch, *files, *TINY, "--output_dir", tmp_path / "out")
    message = "the validation data has the label 'c', the training data a, b."
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("content", ["half", "text", "none"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(content, workers, tmp_path, monkeypatch, capfd):
    folder = write_folder(tmp_path / "train", 12)
    path = next(folder.rglob("*.png"))
    whole = path.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "text": b"no image at all", "none": b""}[content])
    flags = ["--train_dir", folder, "--validation_dir", folder, *TINY, "--num_train_epochs", 1]
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, "--dataloader_num_workers", workers, "--output_dir", tmp_path / "out")
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"error: the image {path} cannot be read: " in last


def test_an_image_of_more_than_8_bits_is_refused_with_its_mode(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)).save(path)
    message = rf"^the image {re.escape(str(path))} cannot be read: its mode is I(;16)?, with values above 255: save"
    with pytest.raises(ValueError, match=message):
        run_image_classification.open_image({"path": str(path), "bytes": None}, 0)
