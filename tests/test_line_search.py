import dataclasses
import math

import pytest
from searching import Searching, initialized, quadratic, recorder

from hf_alsals.initial_search import InitialSearch
from hf_alsals.path_growth import PathGrowth
from hf_alsals.presets import LINE_SEARCHES, line_search_of

GROWTHS = ["constant", "path"]


# ---- a search ----


# f(eta) = f0 - a eta + b eta^2 meets the Armijo condition exactly for eta <= a (1 - c) / b.
@pytest.mark.parametrize("f0", [-3.0, 0.0, 5.0])
@pytest.mark.parametrize("c", [0.15, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("decrease_factor", [0.5, 0.9])
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (2.0, 30.0), (0.3, 0.1), (7.0, 1.0)])
def test_accepts_the_first_probe_under_the_closed_form_bound_of_a_quadratic(f0, c, decrease_factor, a, b):
    searching = Searching(c=c, beta3=0.0, decrease_factor=decrease_factor, initial_step_size=2.0)
    bound = a * (1 - c) / b
    backtracks = max(0, math.ceil(math.log(bound / 2.0) / math.log(decrease_factor)))
    probe, probed = recorder(lambda step_size: f0 - a * step_size + b * step_size**2)

    step_size = searching.search(f0, a, probe)

    state = searching.state
    assert step_size == pytest.approx(2.0 * decrease_factor**backtracks, rel=1e-12)
    assert probed == pytest.approx([2.0 * decrease_factor**k for k in range(backtracks + 1)], rel=1e-12)
    assert state.step_size == state.smallest_probe == step_size
    assert state.probes == state.total_probes == backtracks + 1
    assert (state.slope, state.predicted_reduction) == (a, step_size * a)
    assert state.actual_reduction == pytest.approx(a * step_size - b * step_size**2, rel=1e-9)
    assert state.reduction_ratio == pytest.approx(1 - b * step_size / a, rel=1e-9)


def test_slope_and_reduction_are_smoothed_and_the_accepted_reduction_is_kept():
    searching = Searching(c=0.5, beta3=0.75, growth_factor=1.0, decrease_factor=0.5, initial_step_size=1.0)

    # s = 0.25 * 4 = 1; eta = 1: h = 0.25 * 1 = 0.25 < 0.5; eta = 0.5: h = 0.25 * 1.2 = 0.3 >= 0.25.
    assert searching.search(2.0, 4.0, {1.0: 1.0, 0.5: 0.8}.__getitem__) == 0.5
    assert dataclasses.astuple(searching.state.acceptance) == pytest.approx((1.0, 0.3))
    assert (searching.state.slope, searching.state.probes) == (4.0, 2)
    assert searching.state.actual_reduction == pytest.approx(1.2)

    # s = 0.75 * 1 + 0.25 * 2 = 1.25; eta = 0.5: h = 0.75 * 0.3 + 0.25 * 0.4 = 0.325 >= 0.3125.
    assert searching.search(1.0, 2.0, {0.5: 0.6}.__getitem__) == 0.5
    assert dataclasses.astuple(searching.state.acceptance) == pytest.approx((1.25, 0.325))

    # s = 0.9375 + 0.25 * 0.25 = 1; eta = 0.5: h = 0.24375 + 0.25 * 0 < 0.25; eta = 0.25: the same h >= 0.125.
    assert searching.search(1.0, 0.25, {0.5: 1.0, 0.25: 1.0}.__getitem__) == 0.25
    assert dataclasses.astuple(searching.state.acceptance) == pytest.approx((1.0, 0.24375))
    assert searching.state.total_probes == 5


def test_the_smoothed_reduction_has_to_be_c_times_the_smoothed_prediction():
    searching = initialized(c=0.4, beta3=0.75)
    batches = []
    for a, b in [(2.0, 1.0), (1.0, 30.0), (3.0, 5.0), (2.0, 60.0), (2.0, 3.0), (1.0, 8.0)]:
        batches.append((a, b))
        step_size, probes = searching.state.step_size, 1
        while True:  # the losses of all batches so far are parabolas, which are known at every step size
            weights = [0.25 * 0.75**age for age in reversed(range(len(batches)))]
            reduction = sum(-weight * quadratic(*batch)(step_size) for weight, batch in zip(weights, batches))
            prediction = sum(weight * step_size * batch[0] for weight, batch in zip(weights, batches))
            if reduction >= 0.4 * prediction:
                break
            step_size, probes = 0.9 * step_size, probes + 1
        assert searching.search(0.0, a, quadratic(a, b)) == pytest.approx(step_size)
        assert searching.state.probes == probes
        assert searching.state.step_size == searching.next_probe == pytest.approx(step_size)


def test_the_step_size_grows_after_each_acceptance():
    searching = Searching(beta3=0.0, growth_factor=1.25, initial_step_size=0.1)
    step_sizes = [searching.accept() for _ in range(20)]
    assert step_sizes == pytest.approx([0.1 * 1.25**k for k in range(20)], rel=1e-12)


def test_growth_starts_from_the_step_size_accepted_after_backtracking():
    searching = Searching(beta3=0.0, growth_factor=1.5, decrease_factor=0.5, initial_step_size=1.0)
    assert searching.search(0.0, 1.0, lambda step_size: -step_size if step_size < 0.3 else 1.0) == 0.25
    probe, probed = recorder(lambda step_size: -step_size)
    searching.search(0.0, 1.0, probe)
    assert probed == [0.375]


# f(eta) = a eta + b eta^2 rises; with slope -a it may rise by at most eta a / c, so eta <= a (1 / c - 1) / b.
@pytest.mark.parametrize("c", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("b", [0.5, 5.0])
def test_uphill_it_backtracks_to_where_the_loss_rises_by_one_over_c_of_the_prediction(c, b):
    searching = Searching(c=c, beta3=0.0, decrease_factor=0.9, initial_step_size=3.0)
    a = 2.0
    backtracks = max(0, math.ceil(math.log(a * (1 / c - 1) / b / 3.0) / math.log(0.9)))
    step_size = searching.search(0.0, -a, lambda step_size: a * step_size + b * step_size**2)
    assert step_size == pytest.approx(3.0 * 0.9**backtracks, rel=1e-12)
    assert searching.state.slope == searching.state.acceptance.slope == -a


def test_uphill_the_default_search_backtracks_too():
    searching = initialized(c=0.5, beta3=0.0)
    assert searching.search(0.0, -1.0, lambda step_size: 1.9 * step_size) == 0.1
    assert searching.search(0.0, -1.0, lambda step_size: 2.1 * step_size if step_size > 0.05 else 0.0) < 0.05


@pytest.mark.parametrize(("losses", "expected"), [((1.0,), 1.0), ((0.9,), 1.0), ((1.1, 1.0), 0.5)])
def test_slope_zero_accepts_any_step_size_that_does_not_raise_the_loss(losses, expected):
    searching = Searching(beta3=0.0, decrease_factor=0.5, initial_step_size=1.0)
    left = list(losses)
    assert searching.search(1.0, 0.0, lambda step_size: left.pop(0)) == expected
    assert left == []
    assert searching.state.acceptance.slope == 0.0
    assert math.isnan(searching.state.reduction_ratio)  # there is nothing to divide by


def test_a_slope_of_zero_is_no_reason_to_grow():
    searching = Searching(growth_factor=2.0)
    for _ in range(5):
        assert searching.search(1.0, 0.0, lambda step_size: 1.0) == 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("slope", [1.0, 0.0, -1.0])
def test_a_nonfinite_probe_is_rejected_and_counted(value, slope):
    searching = Searching(decrease_factor=0.5, initial_step_size=1.0)
    assert searching.search(3.0, slope, lambda step_size: value if step_size > 0.2 else 2.0) == 0.125
    assert (searching.state.probes, searching.state.nonfinite_probes) == (4, 3)
    assert searching.state.actual_reduction == 1.0
    assert searching.state.acceptance.reduction == pytest.approx(0.01)
    searching.accept()
    assert searching.state.nonfinite_probes == 0


@pytest.mark.parametrize("slope", [math.nan, math.inf, -math.inf])
def test_a_slope_that_is_not_finite_is_left_out_of_the_averages(slope):
    searching = initialized()
    searching.search(0.0, 1.0, quadratic(1.0, 2.0))
    before = searching.state.acceptance
    assert searching.search(0.0, slope, quadratic(1.0, 2.0)) == 0.1  # by what is known of the batch before
    assert searching.state.acceptance == before
    assert dataclasses.astuple(before) == pytest.approx((0.5, 0.5))


# ---- where no step size is accepted ----


@pytest.mark.parametrize(("loss_at", "taken"), [(lambda eta: -0.01 * eta, True), (lambda eta: 1.0, False)])
def test_after_a_hundred_rejections_the_smallest_step_size_is_taken_if_it_lowers_the_loss(loss_at, taken):
    searching = Searching(beta3=0.0, growth_factor=1.5, decrease_factor=0.9, initial_step_size=0.2)
    probe, probed = recorder(loss_at)
    step_size = searching.search(0.0, 1.0, probe)
    assert len(probed) == searching.state.probes == searching.state.total_probes == 100
    assert probed[-1] == min(probed) == pytest.approx(0.2 * 0.9**99, rel=1e-12)
    assert step_size == (probed[-1] if taken else 0.0)
    assert not searching.state.accepted
    assert searching.state.acceptance.reduction == searching.state.actual_reduction == -loss_at(probed[-1])


def test_a_search_ends_where_smaller_steps_no_longer_show_in_the_loss():
    searching = Searching(beta3=0.0, growth_factor=2.0, decrease_factor=0.5, initial_step_size=1.0)
    step_size = searching.search(1.0, 1.0, lambda eta: 2.0 if eta > 0.2 else 1.0)
    assert (step_size, searching.state.probes, searching.next_probe) == (0.0625, 5, 0.125)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_step_size_is_zero_when_every_probe_is_nonfinite(value):
    searching = Searching(beta3=0.5, initial_step_size=0.2)
    searching.search(0.0, 1.0, lambda step_size: -4.0)
    assert searching.search(0.0, 1.0, lambda step_size: value) == 0.0
    assert searching.state.probes == searching.state.nonfinite_probes == 100
    assert searching.state.acceptance.reduction == 2.0


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_after_exhausted_probes_the_next_search_starts_one_decrease_below_the_last(value):
    searching = Searching(beta3=0.0, growth_factor=1.5, decrease_factor=0.9, initial_step_size=0.2)
    searching.accept()
    for _ in range(2):
        searching.search(0.0, 1.0, lambda step_size: value)
    assert searching.accept() == pytest.approx(0.2 * 1.5 * 0.9**2, rel=1e-12)
    assert searching.accept() == pytest.approx(0.2 * 1.5 * 0.9**2 * 1.5, rel=1e-12)


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_no_unsearched_step_follows_a_search_that_found_nothing(value):
    searching = Searching(beta3=0.0, growth_factor=1.5, search_interval=2)
    searching.accept()
    searching.skip()
    assert searching.search(0.0, 1.0, lambda step_size: value) == 0.0
    assert searching.is_due


def test_a_probe_accepted_as_the_last_allowed_one_counts_as_accepted():
    searching = Searching(beta3=0.0, growth_factor=2.0, decrease_factor=0.9, initial_step_size=1.0)
    last = 0.9**99
    step_size = searching.search(0.0, 1.0, lambda step_size: -step_size if step_size < last * 1.01 else 1.0)
    assert step_size == pytest.approx(last, rel=1e-12)
    assert searching.accept() == pytest.approx(2 * last, rel=1e-12)


@pytest.mark.parametrize(("decrease_factor", "probes"), [(0.9, 7), (0.8, 4), (0.5, 2), (0.3, 2)])
def test_the_default_search_halves_the_step_size_at_most_and_searches_on_where_it_is_not_finite(
    decrease_factor, probes
):
    searching = initialized(decrease_factor=decrease_factor, search_interval=3)
    assert searching.line_search.max_probes == probes
    for k in (1, 2):
        assert searching.search(0.0, 1.0, lambda step_size: math.nan) == 0.0
        assert searching.state.probes == probes
        assert searching.state.step_size == pytest.approx(0.1 * decrease_factor ** (k * (probes - 1)))
        assert searching.is_due
    assert searching.search(0.0, 1.0, lambda step_size: -step_size) == searching.state.step_size
    assert not searching.is_due


def test_the_default_search_does_not_search_on_after_a_bad_batch():
    searching = initialized(decrease_factor=0.5, search_interval=3)
    assert searching.search(0.0, 1.0, lambda step_size: 1.0) == 0.0
    assert (searching.state.step_size, searching.state.accepted) == (0.05, False)
    for _ in range(2):
        assert searching.skip() == 0.05
    assert searching.is_due


def test_a_bad_batch_at_a_large_step_size_does_not_hold_the_default_search_down():
    searching = initialized(c=0.3, beta3=0.5)
    searching.search(0.0, 1.0, quadratic(1.0, 500.0))
    assert searching.state.step_size == pytest.approx(0.1 * 0.9**6)  # by halving it at most
    assert not searching.state.accepted
    for _ in range(20):
        searching.search(0.0, 1.0, quadratic(1.0, 500.0))
    # Where the parabola itself has a sufficient reduction, and not below.
    assert 0.9 * 1.4 / 500 < searching.state.step_size <= 1.4 / 500


# ---- the first searches ----


@pytest.mark.parametrize("initial_step_size", [1e-6, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("a", "b", "c"), [(2.0, 5.0, 0.3), (1e-3, 40.0, 0.5), (10.0, 3.0, 0.1)])
def test_training_starts_at_a_tenth_of_what_the_first_search_finds(initial_step_size, a, b, c):
    searching = Searching("path", c=c, initial_step_size=initial_step_size)
    step_size = searching.search(0.0, a, quadratic(a, b))
    largest = 2 * (1 - max(c, 0.3)) * a / b  # where the reduction is c times the prediction
    assert largest / 2**0.125 <= 10 * step_size <= largest * (1 + 1e-9)
    state = searching.state
    assert state.step_size == step_size
    assert state.probes == state.total_probes <= 30
    # The numbers are those of what it found.
    assert (state.slope, state.predicted_reduction) == (a, pytest.approx(10 * step_size * a))
    assert state.actual_reduction == pytest.approx(-quadratic(a, b)(10 * step_size))


@pytest.mark.parametrize(("times", "expected"), [((4, 50), 4), ((1, 50), 1), ((1, 2), 1), ((2, 1), 1), ((50, 2), 2)])
def test_training_starts_at_the_least_that_the_first_three_batches_allow(times, expected):
    searching = Searching("path", growth_factor=1.2)
    taken = searching.search(0.0, 1.0, quadratic(1.0, 1 / 4))
    assert 0.14 * 4 / 2**0.125 <= taken <= 0.14 * 4
    for batch in times:
        assert not searching.state.is_initialized
        taken = searching.search(0.0, 1.0, quadratic(1.0, 1 / batch), path_slope=1.0)
        assert searching.state.probes == 1 or batch < 4
    assert 0.14 * expected / 2**0.125 <= taken <= 0.14 * expected * (1 + 1e-9)
    assert [searching.skip() for _ in range(7)] == [taken] * 7  # nothing has been followed before
    assert searching.state.is_initialized


def test_a_batch_that_allows_nothing_counts_among_the_first_three():
    nothing, something = (1.0, lambda step_size: math.inf), (1.0, quadratic(1.0, 1.0))
    searching = Searching("path")
    first, second, third = searching.start(something, nothing, something)
    assert (first, second) == (third, 0.0)
    assert searching.state.is_initialized
    searching = Searching("path")
    assert searching.start(something, nothing, nothing)[1:] == [0.0, 0.0]
    assert not searching.state.is_initialized  # all over again
    assert searching.start(something, something, nothing) == [first, first, 0.0]
    assert searching.state.is_initialized
    assert searching.state.step_size == first


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_the_first_search_waits_for_a_slope(slope):
    searching = Searching("path")
    assert searching.search(0.0, slope, lambda step_size: pytest.fail("there is no slope to go down")) == 0.0
    assert not searching.state.is_initialized
    assert searching.is_due
    assert searching.search(0.0, 1.0, quadratic(1.0, 1.0)) > 0


def test_where_the_first_search_finds_nothing_there_is_another():
    searching = Searching("path")
    assert searching.search(0.0, 1.0, lambda step_size: math.inf) == 0.0
    assert (searching.state.probes, searching.state.accepted) == (30, False)
    assert searching.state.actual_reduction == -math.inf
    assert not searching.state.is_initialized
    assert searching.is_due
    assert searching.state.step_size == 0.1


def test_where_the_first_search_finds_a_hidden_gradient_the_path_alone_moves_the_step_size():
    searching = Searching("path", growth_factor=1.2)
    assert searching.search(0.0, 1.0, lambda step_size: 1.0) == pytest.approx(1e-4)
    assert searching.state.is_blind
    step_size = 1e-4
    for _ in range(30):  # many intervals
        step_size = min(step_size * 1.2 ** (6 * 1.3), 0.01)
        assert searching.skip(path_slope=2.0) == pytest.approx(step_size)
    assert searching.line_search.metrics(searching.state) == {"path_slope": 1.0}


def test_never_searching_starts_low_and_is_moved_by_the_path_alone():
    searching = Searching("path", search_interval="never", growth_factor=1.2, initial_step_size=10.0)
    exponent = 0.0
    for k in range(1, 66):
        exponent -= 0.7 * 40 / (40 + max(k - 41, 0))  # by ever less once an overshoot can be told
        assert searching.skip(path_slope=-2.0) == pytest.approx(1e-2 * 1.2**exponent)


def test_never_searching_is_refused_where_only_searches_move_the_step_size():
    with pytest.raises(ValueError, match=r'^search_interval must be an int or "adaptive" with growth=constant.*never'):
        Searching("constant", search_interval="never")


@pytest.mark.parametrize("growth", ["path", "constant"])
def test_a_search_has_a_hundred_probes_at_most(growth):
    searching = Searching(growth, decrease_factor=0.99999)
    if growth == "path":
        searching.start(*[(1.0, lambda step_size: -step_size)] * 3)
        searching.state = dataclasses.replace(searching.state, interval=searching.line_search.interval.init())
    probe, probed = recorder(lambda step_size: 1.0)
    searching.search(0.0, 1.0, probe)
    assert len(probed) == 100


def test_the_first_search_counts_its_nonfinite_probes():
    searching = Searching("path", initial_step_size=1.0)
    probe, probed = recorder(lambda step_size: -step_size if step_size < 0.01 else math.inf)
    assert searching.search(0.0, 1.0, probe) > 0
    assert searching.state.nonfinite_probes == sum(step_size >= 0.01 for step_size in probed)
    assert searching.state.smallest_probe == min(probed)


def test_after_the_first_searches_a_constant_growth_starts_above_what_they_took():
    searching = Searching(dataclasses.replace(LINE_SEARCHES["constant"], initial_search=InitialSearch()))
    *_, step_size = searching.start(*[(1.0, quadratic(1.0, 1.0))] * 3)
    assert searching.next_probe == pytest.approx(1.01 * step_size)


def test_before_the_first_search_the_initial_step_size_is_reported():
    state = Searching(initial_step_size=0.03).state
    assert state.step_size == 0.03
    assert (state.slope, state.actual_reduction, state.probes, state.searched, state.total_probes) == (
        0,
        0,
        0,
        False,
        0,
    )


# ---- from step to step ----


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_an_integer_interval_searches_every_that_many_steps_and_goes_on_as_it_was_between_them(interval):
    searching = Searching(beta3=0.0, growth_factor=1.5, search_interval=interval)
    step_sizes = [searching.accept() if k % interval == 0 else searching.skip() for k in range(21)]
    assert step_sizes == pytest.approx([0.1 * 1.5 ** (k // interval) for k in range(21)], rel=1e-12)
    assert searching.state.total_probes == math.ceil(21 / interval)


@pytest.mark.parametrize("growth_factor", [1.0, 1.02, 1.1])
def test_an_adaptive_interval_averages_the_step_sizes_that_searches_ended_at(growth_factor):
    options = {"growth_factor": growth_factor, "decrease_factor": 0.5, "initial_step_size": 1.0}
    searching = Searching(beta3=0.0, search_interval="adaptive", **options)
    fast, slow = 0.0, 0.0
    for k in range(300):
        ceiling = 1e-2 if k % 100 == 99 else 1e9
        step_size = searching.search(0.0, 1.0, lambda eta, ceiling=ceiling: -eta if eta < ceiling else 1.0)
        fast, slow = 0.9 * fast + 0.1 * step_size, 0.99 * slow + 0.01 * step_size
        r = max(fast / slow, slow / fast)
        skipped = 0
        while not searching.is_due:
            assert searching.skip() == step_size
            skipped += 1
        assert skipped + 1 == math.ceil(max(1.0, min(10.0, 1 / (r - 1) if r > 1 else math.inf)))


def test_the_step_size_follows_the_path_slope_in_every_step_and_is_searched_from_there():
    searching = initialized(growth_factor=1.2, search_interval=2)
    growth = dataclasses.replace(searching.state.growth, has_backtracked=True)  # it doubles nothing
    searching.state = dataclasses.replace(searching.state, growth=growth)
    probe, probed = recorder(lambda step_size: -step_size)
    searching.search(0.0, 1.0, probe, path_slope=1.0)
    searching.skip(path_slope=1.0)
    searching.search(0.0, 1.0, probe, path_slope=1.0)
    assert probed == pytest.approx([0.1 * 1.2**1.3, 0.1 * 1.2**3.9])
    assert searching.skip() == probed[-1]  # without a path slope


@pytest.mark.parametrize(
    ("loss", "multiples"),
    [
        (lambda step_size: -step_size, [1, 2, 4]),
        (lambda step_size: -0.71 * step_size, [1, 2, 4]),
        (lambda step_size: -0.69 * step_size, [1]),
        (lambda step_size: -step_size if step_size < 0.15 else 0.0, [1, 2]),
        (lambda step_size: -step_size if step_size < 0.3 else -0.69 * step_size, [1, 2, 4]),
        (lambda step_size: -step_size if step_size < 0.15 else math.nan, [1, 2]),
    ],
)
def test_a_search_doubles_what_is_far_too_small_as_long_as_the_prediction_holds(loss, multiples):
    searching = initialized(growth_factor=1.0)
    start = searching.state.step_size
    probe, probed = recorder(loss)
    taken = searching.search(0.0, 1.0, probe, path_slope=1.0)
    assert probed == pytest.approx([start * multiple for multiple in multiples])
    holds = [-loss(step_size) > 0.7 * step_size for step_size in probed]
    assert taken == (max(step_size for step_size, held in zip(probed, holds) if held) if any(holds) else start)
    state = searching.state
    assert (state.step_size, state.probes, state.smallest_probe, state.accepted) == (taken, len(probed), start, True)
    assert (state.actual_reduction, state.predicted_reduction) == (-loss(taken), taken)
    assert state.nonfinite_probes == sum(math.isnan(loss(step_size)) for step_size in probed)


def test_a_search_doubles_nothing_uphill():
    searching = initialized()
    probe, probed = recorder(lambda step_size: 0.6 * step_size)
    searching.search(0.0, -1.0, probe, path_slope=1.0)
    assert len(probed) == 1


def test_a_growth_that_lacks_a_method_is_refused_by_the_name_of_it():
    class Half(type(PathGrowth())):
        largest_doubled = property()

    with pytest.raises(TypeError, match="got one without largest_doubled"):
        dataclasses.replace(line_search_of("path"), growth=Half())


def test_a_search_doubles_nothing_where_the_path_slope_is_not_clearly_positive():
    searching = initialized()
    probe, probed = recorder(lambda step_size: -step_size)
    searching.search(0.0, 1.0, probe, path_slope=-1.0)
    assert len(probed) == 1


def test_before_the_first_search_has_found_a_step_size_it_does_not_follow():
    searching = Searching("path", growth_factor=1.2)
    searching.search(0.0, 0.0, quadratic(1.0, 1.0), path_slope=1.0)
    assert searching.state.step_size == 0.1


def test_once_the_schedule_is_below_half_of_its_peak_nothing_is_followed_or_searched_or_logged():
    searching = initialized()
    searching.search(0.0, 1.0, quadratic(1.0, 1.0), path_slope=1.0, lr_fraction=0.5)
    before = searching.state
    assert set(searching.line_search.metrics(before)) == {"slope", "decrease", "armijo_ratio", "path_slope"}
    for _ in range(25):
        assert searching.skip(path_slope=1.0, lr_fraction=0.499) == before.step_size
        assert searching.state.is_annealing
        assert searching.line_search.metrics(searching.state) == {}
    assert searching.state.growth == before.growth
    searching.search(0.0, 1.0, quadratic(1.0, 1.0), lr_fraction=0.7)  # a restart
    assert not searching.state.is_annealing


def test_the_first_search_does_not_wait_for_the_schedule():
    searching = Searching("path")
    assert searching.search(0.0, 1.0, quadratic(1.0, 1.0), path_slope=1.0, lr_fraction=0.1) > 0
    assert searching.state.growth == PathGrowth().init(0.1)


def test_constant_growth_searches_whatever_the_schedule():
    searching = Searching(growth_factor=1.5)
    for k in range(3):
        searching.search(0.0, 1.0, lambda step_size: -step_size, lr_fraction=1e-6)
        assert searching.state.taken == pytest.approx(0.1 * 1.5**k)
        assert searching.line_search.metrics(searching.state)["slope"] == 1.0


@pytest.mark.parametrize(("lr_fraction", "expected"), [(1.0, True), (0.5, True), (0.499, False), (0.0, False)])
def test_the_path_slope_is_needed_while_it_is_followed(lr_fraction, expected):
    assert LINE_SEARCHES["path"].needs_path_slope(lr_fraction) == expected
    assert not LINE_SEARCHES["constant"].needs_path_slope(lr_fraction)


@pytest.mark.parametrize("growth", GROWTHS)
def test_the_numbers_of_the_last_search_are_logged(growth):
    searching = Searching(growth, beta3=0.0)
    searching.state = dataclasses.replace(searching.state, is_initialized=True)
    searching.search(0.0, 2.0, quadratic(2.0, 5.0), path_slope=3.0)
    step_size = searching.state.taken
    expected = {"slope": 2.0, "decrease": 2 * step_size - 2.5 * step_size**2, "armijo_ratio": 1 - 1.25 * step_size}
    expected |= {"path_slope": 1.0} if growth == "path" else {}
    assert searching.line_search.metrics(searching.state) == pytest.approx(expected)
