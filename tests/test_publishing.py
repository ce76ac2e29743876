import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import load as load_safetensors
from tiny_training import Sequences, arguments, gpt2
from transformers import TrainingArguments

from hf_alsals import AlsalsTrainer, AlsalsTrainingArguments
from hf_alsals.publishing import PublishedArguments, is_local_path, remove_local_base_model, without_local_paths

RECIPES = Path(__file__).parent.parent / "recipes"
TINY = ["--use_cpu", "--disable_tqdm", "true", "--max_steps", "4", "--report_to", "none", "--optim", "alsals"]
PRETEND = "hf_pretend_token"
HOST = "pretend-host-name"


@pytest.fixture
def hub():
    with HubServer(token=PRETEND) as server:
        yield server


def python(tmp_path, endpoint, *command):
    """Run Python as on a machine of a name that nothing else has, and whose Hub is the endpoint."""
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(
        f"import platform, socket\nsocket.gethostname = platform.node = lambda: {HOST!r}\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    env["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)


def recipe(tmp_path, hub, name, *flags, output_dir="out"):
    push = ["--push_to_hub", "--hub_model_id", "user/tiny", "--hub_token", PRETEND]
    flags = [*TINY, *push, *flags, "--output_dir", tmp_path / output_dir]
    return python(tmp_path, getattr(hub, "url", hub), RECIPES / name, *flags)


def card_of(files):
    return yaml.safe_load(files["README.md"].decode().split("---\n")[1])


def assert_nothing_private(files, tmp_path):
    for name, content in files.items():
        for private in (PRETEND, str(tmp_path), HOST):
            assert private.encode() not in content, (name, private)


@pytest.mark.parametrize(
    ("name", "flags", "task", "auto_class"),
    [
        ("run_clm.py", ["--config_overrides", "n_layer=1,n_embd=16"], "text-generation", "AutoModelForCausalLM"),
        ("run_glue.py", [], "text-classification", "AutoModelForSequenceClassification"),
        ("run_image_classification.py", [], "image-classification", "AutoModelForImageClassification"),
        ("run_mlm.py", [], "fill-mask", "AutoModelForMaskedLM"),
        ("run_t5_mlm.py", [], "text2text-generation", "AutoModelForSeq2SeqLM"),
    ],
)
def test_a_pushed_recipe_is_loaded_back_and_tells_its_results(name, flags, task, auto_class, hub, tmp_path):
    samples = ["--max_train_samples", "32", "--max_eval_samples", "16"]
    done = recipe(tmp_path, hub, name, *samples, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repos["user/tiny"]
    assert {"model.safetensors", "config.json", "README.md", "step_size.png", "all_results.json"} <= set(files)
    assert not any(path.startswith("checkpoint-") for path in files)
    assert_nothing_private(files, tmp_path)
    card = card_of(files)
    assert {"alsals", "generated_from_trainer"} <= set(card["tags"])
    result = card["model-index"][0]["results"][0]
    assert result["task"]["type"] == task
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    local = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (metrics["loss"], metrics["accuracy"]) == (local["eval_loss"], local["eval_accuracy"])
    text = files["README.md"].decode()
    for row in ("optimizer | `alsals`", "last step size", "probes per step", "share of the time", "![Loss and step"):
        assert row in text
    processor = "AutoImageProcessor" if "image" in name else "AutoTokenizer"
    load = f"""
import torch, transformers
model = transformers.{auto_class}.from_pretrained("user/tiny")
transformers.{processor}.from_pretrained("user/tiny")
torch.save(model.state_dict(), "loaded.bin")
"""
    loaded = python(tmp_path, hub.url, "-c", load)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    weights = torch.load(tmp_path / "loaded.bin", weights_only=True)
    for key, value in load_safetensors(files["model.safetensors"]).items():
        assert weights[key].equal(value)


def test_a_pushed_adapter_tells_no_path_of_its_base_model_and_is_loaded_onto_it(hub, tmp_path):
    base = tmp_path / "base"
    tiny = ["--max_train_samples", "32", "--max_eval_samples", "16"]
    done = python(tmp_path, hub.url, RECIPES / "run_glue.py", *TINY, *tiny, "--output_dir", base)
    assert done.returncode == 0, done.stderr[-3000:]
    done = recipe(tmp_path, hub, "run_glue.py", *tiny, "--model_name_or_path", base, "--use_peft")
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repos["user/tiny"]
    assert_nothing_private(files, tmp_path)
    assert "model.safetensors" not in files
    load = f"""
import peft, transformers
config = transformers.AutoConfig.from_pretrained("user/tiny")
assert config.id2label == {{0: "other_topic", 1: "same_topic"}}
base = transformers.AutoModelForSequenceClassification.from_pretrained({str(base)!r}, config=config)
peft.PeftModel.from_pretrained(base, "user/tiny")
"""
    loaded = python(tmp_path, hub.url, "-c", load)
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def test_pushes_while_training_tell_nothing_either(hub, tmp_path):
    flags = ["--save_steps", "2", "--hub_strategy", "all_checkpoints", "--hub_always_push"]
    flags += ["--config_overrides", "n_layer=1,n_embd=16", "--max_train_samples", "32", "--max_eval_samples", "8"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end"]
    flags += ["--run_name", f"on {tmp_path}/data, by me", "--block_size", "64"]
    done = recipe(tmp_path, hub, "run_clm.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repos["user/tiny"]
    assert {"checkpoint-2/training_args.bin", "checkpoint-4/optimizer.pt", "training_args.bin"} <= set(files)
    assert_nothing_private(files, tmp_path)
    assert json.loads(files["checkpoint-4/trainer_state.json"])["best_model_checkpoint"].startswith("checkpoint-")
    assert len([commit for commit in hub.commits if "step 2" in commit[1]]) >= 1


@pytest.mark.parametrize("arguments_class", [AlsalsTrainingArguments, TrainingArguments])
def test_user_code_pushes_with_the_trainer(arguments_class, hub, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny_training import Sequences, arguments, gpt2
from transformers import TrainingArguments
from hf_alsals import ALSALS, AlsalsTrainer, AlsalsTrainingArguments

model = gpt2()
ours = {arguments_class.__name__} is AlsalsTrainingArguments
optim = "salsa" if ours else "adamw_torch"
args = arguments({str(tmp_path / "mine")!r}, {arguments_class.__name__}, hub_token={PRETEND!r}, optim=optim)
optimizers = (None, None) if ours else (ALSALS(model.parameters()), None)
trainer = AlsalsTrainer(model, args, train_dataset=Sequences(), eval_dataset=Sequences(), optimizers=optimizers)
trainer.train()
trainer.evaluate()
trainer.push_to_hub(dataset="random sequences")
"""
    )
    done = python(tmp_path, hub.url, script)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repos["user/mine"]
    assert_nothing_private(files, tmp_path)
    result = card_of(files)["model-index"][0]["results"][0]
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"]["name"] == "random sequences"
    assert result["metrics"][0]["type"] == "loss"


@pytest.mark.parametrize("refused", ["token", "down"])
def test_where_the_hub_refuses_the_results_are_on_disk_and_the_message_says_so(refused, tmp_path):
    with HubServer(token="another") as server:
        endpoint = server.url
        if refused == "token":
            done = recipe(tmp_path, server, "run_image_classification.py")
    if refused == "down":  # nothing listens there any more
        done = recipe(tmp_path, endpoint, "run_image_classification.py")
    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("run_image_classification.py: error: push_to_hub: ")
    assert f"The results are in {tmp_path / 'out'}." in last_line
    assert f"hf upload user/tiny {tmp_path / 'out'}" in done.stderr + done.stdout
    expected = {"model.safetensors", "README.md", "all_results.json", "step_size.png", "trainer_state.json"}
    assert expected <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "eval_accuracy" in json.loads((tmp_path / "out" / "all_results.json").read_text())


def test_saved_training_arguments_are_those_of_the_run_without_what_is_private(tmp_path):
    args = arguments(tmp_path / "model", optim="salsa", hub_token=PRETEND, resume_from_checkpoint="/home/me/run-1")
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.save_model()
    saved = torch.load(tmp_path / "model" / "training_args.bin", weights_only=False)
    assert type(saved) is AlsalsTrainingArguments
    assert (saved.output_dir, saved.hub_token, saved.resume_from_checkpoint) == ("model", None, "run-1")
    assert trainer.args is args
    assert (args.output_dir, args.hub_token) == (str(tmp_path / "model"), PRETEND)
    different = {key for key, value in vars(args).items() if vars(saved).get(key) != value}
    assert different <= {
        "output_dir",
        "hub_token",
        "resume_from_checkpoint",
        "accelerator_config",
        "distributed_state",
    }


def test_published_arguments_read_and_write_those_that_they_stand_for(tmp_path):
    args = arguments(tmp_path)
    published = PublishedArguments(args)
    published.seed = 5
    assert (args.seed, published.seed, published.should_save) == (5, 5, args.should_save)
    file = io.BytesIO()
    torch.save({"args": published}, file)
    assert str(tmp_path).encode() not in file.getvalue()


def test_paths_are_told_from_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert [is_local_path(value) for value in (str(tmp_path), "/nowhere", "~/runs", "model", "./model")] == [True] * 5
    assert [is_local_path(value) for value in ("google-bert/bert-base-cased", "", None, 3)] == [False] * 4
    nested = {"a": ["/home/me/data", 1], "b": {"c": "steps"}}
    assert without_local_paths(nested) == {"a": ["data", 1], "b": {"c": "steps"}}


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("on /home/me/data/x, twice", "on x, twice"),
        ("data=/home/me/data", "data=data"),
        ("(/home/me/data/)", "(data)"),
        ("a:/home/me/one:/srv/two/", "a:one:two"),
        ("at ~/runs/one and file:///home/me/data", "at one and file://data"),
        ("'/home/me/a b'", "'a b'"),
        ("https://huggingface.co/me/model", "https://huggingface.co/me/model"),
        ("google-bert/bert-base-cased and/or me/model", "google-bert/bert-base-cased and/or me/model"),
        ("</s> <a/> 1/2 n / m", "</s> <a/> 1/2 n / m"),
        (r".*\.layers\.\d+/q_proj|^/x$", r".*\.layers\.\d+/q_proj|^/x$"),
    ],
)
def test_paths_in_text_are_told_from_other_slashes(text, published):
    assert without_local_paths(text) == published
    assert without_local_paths({"a": [(text, Path("/home/me/data"), 1)]}) == {"a": [(published, Path("data"), 1)]}


def test_a_home_with_spaces_is_not_told(monkeypatch):
    monkeypatch.setenv("HOME", "/home/my own name")
    assert without_local_paths("on /home/my own name/data/x, twice") == "on x, twice"
    monkeypatch.setenv("HOME", "/")
    assert without_local_paths("https://huggingface.co/x") == "https://huggingface.co/x"


def test_the_best_checkpoint_is_named_without_its_path(tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences())
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    trainer.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["best_model_checkpoint"] == "checkpoint-3"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")


def test_a_base_model_on_the_hub_stays_named(tmp_path):
    config = {"base_model_name_or_path": "google-bert/bert-base-cased", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text("---\nbase_model: google-bert/bert-base-cased\n---\n# card\n")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    remove_local_base_model(str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_script_with_a_trainer_of_trl_pushes_with_the_name_of_its_dataset(hub, tmp_path):
    reason = "TRL is optional: its newest release may not run on the oldest transformers"
    pytest.importorskip("trl.trainer.sft_trainer", reason=reason)
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import dataclass
from datasets import Dataset
from tiny_training import arguments
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer
from hf_alsals import AlsalsArgumentsMixin, AlsalsTrainerMixin

@dataclass
class Arguments(AlsalsArgumentsMixin, SFTConfig):
    pass

class Trainer(AlsalsTrainerMixin, SFTTrainer):
    pass

config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=259, n_positions=64, bos_token_id=1)
GPT2LMHeadModel(config).save_pretrained({str(tmp_path / "base")!r})
model = GPT2LMHeadModel.from_pretrained({str(tmp_path / "base")!r})
texts = Dataset.from_dict({{"text": [f"line {{i}} of many" for i in range(32)]}})
args = arguments({str(tmp_path / "mine")!r}, Arguments, hub_token={PRETEND!r}, max_length=32, bf16=False)
tokenizer = ByT5Tokenizer(extra_ids=0)
trainer = Trainer(model, args, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer)
trainer.train()
trainer.evaluate()
trainer.create_model_card(dataset_name={str(tmp_path / "data")!r})
trainer.push_to_hub(dataset_name="me/lines")
"""
    )
    done = python(tmp_path, hub.url, script)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repos["user/mine"]
    assert_nothing_private(files, tmp_path)
    card = card_of(files)
    result = card["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == "me/lines"
    assert {metric["type"] for metric in result["metrics"]} >= {"loss", "mean_token_accuracy"}
    assert {"alsals", "trl", "sft"} <= set(card["tags"])
    text = files["README.md"].decode()
    assert "This model is a fine-tuned version of a local model on the [me/lines]" in text
    assert "## Step size" in text


@pytest.mark.parametrize(
    "content", [b"# my notes\n", b"---\nfoo: [unclosed\n---\n", b"# caf\xe9\n", b"---\nbase_model: /tmp\n---\nhello\n"]
)
def test_saving_a_model_leaves_a_readme_alone(content, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences()).save_model()
    assert (tmp_path / "README.md").read_bytes() == content
    assert (tmp_path / "model.safetensors").exists()
