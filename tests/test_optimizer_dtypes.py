import pytest
import torch
from small_problems import DTYPES, SLOPES, ConstantALSALS, make_net, single, train
from torch import nn

from hf_alsals import ALSALS, PRESETS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESETS)
def test_trains_in_every_dtype_with_moments_of_at_least_float32(dtype, name):
    net = make_net(dtype)
    optimizer = ConstantALSALS(net.parameters(), **PRESETS[name])
    losses = [loss for _, loss in train(net, optimizer, range(100))]
    assert max(losses[-10:]) < 0.2 * losses[0]
    assert optimizer.skipped_steps == 0
    for p in net.parameters():
        assert p.dtype == dtype
        kept = {key: value for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
        moments = [name for name in kept if name not in ("initial", "path") and "step" not in name]
        assert len(moments) >= 2
        for moment in moments:
            assert optimizer.state[p][moment].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_moment_of_a_small_half_precision_gradient_does_not_underflow(dtype):
    w = single([1.0, 2.0], dtype)
    w.grad = torch.tensor([1e-4, -1e-4], dtype=dtype)
    ConstantALSALS([w], initial_step_size=0.25).step(lambda: -1.0, 0.0)
    assert w.tolist() == pytest.approx([0.75, 2.25], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_too_small_to_show_in_half_precision_do_not_end_the_search(dtype):
    net = make_net(dtype)
    optimizer = ConstantALSALS(net.parameters(), **PRESETS["adam_sls"])
    train(net, optimizer, range(400))
    assert optimizer.step_size > 1e-6
    assert optimizer.search.total_probes < 4000


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("order", [1, -1])
def test_parameters_of_different_dtypes_train_together(slope, order):
    params = [single([1.0, -2.0], dtype) for dtype in DTYPES][::order]
    optimizer = ConstantALSALS(params, slope=slope)

    def closure():
        return sum((p.double() ** 2).sum() for p in params)

    first = closure().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step(closure, loss)
    assert closure() < 0.05 * first
    assert [p.dtype for p in params] == DTYPES[::order]


def test_finite_difference_steps_as_far_as_the_coarsest_dtype_needs():
    coarse, fine = single([1.0], torch.bfloat16), single([1.0])
    optimizer, probed = ConstantALSALS([coarse, fine], slope="finite_difference"), []

    def closure():
        probed.append(fine.item())
        return coarse.double().sum() + fine.sum()

    loss = closure()
    loss.backward()
    optimizer.step(closure, loss)
    assert probed[1] == pytest.approx(1.0 - 2**-3.5, rel=1e-7)


@pytest.mark.parametrize("order", [1, -1])
def test_gradient_too_large_for_another_parameters_dtype_is_still_finite(order):
    half, single_precision, double = (single([1.0], dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    half.grad, single_precision.grad, double.grad = (
        torch.tensor([value], dtype=p.dtype) for value, p in ((1.0, half), (1e6, single_precision), (1e50, double))
    )
    optimizer = ConstantALSALS([half, single_precision, double][::order], initial_step_size=0.5)
    optimizer.step(lambda: -1e60, 0.0)
    assert optimizer.skipped_steps == 0
    assert (half.item(), single_precision.item(), double.item()) == pytest.approx((0.5, 0.5, 0.5), rel=1e-3)


def test_empty_and_zero_dimensional_parameters_are_taken():
    empty, scalar = single([]), single(3.0)
    optimizer = ConstantALSALS([empty, scalar], initial_step_size=0.5)
    (empty.sum() + scalar**2).backward()
    optimizer.step(lambda: empty.sum() + scalar**2)
    assert scalar.item() == pytest.approx(2.5, rel=1e-7)


def test_channels_last_parameter_keeps_its_layout_and_takes_the_same_steps():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nets = [nn.Conv2d(3, 4, 3, dtype=torch.float64) for _ in range(2)]
    for net in nets:
        nn.init.zeros_(net.bias)
        net.weight.data = weight.clone()
    nets[1].to(memory_format=torch.channels_last)
    assert not nets[1].weight.is_contiguous()

    def loss_of(net, k):
        return (net(images.roll(k, dims=0)[:4]).tanh().mean(dim=(2, 3)) - 0.5).pow(2).mean()

    optimizers = [ConstantALSALS(net.parameters(), weight_decay=0.1) for net in nets]
    histories = [train(net, optimizer, range(40), loss_of) for net, optimizer in zip(nets, optimizers)]
    for contiguous, channels_last in zip(*histories):
        assert channels_last == pytest.approx(contiguous, rel=1e-9)
    torch.testing.assert_close(nets[1].weight, nets[0].weight, rtol=1e-9, atol=1e-9)
    assert nets[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert not nets[1].weight.is_contiguous()
    assert optimizers[1].state[nets[1].weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert histories[0][-1][1] < 0.5 * histories[0][0][1]


def test_an_autocast_around_the_step_does_not_hide_the_moves_from_the_probes():
    losses = {}
    for around in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 1)
        x = torch.randn(64, 8)
        optimizer = ALSALS(model.parameters())
        losses[around] = []

        def closure(model=model, x=x, losses=losses[around]):
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x).float() - x[:, :1]).square().mean()
            losses.append(loss.item())
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            loss = closure()
            loss.backward()
            optimizer.step(closure, loss)
    assert losses[True] == losses[False]
    assert len(set(losses[True])) > 2
