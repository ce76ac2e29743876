import socket

import pytest
from huggingface_hub import ModelCard
from tiny_training import Sequences, arguments, gpt2
from transformers import TrainingArguments

from hf_alsals import AlsalsTrainer
from hf_alsals.callbacks import StepSizeCallback


@pytest.fixture
def trained(tmp_path):
    args = arguments(tmp_path / "model", optim="salsa", optim_args="c=0.4", hub_token="hf_secret")
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), callbacks=[StepSizeCallback()])
    trainer.train()
    return trainer


def test_the_card_says_how_the_step_size_was_found(trained, tmp_path):
    trained.create_model_card(tasks="text-generation", tags="tiny")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert {"alsals", "tiny"} <= set(card.data.tags)
    alsals = trained.alsals
    for row in (
        "No learning rate was chosen: the step size was found by a line search along Adam's direction (ALSALS,",
        "| optimizer | `salsa` |",
        "| options | c 0.4, beta3 0.99, growth_factor 1.1, search_interval adaptive, decrease_factor 0.8, "
        "initial_step_size 0.1, growth constant, slope preconditioned |",
        f"| last step size | {alsals.step_size:.4g} |",
        f"| probes per step | {alsals.search.total_probes / 6:.2f} |",
        "![Loss and step size over the optimizer steps](step_size.png)",
        "This model was trained from scratch",
    ):
        assert row in card.text
    share = card.text.split("| share of the time in the search | ")[1].split("%")[0]
    assert 0 <= int(share) < 100


def test_no_secret_and_no_path_gets_into_a_card(trained, tmp_path):
    trained.create_model_card(finetuned_from=str(tmp_path))
    text = (tmp_path / "model" / "README.md").read_text()
    for secret in (str(tmp_path), "hf_secret", socket.gethostname()):
        assert secret not in text
    assert "This model is a fine-tuned version of a local model on" in text


def test_the_results_of_the_last_evaluation_are_in_the_metadata(tmp_path):
    args = arguments(tmp_path, optim="alsals", eval_strategy="steps", eval_steps=3)
    data = {"one": Sequences(), "two": Sequences(5)}
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), eval_dataset=data)
    trainer.train()
    trainer.create_model_card(dataset_tags="user/sequences", dataset="Sequences", dataset_args="short")
    card = ModelCard.load(tmp_path / "README.md")
    last = {key: entry[key] for entry in trainer.state.log_history for key in entry if key.endswith("_loss")}
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"one_loss", "two_loss"}
    for name, result in results.items():
        assert result.metric_value == last[f"eval_{name}"]
        assert (result.dataset_type, result.dataset_config) == ("user/sequences", "short")
        assert result.task_type == "text-generation"


def test_the_card_of_another_optimizer_is_the_trainers_own(tmp_path):
    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch")
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.train()
    trainer.create_model_card()
    assert "Step size" not in (tmp_path / "README.md").read_text()
