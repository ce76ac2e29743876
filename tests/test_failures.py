import dataclasses
import itertools
import math
import re

import pytest
import torch
from torch import nn

from hf_alsals import ALSALS, AlsalsTrainingArguments
from hf_alsals.failures import FAILURES, FailureMonitor, SearchHistory, SearchRecord


def watch(optimizer, losses, steps, low_precision=False):
    """Train on the losses, one function a step, and return the failures by the step at which they were named."""
    monitor = FailureMonitor(optimizer, low_precision)
    named = {}
    for step in range(steps):
        closure = losses(step)
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step(closure, loss)
        for name, message in monitor.update().items():
            assert name not in named
            named[name] = (step, message)
    return named


def parameter(value, dtype=torch.float32):
    return nn.Parameter(torch.tensor(value, dtype=dtype))


def rising_loss():
    """A parameter, and a loss of it that is higher at every call."""
    w, calls = parameter([1.0]), itertools.count(1)
    return w, lambda: w.sum() + next(calls)


def test_a_loss_that_rises_at_every_step_size_pins_it_at_the_smallest():
    w, closure = rising_loss()
    optimizer = ALSALS([w], growth="constant")
    named = watch(optimizer, lambda step: closure, 30)
    assert list(named) == ["smallest step size"]
    step, message = named["smallest step size"]
    assert step == 9 and message.endswith("; try a smaller c in optim_args.")
    assert f"{0.1 * 0.9**9 * 0.9**99:.1e}" in message


@pytest.mark.parametrize(("initial_step_size", "first"), [(0.1, 0.1), (0.7, 0.7), (1e-6, 1e-6 * 2**17)])
def test_a_first_search_that_finds_nothing_is_named_by_where_it_looked(initial_step_size, first):
    w = parameter([1.0], torch.float64)
    optimizer = ALSALS([w], initial_step_size=initial_step_size)
    named = watch(optimizer, lambda step: lambda: w.sum() if w.item() == 1.0 else w.sum() * math.inf, 12)
    assert set(named) == {"smallest step size", "non-finite probes"}
    assert f"down to {first * 0.5**29:.1e}" in named["smallest step size"][1]


@pytest.mark.filterwarnings("ignore:ALSALS")
@pytest.mark.parametrize("hides", [lambda w: torch.exp(w.sum() - w.sum().detach()), None], ids=["surrogate", "rising"])
def test_a_loss_whose_value_does_not_show_its_gradient_is_named_at_the_first_search(hides):
    w, rising = rising_loss()
    closure = rising if hides is None else lambda: hides(w)
    named = watch(ALSALS([w]), lambda step: closure, 30)
    assert list(named) == ["hidden gradient"]
    step, message = named["hidden gradient"]
    assert step == 0
    assert "does not show its gradient" in message and "search_interval=never" in message


def test_a_search_that_goes_on_at_the_next_steps_is_one_cut():
    w = parameter([1.0] * 4)
    optimizer = ALSALS([w], search_interval=5)

    def losses(step):
        # Now and then the loss rises at any step, four optimizer steps in a row.
        start, slope = w.detach().clone(), 1e4 if step % 60 in range(20, 24) else 0.0
        return lambda: w.square().sum() + slope * (w.detach() - start).abs().sum()

    searches, rejected = [], []
    monitor = FailureMonitor(optimizer)
    for step in range(240):
        closure = losses(step)
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step(closure, loss)
        assert "jumping step size" not in monitor.update()
        if optimizer.searched:
            searches.append(step)
            rejected.append(not optimizer.search.accepted)
    assert len(searches) > 40 and sum(rejected) >= 16
    assert sum(one.cut for one in monitor.history.searches) <= 2


def test_in_low_precision_it_is_named_as_the_cause():
    w, closure = rising_loss()
    named = watch(ALSALS([w], growth="constant"), lambda step: closure, 12, low_precision=True)
    assert "float32" in named["smallest step size"][1]


def test_a_loss_that_bears_any_step_pins_the_step_size_at_the_largest():
    w = parameter([1.0])
    optimizer = ALSALS([w], growth="constant", growth_factor=1.2)
    named = watch(optimizer, lambda step: lambda: 1e3 - 1e-3 * w.sum(), 80)
    assert list(named) == ["largest step size"]
    assert named["largest step size"][0] == math.ceil(math.log(10, 1.2)) + 49


def test_batches_of_very_different_curvature_make_the_step_size_jump():
    w = parameter([1.0] * 4)
    optimizer = ALSALS([w], growth="constant", growth_factor=3.0, beta3=0.0, betas=(0.0, 0.999))
    named = watch(optimizer, lambda step: lambda: (1e4 if step % 3 == 0 else 1.0) * w.square().sum(), 40)
    assert "jumping step size" in named
    assert "per_device_train_batch_size" in named["jumping step size"][1]


def test_growth_on_a_loss_that_does_not_fall_is_named():
    torch.manual_seed(0)
    w = parameter([0.0] * 10)
    gradients = torch.randn(600, 10)
    optimizer = ALSALS([w], growth="constant", growth_factor=1.02, initial_step_size=1e-5, betas=(0.0, 0.999))

    def losses(step):
        shift = w.detach() @ gradients[step]
        return lambda: 1.0 + w @ gradients[step] - shift

    named = watch(optimizer, losses, 600)
    assert list(named) == ["run-away step size"]
    step, message = named["run-away step size"]
    assert step == 200 and "lr_scheduler_type=linear" in message and "growth=path" in message


@pytest.mark.parametrize(
    ("loss", "is_flat"),
    [
        (lambda step: 0.7, True),
        (lambda step: 0.7 - 0.005 * (step > 10), True),  # less than the noise
        (lambda step: 0.7 - 0.05 * (step > 10) + 0.05 * (step > 100), True),  # learned, and lost again
        (lambda step: 0.7 - 0.05 * (step > 100), False),  # by little, but clearly
        (lambda step: 2.0 if step < 3 else 0.7, False),  # as low as it gets at once
        (lambda step: -2.0 if step > 100 else -1.0, False),
    ],
    ids=["flat", "noise", "lost", "clearly", "at once", "negative"],
)
def test_a_loss_that_is_where_it_began_is_named(loss, is_flat):
    noise = 0.05 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    optimizer = ALSALS([parameter([1.0])])
    monitor = FailureMonitor(optimizer, flat_loss_step=250)
    named = {}
    for step in range(400):
        optimizer.loss = loss(step) + noise[step].item()
        named |= dict.fromkeys(monitor.update(), step)
    assert named == ({"flat loss": 249} if is_flat else {})


def test_a_momentum_that_points_uphill_is_named():
    w = parameter([1.0])
    optimizer = ALSALS([w], growth="constant", betas=(0.99, 0.999), beta3=0.5, initial_step_size=1e-3)
    named = watch(optimizer, lambda step: lambda: (1 if step < 30 else -1) * w.sum(), 60)
    assert list(named) == ["uphill direction"]
    step, message = named["uphill direction"]
    assert step >= 39 and "adam_beta1" in message


def test_probes_that_are_not_finite_are_named():
    w = parameter([1.0])
    optimizer = ALSALS([w], growth="constant", growth_factor=1.5)

    def losses(step):
        start = w.item()
        return lambda: w.sum() if abs(w.item() - start) < 0.01 else w.sum() * math.inf

    named = watch(optimizer, losses, 40)
    assert "non-finite probes" in named
    assert named["non-finite probes"][0] == 4 and "smaller growth_factor" in named["non-finite probes"][1]


def test_weights_too_coarse_for_the_step_are_named():
    w = parameter([256.0], torch.bfloat16)  # the next smaller one is 255
    named = watch(ALSALS([w], growth="constant"), lambda step: lambda: w.float().sum(), 30, low_precision=True)
    assert list(named) == ["unseen decrease"]
    assert named["unseen decrease"][0] == 9 and "bf16" in named["unseen decrease"][1]


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_a_healthy_search_has_no_failure(growth):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = ALSALS(model.parameters(), growth=growth)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=600)

    def losses(step):
        if step > 0:
            schedule.step()
        x = torch.randn(64, 8)
        return lambda: nn.functional.mse_loss(model(x), x[:, :1] * x[:, 1:2])

    assert watch(optimizer, losses, 600) == {}  # with growth=path 30 searches


BY_NAME = {failure.name: failure for failure in FAILURES}
FINE = SearchRecord(rejected=False, cut=False, uphill=False, nonfinite=False, unseen=False)


def history_of(pattern, field, low_precision=False):
    """A history of searches, those marked by an x in the pattern with something to show."""
    history = SearchHistory(ALSALS([parameter([1.0])]), low_precision)
    history.searches.extend(dataclasses.replace(FINE, **{field: mark == "x"}) for mark in pattern)
    return history


def test_every_failure_has_a_name_of_its_own():
    assert list(BY_NAME) == [
        "hidden gradient",
        "smallest step size",
        "largest step size",
        "jumping step size",
        "run-away step size",
        "flat loss",
        "uphill direction",
        "non-finite probes",
        "unseen decrease",
    ]
    assert len(FAILURES) == 9


@pytest.mark.parametrize(
    ("name", "field", "silent", "shown"),
    [
        ("smallest step size", "rejected", ["x" * 9, "." + "x" * 9, "x" * 19 + "."], ["x" * 10, "." * 10 + "x" * 10]),
        ("uphill direction", "uphill", ["x" * 9, "." + "x" * 9, "x" * 19 + "."], ["x" * 10, "." * 10 + "x" * 10]),
        ("jumping step size", "cut", ["x" * 19, "x" * 4 + "." * 16], ["x" * 5 + "." * 15, "...x" * 5]),
        ("non-finite probes", "nonfinite", ["xxxx", "xxxxx" + "." * 16], ["xxxxx", "xxxxx" + "." * 15]),
        ("unseen decrease", "unseen", ["x" * 9, "x." * 9 + ".."], ["x" * 10, "x." * 10]),
    ],
)
def test_a_failure_shows_from_a_number_of_searches_on(name, field, silent, shown):
    failure = BY_NAME[name]
    for patterns, expected in ((silent, False), (shown, True)):
        for pattern in patterns:
            history = history_of(pattern, field)
            assert failure.shows(history) == expected, pattern
            # What another failure is about does not count.
            assert [one.name for one in FAILURES if one.shows(history)] == [name] * expected
    for other in {"rejected", "cut", "uphill", "nonfinite", "unseen"} - {field}:
        assert not failure.shows(history_of("x" * 20, other))


def test_a_large_step_size_shows_after_fifty_steps():
    history = history_of("", "cut")
    for steps, expected in ((0, False), (49, False), (50, True), (60, True)):
        history.steps_at_large_step_size = steps
        assert BY_NAME["largest step size"].shows(history) == expected


@pytest.mark.parametrize(
    ("steps", "grown", "expected"), [(199, 11.0, False), (200, 9.9, False), (200, 10.1, True), (0, math.nan, False)]
)
def test_a_step_size_has_run_away_after_two_hundred_steps_and_ten_fold_growth(steps, grown, expected):
    history = history_of("", "cut")
    history.steps_since_lowest_loss = steps
    history.step_size_at_lowest_loss = history.alsals.step_size / grown
    assert BY_NAME["run-away step size"].shows(history) == expected


@pytest.mark.parametrize(
    ("name", "field", "pattern", "low_precision", "sentence", "remedy"),
    [
        (
            "smallest step size",
            "rejected",
            "x" * 10,
            False,
            "no step size met the condition in 10 searches in a row, down to 2.5e-07: the loss falls by less than its "
            "slope says, or c is too large",
            "try a smaller c in optim_args",
        ),
        (
            "smallest step size",
            "rejected",
            "x" * 10,
            True,
            "no step size met the condition in 10 searches in a row, down to 2.5e-07: the losses in low precision "
            "are too coarse to show a decrease",
            "compute the loss in float32",
        ),
        (
            "largest step size",
            "cut",
            "",
            False,
            "the step size has been 1 or more for 50 steps: the loss hardly depends on the weights, or c is too small "
            "to bound the step",
            "try a larger c in optim_args",
        ),
        (
            "jumping step size",
            "cut",
            "..x" * 6 + "..",
            False,
            "6 of the last 20 searches cut the step size by a third or more: batches disagree, for they are too small "
            "or the landscape is irregular",
            "try a larger per_device_train_batch_size or gradient_accumulation_steps, or a larger beta3 in optim_args",
        ),
        (
            "run-away step size",
            "cut",
            "",
            False,
            "the step size has grown from 1.5e-05 to 1.0e-01 in 240 steps in which the loss did not fall: nothing "
            "bounds it",
            "try lr_scheduler_type=linear, or a smaller growth_factor in optim_args",
        ),
        (
            "uphill direction",
            "uphill",
            "x" * 10,
            False,
            "the smoothed slope has been negative for 10 searches: momentum points uphill, as it does after steps "
            "that were too long",
            "try a smaller adam_beta1, or a larger c in optim_args",
        ),
        (
            "non-finite probes",
            "nonfinite",
            "x" * 5 + ".",
            False,
            "5 of the last 6 searches met a loss that is not finite: steps not much longer than those taken make the "
            "model overflow",
            "try a smaller growth_factor in optim_args",
        ),
        (
            "non-finite probes",
            "nonfinite",
            "x" * 5 + ".",
            True,
            "5 of the last 6 searches met a loss that is not finite: steps not much longer than those taken make the "
            "model overflow",
            "try bf16 in place of fp16, or a smaller growth_factor in optim_args",
        ),
        (
            "unseen decrease",
            "unseen",
            "x" * 11 + ".",
            False,
            "11 of the last 12 searches saw no decrease at all, to the bit: the loss or the weights are too coarse "
            "for such small steps",
            "take what does not depend on the weights out of the loss, or train in float64",
        ),
        (
            "unseen decrease",
            "unseen",
            "x" * 11 + ".",
            True,
            "11 of the last 12 searches saw no decrease at all, to the bit: the loss or the weights are too coarse "
            "for such small steps",
            "keep the weights in float32 and do without bf16 or fp16",
        ),
    ],
    ids=lambda value: value if value in BY_NAME else "",
)
def test_what_a_failure_says(name, field, pattern, low_precision, sentence, remedy):
    history = history_of(pattern, field, low_precision)
    history.alsals.search = dataclasses.replace(history.alsals.search, smallest_probe=2.5e-7)
    history.steps_since_lowest_loss, history.step_size_at_lowest_loss = 240, 1.5e-5
    assert BY_NAME[name].sentence(history) == sentence
    assert BY_NAME[name].remedy(history) == remedy


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("smallest step size", {"slope": "preconditioned"}, "try slope=exact or a smaller c in optim_args"),
        ("largest step size", {"search_interval": "never"}, "try a smaller growth_factor in optim_args"),
        (
            "jumping step size",
            {"growth": "constant"},
            "try a larger per_device_train_batch_size or gradient_accumulation_steps",
        ),
        (
            "run-away step size",
            {"growth": "constant"},
            "try lr_scheduler_type=linear, or growth=path or a smaller growth_factor in optim_args",
        ),
        ("flat loss", {}, "if AdamW learns here, try a larger c in optim_args"),
        (
            "flat loss",
            {"search_interval": "never"},
            "if AdamW learns here, try a smaller growth_factor in optim_args",
        ),
    ],
)
def test_a_remedy_is_not_what_is_done_already(name, options, remedy):
    assert BY_NAME[name].remedy(SearchHistory(ALSALS([parameter([1.0])], **options))) == remedy


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)
def test_what_a_remedy_names_can_be_changed(failure, low_precision):
    remedy = failure.remedy(history_of("", "cut", low_precision))
    settings = {field.name for field in dataclasses.fields(AlsalsTrainingArguments)}
    options = {"growth", "slope", *ALSALS([parameter([1.0])]).line_search.options}
    for name in re.findall(r"\w+_\w+|\w+(?==)|\bc\b|\b[a-z]+\d+\b", remedy):
        assert name in settings | options | {"float32", "float64"}, remedy


def test_a_history_notes_what_the_optimizer_says_of_a_search():
    optimizer = ALSALS([parameter([1.0])], growth="constant")
    history = SearchHistory(optimizer)
    search = dataclasses.replace(optimizer.search, searched=True, probes=2, step_size=0.1, slope=1.0, accepted=True)
    acceptance = search.acceptance
    for changes, shown in [
        ({"actual_reduction": 0.5}, set()),
        ({"actual_reduction": 0.5, "step_size": 0.07}, set()),
        ({"actual_reduction": 0.5, "step_size": 0.046}, {"cut"}),
        ({"actual_reduction": -0.5, "accepted": False}, {"rejected"}),
        ({"actual_reduction": 0.5, "step_size": 0.001}, set()),  # the search after a rejection goes on with it
        ({"actual_reduction": 0.0}, {"unseen"}),
        ({"actual_reduction": 0.0, "slope": 0.0}, set()),
        ({"actual_reduction": 0.5, "nonfinite_probes": 1}, {"nonfinite"}),
        ({"actual_reduction": 0.5, "acceptance": dataclasses.replace(acceptance, slope=-1.0)}, {"uphill"}),
        ({"actual_reduction": 0.0, "probes": 0, "accepted": False, "slope": -1.0}, set()),
    ]:
        optimizer.search = dataclasses.replace(search, **changes)
        history.update()
        record = dataclasses.asdict(history.searches[-1])
        assert {name for name, value in record.items() if value} == shown, changes
    count = len(history.searches)
    optimizer.search = dataclasses.replace(search, searched=False)
    history.update()
    assert len(history.searches) == history.searches_so_far == count
    optimizer.search = search
    for _ in range(30):
        history.update()
    assert len(history.searches) == history.window == 20 and history.searches_so_far == count + 30


def test_a_monitor_tells_each_failure_once():
    optimizer = ALSALS([parameter([1.0])], growth="constant")
    monitor = FailureMonitor(optimizer)
    optimizer.search = dataclasses.replace(optimizer.search, searched=True, probes=1, accepted=False, slope=1.0)
    told = [monitor.update() for _ in range(30)]
    assert [list(messages) for messages in told if messages] == [["smallest step size", "unseen decrease"]]
    failure = BY_NAME["smallest step size"]
    history = monitor.history
    assert told[9]["smallest step size"] == f"{failure.sentence(history)}; {failure.remedy(history)}."
