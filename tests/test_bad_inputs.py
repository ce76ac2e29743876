"""Bad inputs, and what the one line that refuses each of them has to name."""

import importlib
import json
import sys

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_alsals import ALSALS, AlsalsTrainingArguments, LineProfileCallback, LossReplay

TINY = {
    "run_clm": [
        "--config_overrides",
        "n_layer=1,n_embd=16,n_head=2",
        "--block_size",
        "64",
        "--max_train_samples",
        "8",
    ],
    "run_glue": ["--max_seq_length", "32"],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def refused(monkeypatch, capfd, recipe, flags):
    """Return the last line of what a recipe says of these flags, which it must not train with."""
    module = importlib.import_module(recipe)
    flags = [*flags, "--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]
    flags += [] if "--output_dir" in flags else ["--output_dir", "out"]
    flags += [] if {"--max_steps", "--num_train_epochs"} & {*flags} else ["--max_steps", "1"]
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *flags])
    with pytest.raises(SystemExit) as error:
        module.main()
    assert error.value.code == 2
    text = capfd.readouterr().err
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"{recipe}.py: error: ")
    return last


# The flags, and what the message names besides: the first flag is always named.
ARGUMENTS = [
    ("--seed -1", "-1"),
    ("--seed 5000000000", "5000000000"),
    ("--seed x", "'x'"),
    ("--data_seed -1", "-1"),
    ("--dataloader_num_workers -1", "-1"),
    ("--dataloader_prefetch_factor 3", "dataloader_num_workers"),
    ("--num_train_epochs 0", "0"),
    ("--num_train_epochs -1", "-1"),
    ("--num_train_epochs nan", "nan"),
    ("--num_train_epochs inf", "inf"),
    ("--max_steps 0", "0"),
    ("--max_steps -5", "-5"),
    ("--max_steps 1.5", "'1.5'"),
    ("--max_steps many", "'many'"),
    ("--weight_decay -1", "-1"),
    ("--weight_decay nan", "nan"),
    ("--weight_decay inf", "inf"),
    ("--weight_decay -1 --optim alsals", "-1"),
    ("--learning_rate nan", "nan"),
    ("--learning_rate -1", "-1"),
    ("--learning_rate x", "'x'"),
    ("--learning_rate inf --optim salsa", "inf"),
    ("--adam_beta1 1.5", "1.5"),
    ("--adam_beta2 -1", "-1"),
    ("--adam_beta2 nan", "nan"),
    ("--adam_epsilon -1", "-1"),
    ("--max_grad_norm nan", "nan"),
    ("--max_grad_norm -1", "-1"),
    ("--warmup_steps -1", "warmup_steps"),
    ("--warmup_steps nan", "nan"),
    ("--lr_scheduler_type cosin", "'cosin'"),
    ('--lr_scheduler_kwargs {"num_cycle":1}', "num_cycle"),
    ('--lr_scheduler_kwargs {"num_decay":1} --optim alsals', "num_decay"),
    ('--lr_scheduler_kwargs {"num_cycles":"x"} --lr_scheduler_type cosine', "'x'"),
    ("--lr_scheduler_kwargs {x", "'{x'"),
    ("--lr_scheduler_kwargs 5", "'5'"),
    ("--lr_scheduler_kwargs null", "'null'"),
    ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
    ("--lr_scheduler_type reduce_lr_on_plateau", "eval strategy"),
    ("--logging_steps 0", "logging_steps"),
    ("--logging_steps -1", "-1"),
    ("--logging_steps nan", "nan"),
    ("--save_steps 0", "0"),
    ("--save_steps -1", "-1"),
    ("--eval_steps -1 --eval_strategy steps", "-1"),
    ("--eval_strategy sometimes", "'sometimes'"),
    ("--save_strategy x", "'x'"),
    ("--load_best_model_at_end --eval_strategy epoch", "strategy"),
    ("--save_total_limit 0", "0"),
    ("--label_smoothing_factor 3", "3"),
    ("--label_smoothing_factor -1", "-1"),
    ("--neftune_noise_alpha -1", "-1"),
    ("--bf16 --fp16", "fp16"),
    ("--hub_strategy x", "'x'"),
    ("--optim alsal", "'alsal'"),
    ("--optim_args c=3 --optim alsals", "3"),
    ("--optim_args growth_factor=1e308 --optim alsals", "growth_factor"),
    ("--optim_args growth_factor=0.5 --optim alsals", "growth_factor"),
    ("--optim_args growth_facto=2 --optim alsals", "'growth_facto'"),
    ("--optim_args c --optim alsals", "'c'"),
    ("--optim_args c=x --optim alsals", "'x'"),
    ("--optim_args beta3=1 --optim alsals", "beta3"),
    ("--optim_args decrease_factor=1 --optim alsals", "decrease_factor"),
    ("--optim_args initial_step_size=0 --optim alsals", "initial_step_size"),
    ("--optim_args search_interval=0 --optim alsals", "search_interval"),
    ("--optim_args growth=exponential --optim alsals", "'exponential'"),
    ("--optim_args slope=steep --optim alsals", "'steep'"),
    ("--optim_args probe_micro_batches=0 --optim alsals", "probe_micro_batches"),
    ("--optim_args lr=1 --optim alsals", "'lr'"),
    ("--accelerator_config nofile.json", "'nofile.json': No such file or directory."),
    ("--accelerator_config file", "json file that can be read, got 'file'"),
    ("--accelerator_config list.json", "names and values, got 'list.json'"),
    ('--accelerator_config {"split_batch":true}', "'split_batch'"),
    ("--fsdp_config nofile.json --fsdp full_shard", "'nofile.json': No such file or directory."),
    ('--fsdp_config {"version":2}', "without: set fsdp, or leave it out."),
    ("--include_for_metrics losses", "'losses'"),
    ("--torch_compile_mode fast", "'fast'"),
    ("--torch_compile_backend fast", "'fast'"),
    ("--accelerator_config {x", "'{x'"),
    ("--per_device_train_batch_size -1", "-1"),
    ("--per_device_train_batch_size 0", "0"),
    ("--per_device_eval_batch_size 0", "0"),
    ("--gradient_accumulation_steps 0", "0"),
    ("--gradient_accumulation_steps 1.5", "'1.5'"),
    ("--eval_accumulation_steps 0", "0"),
    ("--debug x", "'x'"),
    ("--log_level x", "'x'"),
    ("--do_train maybe", "maybe"),
    ("--do_predict", "test data"),
    ("--output_dirs x", "x"),
    ("--resume_from_checkpoint nowhere", "'nowhere'"),
    ("--output_dir file", "File exists"),
    ("--output_dir file/out", "Not a directory"),
]

RECIPES = [
    ("run_clm", "--train_file nowhere.txt", "'nowhere.txt'"),
    ("run_clm", "--train_file text.pdf", "'text.pdf'"),
    ("run_clm", "--train_file empty.txt", "'empty.txt'"),
    ("run_clm", "--train_file . ", "'.'"),
    ("run_clm", "--dataset_name no-such/data", "'no-such/data'"),
    ("run_clm", "--dataset_name a/b --train_file x.txt", "train_file"),
    ("run_clm", "--validation_split_percentage 0", "0"),
    ("run_clm", "--validation_split_percentage 100", "100"),
    ("run_clm", "--model_type gpt5000", "'gpt5000'"),
    ("run_clm", "--model_type gpt2 --model_name_or_path x", "model_name_or_path"),
    ("run_clm", "--model_name_or_path no-such/model", "'no-such/model'"),
    ("run_clm", "--tokenizer_name no-such/tokenizer", "'no-such/tokenizer'"),
    ("run_clm", "--config_name no-such/config", "'no-such/config'"),
    ("run_clm", "--block_size 1", "1"),
    ("run_clm", "--block_size 999999", "block_size must leave the train text at least one whole block, got 999999"),
    ("run_clm", "--max_train_samples 0", "0"),
    ("run_clm", "--max_eval_samples -1", "-1"),
    ("run_clm", "--torch_dtype int3", "'int3'"),
    ("run_clm", "--config_overrides n_layer=-1", "n_layer must be a positive number, got -1"),
    ("run_clm", "--config_overrides n_layer=0", "n_layer"),
    ("run_clm", "--config_overrides vocab_size=0", "vocab_size"),
    ("run_clm", "--config_overrides n_positions=0", "n_positions"),
    ("run_clm", "--config_overrides n_embd=-4", "n_embd"),
    ("run_clm", "--config_overrides attn_pdrop=nan", "attn_pdrop"),
    ("run_clm", "--config_overrides layer_norm_epsilon=-1", "layer_norm_epsilon"),
    ("run_clm", "--config_overrides n_layer", "'n_layer'"),
    ("run_clm", "--config_overrides n_layer=x", "'n_layer=x'"),
    ("run_clm", "--config_overrides nolayer=3", "nolayer"),
    ("run_clm", "--streaming --max_steps -1", "max_steps"),
    ("run_clm", "--merge_and_unload", "use_peft"),
    ("run_clm", "--lora_r 0 --use_peft", "0"),
    ("run_clm", "--lora_dropout 1 --use_peft", "1"),
    ("run_mlm", "--mlm_probability 0", "0"),
    ("run_mlm", "--mlm_probability nan", "nan"),
    ("run_mlm", "--max_seq_length 2", "2"),
    ("run_mlm", "--model_type gpt2", "'gpt2'"),
    ("run_t5_mlm", "--mlm_probability 1.5", "1.5"),
    ("run_t5_mlm", "--mean_noise_span_length 0", "0"),
    ("run_t5_mlm", "--mean_noise_span_length nan", "nan"),
    ("run_t5_mlm", "--max_seq_length 0", "0"),
    ("run_glue", "--task_name colas", "'colas'"),
    ("run_glue", "--dataset_name x --task_name cola", "task_name"),
    ("run_glue", "--train_file x.txt", "'x.txt'"),
    ("run_glue", "--train_file nowhere.csv", "'nowhere.csv'"),
    ("run_glue", "--max_seq_length 2", "2"),
    ("run_glue", "--max_predict_samples 0", "0"),
    ("run_image_classification", "--train_dir nowhere", "'nowhere'"),
    ("run_image_classification", "--train_file x.csv", "'x.csv'"),
    ("run_image_classification", "--train_val_split nan", "nan"),
    ("run_image_classification", "--train_val_split 1", "1"),
    ("run_image_classification", "--image_size 2", "2"),
    ("run_image_classification", "--model_type gpt2", "'gpt2'"),
    ("run_image_classification", "--config_overrides depths=x", "depths"),
    ("run_image_classification", "--config_overrides num_channels=0", "num_channels"),
    ("run_image_classification", "--image_processor_name nowhere", "'nowhere'"),
    ("run_image_classification", "--image_column_name label", "'label'"),
]


@pytest.mark.parametrize(("flags", "named"), ARGUMENTS, ids=[flags for flags, _ in ARGUMENTS])
def test_a_bad_training_argument(flags, named, monkeypatch, capfd, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "list.json").write_text("[]")
    line = refused(monkeypatch, capfd, "run_clm", [*TINY["run_clm"], *flags.split()])
    assert named in line
    assert flags.split()[0].removeprefix("--").split("_")[0] in line


@pytest.mark.parametrize(("recipe", "flags", "named"), RECIPES, ids=[" ".join(row[:2]) for row in RECIPES])
def test_a_bad_argument_of_a_recipe(recipe, flags, named, monkeypatch, capfd, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    line = refused(monkeypatch, capfd, recipe, flags.split())
    assert named in line
    assert flags.split()[0].removeprefix("--") in line


CONFIGS = [
    ("a.yaml", b"caf\xe9: 1", "'a.yaml' cannot be read"),
    ("a.yaml", b"\xff\xfe", "'a.yaml' cannot be read"),
    ("a.json", b"\x00", "'a.json' cannot be read"),
    ("a.yaml", b"- seed", "['seed']"),
    ("a.yaml", b"seed", "'seed'"),
    ("a.json", b"null", "None"),
    ("a.json", b"{", "'a.json' cannot be read"),
    ("a.yaml", b"seed: [1", "'a.yaml' cannot be read"),
    ("a.yaml", b"seed: many", "'many'"),
    ("a.yaml", b"seeds: 1", "--seeds"),
    ("a.yaml", b"1: 2", "the name 1"),
    ("a.yaml", b"seed: [[1]]", "[[1]]"),
    ("a.yaml", b"lr_scheduler_kwargs: {num_cycle: 1}", "num_cycle"),
    ("a.yaml", b"lr_scheduler_kwargs: x", "'x'"),
    ("a.yaml", b"seed: !!python/object:os.system {}", "'a.yaml' cannot be read"),
    ("a.json", b"[" * 100_000, "'a.json' cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "named"), CONFIGS, ids=[str(row[1][:30]) for row in CONFIGS])
def test_a_bad_config(name, content, named, monkeypatch, capfd, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert named in refused(monkeypatch, capfd, "run_clm", [name])


FILES = [
    ("run_clm", "a.json", b"null", "'a.json' is null"),
    ("run_clm", "a.json", b"[null]", "'a.json' is null"),
    ("run_clm", "a.jsonl", b'{"text": "a"}\nnull\n', "line 2 of 'a.jsonl' is null"),
    ("run_clm", "a.json", b"3", "a.json cannot be read as json"),
    ("run_clm", "a.json", b"{", "a.json cannot be read as json"),
    ("run_clm", "a.json", b"[]", "a.json cannot be read as json"),
    ("run_clm", "a.json", b"[1, 2]", "the column text of the train data must hold text, got int64"),
    ("run_clm", "a.json", b'{"text": ["a"]}\n{"text": ["b"]}', "the column text of the train data must hold text"),
    ("run_clm", "a.json", b"\xff\xfe", "a.json cannot be read as json"),
    ("run_clm", "a.csv", b"text\n", "a.csv cannot be read as csv"),
    ("run_clm", "a.csv", b"a,b\n1,2,3,4\n5\n", "the column a of the train data must hold text"),
    ("run_clm", "a.csv", b'text\n"open\n', "a.csv cannot be read as csv"),
    ("run_clm", "a.csv", b"\xff\xfe\x00", "a.csv cannot be read as csv"),
    ("run_clm", "a.txt", b"one line", "validation_file"),
    ("run_clm", "a.txt", b"two\nlines", "block_size"),
    ("run_glue", "a.json", b"null", "'a.json' is null"),
    ("run_glue", "a.json", b"{}", "a.json"),
    ("run_glue", "a.csv", b"text,label\n", "a.csv"),
    ("run_glue", "a.csv", b"text\nx\ny\n", "column label"),
    ("run_glue", "a.csv", b"label\n0\n1\n", "columns of text"),
    ("run_glue", "a.csv", b"text,label\nx,0.5\ny,nan\nz,1.5\n", "'nan' in row 1"),
    ("run_glue", "a.csv", b"text,label\nx,0\ny,NA\nz,1\n", "'NA' in row 1"),
    ("run_glue", "a.csv", b"text,label\nx,\ny,1\n", "empty cell"),
    ("run_glue", "a.csv", b"text,label\nx,a\ny,a\n", "only 'a'"),
    ("run_glue", "a.json", b'{"text": "x", "label": [1]}', "column label"),
    ("run_glue", "a.json", b'{"text": 1, "label": 1}', "columns of text"),
]


@pytest.mark.parametrize(("recipe", "name", "content", "named"), FILES, ids=[str(row[1:3]) for row in FILES])
def test_a_bad_file(recipe, name, content, named, monkeypatch, capfd, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert named in refused(monkeypatch, capfd, recipe, [*TINY[recipe], "--train_file", name])


def test_images_without_bytes(monkeypatch, capfd):
    rows = {"image": [{"bytes": None, "path": None}] * 4, "label": [0, 1, 0, 1]}
    Dataset.from_dict(rows).to_parquet("a.parquet")
    line = refused(monkeypatch, capfd, "run_image_classification", ["--train_file", "a.parquet"])
    assert "image" in line


OPTIMIZER = [
    ({"lr": -1.0}, "lr", "-1"),
    ({"lr": float("nan")}, "lr", "nan"),
    ({"lr": float("inf")}, "lr", "inf"),
    ({"lr": "1"}, "lr", "'1'"),
    ({"betas": (0.9, 1.0)}, "betas", r"1\.0"),
    ({"betas": (0.9,)}, "betas", r"\(0\.9,\)"),
    ({"betas": 0.9}, "betas", r"0\.9"),
    ({"betas": (float("nan"), 0.9)}, "betas", "nan"),
    ({"eps": -1e-8}, "eps", "-1e-08"),
    ({"eps": float("nan")}, "eps", "nan"),
    ({"weight_decay": -1}, "weight_decay", "-1"),
    ({"weight_decay": float("nan")}, "weight_decay", "nan"),
    ({"c": 0}, "c", "0"),
    ({"c": 1.5}, "c", r"1\.5"),
    ({"c": "half"}, "c", "'half'"),
    ({"c": True}, "c", "True"),
    ({"c": None}, "c", "None"),
    ({"beta3": 1.0}, "beta3", r"1\.0"),
    ({"beta3": -0.1}, "beta3", r"-0\.1"),
    ({"growth_factor": 0.5}, "growth_factor", r"0\.5"),
    ({"growth_factor": 1e308}, "growth_factor", r"1e\+308"),
    ({"growth_factor": float("nan")}, "growth_factor", "nan"),
    ({"decrease_factor": 0}, "decrease_factor", "0"),
    ({"decrease_factor": 1}, "decrease_factor", "1"),
    ({"initial_step_size": 0}, "initial_step_size", "0"),
    ({"initial_step_size": float("inf")}, "initial_step_size", "inf"),
    ({"search_interval": 0}, "search_interval", "0"),
    ({"search_interval": 1.5}, "search_interval", r"1\.5"),
    ({"search_interval": "often"}, "search_interval", "'often'"),
    ({"growth": "fast"}, "growth", "'fast'"),
    ({"slope": "steep"}, "slope", "'steep'"),
]


@pytest.mark.parametrize(("kwargs", "name", "value"), OPTIMIZER, ids=[str(row[0]) for row in OPTIMIZER])
def test_a_bad_argument_of_the_optimizer(kwargs, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*got .*{value}") as error:
        ALSALS([torch.zeros(1, requires_grad=True)], **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "half", True])
def test_a_bad_argument_of_the_closure(value):
    with pytest.raises((TypeError, ValueError), match=f"^probe_micro_batches must be .*got {value!r}"):
        LossReplay(nn.Linear(1, 1), None, value)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"every": 0}, "every .*got 0"), ({"every": 1, "points": 1}, "points .*got 1")]
)
def test_a_bad_argument_of_a_profile(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LineProfileCallback(**kwargs)


KEYWORDS = [
    ({"weight_decay": float("nan")}, "weight_decay"),
    ({"optim": "adamw_torch", "weight_decay": -1.0}, "weight_decay"),
    ({"optim": "nothing"}, "'nothing'"),
    ({"optim": "alsals", "optim_args": 3}, "optim_args"),
    ({"optim": "alsals", "optim_args": "c=2"}, "c must be"),
    ({"lr_scheduler_kwargs": {"num_cycle": 1}}, "num_cycle"),
    ({"lr_scheduler_kwargs": "x"}, "'x'"),
    ({"num_train_epochs": float("nan")}, "num_train_epochs"),
]


@pytest.mark.parametrize(("kwargs", "named"), KEYWORDS, ids=[json.dumps(row[0]) for row in KEYWORDS])
def test_a_bad_keyword_of_the_training_arguments(kwargs, named):
    with pytest.raises((TypeError, ValueError)) as error:
        AlsalsTrainingArguments("out", use_cpu=True, report_to="none", **kwargs)
    assert named in str(error.value) and "\n" not in str(error.value)
