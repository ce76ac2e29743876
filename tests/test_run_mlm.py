import json
import sys
from pathlib import Path

import pytest
import recipe
import run_mlm
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, ByT5Tokenizer

from hf_alsals import AlsalsTrainingArguments

RECIPE = Path(run_mlm.__file__)
TINY = ["--use_cpu", "--disable_tqdm", "true", "--max_train_samples", 64, "--max_eval_samples", 16]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it was read when it was imported


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run_mlm.py", *map(str, flags)])
    run_mlm.main()


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_the_embedded_text_is_learned_and_the_model_fills_masks(tmp_path, monkeypatch):
    output = tmp_path / "out"
    flags = ["--max_seq_length", 64, *TINY, "--num_train_epochs", 10, "--output_dir", output]
    run(monkeypatch, "--optim", "alsals", *flags)
    state = json.loads((output / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    assert 0 < results(output)["eval_accuracy"] < 1
    model = AutoModelForMaskedLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer("the [MASK] of", return_tensors="pt")
    assert (inputs.input_ids == tokenizer.mask_token_id).sum() == 1
    logits = model(**inputs).logits
    assert logits.shape == (*inputs.input_ids.shape, len(tokenizer))
    assert model.config.vocab_size == len(tokenizer)
    again = tmp_path / "again"
    run(monkeypatch, "--model_name_or_path", output, *TINY, "--max_seq_length", 64, "--do_eval", "--output_dir", again)
    # Not the same masks, so not the same loss.
    assert results(again)["eval_loss"] == pytest.approx(results(output)["eval_loss"], rel=0.2)


def test_only_masked_words_count(tmp_path, monkeypatch):
    seen = []

    class SeenTrainer(run_mlm.AlsalsTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            seen.append(self)

    monkeypatch.setattr(run_mlm, "AlsalsTrainer", SeenTrainer)
    run(monkeypatch, *TINY, "--mlm_probability", 0.3, "--max_steps", 1, "--output_dir", tmp_path)
    rows = [seen[0].train_dataset[i] for i in range(32)]
    batch = seen[0].data_collator(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    special = original == seen[0].processing_class.sep_token_id
    assert special.any()
    assert not (batch["labels"][special] != -100).any()
    assert (batch["labels"][~special] != -100).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_the_shipped_config_is_valid():
    parser = recipe.make_parser("", run_mlm.MlmModelArguments, run_mlm.MlmDataArguments, AlsalsTrainingArguments)
    config = str(RECIPE.parent / "configs" / "bert-mlm.yaml")
    _, model_args, data_args, training_args = parser.parse_args_and_config([config, "--bf16", "false"])
    assert (model_args.model_type, data_args.dataset_name) == ("bert", "wikimedia/wikipedia")
    assert (training_args.optim, training_args.max_steps) == ("alsals", 100000)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mlm_probability", "1"], "mlm_probability must be in (0, 1), got 1.0."),
        (["--max_seq_length", "4"], "max_seq_length must be at least 8, got 4."),
        (["--max_seq_length", "256"], "max_seq_length must be at most 128, what model and tokenizer take, got 256."),
        (["--model_type", "gpt2"], "got 'gpt2'."),
        (["--model_type", "bert", "--config_name", "x"], "model_type cannot be combined with config_name"),
        (["--train_file", "nowhere.txt"], "train_file must be a file, but there is none at 'nowhere.txt'."),
        (["--tokenizer_name", "bytes"], "tokenizer_name must be a tokenizer with a mask token, but 'bytes' has none."),
        (["--model_name_or_path", "nowhere"], "model_name_or_path must be a name on the Hub or a path, and 'nowhere'"),
    ],
)
def test_a_bad_flag_is_named_in_the_last_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, "--output_dir", "out")
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
