"""Models of several architectures, and the comparison of the closure's loss with that of training."""

import torch
from tiny_training import LENGTH, VOCABULARY, Observer, Sequences, gpt2
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)


class Images(Sequences):
    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        label = index % 3
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator) + label, "labels": label}


class NoLossKwargs(nn.Module):
    """A model that takes no num_items_in_batch, draws random numbers and moves a buffer that its loss depends on."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids, labels):
        self.calls += 1
        hidden = nn.functional.dropout(self.embedding(input_ids), 0.2, self.training) * (1 + 0.01 * self.calls)
        logits = self.head(hidden + 0.1 * torch.randn_like(hidden))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def build(name):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "gpt2":
        return gpt2(), Sequences()
    if name == "bert":
        return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **small)), Sequences()
    if name == "t5":
        config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        config.decoder_start_token_id = 0
        return T5ForConditionalGeneration(config), Sequences()
    if name == "vit":
        config = ViTConfig(image_size=16, patch_size=8, num_labels=3, hidden_dropout_prob=0.1, **small)
        return ViTForImageClassification(config), Images()
    if name == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
        return ResNetForImageClassification(config), Images()
    if name == "mixtral":
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=0.1,
            attention_dropout=0.1,
            **small,
        )
        return MixtralForCausalLM(config), Sequences()
    return NoLossKwargs(), Sequences()


def train_and_compare(trainer, steps=None):
    """Train, and compare the closure's loss with the training loss before every optimizer step."""
    seen = []

    def compare():
        replay = trainer.loss_replay
        seen.append((trainer.alsals, replay.loss.item(), replay().item()))

    trainer.add_callback(Observer(compare))
    trainer.train()
    assert len(seen) == (steps or trainer.args.max_steps)
    assert [trained for _, trained, _ in seen] == [replayed for _, _, replayed in seen]
    assert len({trained for _, trained, _ in seen}) > 1
    return trainer
