"""Adam whose step size a line search picks (ALSALS, arXiv 2403.18519)."""

import math
import time
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .direction import AdamDirection, path_slope, read, zero_if_finite
from .line_search import ArmijoLineSearch, check_number
from .path_search import PathSearch

# Each method of the papers as keyword arguments of ALSALS. adam_sls has the c and the growth (2 in 500 steps) of the
# authors' package salsa-optimizer 0.1.0.
PRESETS: dict[str, dict[str, Any]] = {
    "alsals": {"growth": "path"},
    "alsals_paper": {"growth": "constant", "growth_factor": 1 / 0.999},
    "salsa": {
        "growth": "constant",
        "c": 0.5,
        "growth_factor": 1.1,
        "decrease_factor": 0.8,
        "slope": "preconditioned",
        "search_interval": "adaptive",
    },
    "adam_sls": {
        "growth": "constant",
        "betas": (0.0, 0.999),
        "c": 0.2,
        "beta3": 0.0,
        "growth_factor": 2 ** (1 / 500),
        "slope": "preconditioned",
    },
}

SLOPES = ("exact", "preconditioned", "finite_difference")

# How the step size grows, and the search that does it.
SEARCHES: dict[str, type[ArmijoLineSearch]] = {"path": PathSearch, "constant": ArmijoLineSearch}


class ALSALS(torch.optim.Optimizer):
    """Adam whose step size is found by a line search on the smoothed Armijo condition (ALSALS, arXiv 2403.18519).

    `step` needs a closure that returns the loss of the batch that the gradients came from. See `PRESETS` for the
    settings of the related methods: `ALSALS(params, **PRESETS["salsa"])`.

    Args:
        params (iterable): Parameters, or dicts of parameter groups, to optimize.
        lr (`float`, defaults to 1.0): Multiplier on the searched step size, for learning rate schedules.
        betas (`tuple[float, float]`, defaults to (0.9, 0.999)): Decay of Adam's two moments, each in [0, 1).
        eps (`float`, defaults to 1e-8): Term added to the denominator of Adam's direction.
        weight_decay (`float`, defaults to 0.0): Decoupled weight decay per unit of step taken, as in AdamW. It is
            applied after the search and is not part of the searched line.
        growth (`str`, defaults to `"path"`): How the step size grows. With `"path"` it follows the slope along the
            path of training, and the search bounds it (see [`PathSearch`]), which takes a copy of the first weights in
            bfloat16; with `"constant"` it grows by `growth_factor` after each search, as published (see
            [`ArmijoLineSearch`]).
        c, beta3, growth_factor, decrease_factor, initial_step_size, search_interval: See [`PathSearch`] and
            [`ArmijoLineSearch`]; where left out, their own defaults.
        slope (`str`, defaults to `"exact"`): How the slope is measured. `"exact"` is the inner product of gradient and
            direction; `"preconditioned"` leaves momentum out of that direction; `"finite_difference"` probes the loss
            at the step size `sqrt(machine epsilon)` (of the coarsest dtype among the parameters).

    Attributes:
        handed_over (`tuple`): What `set_closure` was given for the next step: closure, loss and clip_coef.
        step_size (`float`): The step size of the last step, before `lr` multiplied it.
        slope, decrease (`float`): Slope and loss decrease that the last search measured, in units of the loss.
        probes (`int`), searched (`bool`): Probes of the last step, without that of a finite difference, and whether it
            searched.
        non_finite_probes (`int`): How many probes of the last step gave a loss that is not finite.
        loss (`float`): The loss that the last step started from.
        search_seconds (`float`): Time spent in searches since the optimizer was made.
        skipped_steps (`int`): Steps skipped for a loss or gradient that was not finite.

    Raises:
        TypeError: If an argument or a parameter has the wrong type; complex parameters are not supported.
        ValueError: If an argument is out of its range.
    """

    max_consecutive_skips = 10

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        growth: Literal["path", "constant"] = "path",
        c: float = 0.3,
        beta3: float | None = None,
        growth_factor: float | None = None,
        decrease_factor: float = 0.9,
        initial_step_size: float = 0.1,
        slope: Literal["exact", "preconditioned", "finite_difference"] = "exact",
        search_interval: int | Literal["adaptive"] | None = None,
    ) -> None:
        if growth not in SEARCHES:
            raise ValueError(f"growth must be one of {', '.join(SEARCHES)}, got {growth!r}.")
        if slope not in SLOPES:
            raise ValueError(f"slope must be one of {', '.join(SLOPES)}, got {slope!r}.")
        self.slope_method = slope
        self.growth = growth
        own_defaults = {"beta3": beta3, "growth_factor": growth_factor, "search_interval": search_interval}
        self.line_search = SEARCHES[growth](
            c=c,
            decrease_factor=decrease_factor,
            initial_step_size=initial_step_size,
            **{name: value for name, value in own_defaults.items() if value is not None},
        )
        self.loss = math.nan
        self.search_seconds = 0.0
        self.non_finite_probes = 0
        self.skipped_steps = 0
        self.consecutive_skips = 0
        self.handed_over: tuple[Any, Any, Any] = (None, None, 1.0)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group (`dict`): Parameters under `"params"`, and `lr`, `betas`, `eps` and `weight_decay` where they
                differ from the defaults.

        Raises:
            TypeError: If a parameter is complex.
            ValueError: If a hyperparameter is out of its range, or the group sets one of the line search.
        """
        super().add_param_group(param_group)
        try:
            _check_param_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def step_size(self) -> float:
        """The step size of the last step before `lr`; before the first search the one that it starts from."""
        return self.line_search.step_size

    @property
    def slope(self) -> float:
        """The slope that the last search measured."""
        return self.line_search.slope

    @property
    def decrease(self) -> float:
        """The loss decrease at the step size that the last search ended at."""
        return self.line_search.decrease

    @property
    def probes(self) -> int:
        """The number of probes of the last step."""
        return self.line_search.probes

    @property
    def searched(self) -> bool:
        """Whether the last step searched."""
        return self.line_search.searched

    def set_closure(
        self,
        closure: Callable[[], Tensor | float],
        loss: Tensor | float | None = None,
        clip_coef: Tensor | float = 1.0,
    ) -> None:
        """Hand over what the next `step()` needs, where `step` is called by others without arguments.

        Args:
            closure (`Callable[[], Tensor]`): Returns the loss of the batch that the gradients came from, a scalar,
                without a backward pass.
            loss (`Tensor` or `float`, *optional*): The loss that the gradients came from; the closure is called for it
                if left out.
            clip_coef (`Tensor` or `float`, defaults to 1.0): What gradient clipping multiplied the gradients by,
                `min(1, max_norm / (total_norm + 1e-6))`. The slope is divided by it: it has to be that of the loss.

        Raises:
            TypeError: If the closure cannot be called, or `clip_coef` is not a number.
            ValueError: If `clip_coef` is not positive.
        """
        if not callable(closure):
            raise TypeError(f"closure must be a function that returns the loss, got {type(closure).__name__}.")
        if not isinstance(clip_coef, Tensor):
            check_number("clip_coef", clip_coef, lambda x: 0 < x < math.inf, "a positive number")
        self.handed_over = (closure, loss, clip_coef)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Tensor | float] | None = None, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Take one step along Adam's direction, with the step size of the line search.

        The gradients are in `.grad` already; a search takes their memory, and `.grad` is `None` after it, even if the
        closure raises. Parameters and search are where they were then; Adam's moments have taken up the gradients.

        Args:
            closure (`Callable[[], Tensor]`): Returns the loss of the batch that the gradients came from, a scalar.
                It is called under `no_grad`, without a backward pass. Optional after `set_closure`.
            loss (`Tensor` or `float`, *optional*): The loss that the gradients came from; the closure is called for it
                if left out.

        Returns:
            `Tensor` or `float`: The loss before the step.

        Raises:
            RuntimeError: If there is no closure, a gradient is sparse, or the loss or a gradient was not finite in ten
                steps in a row.
            TypeError: If the closure cannot be called, or the loss is not a number.
            ValueError: If the loss is not a scalar.
        """
        earlier_closure, earlier_loss, clip_coef = self.handed_over
        self.handed_over = (None, None, 1.0)  # never a second step on the same batch
        self.line_search.probes, self.line_search.searched, self.non_finite_probes = 0, False, 0
        if closure is not None:
            clip_coef = 1.0
        else:
            closure, loss = earlier_closure, earlier_loss if loss is None else loss
        if closure is None and not self.state and all(group["lr"] == 0 for group in self.param_groups):
            # torch.distributed.checkpoint lets an optimizer make its state by a step of zero gradients at lr 0.
            if self.growth == "path":
                self._path_slope([p for group in self.param_groups for p in group["params"] if p.grad is not None])
            self._directions()
            return None
        if closure is None:
            raise RuntimeError(
                "ALSALS.step() needs a closure that returns the loss: pass it, or call set_closure() first."
            )
        if not callable(closure):
            raise TypeError(f"closure must be a function that returns the loss, got {type(closure).__name__}.")

        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError("ALSALS takes dense gradients, got a sparse one: use sparse=False in the embedding.")

        if loss is None:
            loss = closure()
        _check_loss(loss)
        if not params:
            (self.loss,) = read([loss])
            return loss
        if self.growth == "path":
            self.line_search.heed_schedule(self._schedule())
        follows_path = self.growth == "path" and not self.line_search.is_annealing
        path = self._path_slope(params) if follows_path else 0.0
        # The only host wait of a step without a search.
        self.loss, zero, clip_coef, path = read([loss, zero_if_finite(params), clip_coef, path])
        # A clip_coef of 0 is that of gradients whose norm is not finite.
        if not math.isfinite(self.loss + zero) or not 0 < clip_coef < math.inf:
            self._skip()
            return loss
        self.consecutive_skips = 0

        before = self.line_search.state_dict()
        directions = self._directions()
        if follows_path:
            self.line_search.follow(path / clip_coef)
        if self.line_search.is_due():
            try:
                step_size = self._search(closure, [direction for _, direction in directions], clip_coef)
            except BaseException:
                self.line_search.load_state_dict(before)
                raise
        else:
            step_size = self.line_search.skip()
        for group, direction in directions:
            step = group["lr"] * step_size
            direction.move(step, decay=step * group["weight_decay"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the moments, the hyperparameters and, in every parameter group, the numbers of the search."""
        for group in self.param_groups:
            group.setdefault("peak_lr", 0.0)  # a sharded load fills only what is there
            group.update({f"search_{name}": value for name, value in self.line_search.state_dict().items()})
            group.update(skipped_steps=self.skipped_steps, consecutive_skips=self.consecutive_skips)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit from what `state_dict` returned.

        Args:
            state_dict (`dict`): Another ALSALS optimizer's state, for the same parameters.

        Raises:
            ValueError: If it is that of another optimizer, another `growth` or an earlier version, or its parameter
                groups do not match.
        """
        group = state_dict["param_groups"][0]
        if "search_step_size" not in group:
            raise ValueError("state_dict must be that of an ALSALS optimizer, got one without numbers of a search.")
        growth = "path" if "search_started" in group else "constant"
        if growth != self.growth:
            raise ValueError(f"growth must be {growth!r}, as in the state_dict, got {self.growth!r}.")
        missing = [name for name in self.line_search.state_dict() if f"search_{name}" not in group]
        if missing:
            raise ValueError(f"state_dict must be of this version of hf_alsals, got one without {', '.join(missing)}.")
        search = {name: group[f"search_{name}"] for name in self.line_search.state_dict()}
        super().load_state_dict(state_dict)
        self.line_search.load_state_dict(search)
        self.skipped_steps, self.consecutive_skips = group["skipped_steps"], group["consecutive_skips"]
        # torch has cast the moments of bfloat16 and float16 parameters, which are float32, to the parameter's dtype.
        indices = [index for saved in state_dict["param_groups"] for index in saved["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name == "step":
                    self.state[p][name] = value.to("cpu", copy=True)  # on a GPU each would cost a host wait
                elif value.dtype != p.dtype:
                    self.state[p][name] = value.to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = ("line_search", "growth", "slope_method", "loss", "search_seconds", "non_finite_probes")
        own += ("skipped_steps", "consecutive_skips")
        return (
            super().__getstate__() | {name: getattr(self, name) for name in own} | {"handed_over": (None, None, 1.0)}
        )

    def _path_slope(self, params: list[Tensor]) -> Tensor:
        started = [p for p in params if "start" in self.state[p]]
        slope = path_slope(started, [self.state[p] for p in started])
        for p in params:
            if "start" not in self.state[p]:
                self.state[p]["start"] = p.detach().to(torch.bfloat16, copy=True)
        return slope

    def _schedule(self) -> float:
        # Groups may have schedules of their own: it anneals when it does so for all of them.
        for group in self.param_groups:
            group["peak_lr"] = max(group.get("peak_lr", 0.0), group["lr"])
        return max(
            (group["lr"] / group["peak_lr"] for group in self.param_groups if group["peak_lr"] > 0), default=1.0
        )

    def _directions(self) -> list[tuple[dict[str, Any], AdamDirection]]:
        directions = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                states = [self.state[p] for p in params]
                directions.append((group, AdamDirection(params, states, group["betas"], group["eps"])))
        return directions

    def _search(
        self, closure: Callable[[], Tensor | float], directions: list[AdamDirection], clip_coef: float
    ) -> float:
        def probe(step_size: float) -> float:
            for direction in directions:
                direction.move(step_size)
            torch.clear_autocast_cache()  # within an outer autocast it holds the weights of the training forward pass
            probed = closure()
            _check_loss(probed)
            (number,) = read([probed])
            self.non_finite_probes += not math.isfinite(number)
            return number

        begin = time.perf_counter()
        if self.slope_method == "exact":
            slope = sum(read([direction.slope() for direction in directions])) / clip_coef
        elif self.slope_method == "preconditioned":
            slope = sum(read([direction.preconditioned_slope() for direction in directions])) / clip_coef
        for direction in directions:
            direction.remember()
        try:
            if self.slope_method == "finite_difference":
                step_size = max(torch.finfo(p.dtype).eps for direction in directions for p in direction.params) ** 0.5
                slope = (self.loss - probe(step_size)) / step_size
            return self.line_search.search(self.loss, slope, probe)
        except BaseException:
            for direction in directions:
                direction.restore()
            raise
        finally:
            self.search_seconds += time.perf_counter() - begin

    def _skip(self) -> None:
        self.skipped_steps += 1
        self.consecutive_skips += 1
        if self.consecutive_skips >= self.max_consecutive_skips:
            raise RuntimeError(
                f"The loss or a gradient was not finite in {self.consecutive_skips} steps in a row (the last loss is "
                f"{self.loss}): the model or its data produce NaN or infinity."
            )


def _check_param_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        check_number(name, group[name], lambda x: 0 <= x < math.inf, "a finite number of at least 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or not all(isinstance(beta, Real) for beta in betas):
        raise TypeError(f"betas must be two numbers in [0, 1), got {betas!r} of type {type(betas).__name__}.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}.")
    searched = {
        "c",
        "beta3",
        "growth",
        "growth_factor",
        "decrease_factor",
        "initial_step_size",
        "slope",
        "search_interval",
    }
    if named := sorted(searched & set(group)):
        raise ValueError(f"{named[0]} cannot differ between parameter groups: one search moves all of them.")
    for param in group["params"]:
        if param.is_complex():
            raise TypeError(f"ALSALS takes real parameters, got one of {param.dtype}, of shape {list(param.shape)}.")


def _check_loss(loss: Tensor | float) -> None:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"The loss must be a scalar, got a tensor of shape {list(loss.shape)}.")
    elif isinstance(loss, bool) or not isinstance(loss, Real):
        raise TypeError(f"The loss must be a tensor or a number, got {type(loss).__name__}.")
