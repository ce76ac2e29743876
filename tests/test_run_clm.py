import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import recipe
import run_clm
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_alsals import AlsalsTrainingArguments

RECIPE = Path(run_clm.__file__)
TINY = [
    "--config_overrides",
    "n_layer=1,n_embd=16,n_head=2",
    "--block_size",
    "64",
    "--use_cpu",
    "--disable_tqdm",
    "true",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *map(str, flags)])
    run_clm.main()


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics)[:12]))
    return path


def test_the_command_of_the_readme_trains_evaluates_and_writes_what_the_hf_scripts_write(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, RECIPE, "--optim", "alsals", "--output_dir", output, "--max_steps", "20"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search("A sample: ['\"]The ", done.stdout)  # quoted by what the sample holds
    assert "'step_size': " in done.stdout + done.stderr
    expected = {"all_results.json", "trainer_state.json", "model.safetensors", "README.md", "step_size.png"}
    assert expected <= {path.name for path in output.iterdir()}
    assert results(output)["eval_loss"] < math.log(259) - 0.5
    assert results(output)["perplexity"] == pytest.approx(math.exp(results(output)["eval_loss"]))
    state = json.loads((output / "trainer_state.json").read_text())
    assert {"loss", "step_size", "slope", "decrease", "probes"} <= set(state["log_history"][0])
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.decode(tokenizer("naïve").input_ids, skip_special_tokens=True) == "naïve"
    assert model.config.vocab_size == len(tokenizer) == 259


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_config_is_read_and_flags_after_it_override_it(suffix, tmp_path, monkeypatch, text_file):
    config = {
        "optim": "salsa",
        "optim_args": "c=0.4,search_interval=2",
        "train_file": str(text_file),
        "validation_split_percentage": 20,
        "block_size": 64,
        "config_overrides": "n_layer=1,n_embd=16,n_head=2",
        "learning_rate": 0.5,
        "max_steps": 50,
        "use_cpu": True,
        "lr_scheduler_kwargs": {},
        "include_for_metrics": ["loss"],
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / f"config.{suffix}"
    path.write_text(yaml.safe_dump(config) if suffix == "yaml" else json.dumps(config))
    run(monkeypatch, path, "--max_steps", "3")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert state["log_history"][0]["lr_multiplier"] == 0.5


def test_the_shipped_config_is_valid(tmp_path):
    parser = recipe.make_parser(
        "", run_clm.ClmModelArguments, run_clm.ClmDataArguments, recipe.LoraArguments, AlsalsTrainingArguments
    )
    config = RECIPE.parent / "configs" / "gpt2-openwebtext.yaml"
    _, _, data_args, _, training_args = parser.parse_args_and_config([str(config), "--bf16", "false"])
    assert (data_args.dataset_name, data_args.streaming) == ("Skylion007/openwebtext", True)
    assert (training_args.optim, training_args.warmup_steps) == ("alsals", 0)


def test_a_local_data_set_is_streamed_and_split(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"text": topics[name], "other": 1}) for name in sorted(topics)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    flags = ["--optim", "alsals", "--dataset_name", folder, "--streaming", "--max_steps", 3, "--max_eval_samples", 4]
    run(monkeypatch, *flags, *TINY, "--output_dir", tmp_path / "out")
    assert math.isfinite(results(tmp_path / "out")["eval_loss"])


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_csv_and_json_files_with_a_validation_file(suffix, tmp_path, monkeypatch):
    files = []
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.{suffix}"
        text = topics["operator-summary"].replace('"', "'")
        path.write_text(f'text\n"{text}"\n' if suffix == "csv" else json.dumps({"text": text}))
        files += [f"--{split}_file", path]
    run(monkeypatch, "--optim", "alsals", *files, *TINY, "--max_steps", 2, "--output_dir", tmp_path / "out")
    assert results(tmp_path / "out")["eval_samples"] == results(tmp_path / "out")["train_samples"]


def test_a_saved_model_is_trained_on_and_evaluated(tmp_path, monkeypatch, text_file):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    data = ["--train_file", text_file, "--block_size", 64, "--use_cpu", "--disable_tqdm", "true"]
    run(monkeypatch, "--optim", "alsals", *data, *TINY, "--max_steps", 20, "--output_dir", first)
    model = ["--model_name_or_path", first, *data]
    run(monkeypatch, *model, "--do_eval", "--output_dir", second)
    assert results(second)["eval_loss"] == pytest.approx(results(first)["eval_loss"])
    assert "train_loss" not in results(second)
    run(monkeypatch, "--optim", "alsals", *model, "--torch_dtype", "float32", "--max_steps", 60, "--output_dir", third)
    assert results(third)["eval_loss"] < results(first)["eval_loss"]


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path, monkeypatch, text_file):
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--save_steps", 4]
    run(monkeypatch, *flags, "--max_steps", 8, "--output_dir", tmp_path / "whole")
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(resumed / "checkpoint-4")
    run(monkeypatch, *flags, "--max_steps", 8, "--output_dir", resumed, "--resume_from_checkpoint", "true")
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(whole[name].equal(again[name]) for name in whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_file", "nowhere.txt"], "train_file must be a file, but there is none at 'nowhere.txt'."),
        (["--train_file", "text.pdf"], "train_file must be a txt or csv or json or jsonl file, got 'text.pdf'."),
        (["--validation_split_percentage", "100"], "validation_split_percentage must be between 0 and 100, got 100."),
        (["--model_type", "gpt5000"], "got 'gpt5000'."),
        (["--block_size", "1"], "block_size must be at least 2, got 1."),
        (["--max_train_samples", "0"], "max_train_samples must be at least 1, got 0."),
        (["--optim", "alsals", "--optim_args", "c=3"], "c must be a number in (0, 1), got 3."),
        (["--optim", "alsal"], "invalid choice: 'alsal'"),
        (["--lerning_rate", "1"], "--lerning_rate"),
    ],
)
def test_a_bad_flag_is_named_in_the_last_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_block_size_beyond_the_model_is_refused_before_training(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--block_size", 128, "--config_overrides", "n_positions=64", "--output_dir", tmp_path)
    assert "block_size must be at most 64" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        (
            "short.txt",
            b"two\nlines\n",
            "block_size must leave the train text at least one whole block, got 64: take a sm",
        ),
        ("latin.txt", b"caf\xe9\n" * 100, "cannot be read as text"),
        ("numbers.csv", b"a,b\n1,2\n3,4\n", "must have a column of text named text, got a, b"),
        ("empty.jsonl", b"\n", "jsonl"),
    ],
)
def test_a_file_that_holds_no_text_is_named_before_training(name, content, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--optim", "alsals", "--train_file", path, *TINY, "--output_dir", tmp_path / "out")
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_empty_cell_is_no_text(tmp_path, monkeypatch):
    path = tmp_path / "text.csv"
    text = topics["strings"].replace('"', "'")
    path.write_text(f'id,text\n1,"{text}"\n2,\n3,"{text}"\n')
    flags = ["--optim", "alsals", "--train_file", path, *TINY, "--max_steps", 2]
    run(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    assert results(tmp_path / "out")["eval_loss"] > 0


def test_an_eval_strategy_alone_trains_too(tmp_path, monkeypatch, text_file):
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--eval_strategy", "steps", "--eval_steps", 2]
    run(monkeypatch, *flags, "--max_steps", 4, "--output_dir", tmp_path / "out")
    assert results(tmp_path / "out")["train_loss"] > 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 4]


def test_the_shortest_blocks_train_and_speak(tmp_path, monkeypatch, text_file):
    flags = ["--optim", "alsals", "--train_file", text_file, "--config_overrides", "n_layer=1,n_embd=16,n_head=2"]
    run(monkeypatch, *flags, "--block_size", 2, "--max_steps", 2, "--use_cpu", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "step_size.png").exists()


def test_the_same_seed_gives_the_same_model(tmp_path, monkeypatch, text_file):
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--max_steps", 4, "--seed", 7]
    for name, other_seed in (("one", 1), ("two", 2)):
        set_seed(other_seed)
        run(monkeypatch, *flags, "--output_dir", tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_trained_on_a_saved_model_and_saved_alone_or_merged(merge, tmp_path, monkeypatch, text_file):
    base, output = tmp_path / "base", tmp_path / "out"
    data = ["--train_file", text_file, "--block_size", 64, "--use_cpu", "--disable_tqdm", "true"]
    run(monkeypatch, "--optim", "alsals", *data, *TINY, "--max_steps", 2, "--output_dir", base)
    peft = ["--use_peft", "--lora_r", 2, *(["--merge_and_unload"] if merge else [])]
    flags = ["--model_name_or_path", base, *data, *peft, "--max_steps", 10, "--output_dir", output]
    run(monkeypatch, "--optim", "alsals", *flags)
    assert (output / "adapter_model.safetensors").exists() != merge
    assert (output / "model.safetensors").exists() == merge
    assert results(output)["eval_loss"] < results(base)["eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(output if merge else base)
    if not merge:
        model = PeftModel.from_pretrained(model, output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("The value of the expression", return_tensors="pt").input_ids
    trained, untrained = (one(ids).logits for one in (model, AutoModelForCausalLM.from_pretrained(base)))
    assert not trained.allclose(untrained)


def fails(monkeypatch, capsys, *flags):
    if "--output_dir" not in flags:  # tests beside each other may not share the default
        flags += ("--output_dir", tempfile.mkdtemp())
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *flags)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_not_the_runs_own_stays_and_costs_it_nothing(tmp_path, monkeypatch, text_file, caplog):
    output = tmp_path / "run_$a_$b"
    for name in ("adapter_old", "step_size.png", "checkpoint-best"):
        (output / name).mkdir(parents=True)
    for name in ("model_v1.safetensors", "adapter_notes.md"):
        (output / name).write_text("precious")
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--max_steps", 2, "--output_dir", output]
    run(monkeypatch, *flags)
    present = {path.name for path in output.iterdir()}
    assert {"adapter_old", "step_size.png", "checkpoint-best", "model.safetensors", "README.md"} <= present
    assert (output / "model_v1.safetensors").read_text() == (output / "adapter_notes.md").read_text() == "precious"
    assert "step_size.png is not written, training goes on without it: Is a directory" in caplog.text


def test_a_card_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, text_file, caplog):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_clm.AlsalsTrainer, "create_model_card", fail)
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--max_steps", 2, "--output_dir", tmp_path / "out"]
    run(monkeypatch, *flags)
    assert f"{tmp_path / 'out' / 'README.md'} is not written: No space left on device" in caplog.messages
    assert results(tmp_path / "out")["eval_loss"] > 0


@pytest.mark.parametrize(
    "missing",
    [
        ["README.md"],
        ["README.md", "eval_results.json"],
        ["README.md", "eval_results.json", "train_results.json", "all_results.json", "model.safetensors"],
    ],
)
def test_a_run_killed_after_its_last_checkpoint_does_what_is_missing(missing, tmp_path, monkeypatch, text_file):
    output = tmp_path / "out"
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--save_steps", 3, "--max_steps", 6]
    run(monkeypatch, *flags, "--output_dir", output)
    whole, metrics = load_file(output / "model.safetensors"), results(output)
    for name in missing:
        (output / name).unlink()
    run(monkeypatch, *flags, "--output_dir", output, "--resume_from_checkpoint", "true")
    again = load_file(output / "model.safetensors")
    assert all(whole[name].equal(again[name]) for name in whole)
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 6
    assert results(output)["eval_loss"] == metrics["eval_loss"]
    assert results(output)["train_loss"] == metrics["train_loss"]
    assert all((output / name).exists() for name in missing)
    assert "probes per step" in (output / "README.md").read_text()


def test_a_run_that_goes_on_leaves_no_results_of_fewer_steps(tmp_path, monkeypatch, text_file, capsys):
    output = tmp_path / "out"
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--save_steps", 2, "--output_dir", output]
    run(monkeypatch, *flags, "--max_steps", 2)

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_clm.AlsalsTrainer, "save_model", kill)  # with the first checkpoint
        run(monkeypatch, *flags, "--max_steps", 4, "--resume_from_checkpoint", "true")
    assert not {"README.md", "all_results.json", "eval_results.json"} & {path.name for path in output.iterdir()}
    run(monkeypatch, *flags, "--max_steps", 4, "--resume_from_checkpoint", "true")
    assert (output / "README.md").exists()
    message = fails(monkeypatch, capsys, *flags, "--max_steps", 4, "--resume_from_checkpoint", "true")
    assert "holds a finished run, nothing is left to go on with" in message


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("save_model", OSError(28, "No space left on device"), "cannot be read or written: No space left on device"),
        (
            "train",
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
            "cannot be read or written: ",
        ),
        ("train", ValueError("two\nlines"), "error: two lines"),
    ],
)
def test_what_ends_a_training_is_said_in_one_line(method, error, message, tmp_path, monkeypatch, text_file, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(run_clm.AlsalsTrainer, method, fail)
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--max_steps", 2, "--output_dir", tmp_path / "out"]
    assert message in fails(monkeypatch, capsys, *flags)


def test_a_metric_that_there_is_not_is_named(tmp_path, monkeypatch, text_file, capsys):
    flags = ["--optim", "alsals", "--train_file", text_file, *TINY, "--max_steps", 2, "--output_dir", tmp_path / "out"]
    flags += ["--eval_strategy", "steps", "--eval_steps", 1, "--metric_for_best_model", "f1"]
    message = fails(monkeypatch, capsys, *flags)
    assert "metric_for_best_model" in message and "'eval_f1'" in message and "eval_accuracy" in message


def test_an_adapter_goes_on_as_the_adapter_that_it_was(tmp_path, monkeypatch, text_file, capsys):
    base = tmp_path / "base"
    data = ["--train_file", text_file, "--block_size", 64, "--use_cpu", "--disable_tqdm", "true"]
    run(monkeypatch, "--optim", "alsals", *data, *TINY, "--max_steps", 1, "--output_dir", base)
    flags = ["--optim", "alsals", "--model_name_or_path", base, *data, "--save_steps", 1]
    run(monkeypatch, *flags, "--use_peft", "--lora_r", 2, "--max_steps", 2, "--output_dir", tmp_path / "lora")
    flags += ["--max_steps", 3, "--resume_from_checkpoint", tmp_path / "lora" / "checkpoint-2"]
    for number, other in enumerate((["--use_peft", "--lora_r", 4], [])):
        message = fails(monkeypatch, capsys, *flags, *other, "--output_dir", tmp_path / str(number))
        assert "resume_from_checkpoint must be a checkpoint of this model, but " in message
        assert len(message) < 500
    run(monkeypatch, *flags, "--use_peft", "--lora_r", 2, "--output_dir", tmp_path / "on")
    assert json.loads((tmp_path / "on" / "trainer_state.json").read_text())["global_step"] == 3
