import math
import warnings

import pytest
import torch
from small_problems import ConstantALSALS, assert_identical, single
from torch import nn

from hf_alsals import ALSALS
from hf_alsals.adam import AdamDirection


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *((name, value, ValueError) for name in ("lr", "eps", "weight_decay") for value in (-0.1, math.inf, math.nan)),
        *(("betas", value, ValueError) for value in ((0.9,), (1.0, 0.9), (0.9, -0.1), (0.9, math.nan), (0.9,) * 3)),
        *((name, "0.1", TypeError) for name in ("lr", "eps", "weight_decay")),
        *(("betas", value, TypeError) for value in (0.9, None, ("0.9", "0.999"))),
        ("c", 1.0, ValueError),
        ("beta3", 1.0, ValueError),
        ("growth_factor", 0.5, ValueError),
        ("decrease_factor", 1.0, ValueError),
        ("initial_step_size", 0.0, ValueError),
        ("initial_step_size", "0.1", TypeError),
        ("search_interval", 0, ValueError),
        ("search_interval", 1.5, TypeError),
        ("slope", "precise", ValueError),
        ("growth", "linear", ValueError),
        ("direction", "", ValueError),
    ],
)
def test_wrong_argument_is_named_with_its_value(name, value, error):
    with pytest.raises(error, match=f"^{name} must be ") as raised:
        ALSALS([single([1.0])], **{name: value})
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1e-8), ("weight_decay", -0.1)]
)
def test_wrong_value_in_a_parameter_group_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        ConstantALSALS([{"params": [single([1.0])], name: value}])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("c", 0.3),
        ("beta3", 0.9),
        ("growth_factor", 1.1),
        ("decrease_factor", 0.5),
        ("initial_step_size", 0.1),
        ("slope", "exact"),
        ("search_interval", 1),
        ("growth", "path"),
        ("direction", AdamDirection),
    ],
)
def test_search_setting_in_a_parameter_group_raises(name, value):
    with pytest.raises(ValueError, match=f"^{name} cannot differ between parameter groups"):
        ConstantALSALS([{"params": [single([1.0])]}, {"params": [single([2.0])], name: value}])


@pytest.mark.parametrize(("name", "value"), [("eps", -1.0), ("betas", None), ("c", 0.5)])
def test_a_refused_parameter_group_is_not_added(name, value):
    optimizer = ConstantALSALS([single([1.0])])
    with pytest.raises((TypeError, ValueError), match=name):
        optimizer.add_param_group({"params": [single([2.0])], name: value})
    assert len(optimizer.param_groups) == 1


def test_an_unknown_argument_is_named_with_the_options_that_there_are():
    with pytest.raises(TypeError, match="momentum is no option of growth=path, which takes c, beta3, growth_factor"):
        ALSALS([single([1.0])], momentum=0.9)


@pytest.mark.parametrize("make", [ALSALS, ConstantALSALS])
def test_options_reach_the_line_search(make):
    options = {"c": 0.4, "beta3": 0.2, "growth_factor": 1.2, "decrease_factor": 0.7, "initial_step_size": 0.3}
    optimizer = make([single([1.0])], **options, search_interval="adaptive")
    assert optimizer.line_search.options == options | {"search_interval": "adaptive"}
    assert optimizer.step_size == 0.3


def test_sparse_gradient_raises_and_moves_nothing():
    embedding = nn.Embedding(5, 2, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = ConstantALSALS(embedding.parameters())
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(lambda: 0.0, 1.0)
    assert_identical(embedding.weight.detach(), before)


def test_complex_parameter_raises():
    w = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"complex64.*\[2, 3\]"):
        ConstantALSALS([w])
    with pytest.raises(TypeError, match="complex64"):
        ConstantALSALS([single([1.0])]).add_param_group({"params": [w]})


@pytest.mark.parametrize("lr", [1e-3, 0.099])
def test_a_learning_rate_meant_for_adamw_is_warned_of(lr):
    with pytest.warns(UserWarning, match=f"lr multiplies the step size.*{lr:g} makes it much smaller"):
        ALSALS([single([1.0])], lr=lr)


def test_learning_rates_of_groups_that_are_meant_for_adamw_are_warned_of():
    groups = [{"params": [single([1.0])], "lr": 2e-5}, {"params": [single([1.0])], "lr": 1e-3}]
    with pytest.warns(UserWarning, match=r"0\.001 makes it much smaller: .* the largest of the parameter groups"):
        ALSALS(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ALSALS([groups[0], {"params": [single([1.0])]}])  # the other one is at 1


@pytest.mark.parametrize("lr", [0.0, 0.1, 1.0, 3.0])
def test_a_multiplier_near_one_is_not_warned_of(lr):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ALSALS([single([1.0])], lr=lr)
