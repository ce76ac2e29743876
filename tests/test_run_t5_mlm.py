import json
import sys

import pytest
import run_t5_mlm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

TINY = ["--use_cpu", "--disable_tqdm", "true", "--max_train_samples", 64, "--max_eval_samples", 16]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it was read when it was imported


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run_t5_mlm.py", *map(str, flags)])
    run_t5_mlm.main()


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_the_embedded_text_is_learned_and_the_model_is_loaded_back(tmp_path, monkeypatch):
    output = tmp_path / "out"
    run(monkeypatch, "--optim", "alsals", *TINY, "--num_train_epochs", 5, "--output_dir", output)
    state = json.loads((output / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    assert 0 < results(output)["eval_accuracy"] < 1
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = "The <extra_id_0> of <extra_id_1>."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).endswith(" of .")
    generated = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4)
    assert generated[0, 0] == model.config.decoder_start_token_id == tokenizer.pad_token_id
    again = ["--model_name_or_path", output, *TINY, "--do_eval", "--output_dir", tmp_path / "again"]
    run(monkeypatch, *again)
    # Not the same spans, so not the same loss.
    assert results(tmp_path / "again")["eval_loss"] == pytest.approx(results(output)["eval_loss"], rel=0.2)


def test_a_block_is_cut_as_the_paper_does(tmp_path, monkeypatch):
    seen = []

    class SeenTrainer(run_t5_mlm.AlsalsTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            seen.append(self)

    monkeypatch.setattr(run_t5_mlm, "AlsalsTrainer", SeenTrainer)
    run(monkeypatch, *TINY, "--max_seq_length", 100, "--max_steps", 1, "--output_dir", tmp_path)
    tokenizer, dataset = seen[0].processing_class, seen[0].train_dataset
    batch = seen[0].data_collator([dataset[0]])
    assert batch["input_ids"].shape == (1, 85 + 5 + 1)  # 15 of 100 tokens in 5 spans of 3
    inputs, labels = tokenizer.decode(batch["input_ids"][0]), tokenizer.decode(batch["labels"][0])
    parts = inputs.removesuffix("</s>")
    for i in range(5):
        sentinel, following = f"<extra_id_{i}>", f"<extra_id_{i + 1}>"
        span = labels.split(sentinel)[1].split("</s>" if i == 4 else following)[0]
        parts = parts.replace(sentinel, span)
    assert parts == tokenizer.decode(dataset[0]["input_ids"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mlm_probability", "0"], "mlm_probability must be in (0, 1), got 0.0."),
        (["--mean_noise_span_length", "0.5"], "mean_noise_span_length must be at least 1, got 0.5."),
        (["--max_seq_length", "4"], "max_seq_length must be at least 8, got 4."),
        (["--max_seq_length", "4000"], "lose 200 spans, but the tokenizer has 125 sentinels"),
        (["--model_type", "bert"], "got 'bert'."),
    ],
)
def test_a_bad_flag_is_named_in_the_last_line(flags, message, capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags, "--output_dir", tmp_path)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
