import pytest
import torch
from searching import Searching, wrong

from hf_alsals import ALSALS, LineSearch
from hf_alsals.acceptance import ArmijoCondition, ParabolaCondition
from hf_alsals.growth import ConstantGrowth
from hf_alsals.initial_search import InitialSearch
from hf_alsals.interval import AdaptiveInterval, EverySteps
from hf_alsals.path_growth import PathGrowth
from hf_alsals.presets import LINE_SEARCHES, PRESETS, line_search_of

# What the papers say, and for adam_sls the authors' package salsa-optimizer 0.1.0.
PUBLISHED = {"c": 0.3, "beta3": 0.99, "growth_factor": 1 / 0.999, "decrease_factor": 0.9, "initial_step_size": 0.1}
CONSTANTS = {
    "alsals_paper": PUBLISHED | {"search_interval": 1},
    "salsa": PUBLISHED | {"c": 0.5, "growth_factor": 1.1, "decrease_factor": 0.8, "search_interval": "adaptive"},
    "adam_sls": PUBLISHED | {"c": 0.2, "beta3": 0.0, "growth_factor": 2 ** (1 / 500), "search_interval": 1},
}


def make(**arguments):
    return ALSALS([torch.nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_published_method_has_the_constants_of_its_paper(name):
    optimizer = make(**PRESETS[name])
    assert optimizer.line_search.options == CONSTANTS[name]
    assert optimizer.slope_method == ("exact" if name == "alsals_paper" else "preconditioned")
    assert optimizer.param_groups[0]["betas"] == (0.0 if name == "adam_sls" else 0.9, 0.999)
    assert optimizer.param_groups[0]["eps"] == 1e-8
    parts = optimizer.line_search
    assert type(parts.growth) is ConstantGrowth
    assert type(parts.acceptance) is ArmijoCondition
    assert type(parts.interval) is (AdaptiveInterval if name == "salsa" else EverySteps)
    assert parts.initial_search is None
    assert parts.max_probes == 100


def test_the_default_is_the_preset_alsals_which_follows_the_path():
    search = make().line_search
    assert search == make(**PRESETS["alsals"]).line_search == LINE_SEARCHES["path"]
    assert [type(part) for part in (search.growth, search.acceptance, search.interval, search.initial_search)] == [
        PathGrowth,
        ParabolaCondition,
        EverySteps,
        InitialSearch,
    ]
    defaults = {"c": 0.1, "beta3": 0.5, "growth_factor": 1.03, "decrease_factor": 0.9, "initial_step_size": 0.1}
    assert search.options == defaults | {"search_interval": 10}


def test_constant_growth_has_the_published_constants_but_for_its_growth():
    assert make(growth="constant").line_search == LINE_SEARCHES["constant"]
    assert LINE_SEARCHES["constant"].options == CONSTANTS["alsals_paper"] | {"growth_factor": 1.01}


def test_a_preset_can_be_changed():
    optimizer = make(**PRESETS["salsa"] | {"c": 0.4, "search_interval": 3, "betas": (0.5, 0.9)})
    assert optimizer.line_search.options == CONSTANTS["salsa"] | {"c": 0.4, "search_interval": 3}
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize("growth", LINE_SEARCHES)
def test_a_growth_is_known_by_its_name(growth):
    assert line_search_of(growth) == LINE_SEARCHES[growth]
    assert LINE_SEARCHES[growth].growth.name == growth
    assert line_search_of(growth, c=0.4) == LINE_SEARCHES[growth].with_options(c=0.4)


def test_a_line_search_of_your_own_is_taken_with_options():
    own = LineSearch(ConstantGrowth(1.2), ParabolaCondition(c=0.4), EverySteps(7))
    assert line_search_of(own) == own
    assert line_search_of(own, c=0.6) == LineSearch(ConstantGrowth(1.2), ParabolaCondition(c=0.6), EverySteps(7))


@pytest.mark.parametrize("growth", ["linear", None, 1.01, PathGrowth()])
def test_an_unknown_growth_is_named_with_those_that_there_are(growth):
    with pytest.raises(ValueError, match=r"^growth must be one of path, constant, got ") as raised:
        line_search_of(growth)
    assert repr(growth) in str(raised.value)


ALL = wrong("c", "beta3", "growth_factor", "decrease_factor", "initial_step_size", "search_interval")


@pytest.mark.parametrize("growth", LINE_SEARCHES)
@pytest.mark.parametrize(("name", "value", "error", "right"), ALL)
def test_a_wrong_option_is_named_with_its_value_and_what_would_be_right(growth, name, value, error, right):
    with pytest.raises(error, match=f"^{name} must be .*{right}") as raised:
        line_search_of(growth, **{name: value})
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("c", 1e-9),
        ("c", 1 - 1e-9),
        ("beta3", 0),
        ("growth_factor", 1),
        ("decrease_factor", 0.001),
        ("initial_step_size", 1e-30),
        ("initial_step_size", 7),
        ("search_interval", 1),
    ],
)
def test_an_option_at_the_edge_of_its_range_is_taken(name, value):
    searching = Searching("constant", **{name: value})
    assert searching.line_search.options[name] == value
    assert searching.accept() == (value if name == "initial_step_size" else 0.1)
