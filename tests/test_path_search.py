import math

import pytest

from hf_alsals import PathSearch


def quadratic(a, b):
    """Return the loss at a step size, 0 at step size 0, with the slope `a` and the curvature `b`."""
    return lambda step_size: -a * step_size + 0.5 * b * step_size**2


def started(**arguments):
    """Return a search whose first search is over, at the step size 0.1."""
    search = PathSearch(search_interval=1, **arguments)
    search.search(0.0, 1.0, quadratic(1.0, 1.0))
    search.step_size = search.trial_step_size = 0.1
    return search


@pytest.mark.parametrize("initial_step_size", [1e-6, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("a", "b", "c"), [(2.0, 5.0, 0.3), (1e-3, 40.0, 0.5), (10.0, 3.0, 0.1)])
def test_the_first_search_finds_the_largest_sufficient_step_size_from_anywhere(initial_step_size, a, b, c):
    search = PathSearch(c=c, initial_step_size=initial_step_size)
    step_size = search.search(0.0, a, quadratic(a, b))
    largest = 2 * (1 - c) * a / b  # where the decrease is c times the prediction
    assert largest / 2**0.125 <= 10 * step_size <= largest * (1 + 1e-9)
    assert step_size == search.step_size
    assert search.probes <= 30


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_the_first_search_waits_for_a_slope(slope):
    search = PathSearch()
    assert search.search(0.0, slope, quadratic(1.0, 1.0)) == 0.0
    assert not search.started
    assert search.is_due()
    assert search.search(0.0, 1.0, quadratic(1.0, 1.0)) > 0


def test_the_first_search_gives_up_where_no_step_size_is_sufficient():
    search = PathSearch()
    assert search.search(0.0, 1.0, lambda step_size: 1.0) == 0.0
    assert search.probes == 30
    assert not search.started


@pytest.mark.parametrize("initial_step_size", [1e-6, 0.1, 10.0])
def test_the_first_search_ends_on_a_loss_that_falls_for_ever(initial_step_size):
    search = PathSearch(initial_step_size=initial_step_size)
    assert 0.5 < search.search(0.0, 1.0, lambda step_size: -step_size) <= 1.0  # a tenth of 10
    assert search.started


@pytest.mark.parametrize("initial_step_size", [1e-6, 1e-3, 0.1, 10.0])
def test_steps_too_small_to_show_in_the_loss_are_no_bound(initial_step_size):
    search = PathSearch(initial_step_size=initial_step_size)
    step_size = search.search(0.0, 1.0, lambda x: round(quadratic(1.0, 5.0)(x), 3))
    assert 0.28 / 2**0.125 <= 10 * step_size <= 0.28 * 1.01
    assert search.decrease == pytest.approx(-quadratic(1.0, 5.0)(10 * step_size), abs=1e-3)


def test_where_only_too_large_steps_show_in_the_loss_the_largest_that_does_not_is_taken():
    search = PathSearch()
    assert search.search(0.0, 1e-9, lambda step_size: 1.0 if step_size > 0.03 else 0.0) == pytest.approx(0.0025)
    assert search.started


@pytest.mark.parametrize("initial_step_size", [1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("phase", range(7))
def test_rounding_hides_no_step_size(initial_step_size, phase):
    search = PathSearch(initial_step_size=initial_step_size)

    def rounded(x):  # off by 1e-4 either way, and without a decrease below 1e-8
        noise = 1e-4 * math.sin(1e3 * phase + 40 * math.log(x)) if x > 1e-8 else 0.0
        return quadratic(1.0, 5.0)(x) + noise

    step_size = search.search(0.0, 1.0, rounded)
    assert 0.28 / 2**0.125 * 0.98 <= 10 * step_size <= 0.28 * 1.02


def test_a_loss_that_is_not_finite_is_not_sufficient():
    search = PathSearch(initial_step_size=1.0)
    step_size = search.search(0.0, 1.0, lambda step_size: -step_size if step_size < 0.01 else -math.inf)
    assert 0.01 / 2**0.125 <= 10 * step_size < 0.01


def test_the_step_size_follows_the_average_of_the_path_slopes_over_that_of_their_sizes():
    search = started(growth_factor=1.2)
    slopes = [3.0, 1.0, -2.0, 5.0, -0.5]
    expected = 0.1
    for k in range(1, len(slopes) + 1):
        weights = [0.9 ** (k - 1 - i) for i in range(k)]
        average = sum(w * s for w, s in zip(weights, slopes[:k], strict=True))
        size = sum(w * abs(s) for w, s in zip(weights, slopes[:k], strict=True))
        expected *= 1.2 ** (average / size + 0.3)
        search.follow(slopes[k - 1])
        assert search.path_slope == pytest.approx(average / size)
        assert search.step_size == pytest.approx(expected)


def test_small_path_slopes_let_it_grow_less_and_shrink_as_ever():
    search = started(growth_factor=1.2)
    slopes = [-7.0] * 50 + [0.02] * 100 + [-0.02] * 50
    average = size = 0.0
    expected, log_size, sizes = 0.1, math.log(7.0), []
    for slope in slopes:
        average, size = 0.9 * average + 0.1 * slope, 0.9 * size + 0.1 * abs(slope)
        log_size = 0.9 * log_size + 0.1 * math.log(abs(slope))
        sizes.append(math.exp(log_size))
        exponent = average / size + 0.3
        if exponent > 0:
            exponent *= min(1, sizes[-1] / (0.1 * max(sizes)))
        expected *= 1.2**exponent
        search.follow(slope)
        assert search.step_size == pytest.approx(expected)
        assert search.path_size == pytest.approx(sizes[-1] / max(sizes))
    assert search.path_size == pytest.approx(0.02 / 7, rel=1e-3)


@pytest.mark.parametrize("sign", [-1, 1])
def test_one_bad_batch_does_not_hold_it(sign):
    search, calm = started(), started()
    for k in range(350):
        slope = 1.0 + 0.5 * math.sin(k)
        calm.follow(slope)
        search.follow(sign * 1e5 if k == 50 else slope)
        if k == 300:
            before = search.step_size, calm.step_size
    assert search.step_size / before[0] == pytest.approx(calm.step_size / before[1], rel=1e-3) == 1.03 ** (49 * 1.3)


def test_steps_that_are_always_too_short_grow_and_those_that_are_too_long_shrink():
    longer, shorter = started(), started()
    for _ in range(10):
        longer.follow(1.0)
        shorter.follow(-1.0)
    assert longer.step_size == pytest.approx(0.1 * 1.03**13)
    assert shorter.step_size == pytest.approx(0.1 * 1.03**-7)


@pytest.mark.parametrize("path_slope", [math.nan, math.inf, -math.inf])
def test_a_path_slope_that_is_not_finite_is_left_out(path_slope):
    search = started()
    search.follow(path_slope)
    assert search.step_size == 0.1
    assert search.path_slope == 0.0


def test_no_path_is_no_reason_to_grow():
    search = started()
    search.follow(0.0)
    assert search.step_size == 0.1


def test_once_the_schedule_is_below_half_of_its_peak_nothing_is_searched():
    search = started()
    search.heed_schedule(0.5)
    assert search.is_due()
    for _ in range(25):
        search.heed_schedule(0.499)
        assert not search.is_due()
        assert search.skip() == 0.1
    search.heed_schedule(0.7)  # a restart
    assert search.is_due()


def test_what_has_not_started_is_due_whatever_the_schedule():
    search = PathSearch()
    search.heed_schedule(0.1)
    assert search.is_due()


def test_the_smoothed_decrease_has_to_be_c_times_the_smoothed_prediction():
    search = started(c=0.4, beta3=0.75)
    batches = []
    for a, b in [(2.0, 1.0), (1.0, 30.0), (3.0, 5.0), (2.0, 60.0), (2.0, 3.0), (1.0, 8.0)]:
        batches.append((a, b))
        step_size, probes = search.step_size, 1
        while True:  # the losses of all batches so far are parabolas, which are known at every step size
            weights = [0.25 * 0.75**age for age in reversed(range(len(batches)))]
            decrease = sum(-weight * quadratic(*batch)(step_size) for weight, batch in zip(weights, batches))
            prediction = sum(weight * step_size * batch[0] for weight, batch in zip(weights, batches))
            if decrease >= 0.4 * prediction:
                break
            step_size, probes = 0.9 * step_size, probes + 1
        assert search.search(0.0, a, quadratic(a, b)) == pytest.approx(step_size)
        assert search.probes == probes
        assert search.step_size == search.trial_step_size == pytest.approx(step_size)


def test_a_bad_batch_at_a_large_step_size_is_no_evidence_against_a_small_one():
    search = started(c=0.3, beta3=0.5)
    search.search(0.0, 1.0, quadratic(1.0, 500.0))
    assert search.step_size == pytest.approx(0.1 * 0.9**6) and not search.accepted  # by halving it at most
    for _ in range(20):
        search.search(0.0, 1.0, quadratic(1.0, 500.0))
    # Where the parabola itself has a sufficient decrease, and not below.
    assert 0.9 * 1.4 / 500 < search.step_size <= 1.4 / 500


def test_uphill_the_loss_may_rise_by_one_over_c_of_the_prediction():
    search = started(c=0.5, beta3=0.0)
    assert search.search(0.0, -1.0, lambda step_size: 1.9 * step_size) == 0.1
    assert search.search(0.0, -1.0, lambda step_size: 2.1 * step_size if step_size > 0.05 else 0.0) < 0.05


@pytest.mark.parametrize(("decrease_factor", "probes"), [(0.9, 7), (0.8, 4), (0.5, 2), (0.3, 2)])
def test_a_search_halves_the_step_size_at_most_and_searches_on_where_it_is_not_finite(decrease_factor, probes):
    search = started(decrease_factor=decrease_factor)
    search.search_interval = 3
    for k in (1, 2):
        assert search.search(0.0, 1.0, lambda step_size: math.nan) == 0.0
        assert search.probes == probes
        assert search.step_size == pytest.approx(0.1 * decrease_factor ** (k * (probes - 1)))
        assert search.is_due()
    assert search.search(0.0, 1.0, lambda step_size: -step_size) == search.step_size
    assert not search.is_due()


@pytest.mark.parametrize("slope", [math.nan, math.inf, -math.inf])
def test_a_slope_that_is_not_finite_is_left_out_of_the_averages(slope):
    search = started()
    search.search(0.0, 1.0, quadratic(1.0, 2.0))
    before = search.smoothed_slope, search.smoothed_curvature
    assert search.search(0.0, slope, quadratic(1.0, 2.0)) == 0.1  # by what is known of the batch before
    assert (search.smoothed_slope, search.smoothed_curvature) == before == pytest.approx((0.5, 0.5))


def test_a_bad_batch_is_not_searched_on():
    search = started(decrease_factor=0.5)
    search.search_interval = 3
    assert search.search(0.0, 1.0, lambda step_size: 1.0) == 0.0
    assert (search.step_size, search.accepted) == (0.05, False)
    for _ in range(2):
        assert not search.is_due() and search.skip() == 0.05
    assert search.is_due()


@pytest.mark.parametrize("probes_before", [0, 1, 4])
def test_a_probe_that_raises_leaves_the_search_as_it_was(probes_before):
    for search in (PathSearch(), started()):
        before = search.state_dict()
        left = [0.0] * probes_before

        def probe(step_size, left=left):
            if not left:
                raise RuntimeError("out of memory")
            return left.pop() + 1.0

        with pytest.raises(RuntimeError, match="out of memory"):
            search.search(0.0, 1.0, probe)
        assert search.state_dict() == before


@pytest.mark.parametrize("saved_after", [0, 1, 7])
def test_a_loaded_search_continues_identically(saved_after):
    def steps(search, numbers):
        history = []
        for k in numbers:
            search.heed_schedule(1.0 if k < 15 else 0.4)
            search.follow(math.cos(k) * (1e-3 if k > 2 else 1))
            if search.is_due():
                search.search(0.0, 1.0 + math.sin(k), quadratic(1.0 + math.sin(k), 3.0 + k))
            else:
                search.skip()
            history.append((search.step_size, search.probes))
        return history

    search, resumed = PathSearch(), PathSearch()
    steps(search, range(saved_after))
    resumed.load_state_dict(search.state_dict())
    assert steps(resumed, range(saved_after, 20)) == steps(search, range(saved_after, 20))
