import math

import pytest
import torch
from small_problems import DTYPES, single
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from hf_alsals.shards import (
    cut,
    grad_of,
    local_shard,
    nonfinite_flag,
    overlapping,
    piece_size,
    sum_over_shards,
    to_floats,
)


def with_grad(grad):
    p = torch.nn.Parameter(torch.zeros_like(grad))
    p.grad = grad
    return p


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


# ---- pieces ----


def test_a_large_tensor_is_cut_into_views_that_make_up_the_whole():
    tensor, other = torch.arange(1_400_000.0).view(1400, 1000), torch.arange(1_400_000).view(1400, 1000)
    limit = piece_size(tensor)
    pieces = list(cut(tensor, other))
    assert [len(piece) for piece, _ in pieces] == [limit, limit, 1_400_000 - 2 * limit]
    assert torch.equal(torch.cat([piece for piece, _ in pieces]), tensor.flatten())
    assert torch.equal(torch.cat([piece for _, piece in pieces]), other.flatten())
    for piece, _ in pieces:
        piece.zero_()
    assert not tensor.any()  # they are views


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2**18,)])
def test_a_small_tensor_comes_whole(shape):
    tensor = torch.ones(shape)
    ((piece,),) = cut(tensor)
    assert piece is tensor


def test_what_is_not_contiguous_comes_whole_and_so_does_what_goes_with_it():
    tensor, transposed = torch.ones(700, 1000), torch.ones(1000, 700).t()
    for tensors in ((transposed,), (tensor, transposed)):
        (pieces,) = cut(*tensors)
        assert all(piece is tensor for piece, tensor in zip(pieces, tensors, strict=True))


def test_of_a_dtensor_the_local_shard_is_cut(mesh):
    tensor = torch.arange(12.0).view(3, 4)
    sharded = distribute_tensor(tensor, mesh, [Shard(0)])
    ((piece,),) = cut(sharded)
    assert not isinstance(piece, DTensor)
    assert torch.equal(piece, tensor)
    piece.mul_(2)
    assert torch.equal(local_shard(sharded), 2 * tensor)
    assert local_shard(tensor) is tensor


def test_a_parameter_without_gradient_has_none_to_return():
    p = single([1.0, 2.0])
    with pytest.raises(AssertionError):
        grad_of(p)
    p.grad = torch.ones(2, dtype=torch.float64)
    assert grad_of(p) is p.grad


# ---- sums ----


def test_values_of_plain_parameters_are_added():
    params = [single([1.0]), single([2.0, 3.0]), single([4.0])]
    assert sum_over_shards([torch.tensor(value) for value in (1.0, 20.0, 300.0)], params).item() == 321.0
    assert sum_over_shards([], []).item() == 0.0


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_values_of_dtensors_and_of_plain_parameters_are_added(mesh, placement):
    params = [distribute_tensor(torch.ones(4), mesh, [placement]), single([1.0]), single([1.0])]
    total = sum_over_shards([torch.tensor(value) for value in (1.0, 20.0, 300.0)], params)
    assert not isinstance(total, DTensor)
    assert total.item() == 321.0


# ---- finiteness ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_flag_is_zero_for_all_that_is_finite(dtype):
    ends = torch.finfo(dtype)
    grads = [torch.tensor([ends.max, ends.min, ends.tiny, 0.0], dtype=dtype), torch.ones(0, dtype=dtype)]
    assert nonfinite_flag([with_grad(grad) for grad in grads]).item() == 0.0
    assert nonfinite_flag([]).item() == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 2**18 - 1, 2**18, 299_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_flag_is_nan_for_any_element_that_is_not_finite(value, index, dtype):
    grads = [torch.ones(300_000, dtype=dtype), torch.ones(3, dtype=torch.float64)]
    grads[0][index] = value
    for order in (1, -1):
        assert math.isnan(nonfinite_flag([with_grad(grad) for grad in grads[::order]]).item())


def test_infinities_of_both_signs_do_not_cancel():
    grads = [torch.tensor([math.inf, -math.inf]), torch.tensor([-math.inf])]
    assert math.isnan(nonfinite_flag([with_grad(grad) for grad in grads]).item())


# ---- to the host ----


class Reads(torch.overrides.TorchFunctionMode):
    """Counts the reads of tensors by the host."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__)
        return function(*args, **(kwargs or {}))


def test_scalars_of_any_kind_are_read_at_once_in_their_order():
    fine = 1.0 + 2**-40  # float32 would round it
    values = [
        torch.tensor([[2.5]], requires_grad=True),
        7,
        torch.tensor(fine, dtype=torch.float64),
        -0.5,
        torch.tensor([1.5], dtype=torch.bfloat16),
        torch.tensor(math.nan, dtype=torch.float16),
        torch.tensor(3),
    ]
    with Reads() as reads:
        numbers = to_floats(values)
    assert numbers == pytest.approx([2.5, 7.0, fine, -0.5, 1.5, math.nan, 3.0], rel=1e-15, abs=0, nan_ok=True)
    assert all(type(number) is float for number in numbers)
    assert reads.count == 1


def test_numbers_alone_are_not_read_from_anywhere():
    with Reads() as reads:
        assert to_floats([1, 2.5]) == [1.0, 2.5]
        assert to_floats([]) == []
    assert reads.count == 0


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (lambda t: [t[:4], t[4:]], [False, False]),
        (lambda t: [t[:5], t[4:]], [True, True]),
        (lambda t: [t[4:], t[:5]], [True, True]),
        (lambda t: [t, t], [True, True]),
        (lambda t: [t[:2], t, t[6:8]], [True, True, True]),
        (lambda t: [t[:2], t[2:4], t[3:5], t[6:]], [False, True, True, False]),
        (lambda t: [t[0].expand(3)], [True]),
        (lambda t: [t[::2], t[1::2]], [True, True]),  # gaps count
        (lambda t: [t.view(2, 4).t(), torch.zeros(3)], [False, False]),
        (lambda t: [t[:0], t[:0], t], [False, False, False]),
        (lambda t: [], []),
    ],
)
def test_tensors_that_share_memory_are_found(tensors, expected):
    assert overlapping(tensors(torch.arange(8.0))) == expected
