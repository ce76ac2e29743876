import dataclasses
import math

import pytest

from hf_alsals.path_growth import PathAverages, PathGrowth, PathSlope, TensorState


def follow(growth, path_slopes, step_size=0.1, has_backtracked=False):
    """Return the state and the step size after each of some path slopes."""
    state, history = dataclasses.replace(growth.init(step_size), has_backtracked=has_backtracked), []
    for path_slope in path_slopes:
        state, step_size = growth.follow(state, step_size, path_slope)
        history.append((state, step_size))
    return history


def test_the_step_size_follows_the_average_of_the_path_slopes_over_that_of_their_sizes():
    path_slopes = [3.0, 1.0, -2.0, 5.0, -0.5]
    expected = 0.1
    for k, (state, step_size) in enumerate(follow(PathGrowth(growth_factor=1.2), path_slopes), start=1):
        weights = [0.9 ** (k - 1 - i) for i in range(k)]
        average = sum(w * s for w, s in zip(weights, path_slopes[:k], strict=True))
        size = sum(w * abs(s) for w, s in zip(weights, path_slopes[:k], strict=True))
        faster = 2 if average / size > 0.9 else 1  # as in the first steps of all
        expected *= 1.2 ** (faster * (average / size + 0.3))
        assert state.path_slope == pytest.approx(average / size)
        assert step_size == pytest.approx(expected)


def test_small_path_slopes_let_it_grow_less_and_shrink_as_ever():
    path_slopes = [-7.0] * 50 + [0.02] * 100 + [-0.02] * 50
    average = size = 0.0
    expected, log_size, sizes, since = 0.1, math.log(7.0), [], -1
    for path_slope, (state, step_size) in zip(path_slopes, follow(PathGrowth(growth_factor=1.2), path_slopes)):
        average, size = 0.9 * average + 0.1 * path_slope, 0.9 * size + 0.1 * abs(path_slope)
        log_size = 0.9 * log_size + 0.1 * math.log(abs(path_slope))
        sizes.append(math.exp(log_size))
        exponent = average / size + 0.3
        if exponent > 0:
            exponent *= min(1, sizes[-1] / (0.1 * max(sizes)))
        if len(sizes) > 40:  # it has overshot as soon as that can be told
            since += since < 0 or average < -0.3 * size
        expected *= 1.2 ** (exponent * 40 / (40 + max(since, 0)))
        assert step_size == pytest.approx(expected)
        assert state.path_size == pytest.approx(sizes[-1] / max(sizes))
    assert state.path_size == pytest.approx(0.02 / 7, rel=1e-3)


@pytest.mark.parametrize("sign", [-1, 1])
def test_one_bad_batch_does_not_hold_it(sign):
    path_slopes = [1.0 + 0.5 * math.sin(k) for k in range(350)]
    calm = follow(PathGrowth(), path_slopes, has_backtracked=True)
    path_slopes[50] = sign * 1e5
    disturbed = follow(PathGrowth(), path_slopes, has_backtracked=True)
    grown = [history[349][1] / history[300][1] for history in (disturbed, calm)]
    assert grown[1] == pytest.approx(1.03 ** (49 * 1.3))
    n = disturbed[-1][0].shrinking_steps  # a bad batch may look like an overshoot
    assert (n > 0) == (sign < 0)
    assert grown[0] == pytest.approx(1.03 ** (40 / (40 + max(n, 0)) * 49 * 1.3), rel=1e-3)


def test_steps_that_are_always_too_short_grow_and_those_that_are_too_long_shrink():
    assert follow(PathGrowth(), [1.0] * 10, has_backtracked=True)[-1][1] == pytest.approx(0.1 * 1.03**13)
    # By ever less from step 41 on, where an overshoot can be told.
    exponent = 40 + sum(40 / (40 + n) for n in range(5))
    assert follow(PathGrowth(), [-1.0] * 45)[-1][1] == pytest.approx(0.1 * 1.03 ** (-0.7 * exponent))


def test_an_overshoot_is_one_of_both_averages():
    growth = PathGrowth()
    state = growth.init(0.1)
    for slope, settled in [(1.0, -1.0)] * 20 + [(-0.29, -0.29), (0.29, 0.29)] + [(-1.0, 1.0)] * 30:
        state, _ = growth.follow(state, 0.1, PathSlope(slope, settled))
        assert state.shrinking_steps == -1
    steps = 0
    while state.settled_path_slope >= -0.3:
        assert state.shrinking_steps == -1
        state, _ = growth.follow(state, 0.1, PathSlope(-1.0, -1.0))
        steps += 1
    assert state.shrinking_steps == 0
    assert steps > 3
    n = 0
    for slope, settled in [(-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0)] * 3 + [(0.5, 0.5)] * 9 + [(-1.0, -1.0)] * 9:
        state, _ = growth.follow(state, 0.1, PathSlope(slope, settled))
        n += state.path_slope + state.settled_path_slope < -0.6
        assert state.shrinking_steps == n


def test_the_settled_path_slope_is_what_it_follows_at_first():
    growth = PathGrowth()
    state, step_size = growth.follow(growth.init(0.1), 0.1, PathSlope(-1.0, 2.0))
    assert step_size == pytest.approx(0.1 * 1.03**1.3)
    assert (state.path_slope, state.settled_path_slope) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("steps", "p", "q", "faster"),
    [(41, -0.2, 0.76, 2), (41, -0.2, 0.74, 1), (40, 0.91, 0.8, 2), (40, 0.89, 0.8, 1), (41, -1.0, -1.0, 1)],
)
def test_what_is_far_too_small_grows_twice_as_fast_until_a_search_has_backtracked(steps, p, q, faster):
    growth = PathGrowth()
    averages = {"mean_slope": p, "mean_size": 1.0, "settled_slope": q, "settled_size": 1.0}
    state = dataclasses.replace(growth.init(0.1), steps=steps - 1, **averages)
    state, step_size = growth.follow(state, 0.1, 0.0)  # which leaves p and q where they are
    assert step_size == pytest.approx(0.1 * growth.growth_factor ** (faster * (state.r + 0.3)))
    for stopped in ({"has_backtracked": True}, {"shrinking_steps": 1}):
        _, step_size = growth.follow(before := dataclasses.replace(state, **stopped), 0.1, 0.0)
        assert step_size == pytest.approx(0.1 * math.exp(growth.gain(before) * (before.r + 0.3)), rel=1e-3)


@pytest.mark.parametrize("asked", [-0.7, -0.2, 0.4])
def test_what_the_schedule_takes_off_counts_where_it_shrinks(asked):
    growth = PathGrowth()
    slope = asked - 0.3  # over a mean size of 1
    state = dataclasses.replace(
        growth.init(0.1),
        steps=90,
        mean_slope=slope,
        settled_slope=slope,
        mean_size=1.0,
        settled_size=1.0,
        has_backtracked=True,
        shrinking_steps=0,
    )
    step_size, lr_fraction = 0.1, 1.0
    for fraction in (1.0, 0.99, 0.985, 1.0, 0.5):
        averaged = state.averaged(PathSlope(slope, slope))
        log_growth = growth.gain(averaged) * (averaged.r + 0.3)
        if log_growth < 0:
            log_growth = min(log_growth + max(math.log(lr_fraction / fraction), 0.0), 0.0)
        expected = step_size * math.exp(log_growth)
        state, step_size = growth.follow(state, step_size, PathSlope(slope, slope), lr_fraction=fraction)
        assert step_size == pytest.approx(expected)
        lr_fraction = fraction
    assert (step_size < 0.1) == (asked < 0)


@pytest.mark.parametrize(
    ("p", "q", "r"),
    [
        (0.9, 0.2, 0.2),
        (-0.9, 1.0, 1.0),
        (-0.9, 0.95, 0.77),
        (-0.9, 0.75, -0.15),
        (-0.2, 0.5, 0.3),
        (-0.2, -0.1, -0.3),
        (-0.9, -0.2, -1.0),
    ],
)
def test_a_negative_path_slope_counts_before_the_overshoot_unless_the_settled_one_is_clear(p, q, r):
    averages = PathAverages(mean_slope=2 * p, mean_size=2.0, settled_slope=3 * q, settled_size=3.0, steps=41)
    assert averages.r == pytest.approx(r)
    assert dataclasses.replace(averages, steps=40).r == pytest.approx(q)
    assert dataclasses.replace(averages, shrinking_steps=0).r == pytest.approx((p + q) / 2)


@pytest.mark.parametrize(
    ("before", "after"), [(0.022, 0.0225), (0.0225, 0.0225), (0.5, 0.5), (0.01, 0.01 * 1.03**2.6)]
)
def test_it_grows_to_a_share_of_the_first_weights_at_most(before, after):
    growth = PathGrowth()
    state, step_size = growth.follow(growth.init(before), before, PathSlope(1.0, 1.0, weight_scale=0.05))
    assert step_size == pytest.approx(after)
    assert growth.follow(state, step_size, -100.0)[1] < step_size
    assert growth.follow(state, step_size, 1.0)[1] <= max(before, 0.0225) + 1e-12  # the scale is kept


@pytest.mark.parametrize(("is_searched", "largest"), [(True, 0.45 * 0.05), (False, 0.01)])
def test_in_the_end_the_largest_step_size_falls_as_one_over_the_root_of_the_steps(is_searched, largest):
    growth = PathGrowth()
    state = dataclasses.replace(growth.init(0.0), steps=1599, weight_scale=0.05, has_gone_back=True)

    def after(before):
        return growth.follow(state, before, 1.0, is_searched)[1]

    bound = largest * math.sqrt(400 / 1600)
    assert after(0.99 * bound) == pytest.approx(bound)
    assert after(0.5) == pytest.approx(0.5 * math.sqrt(1599 / 1600))  # what is above it is not cut
    assert after(0.1 * bound) > 0.1 * bound * 1.03


@pytest.mark.parametrize(("path_slope", "largest"), [(1.0, 0.0225), (-1.0, 0.0)])
def test_a_search_may_double_what_is_far_too_small_until_one_has_backtracked(path_slope, largest):
    growth = PathGrowth()
    state, _ = growth.follow(growth.init(0.001), 0.001, PathSlope(1.0, path_slope, weight_scale=0.05))
    assert growth.largest_doubled(state) == pytest.approx(largest)
    search = {"slope": 1.0, "decrease_factor": 0.9, "start": 0.001}
    for step_size in (0.001, 0.002):
        state = growth.searched(state, **search, step_size=step_size, accepted=True)
    assert growth.largest_doubled(state) == pytest.approx(largest)
    for rejected in ({"step_size": 0.0009, "accepted": True}, {"step_size": 0.001, "accepted": False}):
        assert growth.largest_doubled(growth.searched(state, **search, **rejected)) == 0.0


@pytest.mark.parametrize("steps", [1, 40, 41])
@pytest.mark.parametrize("mean_slope", [-0.9, 0.89, 0.91])
def test_in_the_first_steps_a_search_doubles_only_where_the_path_slope_itself_is_clear(steps, mean_slope):
    growth = PathGrowth()
    state, _ = growth.follow(growth.init(0.001), 0.001, PathSlope(1.0, 1.0, weight_scale=0.05))
    state = dataclasses.replace(state, mean_slope=mean_slope, mean_size=1.0, steps=steps)
    assert (growth.largest_doubled(state) > 0) == (steps > 40 or mean_slope > 0.9)


def test_a_search_doubles_nothing_after_an_overshoot():
    growth = PathGrowth()
    state = dataclasses.replace(overshot(growth), mean_slope=1.0, mean_size=1.0, settled_slope=1.0, settled_size=1.0)
    assert growth.largest_doubled(dataclasses.replace(state, shrinking_steps=-1)) > 0
    assert growth.largest_doubled(state) == 0.0


# ---- a tensor of its own ----


def overshot(growth):
    state = growth.init(0.1)
    for _ in range(42):
        state, _ = growth.follow(state, 0.1, PathSlope(-1.0, -1.0))
    return state


def test_before_the_common_step_size_has_overshot_tensors_share_it():
    growth = PathGrowth()
    common, _ = growth.follow(growth.init(0.1), 0.1, 1.0)
    tensor = TensorState()
    for _ in range(10):
        tensor = growth.follow_tensor(tensor, PathSlope(-1.0, -1.0), common, is_hidden=False)
    assert (tensor.log_multiplier, tensor.multiplier, tensor.shrinking_steps) == (0.0, 1.0, -1)
    assert tensor.path_slope == -1.0


def test_a_tensor_follows_its_own_path_slopes_from_then_on():
    growth = PathGrowth()
    common, tensor, log = overshot(growth), TensorState(), 0.0
    for k in range(45):
        path_slope = 1.0 if k < 30 else -1.0
        tensor = growth.follow_tensor(tensor, PathSlope(path_slope, path_slope), common, is_hidden=False)
        gain = 40 / (40 + max(tensor.shrinking_steps, 0))
        r = (tensor.settled_path_slope + tensor.path_slope) / 2
        lead = math.log(1.03) * gain * (r + 0.3) - growth.log_growth(common, common)
        log += max(lead - math.log(1.03) * gain * 0.3, 0.0) if lead > 0 else lead
        assert tensor.log_multiplier == pytest.approx(log)
        assert abs(math.log(tensor.multiplier) - log) <= math.log(2) / 8 + 1e-12
        assert 4 * math.log2(tensor.multiplier) == pytest.approx(round(4 * math.log2(tensor.multiplier)))
    assert tensor.shrinking_steps > 0


@pytest.mark.parametrize("before", [-0.6, -0.3, -0.25, -0.2, 0.0, 0.05, 0.2, 0.5])
def test_a_multiplier_grows_only_by_what_its_tensors_lead_exceeds(before):
    growth = PathGrowth()
    sizes = {"mean_size": 1.0, "settled_size": 1.0}
    common = overshot(growth)
    common = dataclasses.replace(common, mean_slope=-0.2, settled_slope=-0.2, shrinking_steps=20, **sizes)
    tensor = TensorState(mean_slope=before, settled_slope=before, log_multiplier=0.5, shrinking_steps=20, **sizes)
    tensor = growth.follow_tensor(tensor, PathSlope(before, before), common, is_hidden=True)
    gain = 40 / (40 + tensor.shrinking_steps)
    lead = gain * (tensor.path_slope + 0.3) - 40 / 60 * 0.1  # over the growth of all hidden matrices
    lead = lead if lead < 0 else max(lead - 0.3 * gain, 0.0)
    assert tensor.log_multiplier == pytest.approx(0.5 + math.log(1.03) * lead)
    assert (tensor.log_multiplier > 0.5) == (before > 0.1)


def test_nothing_leads_where_a_bound_holds_the_common_step_size():
    growth = PathGrowth()
    common = dataclasses.replace(overshot(growth), weight_scale=0.1)
    averages = {field.name: getattr(common, field.name) for field in dataclasses.fields(PathAverages)}
    tensor, step_size = TensorState(**averages), 0.045
    for _ in range(100):
        common, step_size = growth.follow(common, step_size, 1.0)
        tensor = growth.follow_tensor(tensor, PathSlope(1.0, 1.0), common, is_hidden=True)
    assert (step_size, tensor.multiplier) == (pytest.approx(0.045), 1.0)


@pytest.mark.parametrize(("is_hidden", "largest"), [(True, 4.0), (False, 32.0)])
def test_a_multiplier_stays_within_its_bounds(is_hidden, largest):
    growth = PathGrowth()
    common, tensor = dataclasses.replace(overshot(growth), mean_slope=0.0, settled_slope=0.0), TensorState()
    for path_slope, bound in ((1.0, largest), (-1.0, 1.0)):
        for _ in range(4000):
            tensor = growth.follow_tensor(tensor, PathSlope(path_slope, path_slope), common, is_hidden=is_hidden)
        assert tensor.log_multiplier == pytest.approx(math.log(bound))


def test_of_a_tensor_without_path_slopes_nothing_is_known():
    growth = PathGrowth()
    common, tensor = overshot(growth), TensorState()
    for _ in range(50):
        tensor = growth.follow_tensor(tensor, PathSlope(0.0, 0.0), common, is_hidden=False)
    assert tensor.multiplier == 1.0


def test_a_largest_multiplier_bounds_it_too():
    growth = PathGrowth()
    common, tensor = overshot(growth), TensorState(log_multiplier=math.log(8))
    for largest, expected in ((2.0, 2.0), (0.5, 1.0)):
        bounded = growth.follow_tensor(tensor, PathSlope(1.0, 1.0), common, is_hidden=False, largest=largest)
        assert bounded.multiplier == expected


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
        after = growth.searched(state, **search, accepted=accepted)
        assert after == dataclasses.replace(state, has_backtracked=True)


def test_the_mean_path_slope_over_that_of_its_sizes_is_logged():
    growth = PathGrowth()
    assert growth.metrics(growth.init(0.1)) == {"path_slope": 0.0}
    assert growth.metrics(follow(growth, [3.0, -1.0])[-1][0]) == {"path_slope": pytest.approx(1.7 / 3.7)}
