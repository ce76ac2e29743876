import os
import subprocess
import sys
from pathlib import Path

import pytest
import recipe
from transformers import AutoTokenizer, BertConfig
from transformers.trainer_callback import TrainerState

from hf_alsals import AlsalsTrainingArguments

RECIPES = sorted(Path(recipe.__file__).parent.glob("run_*.py"))


def start(monkeypatch, *flags, predicts=False):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, flags)])
    parser = recipe.make_parser("A recipe.", recipe.ModelArguments, AlsalsTrainingArguments)
    return recipe.start(parser, predicts=predicts)[-1]


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
    model = ["--model_name_or_path", "some"]
    args = start(monkeypatch, *flags, *model, "--output_dir", tmp_path, "--use_cpu", predicts=True)
    assert (args.do_train, args.do_eval, args.do_predict) == done
    assert (args.logging_steps, args.logging_first_step) == (10, True)


def refused(monkeypatch, capsys, *flags):
    with pytest.raises(SystemExit):
        start(monkeypatch, *flags)
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("flag", ["--do_eval", "--do_predict"])
def test_a_model_that_has_learnt_nothing_is_not_evaluated(flag, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, flag, "--output_dir", tmp_path, "--use_cpu", predicts=True)
    assert "model_name_or_path must be given where nothing is trained" in capsys.readouterr().err


def write_checkpoint(output_dir, step, epoch=1.0):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir()
    TrainerState(global_step=step, epoch=epoch).save_to_json(str(folder / "trainer_state.json"))
    return str(folder)


CARD_OF_A_RUN = "---\ntags:\n- generated_from_trainer\n---\n# run\n"


@pytest.mark.parametrize("name", [*recipe.RESULTS, "README.md"])
def test_a_finished_run_is_not_overwritten_unless_that_is_asked_for(name, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_text(CARD_OF_A_RUN)
    flags = ["--output_dir", tmp_path, "--use_cpu"]
    message = refused(monkeypatch, capsys, *flags)
    assert f"output_dir {str(tmp_path)!r} holds an earlier run ({name}): name another, or pass --overw" in message
    # Without a checkpoint to go on from it would begin anew.
    message = refused(monkeypatch, capsys, *flags, "--resume_from_checkpoint", "true")
    assert f"holds an earlier run ({name}), and no checkpoint to go on with: evaluate its model by" in message
    for more in (["--overwrite_output_dir"], ["--do_eval", "--model_name_or_path", "some"]):
        start(monkeypatch, *flags, *more)
    assert (tmp_path / name).read_text() == CARD_OF_A_RUN


@pytest.mark.parametrize(
    ("flags", "goes_on"),
    [
        (["--max_steps", 6], False),
        (["--max_steps", 7], True),
        (["--num_train_epochs", 2], False),
        (["--num_train_epochs", 3], True),
    ],
)
def test_a_finished_run_goes_on_only_if_there_is_something_left(flags, goes_on, tmp_path, monkeypatch, capsys):
    last = write_checkpoint(tmp_path, 6, epoch=2.0)
    for name in ("model.safetensors", "all_results.json"):
        (tmp_path / name).write_text("precious")
    flags = ["--output_dir", tmp_path, "--use_cpu", "--resume_from_checkpoint", "true", *flags]
    # Its card is what a run writes last: evaluation and card are left.
    assert start(monkeypatch, *flags).resume_from_checkpoint == last
    (tmp_path / "README.md").write_text(CARD_OF_A_RUN)
    if goes_on:
        assert start(monkeypatch, *flags).resume_from_checkpoint == last
    else:
        assert "holds a finished run, nothing is left to go on with" in refused(monkeypatch, capsys, *flags)


def test_a_finished_run_without_its_last_checkpoint_is_not_trained_again(tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path, 3)
    for name in ("model.safetensors", "train_results.json"):
        (tmp_path / name).write_text("precious")
    TrainerState(global_step=6, epoch=2.0).save_to_json(str(tmp_path / "trainer_state.json"))
    flags = ["--output_dir", tmp_path, "--use_cpu", "--resume_from_checkpoint", "true", "--save_strategy", "no"]
    assert start(monkeypatch, *flags, "--max_steps", 6).resume_from_checkpoint == checkpoint
    (tmp_path / "README.md").write_text(CARD_OF_A_RUN)
    assert "holds a finished run, nothing is left" in refused(monkeypatch, capsys, *flags, "--max_steps", 6)
    assert start(monkeypatch, *flags, "--max_steps", 7).resume_from_checkpoint == checkpoint


def test_an_interrupted_run_is_gone_on_with_or_overwritten(tmp_path, monkeypatch, capsys):
    last = write_checkpoint(tmp_path, 5)
    (tmp_path / "model.safetensors").write_text("of a push in between")
    flags = ["--output_dir", tmp_path, "--use_cpu"]
    message = refused(monkeypatch, capsys, *flags)
    assert "holds an interrupted run (checkpoint-5): go on with it by --resume_from_checkpoint true" in message
    assert "interrupted run" in refused(monkeypatch, capsys, *flags, "--resume_from_checkpoint", "false")
    assert start(monkeypatch, *flags, "--resume_from_checkpoint", "true").resume_from_checkpoint == last
    assert start(monkeypatch, *flags, "--resume_from_checkpoint", last).resume_from_checkpoint == last
    assert start(monkeypatch, *flags, "--overwrite_output_dir").resume_from_checkpoint is None


@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint", "true"]])
def test_a_readme_of_ones_own_is_not_replaced(resume, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path, 5)
    (tmp_path / "README.md").write_text("My notes.")
    flags = ["--output_dir", tmp_path, "--use_cpu", *resume]
    assert "holds a README.md that the model card would replace: name another, or" in refused(
        monkeypatch, capsys, *flags
    )
    start(monkeypatch, *flags, "--overwrite_output_dir")
    assert (tmp_path / "README.md").read_text() == "My notes."


@pytest.mark.parametrize(
    ("name", "flags", "is_refused"),
    [
        ("checkpoint-7", [], True),
        ("checkpoint-7", ["--overwrite_output_dir"], False),
        ("checkpoint-7", ["--overwrite_output_dir", "--save_total_limit", 2], True),
        ("checkpoint-7", ["--resume_from_checkpoint", "true"], False),  # as a run leaves it that is killed
        ("checkpoint-best", [], False),
        ("checkpoint-best", ["--save_total_limit", 2], True),
        ("checkpoint-best", ["--resume_from_checkpoint", "true", "--save_total_limit", 2], True),
        ("my-checkpoint-7", ["--save_total_limit", 2], False),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_neither_written_to_nor_deleted(
    name, flags, is_refused, tmp_path, monkeypatch, capsys
):
    (tmp_path / name).mkdir()
    flags = ["--output_dir", tmp_path, "--use_cpu", *flags]
    if is_refused:
        assert f"holds {name}, no whole checkpoint, which this run may" in refused(monkeypatch, capsys, *flags)
    else:
        start(monkeypatch, *flags)


def test_only_what_the_run_wrote_is_removed(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 5)
    (tmp_path / "linked").mkdir()
    write_checkpoint(tmp_path / "linked", 6)
    (tmp_path / "checkpoint-6").symlink_to(tmp_path / "linked" / "checkpoint-6")
    kept = ["checkpoint-best", "checkpoint-7", "adapter_old", "linked"]
    for name in ("checkpoint-best", "checkpoint-7", "adapter_old"):
        (tmp_path / name).mkdir()
    files = ["model_v1.safetensors", "adapter_notes.md", "my_results.json"]
    for name in (*files, "eval_results.json", "all_results.json", "README.md"):
        (tmp_path / name).write_text("text")
    args = start(monkeypatch, "--output_dir", tmp_path, "--use_cpu", "--overwrite_output_dir")
    recipe.remove_earlier_run(args)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, *files, "checkpoint-6", recipe.LOCK}
    assert all(recipe.WEIGHTS.fullmatch(name) is None for name in files)
    assert (tmp_path / "linked" / "checkpoint-6" / "trainer_state.json").exists()


def test_a_second_run_into_the_same_folder_is_refused_until_the_first_ends(tmp_path, monkeypatch, capsys):
    first = "import recipe, sys; recipe.lock_output_dir(sys.argv[1]); print('locked', flush=True); input()"
    paths = os.pathsep.join([str(RECIPES[0].parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", first, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "locked\n"
        message = refused(monkeypatch, capsys, "--output_dir", tmp_path, "--use_cpu")
        assert f"output_dir must be a folder that no other run is writing into, got {str(tmp_path)!r}: wait" in message
    finally:
        process.kill()
        process.communicate()
    for _ in range(2):  # the lock is this process's own now
        start(monkeypatch, "--output_dir", tmp_path, "--use_cpu")
    assert os.listdir(tmp_path) == [recipe.LOCK]
    monkeypatch.setattr(recipe, "fcntl", None)
    start(monkeypatch, "--output_dir", tmp_path / "elsewhere", "--use_cpu")
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_first_run_resumes_from_nothing_and_says_so(tmp_path, monkeypatch, caplog):
    flags = ["--output_dir", tmp_path / "new", "--use_cpu", "--save_strategy", "no"]
    args = start(monkeypatch, *flags, "--resume_from_checkpoint", "true")
    assert args.resume_from_checkpoint is None
    assert "with save_strategy no: training begins at the first step" in caplog.text
    caplog.clear()
    start(monkeypatch, *flags)
    assert "begins at the first step" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume_from_checkpoint", "."], "resume_from_checkpoint must be true or a checkpoint's folder, got '.'."),
        (["--output_dir", "file"], "output_dir must be a folder that can be written to, got 'file': File exists."),
        (["--output_dir", "file/out"], "output_dir must be a folder that can be written to, got 'file/out': Not a di"),
        (["--output_dir", "taken"], "output_dir 'taken' has a folder model.safetensors where a run writes a file"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, got 0."),
        (["--load_best_model_at_end", "true"], "load_best_model_at_end"),
        (["--optim", "alsals", "--optim_args", "c=3"], "optim_args: c must be a number in (0, 1), got 3."),
        (["--optim", "alsals", "--learning_rate", "-1"], "learning_rate must be a finite number of at least 0"),
        (["--do_predict"], "do_predict must be left out: this recipe has no test data to predict."),
    ],
)
def test_what_cannot_be_is_named_in_the_last_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "model.safetensors").mkdir(parents=True)
    flags = flags if "--output_dir" in flags else ["--output_dir", "out", *flags]
    assert message in refused(monkeypatch, capsys, *flags)


@pytest.mark.parametrize(
    ("known", "labels", "expected"),
    [
        (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], ["entailment", "neutral"], {"entailment": 2, "neutral": 1}),
        (["US", "us"], ["us", "US"], {"us": 1, "US": 0}),
        (["a", "b", "c"], ["c", "a"], {"c": 2, "a": 0}),
        (["LABEL_0", "LABEL_1"], ["us", "US", "Us"], {"us": 0, "US": 1, "Us": 2}),
        (["neg", "neu", "pos"], ["0", "1", "2"], {"0": 0, "1": 1, "2": 2}),
    ],
)
def test_a_model_keeps_the_numbers_of_the_labels_that_it_knows(known, labels, expected, caplog):
    config = BertConfig(id2label=dict(enumerate(known)), label2id={label: i for i, label in enumerate(known)})
    assert recipe.match_labels(config, labels, is_trained=True) == expected
    keeps = set(map(str.lower, labels)) <= set(map(str.lower, known))
    assert list(config.id2label.values()) == (known if keeps else labels)
    assert ("give way" in caplog.text) == (known == ["neg", "neu", "pos"])


def test_the_trained_tokenizer_is_the_same_in_another_process():
    script = (
        "import recipe, pydoc_data.topics as t; "
        "print(sorted(recipe.train_tokenizer(t.topics.values()).get_vocab().items()))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    first, second = (subprocess.run(command, capture_output=True, check=True, env=env).stdout for _ in range(2))
    assert first == second
    assert len(first) > 10000


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


@pytest.mark.parametrize(
    "error", ["PytorchStreamWriter failed", "[enforce fail at inline_container.cc:672] . unexpected"]
)
def test_a_disk_that_is_full_for_torch_is_said_so(error, tmp_path, capsys):
    parser = recipe.make_parser("A recipe.", recipe.ModelArguments, AlsalsTrainingArguments)
    args = AlsalsTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(SystemExit), recipe.training(parser, args):
        raise RuntimeError(error)
    message = f"output_dir {str(tmp_path)!r} or the data cannot be read or written: a file could not be written to its"
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_errors_of_many_lines_become_one(capsys):
    parser = recipe.make_parser("A recipe.", recipe.ModelArguments, AlsalsTrainingArguments)
    with pytest.raises(SystemExit) as error, recipe.one_line_error(parser):
        raise ValueError("one\n  two\n\nthree")
    assert error.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("error: one two three")


def test_the_trained_tokenizer_has_the_special_tokens_of_bert(tmp_path):
    texts = ["The quick brown fox jumps over the lazy dog."] * 3 + ["Naïve foxes, unhappiness!"]
    tokenizer = recipe.train_tokenizer(texts)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, loaded):
        pair = one("the fox", "lazy")
        assert one.decode(pair.input_ids) == "[CLS] the fox[SEP] lazy[SEP]"
        first = pair.input_ids.index(one.sep_token_id) + 1
        assert pair.token_type_ids == [0] * first + [1] * (len(pair.input_ids) - first)
        assert one.decode(one("Жук").input_ids, skip_special_tokens=True) == " жук"  # nothing is unknown to bytes
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
