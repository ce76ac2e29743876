import dataclasses
import math

import pytest
from searching import wrong

from hf_alsals.interval import AdaptiveInterval, EverySteps, IntervalState, interval_of


def due(interval, state, step_sizes):
    """Return whether each of some optimizer steps searches, and the state after them."""
    searched = []
    for step_size in step_sizes:
        searched.append(interval.is_due(state))
        state = interval.searched(state, step_size, again=False) if interval.is_due(state) else interval.skipped(state)
    return searched, state


@pytest.mark.parametrize("value", [EverySteps(2), AdaptiveInterval(), IntervalState()])
def test_an_interval_is_frozen_and_so_is_its_state(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, 3)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_integer_interval_searches_every_that_many_steps(interval):
    interval = EverySteps(interval)
    searched, _ = due(interval, interval.init(), [0.1] * 21)
    assert searched == [k % interval.search_interval == 0 for k in range(21)]


@pytest.mark.parametrize("growth_factor", [1.0, 1.02, 1.1])
def test_adaptive_interval_follows_the_two_moving_averages(growth_factor):
    interval = AdaptiveInterval()
    state, step_size = interval.init(), 1.0
    fast, slow, lengths = 0.0, 0.0, []
    for k in range(800):
        # Steady growth with a crash of the step size now and then.
        step_size = 1e-2 if k % 150 == 149 else step_size * growth_factor
        fast = 0.9 * fast + 0.1 * step_size
        slow = 0.99 * slow + 0.01 * step_size
        r = max(fast / slow, slow / fast)
        expected = math.ceil(max(1.0, min(10.0, 1 / (r - 1) if r > 1 else math.inf)))

        state = interval.searched(state, step_size, again=False)
        length = 1
        while not interval.is_due(state):
            state = interval.skipped(state)
            length += 1
        assert length == expected
        lengths.append(length)
    assert min(lengths) == 1
    assert max(lengths) > 1


def test_adaptive_interval_reaches_ten_steps_when_the_step_size_stands_still():
    interval = AdaptiveInterval()
    _, state = due(interval, interval.init(), [0.1] * 2000)
    searched, _ = due(interval, state, [0.1] * 100)
    assert sum(searched) == 10
    assert searched[:10] * 10 == searched


@pytest.mark.parametrize("interval", [EverySteps(5), AdaptiveInterval()])
def test_a_search_that_is_to_be_followed_by_another_is(interval):
    _, state = due(interval, interval.init(), [0.1] * 1000)
    while not interval.is_due(state):
        state = interval.skipped(state)
    moved = interval.searched(state, 0.1, again=True)
    assert interval.is_due(moved)
    assert not interval.is_due(interval.searched(moved, 0.1, again=False))
    assert moved.fast_step_size == pytest.approx(0.1)  # the averages have seen it


def test_a_search_that_is_due_stays_so_in_steps_that_cannot_search():
    interval = EverySteps(3)
    state = interval.init()
    for _ in range(4):
        state = interval.skipped(state)
    assert interval.is_due(state)
    searched, _ = due(interval, state, [0.1] * 4)
    assert searched == [True, False, False, True]


def test_a_shorter_interval_does_not_wait_for_the_end_of_a_longer_one():
    state = EverySteps(10).searched(IntervalState(), 0.1, again=False)
    assert state.steps_left == 9
    assert EverySteps(3).resumed(state) == dataclasses.replace(state, steps_left=2)
    assert EverySteps(20).resumed(state) == state
    assert AdaptiveInterval().resumed(state) == state
    assert EverySteps(1).resumed(state).steps_left == 0


def test_the_option_says_which_interval_it_is():
    assert interval_of(4) == EverySteps(4)
    assert interval_of("adaptive") == AdaptiveInterval()
    assert interval_of("adaptive").search_interval == "adaptive"


@pytest.mark.parametrize(("name", "value", "error", "right"), wrong("search_interval"))
def test_a_wrong_interval_is_named_with_its_value(name, value, error, right):
    for make in (EverySteps, interval_of):
        with pytest.raises(error, match=f"^{name} must be .*{right}") as raised:
            make(value)
        assert repr(value) in str(raised.value)


def test_never_searches_and_says_so():
    interval = interval_of("never")
    state = interval.init()
    for _ in range(30):
        assert not interval.is_due(state)
        state = interval.skipped(state)
