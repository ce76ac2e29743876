import pytest
import torch
from small_problems import ConstantALSALS, assert_identical, single
from torch import nn

from hf_alsals import ALSALS
from hf_alsals.path_slope import path_slope


def rounded(tensor):
    return tensor.detach().bfloat16().double()


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_inner_product_of_the_gradients_and_the_way_back(dtype):
    shapes = [(700, 500), (3,), (), (0,)]  # the first of two pieces
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
