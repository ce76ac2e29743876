"""What moves in a forward pass, beside what is trained, moves once a micro-batch, whatever is probed."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_alsals import ALSALS, LossReplay
from hf_alsals.module_state import copied_slots, marks


class Encoder(nn.Module):
    """Trains a linear map; a subclass has something that its forward pass moves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(4, 4)

    def move(self):
        raise NotImplementedError

    def forward(self, x):
        with torch.no_grad():
            self.move()
        return (self.query(x) - x).pow(2).mean()


class MomentumEncoder(Encoder):
    def __init__(self):
        super().__init__()
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    def move(self):
        for key, query in zip(self.key.parameters(), self.query.parameters()):
            key.mul_(0.9).add_(query, alpha=0.1)

    def forward(self, x):
        return super().forward(x) + (self.query(x) - self.key(x)).pow(2).mean()


class MomentumEncoderThroughData(MomentumEncoder):
    def move(self):
        for key, query in zip(self.key.parameters(), self.query.parameters()):
            key.data.mul_(0.9).add_(query.data, alpha=0.1)


class ReplacedData(MomentumEncoder):
    def move(self):
        for key, query in zip(self.key.parameters(), self.query.parameters()):
            key.data = 0.9 * key.data + 0.1 * query.data


class EqualAtFirst(Encoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", self.query.weight.detach().clone())

    def move(self):
        self.average.lerp_(self.query.weight, 0.1)


class LateBuffer(Encoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("late", torch.zeros(2))

    def move(self):
        self.calls += 1
        if self.calls > 3:
            self.late.add_(1)


class LazyBuffer(Encoder):
    def move(self):
        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", torch.zeros(2))
        self.lazy.add_(1)


class NoBufferYet(Encoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("none", None)

    def move(self):
        self.none = torch.ones(2) if self.none is None else self.none + 1


class NumbersAndTensors(Encoder):
    def __init__(self):
        super().__init__()
        self.calls, self.name, self.tensor = 0, "", torch.zeros(2)

    def move(self):
        self.calls += 1
        self.name = f"call {self.calls}"
        self.tensor = self.tensor + 1


MODELS = [
    MomentumEncoder,
    MomentumEncoderThroughData,
    ReplacedData,
    EqualAtFirst,
    LateBuffer,
    LazyBuffer,
    NoBufferYet,
    NumbersAndTensors,
]


def state_of(model):
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    plain = {name: value for name, value in vars(model).items() if isinstance(value, (int, str, torch.Tensor))}
    return tensors | plain


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


@pytest.mark.parametrize("kind", MODELS)
def test_it_moves_in_training_alone(kind):
    """Against the same steps, of the same step sizes, without any probe."""
    model, plain = kind().double(), kind().double()  # all steps are rounded alike
    replay = LossReplay(model, Accelerator(cpu=True))
    optimizer = ALSALS(model.parameters(), growth="constant", search_interval=1)
    optimizer.set_closure(replay)
    reference = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    probes = 0
    for _ in range(6):
        x = torch.randn(8, 4, dtype=torch.float64)
        for one in (model, plain):
            one.zero_grad()
        replay.record(model, x).backward()
        optimizer.step()
        plain(x).backward()
        reference.param_groups[0]["lr"] = optimizer.search.taken
        reference.step()
        probes += optimizer.probes
        assert_same(state_of(model), state_of(plain))
    assert probes >= 6


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in (LateBuffer, LazyBuffer, NoBufferYet)])
def test_a_probe_sees_it_as_the_training_pass_did(kind):
    model = kind()
    replay = LossReplay(model, Accelerator(cpu=True))
    for _ in range(3):
        replay.record(model, torch.randn(8, 4))
        assert replay() == replay() == replay.loss


def test_from_the_second_step_on_only_what_moves_is_copied():
    model = EqualAtFirst()
    model.register_buffer("constant", torch.zeros(2))
    replay = LossReplay(model, Accelerator(cpu=True))
    for _ in range(2):
        before = model.average.clone()
        replay.record(model, torch.randn(8, 4))
        model.query.weight.data.add_(1)
    model.constant.data.add_(1)  # a copy of it would undo that
    (batch,) = replay.micro_batches
    batch.module_state.restore()
    assert torch.equal(model.average, before)
    assert torch.equal(model.constant, torch.ones(2))


def test_what_lora_freezes_is_not_copied_and_what_a_momentum_encoder_freezes_is():
    encoder = MomentumEncoder()
    assert (encoder.key, "weight") in copied_slots(encoder)
    large = MomentumEncoder()
    large.frozen = nn.Linear(64, 64).requires_grad_(False)
    assert (large.frozen, "weight") not in copied_slots(large)
    assert (large.frozen, "weight") in marks(large)
