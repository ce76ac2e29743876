import copy
import json
import math

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread
from tiny_training import Sequences, arguments, gpt2, training_logs
from torch import nn

from hf_alsals import ALSALS, AlsalsTrainer, LineProfileCallback
from hf_alsals.line_profile import LineProfile, draw_line_profile
from hf_alsals.path_growth import TensorState

STEP_SIZES = [0.0, 1e-4, 1e-3, 1e-2, 0.1]


@pytest.mark.parametrize(("steps_before", "multiplier"), [(0, 1.0), (3, 1.0), (3, 2.0)])
def test_the_losses_on_the_line_are_those_of_adamw_at_these_learning_rates(steps_before, multiplier):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, other = torch.randn(16, 4).double(), torch.randn(16, 4).double()

    def loss_of(model, x):
        return (model(x) - x[:, :1] * x[:, 1:2]).square().mean()

    optimizer = ALSALS(model.parameters(), growth="constant")
    for _ in range(steps_before + 1):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        if _ < steps_before:
            optimizer.step(lambda: loss_of(model, x), loss)

    optimizer.tensors[model[0].weight] = TensorState(log_multiplier=math.log(multiplier))
    expected = {"own": [], "other": []}
    slopes = []
    for step_size in STEP_SIZES:
        twin = copy.deepcopy(model)
        first, *rest = twin.parameters()
        groups = [{"params": [first], "lr": multiplier * step_size}, {"params": rest}]
        adamw = torch.optim.AdamW(groups, lr=step_size, weight_decay=0.0)
        for p, q in zip(model.parameters(), twin.parameters()):
            q.grad = p.grad.clone()
            adamw.state[q] = {name: value.clone() for name, value in optimizer.state[p].items()}
        adamw.step()
        pairs = list(zip(model.parameters(), twin.parameters()))
        slopes.append(sum((p.grad * (p - q)).sum().item() for p, q in pairs) / max(step_size, 1e-300))
        expected["own"].append(loss_of(twin, x).item())
        expected["other"].append(loss_of(twin, other).item())

    before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict()["state"]))
    line = LineProfile(optimizer, lambda: loss_of(model, x), clip_coef=0.5)
    own = line.losses(lambda: loss_of(model, x), STEP_SIZES)
    after = (model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert own == pytest.approx(expected["own"], rel=1e-12)
    assert line.slope == pytest.approx(slopes[1] / 0.5, rel=1e-9)

    with torch.no_grad():
        for p in model.parameters():
            p += 1.0  # the weights of another moment
    assert line.losses(lambda: loss_of(model, other), STEP_SIZES) == pytest.approx(expected["other"], rel=1e-12)
    for p, weights in zip(model.parameters(), before[0].values()):
        torch.testing.assert_close(p.detach(), weights + 1.0, rtol=0, atol=0)


def test_weights_are_put_back_when_a_closure_fails():
    w = nn.Parameter(torch.ones(3))
    w.sum().backward()
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("full")
        return w.sum()

    line = LineProfile(ALSALS([w]), closure)
    with pytest.raises(RuntimeError, match="full"):
        line.losses(closure, STEP_SIZES)
    assert w.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_profiles_of_a_run_agree_with_its_logs_and_change_nothing(accumulation, tmp_path):
    logs = []
    for callbacks in ([], [LineProfileCallback(every=2, points=40)]):
        args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=accumulation, max_grad_norm=0.1)
        args.optim_args = "search_interval=1"
        trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), callbacks=callbacks)
        trainer.train()
        logs.append(training_logs(trainer))
    assert logs[0] == logs[1]
    by_step = {entry["step"]: entry for entry in logs[0]}
    folder = tmp_path / "line_profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-00000{step}.{kind}" for step in (2, 4, 6) for kind in ("json", "png")
    ]
    for step in (2, 4, 6):
        profile = json.loads((folder / f"step-00000{step}.json").read_text())
        assert len(profile["step_sizes"]) == len(profile["losses"]) == 41 and profile["step_sizes"][0] == 0
        assert profile["losses"][0] == pytest.approx(by_step[step]["loss"], abs=1e-4)
        if step < 6:  # at step 4 the schedule is below its half, and nothing is searched
            next_loss, taken = by_step[step + 1]["loss"], profile["accepted_step_size"]
            i = next(i for i, step_size in enumerate(profile["step_sizes"]) if step_size > taken)
            low, high = sorted(profile["next_losses"][i - 1 : i + 1])
            assert low - 1e-4 <= next_loss <= high + 1e-4
        else:
            assert profile["next_losses"] == []
        assert profile["searched"] == (by_step[step]["probes"] > 0) == (step < 6)
        best = min(profile["losses"])
        assert profile["losses"][profile["step_sizes"].index(profile["best_step_size"])] == best
        assert (imread(folder / f"step-00000{step}.png") < 0.99).any(axis=-1).sum() > 5000
    second = json.loads((folder / "step-000002.json").read_text())
    assert second["slope"] == pytest.approx(by_step[2]["slope"], rel=1e-5)
    assert second["accepted_step_size"] == by_step[2]["step_size"] * second["lr_multiplier"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("growth", ["path", "constant"])
def test_at_the_accepted_step_size_a_profile_has_the_loss_that_the_search_measured(growth, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    optimizer = ALSALS(model.parameters(), lr=0.5, weight_decay=0.1, growth=growth, search_interval=1)

    for _ in range(4):
        x = torch.randn(16, 4, dtype=dtype)

        def closure(x=x):
            return (model(x) - x[:, :1]).float().square().mean()

        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        line = LineProfile(optimizer, closure)
        optimizer.step(closure, loss)
        start, accepted = loss.item(), optimizer.search.predicted_reduction / optimizer.slope
        assert optimizer.search.accepted and optimizer.probes > 0
        assert line.slope == pytest.approx(optimizer.slope, rel=1e-6)  # the kernel of the first move rounds otherwise
        # The weights have moved on since, to half the step and with weight decay: no business of the line.
        before, after = line.losses(closure, [0.0, accepted])
        assert before == start
        assert start - after == pytest.approx(optimizer.actual_reduction, rel=1e-4, abs=1e-6)


def test_a_profile_of_a_run_has_the_loss_that_the_search_measured(tmp_path):
    settings = {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    # The search takes the step size of its first probe, and that is the one in the middle of the profile.
    optim_args = "growth=constant,growth_factor=1,c=1e-9,beta3=0,initial_step_size=1e-3"
    args = arguments(tmp_path, max_steps=3, optim_args=optim_args, **settings)
    callbacks = [LineProfileCallback(every=1, points=5)]
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), callbacks=callbacks)
    trainer.train()
    assert trainer.alsals.search.total_probes == 3
    for entry in training_logs(trainer):
        profile = json.loads((tmp_path / "line_profile" / f"step-00000{entry['step']}.json").read_text())
        assert profile["step_sizes"][3] == profile["accepted_step_size"] == entry["step_size"]
        assert profile["losses"][0] - profile["losses"][3] == entry["decrease"]
        assert profile["slope"] == pytest.approx(entry["slope"], rel=1e-6)


class Fragile(nn.Module):
    """Has an infinite loss a little downhill, and gradients that are not finite if it is asked to."""

    def __init__(self, gradient, finite_from=3.9):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.gradient = gradient
        self.finite_from = finite_from

    def forward(self, input_ids, labels):
        loss = self.w.square().sum() * self.gradient
        return {"loss": loss.masked_fill(loss < self.finite_from, torch.inf)}


@pytest.mark.parametrize(("searched", "title"), [(True, "searched"), (False, "not searched")])
def test_the_title_says_whether_the_line_was_searched(searched, title, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text: titles.append(text))
    profile = {"step": 7, "searched": searched, "c": 0.3, "slope": 1.0, "accepted_step_size": 0.1}
    profile |= {"best_step_size": 0.1, "step_sizes": [0.0, 0.1, 0.2], "losses": [1.0, 0.9, 1.1], "next_losses": []}
    draw_line_profile(profile, str(tmp_path / "profile.png"))
    assert titles == [f"optimizer step 7, {title}"]


def test_a_loss_that_is_not_finite_is_left_out_of_the_picture(tmp_path):
    args = arguments(tmp_path, max_steps=1, optim_args="initial_step_size=1e-3")
    AlsalsTrainer(Fragile(1.0), args, train_dataset=Sequences(), callbacks=[LineProfileCallback(every=1)]).train()
    losses = json.loads((tmp_path / "line_profile" / "step-000001.json").read_text())["losses"]
    assert torch.tensor(losses).isinf().any()
    assert (tmp_path / "line_profile" / "step-000001.png").exists()


@pytest.mark.parametrize("model", [Fragile(torch.nan), Fragile(1.0, finite_from=5.0)], ids=["gradient", "loss"])
def test_a_step_that_is_skipped_has_no_profile(model, tmp_path):
    args = arguments(tmp_path, max_steps=1)
    AlsalsTrainer(model, args, train_dataset=Sequences(), callbacks=[LineProfileCallback(every=1)]).train()
    assert not (tmp_path / "line_profile").exists()


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("points", 1)])
def test_a_number_too_small_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least . *, got {value}"):
        LineProfileCallback(**{"every": 1, name: value})


def test_fp16_without_clipping_is_refused_before_training(tmp_path):
    args = arguments(tmp_path, max_grad_norm=0.0)
    args.fp16 = True
    with pytest.raises(ValueError, match=r"max_grad_norm > 0 under fp16, got 0\.0"):
        LineProfileCallback(every=1).on_train_begin(args, None, None)


def test_a_profile_that_cannot_be_written_costs_a_warning_and_not_the_run(tmp_path, caplog):
    (tmp_path / "line_profile").write_text("no folder")
    args = arguments(tmp_path, max_steps=4)
    trainer = AlsalsTrainer(gpt2(), args, train_dataset=Sequences(), callbacks=[LineProfileCallback(2, points=2)])
    trainer.train()
    assert trainer.state.global_step == 4
    messages = [message for message in caplog.messages if str(tmp_path / "line_profile") in message]
    assert len(messages) == 2 and all("training goes on" in message for message in messages)
