import pytest
import torch
from small_problems import ConstantALSALS, assert_identical, parameter_group, single
from torch import nn

from hf_alsals import ALSALS
from hf_alsals.adam import AdamDirection
from hf_alsals.path_slope import MAX_DISTANCE, SAMPLE_SIZE, WHOLE_SIZE, path_slopes, weight_scale
from hf_alsals.shards import to_floats


def path_slope(params, state):
    slopes = path_slopes(AdamDirection([parameter_group(params)], state)).path
    return torch.tensor(sum(to_floats(slopes)), dtype=torch.float64)


def rounded(tensor):
    return tensor.detach().bfloat16().double()


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_inner_product_of_the_gradients_and_the_way_back(dtype):
    shapes = [(1100, 500), (3,), (), (0,)]  # the first of two pieces
    params = [nn.Parameter(randn(*shape, seed=k).to(dtype)) for k, shape in enumerate(shapes)]
    params.append(nn.Parameter(randn(6, 700, seed=9).to(dtype).t()))  # cannot be cut
    state = {p: {} for p in params}
    for p in params:
        p.grad = randn(*p.shape, seed=p.numel()).to(dtype)
    first = [rounded(p) for p in params]
    path_slope(params, state)

    with torch.no_grad():
        for p in params:
            p += 0.3 * p.grad
    expected = sum((p.grad.double() * (start - rounded(p))).sum().item() for p, start in zip(params, first))
    assert path_slope(params, state).item() == pytest.approx(expected, rel=1e-4)
    # Downhill from the first weights it is the way times the gradient, but for rounding.
    assert expected == pytest.approx(-0.3 * sum(p.grad.double().square().sum().item() for p in params), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_first_weights_are_kept_in_bfloat16_and_rounding_is_no_way(dtype):
    w = nn.Parameter(randn(1000, seed=0).to(dtype))
    w.grad = randn(1000, seed=1).to(dtype)
    before = w.detach().clone()
    state = {w: {}}
    for _ in range(2):
        assert path_slope([w], state).item() == 0.0
    assert set(state[w]) == {"initial"}
    assert_identical(state[w]["initial"], before.bfloat16())
    with torch.no_grad():
        w.zero_()
    assert_identical(state[w]["initial"], before.bfloat16())  # a copy, also of weights in bfloat16


def test_a_parameter_without_first_weights_has_moved_nowhere():
    early, late = single([1.0, 2.0]), single([3.0])
    state = {early: {}, late: {}}
    early.grad, late.grad = torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    path_slope([early], state)
    with torch.no_grad():
        early -= 0.5
        late -= 0.25
    assert path_slope([early, late], state).item() == 1.0
    with torch.no_grad():
        late -= 0.25
    assert path_slope([early, late], state).item() == 1.25


def test_the_slope_that_the_optimizer_follows_is_that_of_the_unclipped_gradient():
    w = single([1.0, -2.0])
    optimizer = ALSALS([w], initial_step_size=0.5, growth_factor=2.0)
    for _ in range(2):
        here = rounded(w)
        loss = (w**2).sum()
        (gradient,) = torch.autograd.grad(loss, w)
        w.grad = 0.25 * gradient
        optimizer.set_clip_coef(0.25)
        optimizer.step(lambda: (w**2).sum(), loss)
    slope = (gradient @ (torch.tensor([1.0, -2.0], dtype=torch.float64) - here)).item()
    assert slope > 0
    assert optimizer.search.growth.mean_slope == pytest.approx(0.1 * slope)


def test_a_growth_that_does_not_follow_it_keeps_no_first_weights():
    for make, names in ((ALSALS, {"initial"}), (ConstantALSALS, set())):
        w = single([1.0, -2.0])
        w.grad = torch.ones_like(w)
        optimizer = make([w])
        optimizer.step(lambda w=w: w.sum())
        assert set(optimizer.state[w]) - {"step", "exp_avg", "exp_avg_sq"} == names


# ---- along the last direction ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [[(1100, 500), (3,), (), (0,)], [(3072, 2048), (768,)]], ids=["whole", "sampled"])
def test_the_slope_along_the_last_direction_is_that_of_each_parameter(shapes, dtype):
    params = [nn.Parameter(randn(*shape, seed=k).to(dtype)) for k, shape in enumerate(shapes)]
    state = {p: {} for p in params}
    groups = [parameter_group(params[:1], betas=(0.8, 0.99)), parameter_group(params[1:])]
    last = []
    for k in range(3):
        for number, p in enumerate(params):
            p.grad = (p.detach() + 0.1 * randn(*p.shape, seed=10 * k + number)).to(dtype)
        direction = AdamDirection(groups, state)
        direction.multipliers = {params[0]: 2.0}
        slopes = to_floats(path_slopes(direction).last)
        expected = [(p.grad.double() * d).sum().item() for p, d in zip(params, last)] if last else [0.0] * len(params)
        size = max(p.numel() for p in params)
        assert slopes == pytest.approx(expected, rel=0.02 if size > SAMPLE_SIZE else 1e-4)
        direction.update()
        last = []
        for p, multiplier, (beta1, beta2) in zip(params, (2.0, 1.0, 1.0, 1.0), [(0.8, 0.99)] + [(0.9, 0.999)] * 3):
            m, v = (state[p][name].double() for name in ("exp_avg", "exp_avg_sq"))
            step = k + 1
            last.append(multiplier * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8))


def test_the_scale_of_the_first_weights_is_the_geometric_mean_of_their_root_mean_squares():
    params = [nn.Parameter(0.02 * randn(3000, 2000, seed=0).float()), nn.Parameter(randn(64, 64, seed=1).float())]
    params += [nn.Parameter(torch.zeros(3000, 8)), nn.Parameter(5 * randn(1000, 3000, seed=2).float())]
    state = {p: {} for p in params}
    for p in params:
        p.grad = torch.ones_like(p)
    path_slope(params, state)
    counted = [p.detach() for p in params if p.any()]  # zeros do not count
    of_elements = [p.square().mean().sqrt().expand(p.numel()) for p in counted]
    expected = torch.cat(of_elements).double().log().mean().exp()
    assert state[params[0]]["initial"].shape != params[0].shape
    assert weight_scale(params, state).item() == pytest.approx(expected.item(), rel=0.01)
    assert weight_scale(params[2:3], state).item() == 0.0


# ---- of a sample ----


def large_parameters(*shapes, dtype=torch.float32):
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    state = {p: {} for p in params}
    for p in params:
        p.grad = torch.ones_like(p)
    assert path_slope(params, state).item() == 0
    return params, state


def test_large_parameters_are_sampled_and_small_ones_read_whole():
    (large, medium, small), state = large_parameters((3072, 3072), (1000, 300), (768,))
    sizes = [state[p]["initial"].numel() for p in (large, medium, small)]
    assert sum(sizes[:2]) == pytest.approx(SAMPLE_SIZE, rel=0.05)
    assert sizes[1] / sizes[0] == pytest.approx(medium.numel() / large.numel(), rel=0.01)
    assert sizes[2] == 768
    assert all(state[p]["initial"].dtype == torch.bfloat16 for p in state)
    with torch.no_grad():
        for p, move in ((large, -1.0), (medium, -0.25), (small, 2.0)):
            p += move
    expected = large.numel() + 0.25 * medium.numel() - 2 * small.numel()
    assert path_slope([large, medium, small], state).item() == pytest.approx(expected, rel=1e-6)


def test_up_to_a_size_everything_is_read_whole():
    (p,), state = large_parameters((WHOLE_SIZE // 1024, 1024))
    assert state[p]["initial"].shape == p.shape


def test_a_large_model_is_sampled_by_a_share_that_meets_every_row():
    (p,), state = large_parameters((2**16, 768))
    assert p.numel() / state[p]["initial"].numel() == pytest.approx(MAX_DISTANCE, rel=0.05)
    for begin in range(0, len(p), 4099):  # where only a few rows have moved, they are all that counts
        with torch.no_grad():
            p.zero_()
            p[begin : begin + 40] = -1.0
        expected = p[begin : begin + 40].numel()
        assert path_slope([p], state).item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("width", [64, 500, 768, 1024, 4095, 4096, 4097, 3 * 1024, 17 * 64, 31 * 64])
def test_every_column_is_met_about_as_often(width):
    (p,), state = large_parameters((2**24 // width, width))
    for begin in range(0, width, 50):  # where only some columns have moved, they are all that counts
        columns = slice(begin, min(begin + 50, width))
        with torch.no_grad():
            p.zero_()
            p[:, columns] = -1.0
        expected = p[:, columns].numel()
        assert path_slope([p], state).item() == pytest.approx(expected, rel=0.1)


def test_the_estimate_is_the_whole_but_for_the_noise_of_a_sample():
    torch.manual_seed(0)
    (p,), state = large_parameters((4096, 4096))
    p.grad = torch.randn(p.shape)
    with torch.no_grad():
        p += torch.randn(p.shape) - 0.02 * p.grad
    products = p.grad.double() * -p.detach().bfloat16().double()
    error = path_slope([p], state).item() - products.sum().item()
    # The standard error of a sum that is estimated from a sample.
    assert abs(error) < 4 * products.std().item() * p.numel() / SAMPLE_SIZE**0.5
    assert products.sum().item() > 10 * products.std().item() * p.numel() / SAMPLE_SIZE**0.5


def test_first_weights_that_a_checkpoint_has_whole_stay_whole():
    (p,), state = large_parameters((4096, 4096))
    state[p]["initial"] = torch.zeros(p.shape, dtype=torch.bfloat16)
    with torch.no_grad():
        p[0, 0] = -3.0  # of one element the sample would tell nothing, or too much
    assert path_slope([p], state).item() == 3.0


def test_a_gradient_of_another_layout_is_sampled_at_the_same_places():
    (p,), state = large_parameters((4096, 4096))
    with torch.no_grad():
        p.copy_(-torch.arange(4096.0).view(-1, 1) / 4096)
    rows = torch.arange(4096.0).view(-1, 1).expand(4096, 4096)
    p.grad = rows.t().contiguous().t()
    assert not p.grad.is_contiguous()
    strided = path_slope([p], state).item()
    p.grad = rows.contiguous()
    assert (
        path_slope([p], state).item() == strided == pytest.approx((rows.double() ** 2).sum().item() / 4096, rel=0.02)
    )


def test_parameters_that_cannot_be_sampled_are_read_whole():
    transposed = nn.Parameter(torch.zeros(4096, 3000).t())
    state = {transposed: {}}
    transposed.grad = torch.ones(4096, 3000).t()
    path_slope([transposed], state)
    assert state[transposed]["initial"].shape == transposed.shape
