"""torch's own generic checks of an optimizer, for ALSALS: those of TestOptimRenewed in torch's test/test_optim.py.

ALSALS needs a closure in step, as LBFGS does. Applied, by torch's names:

errors: test_errors_of_torch, test_a_parameter_group_that_torch_refuses_is_refused
forloop_goes_right_direction, param_group_with_lrscheduler_goes_right_direction: test_the_loss_falls_under_schedules
param_groups_weight_decay, param_groups_lr: test_parameter_groups_have_their_own_weight_decay_and_lr
tensor_lr: test_a_tensor_lr_is_that_number
set_default_dtype_works_with_foreach: test_the_default_dtype_does_not_matter
step_is_noop_when_params_have_no_grad, step_is_noop_for_zero_grads: test_a_step_without_gradients_moves_nothing
second_order_optims_return_consistent_types: test_a_step_returns_the_loss_of_its_closure
non_empty_state, optimizer_can_be_printed: test_every_parameter_has_a_state_and_every_group_is_printed
state_dict_deterministic, can_load_from_to_named_state_dict, save_load_equality_with_weights_only:
test_a_loaded_optimizer_goes_on_the_same
load_nontensor_step, state_dict_with_cuda_params: test_a_loaded_state_has_the_dtypes_of_a_state_made_there, on the CPU
deepcopy_copies_all_public_attrs: test_a_copy_has_all_attributes
(load_)state_dict_pre_hook, post_hook, pre_post_hook, prepend: test_hooks_of_state_dict, test_hooks_of_load_state_dict
step_pre_hook, step_post_hook, step_all_hooks: test_hooks_of_step, test_a_pre_hook_of_step_may_change_its_arguments
mixed_device_dtype: test_optimizer_dtypes.py, on one device
Beyond them: generators, keys of one's own in a state, gradients that are not contiguous, and the profiler's names.

Not applicable:

optim_infos_do_not_specify_global_cliquey_kwargs, defaults_changed_to_foreach: foreach, fused are no arguments
foreach_matches_forloop, foreach_large_tensor, peak_memory_foreach: there is one implementation
fused_*, cpu_load_state_dict, grad_scaling_autocast_fused_optimizers: there is no fused or capturable one
complex, complex_2d, rosenbrock_sparse: complex and sparse are refused, in test_optimizer_arguments.py
forloop_goes_right_direction_multigpu: needs two GPUs
can_load_older_state_dict, adamw_serialization: another version's or optimizer's is refused, in test_optimizer_state.py
compiled optimizers: a search decides on the host, so step is not compiled, in test_optimizer_robustness.py
"""

import copy
import os
import pickle
import warnings
from unittest import mock

import pytest
import torch
from small_problems import assert_identical, optimizer_state, snapshot, through_torch_save
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_alsals import ALSALS, PRESETS

INPUTS = {
    "default": {},
    "non-default lr": {"lr": 0.5},
    "tensor lr": {"lr": torch.tensor(0.5)},
    "nonzero weight_decay": {"weight_decay": 0.1},
    "betas and eps": {"betas": (0.5, 0.9), "eps": 1e-6},
    "constant growth": PRESETS["alsals_paper"],
}
SCHEDULES = {
    "none": [],
    "StepLR": [lambda optimizer: lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10)],
    "ReduceLROnPlateau": [lr_scheduler.ReduceLROnPlateau],
    "two": [
        lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.4, total_iters=4),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
    ],
    "OneCycleLR": [lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=30)],
}
every_input = pytest.mark.parametrize("kwargs", INPUTS.values(), ids=INPUTS)
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer))}


class Problem:
    """torch's problem for all optimizers: a matrix, a bias, and the squares of what they give."""

    def __init__(self, dtype=torch.float32, contiguous=True, like=None):
        generator = torch.Generator().manual_seed(0)
        weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((10, 5, 2), (10, 2), (5,)))
        values = [weight[..., 0].to(dtype), bias[..., 0].to(dtype)] if like is None else snapshot(like.params)
        # A strided view, as torch's non-contiguous parameters.
        self.params = [
            torch.nn.Parameter(value.contiguous() if contiguous else torch.stack([value] * 2, dim=-1)[..., 0])
            for value in values
        ]
        assert all(p.is_contiguous() == contiguous for p in self.params)
        self.x = x.to(dtype)

    def named(self, is_named):
        return [(f"name{i}", p) for i, p in enumerate(self.params)] if is_named else self.params

    def loss(self):
        weight, bias = self.params
        return (weight.mv(self.x) + bias).pow(2).sum()

    def closure(self, optimizer):
        def forward_backward():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return forward_backward

    def train(self, optimizer, steps):
        return [optimizer.step(self.closure(optimizer)).item() for _ in range(steps)]


def trained(kwargs, steps=3, **problem):
    problem = Problem(**problem)
    optimizer = ALSALS(problem.params, **copy.deepcopy(kwargs))
    problem.train(optimizer, steps)
    return problem, optimizer


# ---- errors ----


def test_errors_of_torch():
    # Private, as of torch 2.13; importing it would freeze the flags of torch.backends for all other tests.
    with mock.patch("torch.backends.disable_global_flags"), mock.patch.dict(os.environ):
        torchs = pytest.importorskip(
            "torch.testing._internal.common_optimizers", reason="needs expecttest", exc_type=ImportError
        )
    errors = torchs.get_error_inputs_for_all_optims("cpu", torch.float32)
    for error in errors:
        assert error.error_on == torchs.OptimizerErrorEnum.CONSTRUCTION_ERROR
        given = error.optimizer_error_input
        params = [torch.nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
        is_warning = issubclass(error.error_type, Warning)
        with (pytest.warns if is_warning else pytest.raises)(error.error_type, match=error.error_regex):
            ALSALS(params, **given.kwargs)


@pytest.mark.parametrize(
    ("group_of", "error", "message"),
    [
        (lambda p: {p}, TypeError, "must be a dict"),
        (lambda p: {"params": {p}}, TypeError, "ordered collections"),
        (lambda p: {"params": [1.0]}, TypeError, "can only optimize Tensors"),
        (lambda p: {"params": [p * 2]}, ValueError, "non-leaf"),
        (lambda p: {"params": [p]}, ValueError, "more than one parameter group"),
    ],
)
def test_a_parameter_group_that_torch_refuses_is_refused(group_of, error, message):
    problem, optimizer = trained({}, 0)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group_of(problem.params[0]))
    assert len(optimizer.param_groups) == 1


def test_generators_are_taken_and_none_is_empty():
    problem = Problem()
    assert ALSALS(p for p in problem.params).param_groups[0]["params"] == problem.params
    optimizer = ALSALS({"params": (p for p in [param])} for param in problem.params)
    assert [group["params"] for group in optimizer.param_groups] == [[p] for p in problem.params]
    with pytest.raises(ValueError, match="empty parameter list"):
        ALSALS(p for p in [])


# ---- steps ----


@every_input
@pytest.mark.parametrize(("contiguous", "grouped"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
def test_the_loss_falls_under_schedules(kwargs, contiguous, grouped, schedules):
    problem, kwargs = Problem(contiguous=contiguous), copy.deepcopy(kwargs)
    weight, bias = problem.params
    optimizer = ALSALS([{"params": [weight]}, {"params": [bias], "lr": 0.7}] if grouped else problem.params, **kwargs)
    schedulers = [make(optimizer) for make in schedules]
    first = problem.loss().item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as torch's of schedulers that do not see the step
        for _ in range(20):
            loss = optimizer.step(problem.closure(optimizer))
            for scheduler in schedulers:
                scheduler.step(*[loss] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    assert problem.loss().item() < first


@every_input
def test_non_contiguous_gradients_are_taken(kwargs):
    (problem, optimizer), (other, reference) = trained(kwargs, 0), trained(kwargs, 0)
    for p in problem.params:
        p.register_hook(lambda grad: torch.stack([grad] * 2, dim=-1)[..., 0])
    problem.train(optimizer, 5)
    other.train(reference, 5)
    assert_identical(snapshot(problem.params), snapshot(other.params))


@every_input
def test_parameter_groups_have_their_own_weight_decay_and_lr(kwargs):
    problem, irrelevant = Problem(), torch.nn.Parameter(torch.ones(2))
    weight, bias = problem.params
    of_group = {name: value for name, value in kwargs.items() if name in ("lr", "betas", "eps")}
    options = {name: value for name, value in kwargs.items() if name not in ("lr", "betas", "eps", "weight_decay")}
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    groups = [*(group | of_group for group in groups), {"params": [irrelevant], "lr": 0.0}]
    optimizer = ALSALS(groups, **options)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(problem.loss() + irrelevant.sum())
        losses[-1].backward()
        optimizer.step(lambda: problem.loss() + irrelevant.sum(), losses[-1])
    assert losses[-1] < losses[0]
    assert irrelevant.tolist() == [1.0, 1.0]


@every_input
def test_a_tensor_lr_is_that_number(kwargs):
    lr = float(kwargs.get("lr", 1.0))
    (problem, optimizer), (other, reference) = trained(kwargs | {"lr": lr}), trained(kwargs | {"lr": torch.tensor(lr)})
    assert_identical(snapshot(problem.params), snapshot(other.params))
    assert optimizer.step_size == reference.step_size


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default):
    steps = 300  # bfloat16 counts to 256
    (problem, reference), (other, optimizer) = trained({}, steps), trained({}, 0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        other.train(optimizer, steps)
    finally:
        torch.set_default_dtype(before)
    assert_identical(snapshot(other.params), snapshot(problem.params))
    assert_identical(optimizer_state(optimizer), optimizer_state(reference))


@every_input
@pytest.mark.parametrize("gradient", [None, 0.0])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_step_without_gradients_moves_nothing(kwargs, gradient, requires_grad):
    params = [torch.full((2, 3), 2.0, requires_grad=requires_grad) for _ in range(2)]
    for p in params:
        p.grad = None if gradient is None else torch.zeros_like(p)
    optimizer = ALSALS(params, **copy.deepcopy(kwargs) | {"weight_decay": 0.0})
    for _ in range(3):
        optimizer.step(lambda: torch.tensor([1.0]))
    assert_identical(snapshot(params), [torch.full((2, 3), 2.0)] * 2)


@pytest.mark.parametrize("loss", [torch.tensor([10.0]), torch.tensor(10.0), 10, 10.0])
@pytest.mark.parametrize("gradient", [None, 0.0])
def test_a_step_returns_the_loss_of_its_closure(loss, gradient):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = None if gradient is None else torch.full_like(p, gradient)
    assert ALSALS([p]).step(lambda: loss) is loss


@every_input
def test_every_parameter_has_a_state_and_every_group_is_printed(kwargs):
    problem = Problem()
    optimizer = ALSALS([{"params": [p]} for p in problem.params], **copy.deepcopy(kwargs))
    problem.train(optimizer, 1)
    assert [*optimizer.state] == problem.params
    assert all({"step", "exp_avg", "exp_avg_sq"} <= set(state) for state in optimizer.state.values())
    assert repr(optimizer).startswith("ALSALS (\nParameter Group 0\n")
    assert repr(optimizer).count("    weight_decay: ") == repr(optimizer).count("    lr: ") == 2


def test_the_profiler_shows_step_and_zero_grad():
    problem, optimizer = trained({})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        problem.train(optimizer, 1)
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#ALSALS.step", "Optimizer.zero_grad#ALSALS.zero_grad"} <= names


# ---- state ----


def groups_without_names(optimizer):
    groups = optimizer_state(optimizer)["param_groups"]
    return [{name: value for name, value in group.items() if name != "param_names"} for group in groups]


@every_input
@pytest.mark.parametrize("named", [(False, False), (False, True), (True, False), (True, True)])
def test_a_loaded_optimizer_goes_on_the_same(kwargs, named):
    problem = Problem()
    optimizer = ALSALS(problem.named(named[0]), **copy.deepcopy(kwargs))
    problem.train(optimizer, 10)
    other = Problem(like=problem)
    loaded = ALSALS(other.named(named[1]), **copy.deepcopy(kwargs))
    saved = through_torch_save(optimizer.state_dict())
    loaded.load_state_dict(saved)
    assert_identical(saved, optimizer_state(optimizer))
    assert problem.train(optimizer, 10) == other.train(loaded, 10)
    assert_identical(snapshot(other.params), snapshot(problem.params))
    assert_identical(loaded.state_dict()["state"], optimizer.state_dict()["state"])
    assert loaded.state_dict()["param_groups"][0].get("param_names") == (["name0", "name1"] if any(named) else None)
    loaded.param_groups.extend(loaded.param_groups)  # a group that is there twice is written twice
    assert_identical(groups_without_names(loaded), groups_without_names(optimizer) * 2)


@pytest.mark.parametrize("saved", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("as_number", [False, True])
def test_a_loaded_state_has_the_dtypes_of_a_state_made_there(saved, loaded, as_number):
    _, optimizer = trained({}, dtype=saved)
    fresh_problem, fresh = trained({}, dtype=loaded)
    problem, other = trained({}, 0, dtype=loaded)
    state_dict = optimizer_state(optimizer)
    for state in state_dict["state"].values():
        state["step"] = state["step"].item() if as_number else state["step"]
    other.load_state_dict(state_dict)
    for p, q in zip(problem.params, fresh_problem.params, strict=True):
        dtypes = [{k: v.dtype for k, v in state.items()} for state in (other.state[p], fresh.state[q])]
        assert dtypes[0] == dtypes[1]
        assert other.state[p]["step"] == 3
        assert other.state[p]["step"].dtype == torch.float32
    problem.train(other, 3)


def test_keys_of_the_users_own_are_loaded():
    _, optimizer = trained({})
    saved = optimizer_state(optimizer)
    saved["param_groups"][0]["mine"] = "group"
    saved["state"][0] |= {"count": 3, "index": torch.tensor([1, 2])}
    saved["state"]["mine"] = "global"
    problem, other = trained({}, 0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["mine"] == "group"
    assert other.state["mine"] == "global"
    state = other.state[problem.params[0]]
    assert (state["count"], state["index"].dtype) == (3, torch.int64)
    problem.train(other, 2)


@every_input
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_all_attributes(kwargs, copied):
    _, optimizer = trained(kwargs)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(copied(optimizer)) if not name.startswith("_")} == public


# ---- hooks ----


def test_hooks_of_state_dict():
    _, optimizer = trained({})
    pre = optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.update(test=1))
    assert optimizer.state_dict()["state"]["test"] == 1
    optimizer.register_state_dict_post_hook(lambda _, given: given | {"found": given["state"].pop("test", None)})
    assert optimizer.state_dict()["found"] == 1
    pre.remove()
    del optimizer.state["test"]
    assert optimizer.state_dict()["found"] is None


def test_hooks_of_load_state_dict():
    _, optimizer = trained({}, dtype=torch.bfloat16)
    problem, other = trained({}, 0, dtype=torch.bfloat16)
    found = []

    def in_place(_, given):
        given["param_groups"][0]["lr"] = 0.2

    def with_lr(lr):
        return lambda _, given: given | {"param_groups": [group | {"lr": lr} for group in given["param_groups"]]}

    def after(loaded):
        found.append(
            (loaded.param_groups[0]["lr"], loaded.step_size, loaded.state[problem.params[0]]["exp_avg"].dtype)
        )

    other.register_load_state_dict_post_hook(after)
    for hook, prepend in [(in_place, False), (with_lr(0.3), False), (with_lr(0.4), True)]:
        other.register_load_state_dict_pre_hook(hook, prepend=prepend)
        other.load_state_dict(optimizer_state(optimizer))
    # Whole: the search, and the moments in their own dtype.
    assert found == [(lr, optimizer.step_size, torch.float32) for lr in (0.2, 0.3, 0.3)]


def test_hooks_of_step():
    (problem, optimizer), (other_problem, other) = trained({}), trained({})
    calls = []
    registers = {
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
    }
    handles = [register(lambda *_, what=what: calls.append(what)) for what, register in registers.items()]
    try:
        problem.train(optimizer, 2)
        other_problem.train(other, 1)
    finally:
        for handle in handles:
            handle.remove()
    problem.train(optimizer, 1)
    assert calls == ["global pre", "pre", "post", "global post"] * 2 + ["global pre", "global post"]


def test_a_pre_hook_of_step_may_change_its_arguments():
    problem, optimizer = trained({})
    closure = problem.closure(optimizer)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), {}))
    assert optimizer.step().item() == optimizer.loss
