import dataclasses
import math

import pytest
from searching import NumbersLine, Searching, quadratic, wrong

from hf_alsals.acceptance import ArmijoCondition, ParabolaCondition
from hf_alsals.growth import ConstantGrowth
from hf_alsals.interval import AdaptiveInterval, EverySteps
from hf_alsals.line_search import LineSearch
from hf_alsals.path_growth import PathGrowth
from hf_alsals.presets import LINE_SEARCHES

GROWTHS = ["constant", "path"]


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_line_search_and_its_state_are_frozen(growth):
    searching = Searching(growth)
    for value in (searching.line_search, searching.state):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_probe", [1, 2, 3])
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("is_initialized", [True, False])
def test_a_probe_that_raises_changes_nothing(error, failing_probe, growth, is_initialized):
    searching = Searching(growth, growth_factor=1.5, search_interval="adaptive")
    searching.state = state = dataclasses.replace(searching.state, is_initialized=is_initialized)
    before = searching.line_search.state_dict(state)
    calls = 0

    def probe(step_size):
        nonlocal calls
        calls += 1
        if calls == failing_probe:
            raise error
        return math.inf

    with pytest.raises(error):
        searching.search(1.0, 5.0, probe, path_slope=2.0)
    assert calls == failing_probe
    assert searching.state is state
    assert searching.line_search.state_dict(state) == before
    # The step that is tried again is that of a search to which nothing has happened.
    line = NumbersLine(1.0, 5.0, lambda step_size: 1 + quadratic(5.0, 9.0)(step_size))
    again, fresh = Searching(searching.line_search), Searching(searching.line_search)
    again.state, fresh.state = state, dataclasses.replace(fresh.state, is_initialized=is_initialized)
    assert again.line_search.step(state, line, 2.0) == fresh.line_search.step(fresh.state, line, 2.0)


@pytest.mark.parametrize("growth", GROWTHS)
def test_the_options_are_the_fields_of_the_parts_whose_names_do_not_collide(growth):
    search = LINE_SEARCHES[growth]
    names = [
        field.name
        for part in (search.growth, search.acceptance, search.interval)
        for field in dataclasses.fields(part)
    ]
    names += ["decrease_factor", "initial_step_size"]
    assert len(set(names)) == len(names) == 6
    assert set(search.options) == set(names)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize(
    ("name", "value", "reached"),
    [
        ("c", 0.45, lambda search: search.acceptance.c),
        ("beta3", 0.35, lambda search: search.acceptance.beta3),
        ("growth_factor", 1.35, lambda search: search.growth.growth_factor),
        ("search_interval", 4, lambda search: search.interval.search_interval),
        ("decrease_factor", 0.65, lambda search: search.decrease_factor),
        ("initial_step_size", 0.55, lambda search: search.initial_step_size),
    ],
)
def test_each_option_reaches_its_part_and_no_other(growth, name, value, reached):
    search = LINE_SEARCHES[growth]
    changed = search.with_options(**{name: value})
    assert reached(changed) == changed.options[name] == value
    assert changed.options | {name: search.options[name]} == search.options
    assert changed.with_options(**{name: search.options[name]}) == search
    assert search.options[name] != value


def test_the_interval_option_switches_the_kind_of_interval():
    search = LINE_SEARCHES["path"]
    adaptive = search.with_options(search_interval="adaptive")
    assert adaptive.interval == AdaptiveInterval()
    assert adaptive.options["search_interval"] == "adaptive"
    assert adaptive.with_options(search_interval=7).interval == EverySteps(7)
    assert adaptive.with_options(c=0.2).interval == AdaptiveInterval()


@pytest.mark.parametrize("growth", GROWTHS)
def test_an_unknown_option_is_named_with_those_that_there_are(growth):
    message = f"momentum is no option of growth={growth}, which takes c, beta3, growth_factor, search_interval, "
    with pytest.raises(TypeError, match=f"^{message}decrease_factor, initial_step_size.$"):
        LINE_SEARCHES[growth].with_options(c=0.5, momentum=0.9)


@pytest.mark.parametrize(("name", "value", "error", "right"), wrong("decrease_factor", "initial_step_size"))
def test_a_wrong_number_of_its_own_is_named_with_its_value(name, value, error, right):
    with pytest.raises(error, match=f"^{name} must be .*{right}") as raised:
        LineSearch(ConstantGrowth(), ArmijoCondition(), EverySteps(), **{name: value})
    assert repr(value) in str(raised.value)


def test_any_parts_go_together():
    search = LineSearch(PathGrowth(1.2), ArmijoCondition(c=0.5, beta3=0.0), EverySteps(1))
    searching = Searching(search, initial_step_size=1.0, decrease_factor=0.5)
    # 1.2 ** 2.6, twice as fast as 1.3, is above the bound 1 = 2 (1 - c) a / b; half of it is under it.
    assert searching.search(0.0, 1.0, quadratic(1.0, 1.0), path_slope=1.0) == pytest.approx(0.5 * 1.2**2.6)
    searching = Searching(LineSearch(ConstantGrowth(1.5), ParabolaCondition(c=0.5, beta3=0.0), EverySteps(1)))
    assert searching.search(0.0, 1.0, quadratic(1.0, 1.0), path_slope=1.0) == 0.1
    assert searching.search(0.0, 1.0, quadratic(1.0, 1.0), path_slope=1.0) == pytest.approx(0.15)


# ---- saved and loaded ----


def zigzag(searching, k):
    """Take step k on a loss whose curvature depends on k, under a schedule that falls, once below half of its peak."""
    curvature = 1 + 20 * math.sin(k) ** 2
    slope = 1 + 0.5 * math.sin(3 * k)
    line = NumbersLine(1.0, slope, lambda eta: 1 - slope * eta + curvature * eta**2)
    path_slope = (0.3 + math.cos(k)) * (1e-3 if 2 < k < 20 else 1)
    lr_fraction = 0.4 if 140 < k < 150 else 1 - 0.002 * k
    searching.state = searching.line_search.step(searching.state, line, path_slope, lr_fraction)
    return searching.state


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("search_interval", [1, 4, "adaptive"])
@pytest.mark.parametrize("saved_after", [0, 1, 7, 30, 61, 127])
def test_a_loaded_search_continues_identically(growth, search_interval, saved_after):
    options = {"beta3": 0.5, "growth_factor": 1.3, "initial_step_size": 2.0, "search_interval": search_interval}
    searching, resumed = Searching(growth, **options), Searching(growth, **options)
    for k in range(saved_after):
        zigzag(searching, k)
    saved = searching.line_search.state_dict(searching.state)
    assert all(isinstance(number, (int, float)) for number in saved.values())
    resumed.state = resumed.line_search.load_state_dict(saved)
    assert resumed.state == searching.state

    expected = [zigzag(searching, k) for k in range(saved_after, saved_after + 60)]
    assert [zigzag(resumed, k) for k in range(saved_after, saved_after + 60)] == expected
    assert any(state.probes > 1 for state in expected)


@pytest.mark.parametrize("growth", GROWTHS)
def test_loading_ignores_keys_of_others(growth):
    searching = Searching(growth)
    zigzag(searching, 0)
    saved = searching.line_search.state_dict(searching.state)
    assert searching.line_search.load_state_dict(saved | {"lr": 1.0, "params": [0]}) == searching.state


@pytest.mark.parametrize(
    ("growth", "missing"),
    [
        (growth, name)
        for growth in GROWTHS
        for name in Searching(growth).line_search.state_dict(Searching(growth).state)
    ],
)
def test_loading_an_incomplete_state_raises(growth, missing):
    search = LINE_SEARCHES[growth]
    saved = search.state_dict(search.init())
    del saved[missing]
    with pytest.raises(KeyError, match=missing):
        search.load_state_dict(saved)


def test_a_search_with_a_shorter_interval_does_not_wait_for_the_end_of_the_longer_one():
    searching = Searching(search_interval=10)
    searching.accept()
    resumed = Searching(search_interval=3)
    resumed.state = resumed.line_search.load_state_dict(searching.line_search.state_dict(searching.state))
    assert [resumed.skip() for _ in range(2)] == [0.1, 0.1]
    assert resumed.is_due
