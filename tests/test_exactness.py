"""The loss closure under the Trainer's features: at step size 0 it is the training loss, to the bit."""

import inspect
import warnings
from dataclasses import dataclass

import pytest
import torch
from exactness import build, train_and_compare
from peft import LoraConfig, get_peft_model
from tiny_training import Sequences, arguments, gpt2, training_logs, weights
from torch import nn
from torch.utils.data import IterableDataset
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_alsals import (
    ALSALS,
    AlsalsArgumentsMixin,
    AlsalsSeq2SeqTrainer,
    AlsalsSeq2SeqTrainingArguments,
    AlsalsTrainer,
    AlsalsTrainerMixin,
)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "resnet", "mixtral", "no loss kwargs"])
def test_models(name, accumulation, tmp_path):
    model, dataset = build(name)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, per_device_train_batch_size=2)
    train_and_compare(AlsalsTrainer(model, args, train_dataset=dataset))


def test_seq2seq_trainer(tmp_path):
    model, dataset = build("t5")
    args = arguments(tmp_path, AlsalsSeq2SeqTrainingArguments, gradient_accumulation_steps=2)
    train_and_compare(AlsalsSeq2SeqTrainer(model, args, train_dataset=dataset))


def test_batch_norm_moves_once_for_each_training_forward_pass(tmp_path):
    statistics = []
    for optim in ("alsals", "adamw_torch"):
        model, dataset = build("resnet")
        # A step of size 0 leaves the weights alone, so the statistics are those of the same forward passes.
        args = arguments(tmp_path, optim=optim, learning_rate=0.0, gradient_accumulation_steps=2)
        AlsalsTrainer(model, args, train_dataset=dataset).train()
        statistics.append({name: value.clone() for name, value in model.named_buffers()})
    ours, plain = statistics
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert {value.item() for name, value in ours.items() if name.endswith("num_batches_tracked")} == {12}


@pytest.mark.parametrize("clipping", [0.0, 0.05, 100.0])
def test_with_a_constant_accepted_step_size_training_is_adamw_to_the_bit(clipping, tmp_path):
    common = {"max_grad_norm": clipping, "weight_decay": 0.1, "lr_scheduler_type": "constant", "max_steps": 12}
    model, dataset = build("gpt2")
    args = arguments(
        tmp_path, optim_args="growth=constant,c=1e-9,growth_factor=1,initial_step_size=1e-4,beta3=0", **common
    )
    ours = AlsalsTrainer(model, args, train_dataset=dataset)
    ours.train()
    assert ours.alsals.search.total_probes == 12
    model, dataset = build("gpt2")
    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch", learning_rate=1e-4, **common)
    plain = AlsalsTrainer(model, args, train_dataset=dataset)
    plain.train()
    assert torch.equal(weights(ours), weights(plain))
    assert [entry["loss"] for entry in training_logs(ours)] == [entry["loss"] for entry in training_logs(plain)]


@pytest.mark.parametrize(("size", "accumulation", "windows"), [(10, 4, 2), (10, 3, 2), (9, 1, 5)])
def test_a_last_shorter_window_and_batch(size, accumulation, windows, tmp_path):
    args = arguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=-1,
        num_train_epochs=2,
    )
    train_and_compare(AlsalsTrainer(gpt2(), args, train_dataset=Sequences(size)), steps=2 * windows)


def own_loss(outputs, labels, num_items_in_batch=None):
    losses = nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return losses / num_items_in_batch


@pytest.mark.parametrize(
    ("trainer_arguments", "training_arguments"),
    [
        ({"compute_loss_func": own_loss}, {}),
        ({}, {"label_smoothing_factor": 0.1}),
        ({}, {"average_tokens_across_devices": False}),
        ({}, {"neftune_noise_alpha": 5.0}),
        ({}, {"gradient_checkpointing": True}),
        ({}, {"bf16": True}),
        ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
        ({}, {"dataloader_drop_last": True}),
    ],
    ids=lambda value: " ".join(value),
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_features(trainer_arguments, training_arguments, accumulation, tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, **training_arguments)
    train_and_compare(AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), **trainer_arguments))


def test_a_trainer_that_says_its_loss_is_scaled(tmp_path):
    class Scaled(AlsalsTrainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss / self.current_gradient_accumulation_steps
            return (loss, outputs) if return_outputs else loss

    args = arguments(tmp_path, gradient_accumulation_steps=3)
    train_and_compare(Scaled(gpt2(), args, train_dataset=Sequences()))


def test_gradient_checkpointing_warns_as_in_plain_training(tmp_path):
    def warnings_of(optim):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            args = arguments(tmp_path, optim=optim, gradient_checkpointing=True)
            AlsalsTrainer(gpt2(), args, train_dataset=Sequences()).train()
        return sorted(str(warning.message) for warning in caught)

    assert warnings_of("alsals") == warnings_of("adamw_torch")


def test_the_batch_size_is_found_after_running_out_of_memory(tmp_path):
    model = gpt2()
    forward = model.forward
    sizes = []

    def limited(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(input_ids=input_ids, **kwargs)

    model.forward = limited
    args = arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    train_and_compare(AlsalsTrainer(model, args, train_dataset=Sequences()))
    assert max(sizes) == 8 and sizes[-1] == 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Sequences())


def test_iterable_dataset(tmp_path):
    train_and_compare(AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Stream()))


def test_group_by_length(tmp_path):
    new = "train_sampling_strategy" in inspect.signature(TrainingArguments).parameters
    grouped = {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
    train_and_compare(AlsalsTrainer(gpt2(), arguments(tmp_path, **grouped), train_dataset=Sequences()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes(dtype, tmp_path):
    model, _ = build("gpt2")
    trainer = AlsalsTrainer(model.to(dtype), arguments(tmp_path, max_steps=30), train_dataset=Sequences())
    train_and_compare(trainer)
    assert training_logs(trainer)[-1]["loss"] < training_logs(trainer)[0]["loss"]


def test_only_the_adapter_of_a_peft_model_moves_and_costs_memory(tmp_path):
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(gpt2(), config)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainable = {p for p in model.parameters() if p.requires_grad}
    before = {p: p.detach().clone() for p in trainable}
    trainer = train_and_compare(AlsalsTrainer(model, arguments(tmp_path), train_dataset=Sequences()))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert any(not torch.equal(p, before[p]) for p in trainable)
    assert set(trainer.alsals.state) == trainable


def test_a_step_that_the_gradient_scaler_skips_leaves_the_search_untouched():
    model = nn.Linear(4, 1)
    optimizer = ALSALS(model.parameters(), search_interval=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.randn(8, 4)
    probes, slopes = [], []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        scaler.scale(loss * factor).backward()
        before = optimizer.search, [p.detach().clone() for p in model.parameters()]
        optimizer.set_closure(lambda: model(x).square().mean(), loss)
        scaler.step(optimizer)
        scaler.update()
        probes.append(optimizer.search.total_probes)
        slopes.append(optimizer.slope)
        if factor != 1.0:
            assert optimizer.search == before[0]
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[1]))
            assert scaler.get_scale() == 4.0
    assert probes[0] == probes[1] < probes[2]
    # Adam's first direction is the sign of the gradient: the slope in unscaled units is the gradient's 1-norm.
    torch.manual_seed(0)
    fresh = nn.Linear(4, 1)
    fresh(x).square().mean().backward()
    norm = sum(p.grad.abs().sum() for p in fresh.parameters()).item()
    optimizer = ALSALS(fresh.parameters())
    optimizer.zero_grad()
    loss = fresh(x).square().mean()
    scaler.scale(loss).backward()
    optimizer.set_closure(lambda: fresh(x).square().mean(), loss)
    scaler.step(optimizer)
    assert optimizer.slope == pytest.approx(norm, rel=1e-4)


def test_trl_sft_trainer(tmp_path):
    reason = "TRL is optional: its newest release may not run on the oldest transformers"
    trl = pytest.importorskip("trl", reason=reason)
    datasets = pytest.importorskip("datasets")

    @dataclass
    class SFTArguments(AlsalsArgumentsMixin, trl.SFTConfig):
        pass

    class AlsalsSFTTrainer(AlsalsTrainerMixin, trl.SFTTrainer):
        pass

    def build_trainer(optim):
        torch.manual_seed(0)
        config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=259, n_positions=64, bos_token_id=1)
        texts = datasets.Dataset.from_dict({"text": [f"line {i} of many " * (1 + i % 3) for i in range(32)]})
        args = arguments(tmp_path, SFTArguments, optim=optim, max_length=64, gradient_accumulation_steps=2, bf16=False)
        tokenizer = ByT5Tokenizer(extra_ids=0)
        return AlsalsSFTTrainer(GPT2LMHeadModel(config), args, train_dataset=texts, processing_class=tokenizer)

    train_and_compare(build_trainer("alsals"))
    logs = []
    for optim in ("alsals", "adamw_torch"):
        trainer = build_trainer(optim)
        trainer.train()
        logs.append(training_logs(trainer))
    assert [entry["num_tokens"] for entry in logs[0]] == [entry["num_tokens"] for entry in logs[1]]
    assert logs[0][-1]["loss"] < logs[0][0]["loss"]
