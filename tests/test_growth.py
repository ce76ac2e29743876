import copy
import dataclasses
import math

import pytest
import torch
from searching import Searching, wrong
from small_problems import assert_identical, make_net, snapshot, through_torch_save, train

from hf_alsals import ALSALS
from hf_alsals.acceptance import ArmijoCondition
from hf_alsals.growth import ConstantGrowth, PathGrowth
from hf_alsals.interval import EverySteps
from hf_alsals.line_search import LineSearch

RULES = [ConstantGrowth, PathGrowth]


def after_search(growth, **changes):
    """Return the state after a search from 1.0 that ended at 0.25, accepted."""
    search = {"start": 1.0, "step_size": 0.25, "slope": 2.0, "accepted": True, "decrease_factor": 0.5}
    return growth.searched(growth.init(0.1), **search | changes)


def follow(growth, path_slopes, step_size=0.1):
    """Return the state and the step size after each of some path slopes."""
    state, history = growth.init(step_size), []
    for path_slope in path_slopes:
        state, step_size = growth.follow(state, step_size, path_slope)
        history.append((state, step_size))
    return history


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_frozen_and_so_is_its_state(rule):
    growth = rule()
    for value in (growth, growth.init(0.1)):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, 2.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "value", "error", "right"), wrong("growth_factor"))
def test_a_wrong_growth_factor_is_named_with_its_value(rule, name, value, error, right):
    with pytest.raises(error, match=f"^{name} must be .*{right}") as raised:
        rule(**{name: value})
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("rule", RULES)
def test_a_growth_factor_of_one_is_taken(rule):
    assert rule(growth_factor=1).growth_factor == 1


# ---- by a constant factor ----


def test_the_first_search_starts_at_the_initial_step_size():
    growth = ConstantGrowth(growth_factor=1.5)
    assert growth.start(growth.init(0.3), step_size=0.7) == 0.3


@pytest.mark.parametrize("slope", [2.0, -2.0, 1e-300])
def test_after_an_accepted_step_size_the_next_search_starts_the_growth_factor_above_it(slope):
    growth = ConstantGrowth(growth_factor=1.5)
    assert growth.start(after_search(growth, slope=slope), step_size=0.25) == 0.375


@pytest.mark.parametrize("slope", [2.0, 0.0, math.nan])
def test_after_a_search_that_accepted_none_the_next_starts_one_decrease_below_its_start(slope):
    growth = ConstantGrowth(growth_factor=1.5)
    assert growth.start(after_search(growth, slope=slope, accepted=False), step_size=0.25) == 0.5


def test_a_slope_of_zero_is_no_reason_to_grow():
    growth = ConstantGrowth(growth_factor=1.5)
    assert growth.start(after_search(growth, slope=0.0), step_size=0.25) == 0.25


@pytest.mark.parametrize("path_slope", [3.0, -3.0, math.nan])
def test_constant_growth_moves_in_searches_only_and_has_nothing_to_log(path_slope):
    growth = ConstantGrowth(growth_factor=1.5)
    state = after_search(growth)
    assert growth.follow(state, 0.25, path_slope) == (state, 0.25)
    assert growth.metrics(state) == {}
    assert not growth.needs_path_slope


# ---- along the path ----


def test_the_step_size_follows_the_average_of_the_path_slopes_over_that_of_their_sizes():
    path_slopes = [3.0, 1.0, -2.0, 5.0, -0.5]
    expected = 0.1
    for k, (state, step_size) in enumerate(follow(PathGrowth(growth_factor=1.2), path_slopes), start=1):
        weights = [0.9 ** (k - 1 - i) for i in range(k)]
        average = sum(w * s for w, s in zip(weights, path_slopes[:k], strict=True))
        size = sum(w * abs(s) for w, s in zip(weights, path_slopes[:k], strict=True))
        expected *= 1.2 ** (average / size + 0.3)
        assert state.path_slope == pytest.approx(average / size)
        assert step_size == pytest.approx(expected)


def test_small_path_slopes_let_it_grow_less_and_shrink_as_ever():
    path_slopes = [-7.0] * 50 + [0.02] * 100 + [-0.02] * 50
    average = size = 0.0
    expected, log_size, sizes = 0.1, math.log(7.0), []
    for path_slope, (state, step_size) in zip(path_slopes, follow(PathGrowth(growth_factor=1.2), path_slopes)):
        average, size = 0.9 * average + 0.1 * path_slope, 0.9 * size + 0.1 * abs(path_slope)
        log_size = 0.9 * log_size + 0.1 * math.log(abs(path_slope))
        sizes.append(math.exp(log_size))
        exponent = average / size + 0.3
        if exponent > 0:
            exponent *= min(1, sizes[-1] / (0.1 * max(sizes)))
        expected *= 1.2**exponent
        assert step_size == pytest.approx(expected)
        assert state.path_size == pytest.approx(sizes[-1] / max(sizes))
    assert state.path_size == pytest.approx(0.02 / 7, rel=1e-3)


@pytest.mark.parametrize("sign", [-1, 1])
def test_one_bad_batch_does_not_hold_it(sign):
    path_slopes = [1.0 + 0.5 * math.sin(k) for k in range(350)]
    calm = follow(PathGrowth(), path_slopes)
    path_slopes[50] = sign * 1e5
    disturbed = follow(PathGrowth(), path_slopes)
    grown = [history[349][1] / history[300][1] for history in (disturbed, calm)]
    assert grown[0] == pytest.approx(grown[1], rel=1e-3) == 1.03 ** (49 * 1.3)


def test_steps_that_are_always_too_short_grow_and_those_that_are_too_long_shrink():
    assert follow(PathGrowth(), [1.0] * 10)[-1][1] == pytest.approx(0.1 * 1.03**13)
    assert follow(PathGrowth(), [-1.0] * 10)[-1][1] == pytest.approx(0.1 * 1.03**-7)


def test_without_searches_it_grows_six_times_as_fast_until_a_path_slope_is_negative():
    growth = PathGrowth()
    state, step_size = growth.init(1e-4), 1e-4
    for path_slope, faster in [(1.0, 6), (0.0, 6), (2.0, 6), (-1e-3, 1), (1.0, 1)]:
        before = step_size
        state, step_size = growth.follow(state, step_size, path_slope, is_searched=False)
        assert step_size == pytest.approx(before * 1.03 ** (faster * (state.path_slope + 0.3)))


@pytest.mark.parametrize(("before", "after"), [(9.9e-3, 0.01), (0.01, 0.01), (0.5, 0.5)])
def test_without_searches_it_grows_to_a_hundredth_at_most(before, after):
    growth = PathGrowth()
    state, step_size = growth.follow(growth.init(before), before, 1.0, is_searched=False)
    assert step_size == after
    assert growth.follow(state, step_size, -100.0, is_searched=False)[1] < after


@pytest.mark.parametrize("path_slope", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("before", [[], [2.0, -1.0]])
def test_a_path_slope_that_is_not_finite_is_left_out(path_slope, before):
    growth = PathGrowth()
    state, step_size = follow(growth, before)[-1] if before else (growth.init(0.1), 0.1)
    assert growth.follow(state, step_size, path_slope) == (state, step_size)


def test_no_path_is_no_reason_to_grow():
    ((state, step_size),) = follow(PathGrowth(), [0.0])
    assert step_size == 0.1
    assert (state.path_slope, state.path_size) == (0.0, 1.0)


def test_a_path_slope_of_zero_later_counts_in_the_mean_and_not_in_the_geometric_one():
    (before, _), (state, step_size) = follow(PathGrowth(growth_factor=1.2), [-1.0, 0.0])
    assert (state.mean_slope, state.mean_size) == pytest.approx((-0.09, 0.09))
    assert state.path_size == before.path_size == 1.0
    assert step_size == pytest.approx(0.1 * 1.2**-1.4)


def test_a_search_starts_where_the_step_size_has_come_to_and_leaves_the_averages_alone():
    growth = PathGrowth()
    state, step_size = follow(growth, [1.0, 2.0])[-1]
    assert growth.start(state, step_size) == step_size
    for accepted in (True, False):
        search = {"start": step_size, "step_size": 0.01, "slope": 1.0, "decrease_factor": 0.9}
        assert growth.searched(state, **search, accepted=accepted) == state


def test_the_mean_path_slope_over_that_of_its_sizes_is_logged():
    growth = PathGrowth()
    assert growth.metrics(growth.init(0.1)) == {"path_slope": 0.0}
    assert growth.metrics(follow(growth, [3.0, -1.0])[-1][0]) == {"path_slope": pytest.approx(1.7 / 3.7)}


# ---- a rule of your own ----


@dataclasses.dataclass(frozen=True)
class RampState:
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class RampGrowth:
    """Growth to 2, 3, 4 ... times the initial step size, over a number of steps."""

    name = "ramp"
    description = "the step size grew by a ramp"
    needs_path_slope = False
    least_lr_fraction = 0.0

    ramp_steps: int = 4

    def init(self, initial_step_size):
        return RampState()

    def follow(self, state, step_size, path_slope, is_searched=True):
        if state.steps == self.ramp_steps:
            return state, step_size
        steps = state.steps + 1
        return RampState(steps), step_size * (steps + 1) / steps

    def start(self, state, step_size):
        return step_size

    def searched(self, state, **search):
        return state

    def metrics(self, state):
        return {"ramp_steps": state.steps}


RAMP = LineSearch(RampGrowth(), ArmijoCondition(beta3=0.0), EverySteps(2), initial_step_size=0.125)


def test_a_rule_of_your_own_is_searched_with_and_logged():
    searching = Searching(RAMP, ramp_steps=3)
    taken = []
    for _ in range(3):
        taken += [searching.accept(), searching.skip()]
        assert searching.line_search.metrics(searching.state)["ramp_steps"] == min(len(taken), 3)
    assert taken == pytest.approx([0.25, 0.375, 0.5, 0.5, 0.5, 0.5])
    assert RAMP.options["ramp_steps"] == 4
    with pytest.raises(TypeError, match=r"growth_factor is no option of growth=ramp, which takes .*ramp_steps"):
        RAMP.with_options(growth_factor=1.1)


def test_a_rule_of_your_own_trains_is_saved_and_resumed_bit_for_bit():
    net = make_net()
    optimizer = ALSALS(net.parameters(), growth=RAMP, ramp_steps=6, initial_step_size=0.001)
    step_sizes = [step_size for step_size, _ in train(net, optimizer, range(4))]
    assert step_sizes == pytest.approx([0.002, 0.003, 0.004, 0.005])

    other_net = copy.deepcopy(net)
    other = ALSALS(other_net.parameters(), growth=RAMP, ramp_steps=6, initial_step_size=0.001)
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    assert other.search == optimizer.search
    history = train(net, optimizer, range(4, 40))
    assert train(other_net, other, range(4, 40)) == history
    assert_identical(snapshot(other_net.parameters()), snapshot(net.parameters()))
    assert other.search.growth == RampState(6)
    assert history[-1][1] < 0.5 * history[0][1]


@pytest.mark.parametrize(("made", "loaded"), [(RAMP, "path"), ("constant", RAMP)])
def test_the_state_of_a_rule_of_your_own_and_that_of_another_are_refused_by_name(made, loaded):
    net = make_net()
    optimizer, other = (ALSALS(net.parameters(), growth=growth) for growth in (made, loaded))
    names = [optimizer.line_search.growth.name, other.line_search.growth.name]
    with pytest.raises(ValueError, match=f"growth must be '{names[0]}', as in the state_dict, got '{names[1]}'"):
        other.load_state_dict(optimizer.state_dict())


def test_an_option_of_a_rule_of_your_own_cannot_differ_between_parameter_groups():
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"^ramp_steps cannot differ between parameter groups"):
        ALSALS([{"params": [w], "ramp_steps": 3}], growth=RAMP)
