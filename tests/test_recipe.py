import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import recipe
from transformers import AutoTokenizer

from hf_alsals import AlsalsTrainingArguments

RECIPES = sorted(Path(recipe.__file__).parent.glob("run_*.py"))


@dataclass
class NoArguments:
    pass


def start(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, flags)])
    return recipe.start(recipe.make_parser("A recipe.", NoArguments, AlsalsTrainingArguments))[-1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_help_has_one_line_a_flag(path):
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True)
    _, _, *flags = done.stdout.split("\n\n")
    lines = "\n\n".join(flags).rstrip().splitlines()
    assert lines[0] == "options:"
    assert len(lines) > 100
    assert all(line.startswith("  --") and len(line.split()) > 1 for line in lines[1:])
    names = [line.split()[0] for line in lines[1:]]
    assert len(set(names)) == len(names)
    assert {"--optim", "--overwrite_output_dir", "--push_to_hub", "--model_name_or_path"} <= set(names)


@pytest.mark.parametrize(
    ("flags", "done"),
    [
        ([], (True, True, False)),
        (["--do_train"], (True, False, False)),
        (["--do_eval"], (False, True, False)),
        (["--do_predict"], (False, False, True)),
        (["--eval_strategy", "epoch"], (True, True, False)),
        (["--do_train", "--eval_strategy", "epoch"], (True, True, False)),
    ],
)
def test_without_flags_a_recipe_trains_and_evaluates(flags, done, tmp_path, monkeypatch):
    args = start(monkeypatch, *flags, "--output_dir", tmp_path, "--use_cpu")
    assert (args.do_train, args.do_eval, args.do_predict) == done
    assert (args.logging_steps, args.logging_first_step) == (10, True)


@pytest.mark.parametrize("name", recipe.RESULTS)
def test_a_finished_run_is_not_overwritten_unless_that_is_asked_for(name, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_text("precious")
    flags = ["--output_dir", tmp_path, "--use_cpu"]
    with pytest.raises(SystemExit):
        start(monkeypatch, *flags)
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"output_dir {str(tmp_path)!r} holds a finished run ({name})" in last_line
    for more in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "true"], ["--do_eval"]):
        start(monkeypatch, *flags, *more)
    assert (tmp_path / name).read_text() == "precious"


def test_an_interrupted_run_may_be_started_again(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-5").mkdir()
    assert start(monkeypatch, "--output_dir", tmp_path, "--use_cpu").do_train


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, "--output_dir", tmp_path, "--resume_from_checkpoint", "checkpoint-7")
    assert (
        "resume_from_checkpoint must be true or a checkpoint's folder, got 'checkpoint-7'." in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("loader", "argument"),
    [
        (recipe.load_tokenizer, "model_name_or_path"),
        (recipe.load_tokenizer, "tokenizer_name"),
        (lambda args: recipe.load_config(args, None), "model_name_or_path"),
        (lambda args: recipe.load_config(args, None), "config_name"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_its_argument(loader, argument, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    args = recipe.TextModelArguments(**{argument: "no-such/name"})
    with pytest.raises(
        ValueError, match=f"^{argument} must be a name on the Hub or a path, and 'no-such/name' cannot"
    ):
        loader(args)


def test_errors_of_many_lines_become_one(capsys):
    parser = recipe.make_parser("A recipe.", NoArguments, AlsalsTrainingArguments)
    with pytest.raises(SystemExit) as error, recipe.one_line_error(parser):
        raise ValueError("one\n  two\n\nthree")
    assert error.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("error: one two three")


def test_the_trained_tokenizer_is_that_of_bert(tmp_path):
    texts = ["The quick brown fox jumps over the lazy dog."] * 3 + ["Naïve foxes, unhappiness!"]
    tokenizer = recipe.train_tokenizer(texts)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, loaded):
        pair = one("the fox", "lazy")
        assert one.convert_ids_to_tokens(pair.input_ids) == ["[CLS]", "the", "fox", "[SEP]", "lazy", "[SEP]"]
        assert pair.token_type_ids == [0, 0, 0, 0, 1, 1]
        assert one.convert_ids_to_tokens(one("ж").input_ids) == ["[CLS]", "[UNK]", "[SEP]"]
        assert (one.pad_token, one.mask_token) == ("[PAD]", "[MASK]")
    assert len(tokenizer) <= 2048


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"merge_and_unload": True}, "merge_and_unload needs use_peft."),
        ({"lora_r": 0}, "lora_r must be at least 1, got 0."),
        ({"lora_alpha": 0}, "lora_alpha must be at least 1, got 0."),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0."),
    ],
)
def test_a_bad_adapter_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        recipe.LoraArguments(**kwargs)


def test_the_summary_of_benchmarks_is_json():
    for path in (Path(recipe.__file__).parent / "benchmarks").glob("*.json"):
        assert json.loads(path.read_text())
