import math

import pytest
from searching import quadratic, recorder

from hf_alsals.initial_search import InitialSearch


def find(probe, slope=1.0, c=0.3, initial_step_size=0.1, loss=0.0):
    return InitialSearch().search(loss, slope, probe, c, InitialSearch().first_probe(initial_step_size))


@pytest.mark.parametrize("loss", [0.0, -3.0])
@pytest.mark.parametrize("initial_step_size", [1e-6, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("a", "b", "c"), [(2.0, 5.0, 0.3), (1e-3, 40.0, 0.5), (10.0, 3.0, 0.1)])
def test_finds_the_largest_sufficient_step_size_from_anywhere(loss, initial_step_size, a, b, c):
    probe, probed = recorder(lambda step_size: loss + quadratic(a, b)(step_size))
    found = find(probe, a, c, initial_step_size, loss)
    largest = 2 * (1 - max(c, 0.3)) * a / b  # where the reduction is c times the prediction
    assert largest / 2**0.125 <= found.step_size <= largest * (1 + 1e-9)
    assert len(probed) <= 30
    assert list(found.reductions) == probed
    for step_size, reduction in found.reductions.items():
        assert reduction == pytest.approx(-quadratic(a, b)(step_size), abs=1e-14)


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_probes_nothing_without_a_slope(slope):
    found = find(lambda step_size: pytest.fail("there is no slope to go down"), slope)
    assert (found.step_size, found.reductions) == (0.0, {})


def test_gives_up_where_no_step_size_is_sufficient():
    found = find(lambda step_size: 1.0)
    assert found.step_size == 0.0
    assert len(found.reductions) == 30
    assert min(found.reductions) == pytest.approx(0.1 * 2**-29)


@pytest.mark.parametrize("initial_step_size", [1e-6, 0.1, 10.0])
def test_ends_on_a_loss_that_falls_for_ever(initial_step_size):
    assert 5.0 < find(lambda step_size: -step_size, initial_step_size=initial_step_size).step_size <= 10.0


def test_an_initial_step_size_above_the_largest_is_a_bound_of_its_own():
    assert find(lambda step_size: -step_size, initial_step_size=30.0).step_size == 30.0
    found = find(lambda step_size: -step_size if step_size <= 21.0 else 1.0, initial_step_size=32.0)
    assert 21.0 / 2**0.125 <= found.step_size <= 21.0


@pytest.mark.parametrize("initial_step_size", [1e-6, 1e-3, 0.1, 10.0])
def test_steps_too_small_to_show_in_the_loss_are_no_bound(initial_step_size):
    found = find(lambda x: round(quadratic(1.0, 5.0)(x), 3), initial_step_size=initial_step_size)
    assert 0.28 / 2**0.125 <= found.step_size <= 0.28 * 1.01
    assert found.reductions[found.step_size] == pytest.approx(-quadratic(1.0, 5.0)(found.step_size), abs=1e-3)


def test_where_only_too_large_steps_show_in_the_loss_the_largest_that_does_not_is_taken():
    assert find(lambda step_size: 1.0 if step_size > 0.03 else 0.0, slope=1e-9).step_size == pytest.approx(0.025)


@pytest.mark.parametrize("initial_step_size", [1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("phase", range(7))
def test_rounding_hides_no_step_size(initial_step_size, phase):
    def rounded(x):  # off by 1e-4 either way, and without a reduction below 1e-8
        noise = 1e-4 * math.sin(1e3 * phase + 40 * math.log(x)) if x > 1e-8 else 0.0
        return quadratic(1.0, 5.0)(x) + noise

    step_size = find(rounded, initial_step_size=initial_step_size).step_size
    assert 0.28 / 2**0.125 * 0.98 <= step_size <= 0.28 * 1.02


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_not_sufficient(value):
    found = find(lambda step_size: -step_size if step_size < 0.01 else value, initial_step_size=1.0)
    assert 0.01 / 2**0.125 <= found.step_size < 0.01


@pytest.mark.parametrize("loss", [0.0, 3.0, -200.0])
@pytest.mark.parametrize("value", [0.0, 0.5, -1e-9])
def test_a_value_that_does_not_follow_the_slope_is_found_out(loss, value):
    found = InitialSearch().search(loss, 100.0, lambda step_size: loss + value * step_size, 0.3, 0.1)
    assert found.hides_gradient
    assert found.step_size == 0.0


@pytest.mark.parametrize("slope", [1e-9, 1e-4])
def test_a_slope_too_small_to_show_says_nothing_of_the_value(slope):
    assert not InitialSearch().search(3.0, slope, lambda step_size: 3.0, 0.3, 0.1).hides_gradient


def test_a_value_that_follows_the_slope_at_small_steps_only_hides_nothing():
    def cliff(step_size):
        return -step_size if step_size < 1e-6 else 5.0

    assert not InitialSearch().search(0.0, 1.0, cliff, 0.3, 0.1).hides_gradient


@pytest.mark.parametrize("loss", [0.0, 3.0])
@pytest.mark.parametrize("ratio", [-2.1, 0.0, 0.2])
def test_a_reduction_by_rounding_does_not_hide_that_the_value_does_not_follow_the_slope(loss, ratio):
    def probe(step_size):  # at tiny steps ten times what the slope predicts
        return loss - (ratio if step_size > 1e-9 else 10.0) * 100.0 * step_size + step_size**2

    assert InitialSearch().search(loss, 100.0, probe, 0.3, 0.1).hides_gradient


def test_a_sharp_parabola_is_curvature_and_no_hidden_gradient():
    found = InitialSearch().search(0.0, 1.0, lambda step_size: -step_size + 1e9 * step_size**2, 0.3, 0.1)
    assert not found.hides_gradient
    assert 0.7e-9 / 2**0.125 <= found.step_size <= 0.7e-9
