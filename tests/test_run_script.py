"""`hf-alsals run`: scripts that know nothing of this package, each in a process of its own."""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_problems import assert_identical
from transformers.training_args import OptimizerNames

from hf_alsals.presets import PRESETS

SCRIPTS = Path(__file__).parent / "scripts"
SHORT = "--max_steps 12 --per_device_train_batch_size 4 --logging_steps 1 --save_strategy steps --save_steps 6"
FLAGS = [*SHORT.split(), "--use_cpu", "--report_to", "none", "--seed", "3"]
EVERY_STEP = ["--optim_args", "search_interval=1"]  # runs of a few steps have to search
RUN = [sys.executable, "-m", "hf_alsals", "run"]


def run(*command, cwd, code=0):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def line_of(stderr):
    (line,) = [line for line in stderr.splitlines() if line.startswith("hf-alsals run: ")]
    return line.removeprefix("hf-alsals run: ")


def logs(folder):
    state = json.loads(
        max(folder.glob("checkpoint-*"), key=lambda p: int(p.name[11:])).joinpath("trainer_state.json").read_text()
    )
    return state["log_history"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The script with the classes of this package written into it, run by python."""
    folder = tmp_path_factory.mktemp("ours")
    text = (SCRIPTS / "parsed.py").read_text().replace("Trainer, TrainingArguments, set_seed", "set_seed")
    names = "from hf_alsals import AlsalsTrainer as Trainer, AlsalsTrainingArguments as TrainingArguments\n"
    text = text.replace("from transformers import", f"{names}from transformers import", 1)
    end = "    gc.collect()\n    PartialState().destroy_process_group()\n"  # gloo aborts some processes that leave it
    (folder / "script.py").write_text(f"import gc\nfrom accelerate import PartialState\n{text}{end}")
    run(sys.executable, "script.py", "--output_dir", "out", "--optim", "alsals", *EVERY_STEP, *FLAGS, cwd=folder)
    return folder / "out"


def test_a_script_trains_as_if_it_had_been_written_for_this_package(ours, tmp_path):
    flags = ["--output_dir", "out", "--optim", "alsals", *EVERY_STEP, *FLAGS]
    stderr = run(*RUN, SCRIPTS / "parsed.py", *flags, cwd=tmp_path)
    assert line_of(stderr) == (
        "Trainer trains with optim alsals in place of adamw_torch_fused, learning_rate 1 in place of 5e-05, "
        "lr_scheduler_type warmup_stable_decay in place of linear."
    )
    assert f"__main__ {SCRIPTS / 'parsed.py'} TrainingArguments 1.0" in stderr
    out = tmp_path / "out"
    assert_identical(load_file(out / "model.safetensors"), load_file(ours / "model.safetensors"))
    keys = ["loss", "step_size", "probes", "path_slope"]
    assert [[entry.get(k) for k in keys] for entry in logs(out)] == [
        [entry.get(k) for k in keys] for entry in logs(ours)
    ]
    assert sum(entry.get("probes", 0) for entry in logs(out)) >= 6
    assert (out / "step_size.png").exists()
    assert "| script | parsed.py |" in (out / "README.md").read_text()
    assert "learning_rate: 1.0" in (out / "README.md").read_text()
    # What was pickled is read by a process that knows of no run.
    text = "import torch; args = torch.load('out/checkpoint-6/training_args.bin', weights_only=False);"
    text += "print(type(args).__module__, type(args).__name__, args.optim, args.learning_rate)"
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["transformers.training_args", "TrainingArguments", "alsals", "1.0"]


def test_the_command_line_and_what_a_script_says_of_schedules_are_kept(tmp_path):
    flags = ["--output_dir", "out", "--learning_rate", "0.5", "--adam_beta1", "0.8", *FLAGS]
    stderr = run(
        *RUN, SCRIPTS / "parsed.py", "--optim", "salsa", "--lr_scheduler_type", "linear", *flags, cwd=tmp_path
    )
    assert line_of(stderr) == "Trainer trains with optim salsa in place of adamw_torch_fused."
    rates = [entry["lr_multiplier"] for entry in logs(tmp_path / "out") if "lr_multiplier" in entry]
    assert (rates[0], rates[-1]) == (pytest.approx(0.5), pytest.approx(0.5 / 12))


def test_arguments_in_the_code_and_subclasses_of_the_script(tmp_path):
    stderr = run(*RUN, SCRIPTS / "fixed.py", "out", "--optim", "alsals", cwd=tmp_path)
    assert line_of(stderr) == (
        "SmoothingTrainer trains with optim alsals in place of adafactor, learning_rate 1 in place of 0.001."
    )
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("optim", [[], ["--optim", "adamw_torch"]])
def test_without_an_optimizer_of_ours_a_script_runs_as_it_is(optim, tmp_path):
    for name, launch in {"plain": [sys.executable], "run": RUN}.items():
        flags = ["--output_dir", name, *optim, *FLAGS]
        stderr = run(*launch, SCRIPTS / "parsed.py", *flags, cwd=tmp_path)
        assert "hf-alsals" not in stderr
    assert_identical(*(load_file(tmp_path / name / "model.safetensors") for name in ("plain", "run")))
    assert not (tmp_path / "run" / "step_size.png").exists()
    states = [torch.load(tmp_path / name / "checkpoint-12" / "optimizer.pt") for name in ("plain", "run")]
    assert_identical(*states)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "own loop",
            "has made no Trainer of transformers in this process, so --optim alsals has changed nothing: use",
        ),
        ("own step", "The training_step of OwnStep must call self.compute_loss and self.accelerator.backward once"),
        ("own optimizer", "gives its Trainer an optimizer of its own (SGD), which --optim alsals cannot replace: "),
    ],
)
def test_what_cannot_be_replaced_is_refused_in_a_sentence(kind, message, tmp_path):
    code = 2 if kind == "own loop" else 1
    stderr = run(*RUN, SCRIPTS / "refused.py", kind, "out", "--optim", "alsals", cwd=tmp_path, code=code)
    assert any(message in line for line in stderr.splitlines())


def test_a_learning_rate_that_is_set_after_the_arguments_were_made_is_one_for_adam_too(tmp_path):
    stderr = run(*RUN, SCRIPTS / "refused.py", "own rates", "out", "--optim", "alsals", cwd=tmp_path)
    assert line_of(stderr).endswith(", lr 1 in place of 0.0003 in parameter groups.")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["absent.py", "--optim", "alsals"],
            "SCRIPT must be a file with Python code, or a module after -m, got 'absent.py'.",
        ),
        (["-m", "absent_module"], "SCRIPT must be a module that Python finds, got 'absent_module'."),
        (["-m", "absent.module"], "SCRIPT must be a module that Python finds, got 'absent.module'."),
        (["__file__", "--optim", "alsal"], "or of the Trainer's own, got 'alsal'; alsals?"),
        ([], "the following arguments are required: SCRIPT"),
    ],
)
def test_a_script_that_there_is_not_is_named(args, message, tmp_path):
    args = [__file__ if arg == "__file__" else arg for arg in args]
    assert message in run(*RUN, *args, cwd=tmp_path, code=2).strip().splitlines()[-1]


def test_no_optimizer_of_the_trainers_own_is_taken_for_a_misspelled_one_of_ours():
    for one in OptimizerNames:
        assert not difflib.get_close_matches(one.value, PRESETS, n=1, cutoff=0.75), one


def test_two_processes_train_as_if_it_had_been_written_for_this_package(ours, tmp_path):
    launch = [sys.executable, *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]]
    flags = ["--optim", "alsals", *EVERY_STEP, *FLAGS, "--ddp_backend", "gloo"]
    says = 'print("group up:", torch.distributed.is_initialized(), file=sys.stderr)'
    says = f"import atexit\natexit.register(lambda: {says})\n"
    text = (SCRIPTS / "parsed.py").read_text()
    (tmp_path / "parsed.py").write_text(text.replace("import torch\n", f"import torch\n{says}", 1))
    stderr = run(*launch, "-m", *RUN[2:], "parsed.py", "--output_dir", "one", *flags, cwd=tmp_path)
    assert line_of(stderr).startswith("Trainer trains with optim alsals")
    # gloo aborts some processes that leave it up
    assert (stderr.count("group up: False"), stderr.count("group up: True")) == (2, 0)
    run(*launch, ours.parent / "script.py", "--output_dir", "other", *flags, cwd=tmp_path)
    assert_identical(*(load_file(tmp_path / name / "model.safetensors") for name in ("one", "other")))
    assert sum(entry.get("probes", 0) for entry in logs(tmp_path / "one")) >= 6


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward", "GRPO"])
def test_the_commands_of_trl_train_with_it(kind, tmp_path):
    pytest.importorskip("trl", reason="TRL is optional: its newest release may not run on the oldest transformers")
    from tiny_trl import dataset_of, model_for, tokenizer

    model_for(kind).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    dataset_of(kind).to_json(tmp_path / "data" / "train.json")
    flags = ["--model_name_or_path", "model", "--dataset_name", "data", "--output_dir", "out", "--dtype", "float32"]
    flags += [*SHORT.split(), "--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false"]
    if kind == "GRPO":
        (tmp_path / "rewards.py").write_text(
            "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
        )
        flags += ["--reward_funcs", "rewards.length", "--num_generations", "4", "--max_completion_length", "6"]
    module = f"trl.scripts.{kind.lower()}"
    stderr = run(*RUN, "-m", module, *flags, "--optim", "alsals", *EVERY_STEP, cwd=tmp_path)
    assert (
        f"hf-alsals run: {kind}Trainer trains with optim alsals in place of adamw_torch_fused, learning_rate 1"
        in stderr
    )
    assert all("step_size" in entry for entry in logs(tmp_path / "out") if "loss" in entry)
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert any(
        not torch.equal(trained[name], w) for name, w in model_for(kind).state_dict().items() if name in trained
    )
