"""The loss closure under the Trainer's features: at step size 0 it is the training loss, to the bit."""

import inspect
import warnings
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import LENGTH, VOCABULARY, Observer, Sequences, arguments, gpt2, training_logs, weights
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_alsals import (
    ALSALS,
    AlsalsArgumentsMixin,
    AlsalsSeq2SeqTrainer,
    AlsalsSeq2SeqTrainingArguments,
    AlsalsTrainer,
    AlsalsTrainerMixin,
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
    assert ours.alsals.line_search.total_probes == 12
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
        before = optimizer.line_search.state_dict(), [p.detach().clone() for p in model.parameters()]
        optimizer.set_closure(lambda: model(x).square().mean(), loss)
        scaler.step(optimizer)
        scaler.update()
        probes.append(optimizer.line_search.total_probes)
        slopes.append(optimizer.slope)
        if factor != 1.0:
            assert optimizer.line_search.state_dict() == before[0]
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed: use FSDP2"),
        ({"is_fsdp_enabled": True}, "FSDP1.*set fsdp_version to 2"),
        ({"get_tp_size": lambda: 2}, "tensor, context, sequence or expert parallelism: use data parallelism"),
        ({"get_cp_size": lambda: 2}, "tensor, context, sequence or expert parallelism: use data parallelism"),
        ({"get_sp_size": lambda: 2}, "tensor, context, sequence or expert parallelism: use data parallelism"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_exact_is_refused_when_the_trainer_is_built(changed, message, tmp_path):
    class Elsewhere(AlsalsTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            vars(self).update(changed)

    with pytest.raises(ValueError, match=message):
        Elsewhere(gpt2(), arguments(tmp_path), train_dataset=Sequences())


def test_a_hand_made_optimizer_is_refused_there_too(tmp_path):
    class TensorParallel(AlsalsTrainer):
        def get_tp_size(self):
            return 2

    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch")
    TensorParallel(gpt2(), args, train_dataset=Sequences())
    with pytest.raises(ValueError, match="tensor, context, sequence or expert parallelism"):
        model = gpt2()
        TensorParallel(model, args, train_dataset=Sequences(), optimizers=(ALSALS(model.parameters()), None))


def test_data_parallelism_in_one_process_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel \(one process, 2 GPUs\): launch one process for each GPU"):
        AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
