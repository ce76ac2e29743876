import dataclasses
import math

import pytest
from searching import quadratic, wrong

from hf_alsals.acceptance import ArmijoCondition, ArmijoState, ParabolaCondition, ParabolaState

CONDITIONS = [ArmijoCondition, ParabolaCondition]
# Step size, slope and actual reduction of a few probes.
PROBES = [(0.3, 2.0, 0.5), (0.1, -1.0, -0.2), (0.25, 0.5, -0.3), (0.7, 3.0, 1.8), (0.05, 1.0, 0.01)]


def weights_of(count, beta3):
    """Return the weight of each of `count` values in their moving average, the newest last."""
    return [(1 - beta3) * beta3**age for age in reversed(range(count))]


def states(condition, probes):
    """Return the state after each probe, if each ends a search."""
    state, history = condition.init(), []
    for probe in probes:
        state = condition.update(state, *probe)
        history.append(state)
    return history


def is_sufficient(condition, *probes):
    """Return whether the last of some probes, each of which ends a search, is sufficient."""
    return condition.is_sufficient(states(condition, probes)[-1], probes[-1][0])


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_is_frozen_and_so_is_its_state(condition):
    for value in (condition(), condition().init()):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, 0.5)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("name", "value", "error", "right"), wrong("c", "beta3"))
def test_a_wrong_number_is_named_with_its_value(condition, name, value, error, right):
    with pytest.raises(error, match=f"^{name} must be .*{right}") as raised:
        condition(**{name: value})
    assert repr(value) in str(raised.value)


# f(eta) = f(0) - a eta + b eta^2 meets the Armijo condition exactly for eta <= a (1 - c) / b.
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("c", [1e-9, 0.15, 0.3, 0.7, 1 - 1e-6])
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (2.0, 30.0), (0.3, 0.1), (7.0, 1.0)])
def test_without_smoothing_a_quadratic_is_sufficient_up_to_its_closed_form_bound(condition, c, a, b):
    bound = a * (1 - c) / b
    for share, expected in ((1e-3, True), (0.5, True), (1 - 1e-6, True), (1 + 1e-6, False), (3.0, False)):
        step_size = share * bound
        probe = (step_size, a, a * step_size - b * step_size**2)
        assert is_sufficient(condition(c=c, beta3=0.0), probe) == expected


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_reduction_that_equals_the_bound_is_sufficient_and_one_just_under_it_is_not(condition):
    assert is_sufficient(condition(c=0.5, beta3=0.0), (0.25, 4.0, 0.5))
    assert not is_sufficient(condition(c=0.5, beta3=0.0), (0.25, 4.0, 0.5 - 1e-12))


# f(eta) = f(0) + a eta + b eta^2 rises; with slope -a it may rise by at most eta a / c, so eta <= a (1 / c - 1) / b.
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("c", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("b", [0.5, 5.0])
def test_uphill_the_loss_may_rise_by_one_over_c_of_the_prediction(condition, c, b):
    a = 2.0
    bound = a * (1 / c - 1) / b
    for share, expected in ((0.5, True), (1 - 1e-6, True), (1 + 1e-6, False)):
        step_size = share * bound
        probe = (step_size, -a, -a * step_size - b * step_size**2)
        assert is_sufficient(condition(c=c, beta3=0.0), probe) == expected


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("reduction", "expected"), [(1e-9, True), (0.0, True), (-1e-9, False)])
def test_at_slope_zero_any_step_size_that_does_not_raise_the_loss_is_sufficient(condition, reduction, expected):
    assert is_sufficient(condition(beta3=0.0), (1.0, 0.0, reduction)) == expected


@pytest.mark.parametrize("beta3", [0.0, 0.75, 0.99])
def test_armijo_averages_slopes_and_reductions_and_compares_them(beta3):
    condition = ArmijoCondition(c=0.4, beta3=beta3)
    for k, state in enumerate(states(condition, PROBES), start=1):
        weights, probes = weights_of(k, beta3), PROBES[:k]
        slope = sum(w * slope for w, (_, slope, _) in zip(weights, probes))
        reduction = sum(w * reduction for w, (_, _, reduction) in zip(weights, probes))
        assert (state.slope, state.reduction) == pytest.approx((slope, reduction))
        for step_size in (1e-3, 0.1, 0.3, 1.0, 10.0):
            expected = reduction >= (0.4 if slope > 0 else 1 / 0.4) * step_size * slope
            assert condition.is_sufficient(state, step_size) == expected


@pytest.mark.parametrize("beta3", [0.0, 0.5, 0.9])
def test_the_parabola_condition_takes_all_reductions_at_the_step_size_of_the_probe(beta3):
    condition = ParabolaCondition(c=0.4, beta3=beta3)
    for k, state in enumerate(states(condition, PROBES), start=1):
        weights, probes = weights_of(k, beta3), PROBES[:k]
        slope = sum(w * slope for w, (_, slope, _) in zip(weights, probes))
        assert state.slope == pytest.approx(slope)
        for step_size in (1e-3, 0.1, 0.3, 1.0, 10.0):
            # Through the reduction r at the step size e with slope a: a eta - (a e - r) (eta / e) ** 2.
            reductions = (a * step_size - (a * e - r) * (step_size / e) ** 2 for e, a, r in probes)
            reduction = sum(w * reduction for w, reduction in zip(weights, reductions))
            expected = reduction >= (0.4 if slope > 0 else 1 / 0.4) * step_size * slope
            assert condition.is_sufficient(state, step_size) == expected


def test_the_sign_of_the_smoothed_slope_decides_not_that_of_the_slope():
    condition = ArmijoCondition(c=0.5, beta3=0.5)
    first = (1.0, 4.0, 2.0)
    # s = 0.5 * 2 - 0.5 * 1 = 0.5 > 0: h = 0.5 * 1 - 0.5 * x >= 0.5 * 0.5 needs a rise x <= 0.5.
    assert is_sufficient(condition, first, (1.0, -1.0, -0.49))
    assert not is_sufficient(condition, first, (1.0, -1.0, -0.51))
    # s = 0.5 * 2 - 0.5 * 4 = -1 < 0: h = 0.5 * 1 - 0.5 * x >= 2 * -1 needs a rise x <= 5.
    assert is_sufficient(condition, first, (1.0, -4.0, -4.99))
    assert not is_sufficient(condition, first, (1.0, -4.0, -5.01))


def test_a_bad_batch_at_a_large_step_size_is_no_evidence_against_a_small_one_by_parabolas():
    bad, good = (0.1, 1.0, -quadratic(1.0, 500.0)(0.1)), (0.001, 1.0, -quadratic(1.0, 500.0)(0.001))
    assert is_sufficient(ParabolaCondition(c=0.3, beta3=0.5), bad, good)
    assert not is_sufficient(ArmijoCondition(c=0.3, beta3=0.5), bad, good)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_of_the_averages(value):
    armijo = ArmijoCondition(beta3=0.5)
    assert armijo.update(ArmijoState(1.0, 2.0), 0.1, 3.0, value) == ArmijoState(2.0, 2.0)
    assert armijo.update(ArmijoState(1.0, 2.0), 0.1, value, 4.0) == ArmijoState(1.0, 3.0)
    parabola = ParabolaCondition(beta3=0.5)
    assert parabola.update(ParabolaState(1.0, 2.0), 0.1, 3.0, value) == ParabolaState(2.0, 2.0)
    assert parabola.update(ParabolaState(1.0, 2.0), 0.1, value, 4.0) == ParabolaState(1.0, 2.0)
