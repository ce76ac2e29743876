import math

import pytest

from hf_alsals.line_search import ArmijoLineSearch


def accept(search, slope=1.0):
    """Run a search whose first probe is accepted."""
    return search.search(0.0, slope, lambda step_size: -1e9)


def reject(search, value):
    """Run a search whose every probe is `value`, starting from the loss 0."""
    return search.search(0.0, 1.0, lambda step_size: value)


def recorder(f):
    """Return `f` and the list of step sizes that it is going to be called with."""
    tried = []

    def probe(step_size):
        tried.append(step_size)
        return f(step_size)

    return probe, tried


# f(eta) = f0 - a eta + b eta^2 meets the Armijo condition exactly for eta <= a (1 - c) / b.
@pytest.mark.parametrize("f0", [-3.0, 0.0, 5.0])
@pytest.mark.parametrize("c", [0.15, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("decrease_factor", [0.5, 0.9])
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (2.0, 30.0), (0.3, 0.1), (7.0, 1.0)])
def test_accepts_the_first_trial_under_the_closed_form_bound_of_a_quadratic(f0, c, decrease_factor, a, b):
    search = ArmijoLineSearch(c=c, beta3=0.0, decrease_factor=decrease_factor, initial_step_size=2.0)
    bound = a * (1 - c) / b
    backtracks = max(0, math.ceil(math.log(bound / 2.0) / math.log(decrease_factor)))
    probe, tried = recorder(lambda step_size: f0 - a * step_size + b * step_size**2)

    step_size = search.search(f0, a, probe)

    assert step_size == pytest.approx(2.0 * decrease_factor**backtracks, rel=1e-12)
    assert tried == pytest.approx([2.0 * decrease_factor**k for k in range(backtracks + 1)], rel=1e-12)
    assert search.step_size == step_size
    assert search.probes == search.total_probes == backtracks + 1
    assert search.slope == a
    assert search.decrease == pytest.approx(a * step_size - b * step_size**2, rel=1e-9)


def test_accepts_a_decrease_that_equals_the_bound():
    search = ArmijoLineSearch(c=0.5, beta3=0.0, initial_step_size=0.25)
    assert search.search(1.0, 4.0, lambda step_size: 0.5) == 0.25


def test_rejects_a_decrease_just_under_the_bound():
    search = ArmijoLineSearch(c=0.5, beta3=0.0, initial_step_size=0.25, decrease_factor=0.5)
    assert search.search(1.0, 4.0, lambda step_size: 0.5 + 1e-12) == 0.125


def test_slope_and_decrease_are_smoothed_and_the_accepted_decrease_is_kept():
    search = ArmijoLineSearch(c=0.5, beta3=0.75, growth_factor=1.0, decrease_factor=0.5, initial_step_size=1.0)

    # s = 0.25 * 4 = 1; eta = 1: h = 0.25 * 1 = 0.25 < 0.5; eta = 0.5: h = 0.25 * 1.2 = 0.3 >= 0.25.
    assert search.search(2.0, 4.0, {1.0: 1.0, 0.5: 0.8}.__getitem__) == 0.5
    assert search.smoothed_slope == pytest.approx(1.0)
    assert search.smoothed_decrease == pytest.approx(0.3)
    assert (search.slope, search.decrease, search.probes) == (4.0, pytest.approx(1.2), 2)

    # s = 0.75 * 1 + 0.25 * 2 = 1.25; eta = 0.5: h = 0.75 * 0.3 + 0.25 * 0.4 = 0.325 >= 0.3125.
    assert search.search(1.0, 2.0, {0.5: 0.6}.__getitem__) == 0.5
    assert search.smoothed_slope == pytest.approx(1.25)
    assert search.smoothed_decrease == pytest.approx(0.325)

    # s = 0.9375 + 0.25 * 0.25 = 1; eta = 0.5: h = 0.24375 + 0.25 * 0 < 0.25; eta = 0.25: the same h >= 0.125.
    assert search.search(1.0, 0.25, {0.5: 1.0, 0.25: 1.0}.__getitem__) == 0.25
    assert search.smoothed_decrease == pytest.approx(0.24375)
    assert search.total_probes == 5


def test_trial_step_size_grows_after_each_acceptance():
    search = ArmijoLineSearch(beta3=0.0, growth_factor=1.25, initial_step_size=0.1)
    step_sizes = [accept(search) for _ in range(20)]
    assert step_sizes == pytest.approx([0.1 * 1.25**k for k in range(20)], rel=1e-12)


def test_growth_starts_from_the_step_size_accepted_after_backtracking():
    search = ArmijoLineSearch(beta3=0.0, growth_factor=1.5, decrease_factor=0.5, initial_step_size=1.0)
    assert search.search(0.0, 1.0, lambda step_size: -step_size if step_size < 0.3 else 1.0) == 0.25
    probe, tried = recorder(lambda step_size: -step_size)
    search.search(0.0, 1.0, probe)
    assert tried == [0.375]


# f(eta) = a eta + b eta^2 rises; with slope -a it may rise by at most eta a / c, so eta <= a (1 / c - 1) / b.
@pytest.mark.parametrize("c", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("b", [0.5, 5.0])
def test_uphill_the_loss_may_rise_by_one_over_c_of_the_prediction(c, b):
    search = ArmijoLineSearch(c=c, beta3=0.0, decrease_factor=0.9, initial_step_size=3.0)
    a = 2.0
    backtracks = max(0, math.ceil(math.log(a * (1 / c - 1) / b / 3.0) / math.log(0.9)))
    step_size = search.search(0.0, -a, lambda step_size: a * step_size + b * step_size**2)
    assert step_size == pytest.approx(3.0 * 0.9**backtracks, rel=1e-12)
    assert search.slope == -a
    assert search.smoothed_slope == -a


def test_the_sign_of_the_smoothed_slope_decides_not_that_of_the_slope():
    search = ArmijoLineSearch(c=0.5, beta3=0.5, growth_factor=1.0, decrease_factor=0.5, initial_step_size=1.0)
    search.search(0.0, 4.0, lambda step_size: -2.0)
    # s = 0.5 * 2 - 0.5 * 1 = 0.5 > 0: h = 0.5 * 1 - 0.5 * x >= 0.5 * 0.5 needs a rise x <= 0.5.
    assert search.search(0.0, -1.0, {1.0: 0.51, 0.5: 0.51}.__getitem__) == 0.5
    # s = 0.25 - 0.5 * 2.5 = -1 < 0: h = 0.5 * 0.245 - 0.5 * x >= 2 * 0.5 * -1 needs a rise x <= 2.245.
    assert search.search(0.0, -2.5, {0.5: 2.24}.__getitem__) == 0.5


@pytest.mark.parametrize(("losses", "expected"), [((1.0,), 1.0), ((0.9,), 1.0), ((1.1, 1.0), 0.5)])
def test_slope_zero_accepts_any_step_size_that_does_not_raise_the_loss(losses, expected):
    search = ArmijoLineSearch(beta3=0.0, decrease_factor=0.5, initial_step_size=1.0)
    probes = iter(losses)
    assert search.search(1.0, 0.0, lambda step_size: next(probes)) == expected
    assert next(probes, None) is None
    assert search.smoothed_slope == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("slope", [1.0, 0.0, -1.0])
def test_non_finite_probe_is_rejected(value, slope):
    search = ArmijoLineSearch(decrease_factor=0.5, initial_step_size=1.0)
    step_size = search.search(3.0, slope, lambda step_size: value if step_size > 0.2 else 2.0)
    assert step_size == 0.125
    assert search.probes == 4
    assert search.decrease == 1.0
    assert search.smoothed_decrease == pytest.approx(0.01)


@pytest.mark.parametrize(("loss_at", "taken"), [(lambda eta: -0.01 * eta, True), (lambda eta: 1.0, False)])
def test_after_too_many_rejections_the_smallest_step_size_is_taken_if_it_lowers_the_loss(loss_at, taken):
    search = ArmijoLineSearch(beta3=0.0, growth_factor=1.5, decrease_factor=0.9, initial_step_size=0.2)
    probe, tried = recorder(loss_at)
    step_size = search.search(0.0, 1.0, probe)
    assert len(tried) == search.probes == search.total_probes == ArmijoLineSearch.max_probes
    assert tried[-1] == min(tried) == pytest.approx(0.2 * 0.9**99, rel=1e-12)
    assert step_size == (tried[-1] if taken else 0.0)
    assert search.smoothed_decrease == search.decrease == -loss_at(tried[-1])


def test_a_search_ends_where_smaller_steps_no_longer_show_in_the_loss():
    search = ArmijoLineSearch(beta3=0.0, growth_factor=2.0, decrease_factor=0.5, initial_step_size=1.0)
    step_size = search.search(1.0, 1.0, lambda eta: 2.0 if eta > 0.2 else 1.0)
    assert (step_size, search.probes, search.trial_step_size) == (0.0625, 5, 0.125)


def test_a_slope_of_zero_is_no_reason_to_grow():
    search = ArmijoLineSearch(growth_factor=2.0)
    for _ in range(5):
        assert search.search(1.0, 0.0, lambda eta: 1.0) == 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_step_size_is_zero_when_every_probe_is_non_finite(value):
    search = ArmijoLineSearch(beta3=0.5, initial_step_size=0.2)
    search.search(0.0, 1.0, lambda step_size: -4.0)
    assert reject(search, value) == 0.0
    assert search.probes == ArmijoLineSearch.max_probes
    assert search.smoothed_decrease == 2.0


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_after_exhausted_probes_the_next_trial_is_one_decrease_below_the_last(value):
    search = ArmijoLineSearch(beta3=0.0, growth_factor=1.5, decrease_factor=0.9, initial_step_size=0.2)
    accept(search)
    reject(search, value)
    reject(search, value)
    assert accept(search) == pytest.approx(0.2 * 1.5 * 0.9**2, rel=1e-12)
    assert accept(search) == pytest.approx(0.2 * 1.5 * 0.9**2 * 1.5, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_unsearched_step_follows_a_search_that_found_nothing_finite(value):
    search = ArmijoLineSearch(growth_factor=1.5, search_interval=2)
    accept(search)
    search.skip()
    assert search.search(0.0, 1.0, lambda step_size: value) == 0.0
    assert search.is_due()


def test_a_probe_accepted_as_the_last_allowed_one_counts_as_accepted():
    search = ArmijoLineSearch(beta3=0.0, growth_factor=2.0, decrease_factor=0.9, initial_step_size=1.0)
    last = 0.9 ** (ArmijoLineSearch.max_probes - 1)
    step_size = search.search(0.0, 1.0, lambda step_size: -step_size if step_size < last * 1.01 else 1.0)
    assert step_size == pytest.approx(last, rel=1e-12)
    assert accept(search) == pytest.approx(2 * last, rel=1e-12)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_probe", [1, 2, 3])
def test_raising_probe_leaves_the_search_untouched(error, failing_probe):
    search = ArmijoLineSearch(growth_factor=1.5, search_interval="adaptive")
    accept(search)
    before, attributes = search.state_dict(), dict(vars(search))
    calls = 0

    def probe(step_size):
        nonlocal calls
        calls += 1
        if calls == failing_probe:
            raise error
        return math.inf

    with pytest.raises(error):
        search.search(1.0, 5.0, probe)
    assert calls == failing_probe
    assert search.state_dict() == before
    assert vars(search) == attributes


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_integer_interval_searches_every_that_many_steps(interval):
    search = ArmijoLineSearch(beta3=0.0, growth_factor=1.5, search_interval=interval)
    due, step_sizes = [], []
    for _ in range(21):
        due.append(search.is_due())
        step_sizes.append(accept(search) if search.is_due() else search.skip())
        assert search.searched == due[-1]
        assert search.probes == (1 if due[-1] else 0)
    assert due == [k % interval == 0 for k in range(21)]
    assert step_sizes == pytest.approx([0.1 * 1.5 ** (k // interval) for k in range(21)], rel=1e-12)
    assert search.total_probes == sum(due)


@pytest.mark.parametrize("growth_factor", [1.0, 1.02, 1.1])
def test_adaptive_interval_follows_the_two_moving_averages(growth_factor):
    search = ArmijoLineSearch(
        beta3=0.0, growth_factor=growth_factor, decrease_factor=0.5, initial_step_size=1.0, search_interval="adaptive"
    )
    fast, slow, intervals = 0.0, 0.0, []
    for k in range(800):
        # Steady acceptance with a crash of the step size now and then.
        ceiling = 1e-2 if k % 150 == 149 else 1e9
        step_size = search.search(
            0.0, 1.0, lambda step_size, ceiling=ceiling: -step_size if step_size < ceiling else 1.0
        )
        fast = 0.9 * fast + 0.1 * step_size
        slow = 0.99 * slow + 0.01 * step_size
        r = max(fast / slow, slow / fast)
        expected = math.ceil(max(1.0, min(10.0, 1 / (r - 1) if r > 1 else math.inf)))

        interval = 1
        while not search.is_due():
            assert search.skip() == step_size
            interval += 1
        assert interval == expected
        intervals.append(interval)
    assert min(intervals) == 1
    assert max(intervals) > 1


def test_adaptive_interval_reaches_ten_steps_when_the_step_size_stands_still():
    search = ArmijoLineSearch(beta3=0.0, growth_factor=1.0, search_interval="adaptive")
    for _ in range(2000):
        accept(search) if search.is_due() else search.skip()
    searched = []
    for _ in range(100):
        searched.append(search.is_due())
        accept(search) if search.is_due() else search.skip()
    assert sum(searched) == 10
    assert searched[:10] * 10 == searched


def test_before_the_first_search_the_initial_step_size_is_reported():
    search = ArmijoLineSearch(initial_step_size=0.03)
    assert search.step_size == 0.03
    assert search.is_due()
    assert (search.slope, search.decrease, search.probes, search.searched, search.total_probes) == (0, 0, 0, False, 0)


def zigzag(search, k):
    """Take step k on a loss whose curvature depends on k."""
    if not search.is_due():
        return search.skip(), 0
    curvature = 1 + 20 * math.sin(k) ** 2
    step_size = search.search(1.0, 1.0, lambda step_size: 1 - step_size + curvature * step_size**2)
    return step_size, search.probes


@pytest.mark.parametrize("search_interval", [1, 4, "adaptive"])
@pytest.mark.parametrize("saved_after", [0, 1, 30, 61, 127])
def test_loaded_search_continues_identically(search_interval, saved_after):
    arguments = {"beta3": 0.5, "growth_factor": 1.3, "initial_step_size": 2.0, "search_interval": search_interval}
    search, resumed = ArmijoLineSearch(**arguments), ArmijoLineSearch(**arguments)
    for k in range(saved_after):
        zigzag(search, k)
    resumed.load_state_dict(search.state_dict())

    expected = [zigzag(search, k) for k in range(saved_after, saved_after + 60)]
    assert [zigzag(resumed, k) for k in range(saved_after, saved_after + 60)] == expected
    assert resumed.state_dict() == search.state_dict()
    assert any(probes > 1 for _, probes in expected)


def test_loading_ignores_keys_of_others():
    search, resumed = ArmijoLineSearch(), ArmijoLineSearch()
    accept(search)
    resumed.load_state_dict(search.state_dict() | {"lr": 1.0, "params": [0]})
    assert resumed.state_dict() == search.state_dict()
    assert not hasattr(resumed, "lr")


@pytest.mark.parametrize("missing", sorted(ArmijoLineSearch().state_dict()))
def test_loading_an_incomplete_state_raises(missing):
    state_dict = ArmijoLineSearch().state_dict()
    del state_dict[missing]
    with pytest.raises(KeyError, match=missing):
        ArmijoLineSearch().load_state_dict(state_dict)


OPEN_UNIT = r"a number in \(0, 1\)"


@pytest.mark.parametrize(
    ("name", "value", "error", "right"),
    [
        *(("c", value, ValueError, OPEN_UNIT) for value in (0, 1, -0.1, 1.5, math.nan, math.inf)),
        *(("beta3", value, ValueError, r"a number in \[0, 1\)") for value in (-0.01, 1, 1.5, math.nan)),
        *(("growth_factor", value, ValueError, "at least 1") for value in (0.99, 0, -1, math.inf, math.nan)),
        *(("decrease_factor", value, ValueError, OPEN_UNIT) for value in (0, 1, -0.5, 1.1, math.nan)),
        *(("initial_step_size", value, ValueError, "positive finite") for value in (0, -1, math.inf, math.nan)),
        *(("search_interval", value, ValueError, 'at least 1 or "adaptive"') for value in (0, -3, "often")),
        *(("c", value, TypeError, OPEN_UNIT) for value in ("0.3", None, True)),
        *(("beta3", value, TypeError, r"a number in \[0, 1\)") for value in ("0.9", None, False)),
        *(("growth_factor", value, TypeError, "at least 1") for value in ("1.01", None, True)),
        *(("decrease_factor", value, TypeError, OPEN_UNIT) for value in ("0.9", None, True)),
        *(("initial_step_size", value, TypeError, "positive finite") for value in ("0.1", None, True)),
        *(("search_interval", value, TypeError, 'an int or "adaptive"') for value in (2.0, True, None, [3])),
    ],
)
def test_wrong_argument_is_named_with_its_value_and_what_would_be_right(name, value, error, right):
    with pytest.raises(error, match=f"^{name} must be .*{right}") as raised:
        ArmijoLineSearch(**{name: value})
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
def test_argument_at_the_edge_of_its_range_is_taken(name, value):
    search = ArmijoLineSearch(**{name: value})
    assert getattr(search, name) == value
    assert accept(search) == (value if name == "initial_step_size" else 0.1)
