import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pytorch_optimizer import Lamb, Lion
from small_problems import assert_identical, make_net, net_loss, parameter_group, single, through_torch_save, train
from tiny_training import Sequences, arguments, gpt2
from torch import nn
from transformers import (
    Adafactor,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_alsals import ALSALS, AlsalsTrainer, AlsalsTrainingArguments
from hf_alsals.direction import hidden_matrices
from hf_alsals.line_profile import LineProfile
from hf_alsals.optimizer_direction import (
    AdafactorDirection,
    Float32OnCpu,
    LambDirection,
    LionDirection,
    MuonDirection,
    OptimizerDirection,
    set_hidden_matrices,
)

RATE = 0.01


class MuonAndAdamW:
    """Muon for matrices, and for the weights of convolutions as matrices; AdamW for the rest."""

    def __init__(self, params):
        self.views = {p: nn.Parameter(p.detach().flatten(1)) for p in params if p.ndim >= 2}  # of the same memory
        self.muon = torch.optim.Muon(self.views.values(), lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW([p for p in params if p.ndim < 2], lr=RATE, weight_decay=0.0)

    def step(self):
        for p, view in self.views.items():
            view.grad = p.grad.flatten(1)
        with Float32OnCpu():
            self.muon.step()
        self.adamw.step()


LIBRARY = {
    LionDirection: lambda params: [Lion(params, lr=RATE, weight_decay=0.0)],
    LambDirection: lambda params: [Lamb(params, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)],
    AdafactorDirection: lambda params: [Adafactor(params, lr=RATE, scale_parameter=False, relative_step=False)],
    MuonDirection: lambda params: [MuonAndAdamW(params)],
}


def matrices(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(6, 10), (10,), (8, 3), (), (2, 3, 4)]
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def gradients(params, k):
    generator = torch.Generator().manual_seed(k)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) + 0.3 * p.detach()


@pytest.mark.parametrize("kind", LIBRARY)
@pytest.mark.parametrize("is_searched", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_at_a_constant_step_size_it_is_the_librarys_optimizer(kind, is_searched, weight_decay):
    ours, theirs = matrices(), matrices()
    library, state = LIBRARY[kind](theirs), {p: {} for p in ours}
    for k in range(8):
        gradients(ours, k), gradients(theirs, k)
        starts = [p.detach().clone() for p in ours]
        grads = [p.grad.clone() for p in ours]
        direction = kind([parameter_group(ours, weight_decay=weight_decay)], state)
        with torch.no_grad():
            if is_searched:
                (slope,) = direction.first_move(RATE)
                moved = [start - p for start, p in zip(starts, ours)]
                assert slope.item() == pytest.approx(
                    sum((g * d).sum().item() for g, d in zip(grads, moved)) / RATE, rel=1e-4
                )
                direction.move(0.3)
            direction.step(RATE)
        for optimizer in library:
            optimizer.step()
        with torch.no_grad():
            for p, start in zip(theirs, starts):
                p.sub_(RATE * weight_decay * start)
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LIBRARY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_direction_in_float32_at_least(kind, dtype):
    params, wide = matrices(dtype), [nn.Parameter(p.detach().float()) for p in matrices(dtype)]
    direction, other = (kind([parameter_group(group)], {p: {} for p in group}) for group in (params, wide))
    gradients(params, 0)
    for p, q in zip(params, wide):
        q.grad = p.grad.float()
    direction.update(), other.update()
    for p, q in zip(params, wide):
        kept = direction.state[p]["direction"]
        assert kept.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(kept, other.state[q]["direction"], rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("name", ["muon", "lamb", "adafactor", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_bit_for_bit(name, dtype):
    net = make_net(dtype)
    optimizer = ALSALS(net.parameters(), direction=name, search_interval=2)
    train(net, optimizer, range(6))
    saved, weights = through_torch_save(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    history = train(net, optimizer, range(6, 14))
    again = make_net(dtype)
    again.load_state_dict(weights)
    resumed = ALSALS(again.parameters(), direction=name, search_interval=2)
    resumed.load_state_dict(saved)
    assert train(again, resumed, range(6, 14)) == history
    assert_identical(dict(again.state_dict()), dict(net.state_dict()))


@pytest.mark.parametrize("name", ["muon", "lamb", "adafactor", "lion"])
def test_the_search_trains_along_it(name):
    net = make_net(torch.float32)
    history = train(net, ALSALS(net.parameters(), direction=name), range(300))
    first, last = (sum(loss for _, loss in part) for part in (history[:10], history[-10:]))
    assert last < 0.5 * first
    assert net_loss(net, 0) < 0.05


def test_a_muon_step_has_the_root_mean_square_of_adams():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64, 256))
    p.grad = torch.randn(64, 256)
    direction = MuonDirection([parameter_group([p])], {p: {}})
    direction.update()
    assert direction.state[p]["direction"].square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def orthogonalized(grad, steps=5):
    """The first step of Muon by its formula (Jordan et al., 2024, with Nesterov momentum and the scale of Adam)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    matrix = grad if grad.shape[0] <= grad.shape[1] else grad.T
    matrix = matrix / matrix.norm()
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return 0.2 * max(grad.shape) ** 0.5 * (matrix if grad.shape[0] <= grad.shape[1] else matrix.T)


@pytest.mark.parametrize("shape", [(6, 10), (40, 24)])
def test_on_a_cpu_muon_is_in_float32_and_torchs_own_within_bfloat16(shape):
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    p.grad = q.grad = torch.randn(shape)
    direction = MuonDirection([parameter_group([p])], {p: {}})
    direction.update()
    ours, exact = direction.state[p]["direction"], orthogonalized(p.grad.double()).float()
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    torch.optim.Muon([q], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert 1e-3 < ((exact + q.detach()).norm() / exact.norm()).item() < 3e-2


def apart_in(model, layers_only):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = ALSALS([{"params": decayed, "weight_decay": 0.1}, {"params": others}])
    set_hidden_matrices(optimizer, model, layers_only)
    names = {p: name for name, p in model.named_parameters()}
    hidden = [names[p] for p in hidden_matrices(optimizer.param_groups)]
    assert len(optimizer.param_groups) == 2
    return [name for p, name in names.items() if p.ndim > 1 and name not in hidden]


@pytest.mark.parametrize("layers_only", [True, False])
def test_embeddings_and_heads_are_no_hidden_matrices(layers_only):
    size = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}
    apart = apart_in(GPT2LMHeadModel(GPT2Config(**size)), layers_only)
    assert apart == ["transformer.wte.weight", "transformer.wpe.weight"]  # the head is tied
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    apart = apart_in(BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **size)), layers_only)
    embeddings = [f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    assert apart == [*embeddings, "classifier.weight"]


def test_of_experts_and_positions_only_muon_makes_no_hidden_matrices():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
            self.position = nn.Parameter(torch.zeros(1, 9, 4))
            self.experts = nn.Parameter(torch.zeros(2, 4, 4))

    assert apart_in(Model(), layers_only=True) == ["position", "experts"]
    assert apart_in(Model(), layers_only=False) == []


def test_an_adapter_as_wide_as_there_are_labels_is_no_head():
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    bert = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=4, **size))
    model = get_peft_model(bert, LoraConfig(task_type="SEQ_CLS", r=4))
    assert not [name for name in apart_in(model, layers_only=False) if "lora" in name]


def test_a_group_says_that_it_has_no_hidden_matrices():
    matrices = [nn.Parameter(torch.zeros(2, 2)) for _ in range(4)]
    groups = [{"params": matrices[:1], "hidden": False}, {"params": matrices[1:], "apart": [1]}]
    assert [id(p) for p in hidden_matrices(groups)] == [id(matrices[1]), id(matrices[3])]
    for name in ("muon", "use_muon"):
        with pytest.raises(ValueError, match=f"^{name} is called hidden in parameter groups"):
            ALSALS([{"params": matrices, name: False}])
    with pytest.raises(TypeError, match=r"^hidden must be True or False in a parameter group, got 'False'\."):
        ALSALS([{"params": matrices, "hidden": "False"}])


def test_layers_in_blocks_as_wide_as_there_are_tokens_or_labels_are_no_heads():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    for width in ({"hidden_size": 32, "intermediate_size": 48}, {"hidden_size": 16, "intermediate_size": 32}):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, **width, **sizes))
        assert apart_in(llama, layers_only=True) == ["model.embed_tokens.weight", "lm_head.weight"]
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    choice = BertForMultipleChoice(BertConfig(vocab_size=20, **size))
    assert apart_in(choice, layers_only=True)[-1] == "classifier.weight"  # of one output
    heads = nn.Module()
    heads.config, heads.several = BertConfig(num_labels=3), nn.ModuleList(nn.Linear(8, 3) for _ in range(2))
    assert apart_in(heads, layers_only=True) == ["several.0.weight", "several.1.weight"]


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_a_matrix_that_turns_hidden_between_steps_is_refused_before_anything_moves(before, after):
    net = make_net(torch.float32)
    optimizer = ALSALS([{"params": net.parameters(), "hidden": before}], direction="muon")
    train(net, optimizer, range(2))
    weights, steps = copy.deepcopy(net.state_dict()), [state["step"].item() for state in optimizer.state.values()]
    optimizer.param_groups[0]["hidden"] = after
    with pytest.raises(ValueError, match=f"has moved along {'Muon' if before else 'Adam'}'s direction"):
        train(net, optimizer, range(2, 3))
    assert_identical(net.state_dict(), weights)
    assert [state["step"].item() for state in optimizer.state.values()] == steps


@pytest.mark.parametrize("name", ["lion", "adafactor"])
@pytest.mark.parametrize("option", [{"betas": (0.5, 0.999)}, {"eps": 1e-6}])
def test_what_a_direction_does_not_read_is_refused(name, option):
    (said,) = option
    with pytest.raises(ValueError, match=rf"^{said} must be left at .*'s direction has its own, got "):
        ALSALS([single([1.0])], direction=name, **option)
    ALSALS([single([1.0])], direction="lamb", **option)
    ALSALS([single([1.0])], direction=name, betas=[0.9, 0.999])


def test_in_autocast_muon_is_in_float32_and_its_mode_is_left():
    p, q = (nn.Parameter(torch.zeros(8, 6)) for _ in range(2))
    p.grad = q.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    directions = [MuonDirection([parameter_group([w])], {w: {}}) for w in (p, q)]
    directions[0].update()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        directions[1].update()
    assert torch.equal(directions[0].state[p]["direction"], directions[1].state[q]["direction"])
    assert p.grad.bfloat16().dtype == torch.bfloat16


def test_training_twice_and_resuming_with_muon(tmp_path):
    args = arguments(tmp_path, optim="alsals_muon", save_strategy="steps", save_steps=3)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    again = AlsalsTrainer(gpt2(), args, train_dataset=Sequences())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    first = [p.detach() for p in trainer.model.parameters()]
    assert_identical([p.detach() for p in again.model.parameters()], first)


def test_the_line_profile_draws_along_any_direction():
    net = make_net(torch.float32)
    optimizer = ALSALS(net.parameters(), direction="lamb")
    train(net, optimizer, range(3))
    net.zero_grad()
    loss = net_loss(net, 3)
    loss.backward()
    profile = LineProfile(optimizer, lambda: net_loss(net, 3))
    assert profile.slope > 0


def test_what_muon_cannot_do_is_said(monkeypatch):
    with pytest.raises(ValueError, match='slope must be "exact" or "finite_difference" along Muon\'s direction'):
        ALSALS([single([1.0])], direction="muon", slope="preconditioned")
    with pytest.raises(
        ValueError, match="direction must be one of nadam, adam, muon, lamb, adafactor, lion, got 'sgd'"
    ):
        ALSALS([single([1.0])], direction="sgd")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"direction=muon needs torch 2\.9 or newer, got "):
        ALSALS([single([[1.0]])], direction="muon")
    with pytest.raises(ValueError, match=r"optim_args: direction=muon needs torch 2\.9 or newer, got "):
        AlsalsTrainingArguments(optim="alsals_muon")
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # importing it fails
    for name in ("lamb", "lion"):
        with pytest.raises(ImportError, match=f"direction={name} needs the package pytorch_optimizer"):
            ALSALS([single([1.0])], direction=name)


def test_a_direction_of_an_optimizer_of_ones_own():
    class SGDDirection(OptimizerDirection):
        name = "sgd"
        description = "the gradient"

        def optimizer_of(self, p, copy, group):
            return torch.optim.SGD([copy], lr=1.0, momentum=0.9)

    net, other = make_net(torch.float32), make_net(torch.float32)
    optimizer = ALSALS(
        net.parameters(), direction=SGDDirection, growth="constant", growth_factor=1.0, c=1e-9, initial_step_size=0.01
    )
    sgd = torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.9)
    train(net, optimizer, range(20))
    for k in range(20):
        sgd.zero_grad()
        net_loss(other, k).backward()
        sgd.step()
    assert optimizer.step_size == 0.01
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
