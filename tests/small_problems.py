"""Small problems to train on in tests, and what is compared in them."""

import copy
import functools
import io

import torch
from torch import nn

from hf_alsals import ALSALS, PRESETS

# The published search; the default, which follows the path, is ALSALS itself.
ConstantALSALS = functools.partial(ALSALS, growth="constant")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SLOPES = ["exact", "preconditioned", "finite_difference"]
METHODS = PRESETS | {"finite_difference": {"slope": "finite_difference"}, "every_third": {"search_interval": 3}}


def make_net(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for p in net.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return net.to(dtype)


def net_loss(net, k, parameters=None, offset=0.0):
    """Return the loss of step k's minibatch, of which there are ten, for targets that may be far away."""
    generator = torch.Generator().manual_seed(k % 10)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    y = offset + 0.1 * ((2 * x[:, :1]).sin() + x[:, 1:2] * x[:, 2:3])
    parameters = dict(net.named_parameters()) if parameters is None else parameters
    dtype = next(iter(parameters.values())).dtype
    return (torch.func.functional_call(net, parameters, x.to(dtype)) - y.to(dtype)).pow(2).mean()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def unflatten(net, w):
    """Return net's parameters by name, taken from the flat tensor `w`."""
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()))
    return {name: x.view(shape) for name, x, shape in zip(names, w.split([s.numel() for s in shapes]), shapes)}


def flat_net_loss(net):
    return lambda w, k: net_loss(net, k, unflatten(net, w))


def rosenbrock(w, k=0):
    return (10 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum()


def train(net, optimizer, steps, loss_of=net_loss):
    """Train on the given steps' batches and return the step size and the loss of each."""
    history = []
    for k in steps:
        optimizer.zero_grad()
        loss = loss_of(net, k)
        loss.backward()
        returned = optimizer.step(lambda k=k: loss_of(net, k), loss)
        history.append((optimizer.step_size, returned.item()))
    return history


def single(values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def parameter_group(params, **settings):
    """Return a parameter group with the hyperparameters that ALSALS gives it."""
    return {"params": list(params), "lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0} | settings


def assert_identical(actual, expected):
    """Raise unless two tensors, or containers of tensors, numbers and names, are equal to the bit."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert set(actual) == set(expected)
        for name, value in expected.items():
            assert_identical(actual[name], value)
    elif isinstance(expected, (list, tuple)):
        for value, other in zip(actual, expected, strict=True):
            assert_identical(value, other)
    else:
        assert actual == expected


def snapshot(params):
    return [p.detach().clone() for p in params]


def optimizer_state(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def through_torch_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def adam_direction_of(gradients, beta1=0.9, beta2=0.999, eps=1e-8):
    """Return Adam's direction after these gradients: its bias-corrected moments are weighted averages of them."""
    gradients = torch.stack(list(gradients))
    return _average(gradients, beta1) / (_average(gradients**2, beta2).sqrt() + eps)


def nesterov_direction_of(gradients, beta1=0.9, beta2=0.999, eps=1e-8):
    """Return the same with Nesterov momentum, which is that of the next step if its gradient is the last one again."""
    gradients = torch.stack(list(gradients))
    again = torch.cat([gradients, gradients[-1:]])
    return _average(again, beta1) / (_average(gradients**2, beta2).sqrt() + eps)


def _average(values, beta):
    weights = beta ** torch.arange(len(values) - 1, -1, -1, dtype=values.dtype)
    return torch.tensordot(weights / weights.sum(), values, 1)
