import copy
import dataclasses
import math

import pytest
import torch
from searching import Searching, wrong
from small_problems import assert_identical, make_net, snapshot, through_torch_save, train

from hf_alsals import ALSALS
from hf_alsals.acceptance import ArmijoCondition
from hf_alsals.growth import ConstantGrowth
from hf_alsals.interval import EverySteps
from hf_alsals.line_search import LineSearch
from hf_alsals.path_growth import PathGrowth

RULES = [ConstantGrowth, PathGrowth]


def after_search(growth, **changes):
    """Return the state after a search from 1.0 that ended at 0.25, accepted."""
    search = {"start": 1.0, "step_size": 0.25, "slope": 2.0, "accepted": True, "decrease_factor": 0.5}
    return growth.searched(growth.init(0.1), **search | changes)


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


# ---- a rule of your own ----


@dataclasses.dataclass(frozen=True)
class RampState:
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class RampGrowth:
    """Growth to 2, 3, 4 ... times the initial step size, over a number of steps."""

    name = "ramp"
    description = "the step size grew by a ramp"
    direction = "adam"
    needs_path_slope = False
    least_lr_fraction = 0.0

    ramp_steps: int = 4

    def init(self, initial_step_size):
        return RampState()

    def follow(self, state, step_size, path_slope, is_searched=True, lr_fraction=1.0):
        assert isinstance(path_slope, float)
        if state.steps == self.ramp_steps:
            return state, step_size
        steps = state.steps + 1
        return RampState(steps), step_size * (steps + 1) / steps

    def start(self, state, step_size):
        return step_size

    def largest_doubled(self, state):
        return 0.0

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
