"""Adam without a learning rate: step sizes follow the path slope, and a line search bounds them."""

import dataclasses
import math
import time
import warnings
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .checks import check_number
from .closure import Closure, ReplayedLoss, check_closure, check_loss, compute_loss, is_replayed, warn_unless_repeated
from .direction import Direction, hidden_matrices, state_dtype
from .line import SLOPES, Line
from .line_search import LineSearch, SearchState
from .optimizer_direction import direction_of
from .path_growth import PathGrowth, PathGrowthState, PathSlope, TensorState
from .path_slope import path_slopes, weight_scale
from .presets import line_search_of
from .shards import nonfinite_flag, to_floats

KINDS = ("hidden", "vectors", "others")

SETTLED_STEPS = 3  # those that a path slope leaves out, for they may be taken back

HIDDEN_GRADIENT = (
    "the loss's value does not show its gradient, as that of exp(logp - logp.detach()), or the gradients are not its "
    "own: no probe can measure it, so training goes on without searches, by the path slope alone"
)


class Pending(NamedTuple):
    """What the next `ALSALS.step()` has been given beforehand.

    Args:
        closure (`Callable[[], Tensor]` or `ReplayedLoss`, *optional*): The closure.
        loss (`Tensor` or `float`, *optional*): The loss that the gradients came from, if a plain closure came with it.
        clip_coef (`Tensor` or `float`, defaults to 1.0): What clipping multiplied the gradients by.
        total_norm (`Tensor`, *optional*): The norm of all gradients before clipping.
    """

    closure: Closure | ReplayedLoss | None = None
    loss: Tensor | float | None = None
    clip_coef: Tensor | float = 1.0
    total_norm: Tensor | None = None


class Start(NamedTuple):
    """What an optimizer step reads, with one host-device sync, before it moves.

    Args:
        is_finite (`bool`): Whether loss, gradients and their norm are finite.
        clip_coef (`float`): What clipping multiplied the gradients by.
        lr_fraction (`float`): Learning rate as a fraction of its peak so far.
        path_slopes (`dict[Tensor, PathSlope]`): Those of the unclipped gradients, of each parameter; empty where
            nothing follows them.
        weight_scale (`float`): Scale of the first weights of the hidden matrices, infinity where it is not known, or
            has been read before.
    """

    is_finite: bool
    clip_coef: float
    lr_fraction: float
    path_slopes: dict[Tensor, PathSlope]
    weight_scale: float = math.inf


class ALSALS(torch.optim.Optimizer):
    """Adam whose step size is found in training.

    By default it follows the slope along the path of training (this package's own), and a line search on the smoothed
    Armijo condition bounds it (ALSALS, arXiv 2403.18519); the paper's own method is `PRESETS["alsals_paper"]`.

    `step` needs a closure that returns the loss of the batch that the gradients came from. See `PRESETS` for the
    settings of the related methods: `ALSALS(params, **PRESETS["salsa"])`.

    Args:
        params (iterable): Parameters, or dicts of parameter groups, to optimize.
        lr (`float`, defaults to 1.0): Multiplier on the searched step size, for learning rate schedules.
        betas (`tuple[float, float]`, defaults to (0.9, 0.999)): Decay of Adam's two moments, each in [0, 1), and of
            LAMB's.
        eps (`float`, defaults to 1e-8): Term added to the denominator of Adam's direction, and of LAMB's.
        weight_decay (`float`, defaults to 0.0): Decoupled weight decay per unit of step taken, as in AdamW. It is
            applied after the search and is not part of the searched line.
        growth (`str` or `LineSearch`, defaults to `"path"`): How the step size grows. With `"path"` that of each
            tensor follows the slope along the path of training, and the search bounds them (see [`PathGrowth`]), which
            takes a copy of the first weights in bfloat16; with `"constant"`, the published rule, it grows by
            `growth_factor` after each search (see [`ConstantGrowth`]). A [`LineSearch`] of your own is taken too.
        slope (`str`, defaults to `"exact"`): How the slope is measured, one of `"exact"`, `"preconditioned"` and
            `"finite_difference"`; see [`Line`].
        direction (`str` or `type[Direction]`, *optional*): The direction: `"nadam"`, `"adam"`, `"muon"`, `"lamb"`,
            `"adafactor"`, `"lion"`, or a class of your own. With `growth="path"` it is `"nadam"` by default, with
            `"constant"` `"adam"`.
        options: Options of the line search: `c`, `beta3`, `growth_factor`, `decrease_factor`, `initial_step_size` and
            `search_interval`. Their meanings and defaults are those of `LINE_SEARCHES[growth]` and its parts.

    Attributes:
        line_search (`LineSearch`), search (`SearchState`): The line search and its state.
        pending (`Pending`): What the next step has been given beforehand.
        step_size (`float`): The step size of the last step, before `lr` multiplied it; the initial one before the
            first.
        slope, actual_reduction (`float`): Slope and reduction of the loss that the last search measured.
        probes (`int`), searched (`bool`): Probes of the last step, without that of a finite difference, and whether it
            searched; `search.nonfinite_probes` of them gave a loss that is not finite.
        loss (`float`): The loss that the last step started from.
        search_seconds (`float`): Time spent in searches since the optimizer was made.
        skipped_steps (`int`): Steps skipped for a loss or gradient that was not finite.

    Raises:
        ImportError: If the direction needs a package, or a version of torch, that is not there.
        TypeError: If an argument or a parameter has the wrong type; complex parameters are not supported.
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = ALSALS([w])
        >>> for _ in range(200):
        ...     closure = lambda: (w**2).sum()
        ...     loss = closure()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     _ = optimizer.step(closure, loss)
        >>> loss.item() < 1e-3
        True
    """

    max_consecutive_skips = 10
    most_rejections = 10
    _copied = (
        "line_search",
        "search",
        "tensors",
        "direction",
        "slope_method",
        "loss",
        "search_seconds",
        "skipped_steps",
        "consecutive_skips",
        "_closure_has_backward",
        "_rejections",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        growth: str | LineSearch = "path",
        slope: Literal["exact", "preconditioned", "finite_difference"] = "exact",
        direction: str | type[Direction] | None = None,
        **options: Any,
    ) -> None:
        if slope not in SLOPES:
            raise ValueError(f"slope must be one of {', '.join(SLOPES)}, got {slope!r}.")
        line_search = line_search_of(growth, **options)
        direction = direction_of(direction, line_search.growth.direction)
        direction.check_installed()
        if slope == "preconditioned" and not direction.has_momentum_apart:
            raise ValueError(
                f'slope must be "exact" or "finite_difference" along {direction.description}, got {slope!r}.'
            )
        self.slope_method = slope
        self.direction = direction
        self.line_search = line_search
        self.search = self.line_search.init()
        self.tensors: dict[Tensor, TensorState] = {}
        self.pending = Pending()
        self.loss = math.nan
        self.search_seconds = 0.0
        self.skipped_steps = 0
        self.consecutive_skips = 0
        self._closure_has_backward = False
        self._rejections = 0
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if 0 < (largest := max(float(group["lr"]) for group in self.param_groups)) < 0.1:
            warnings.warn(
                f"ALSALS: lr multiplies the step size that is found, and {largest:g} makes it much smaller: leave it "
                "out, or keep the largest of the parameter groups near 1.",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group (`dict`): Parameters under `"params"`, and `lr`, `betas`, `eps` and `weight_decay` where they
                differ from the defaults. `"hidden": False` says that its matrices are embeddings and heads.

        Raises:
            TypeError: If a parameter is complex, or `hidden` is no bool.
            ValueError: If a hyperparameter is out of its range or the direction has its own, or the group sets one of
                the line search.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyperparameters(group)
            self.direction.check_group(group)
            if named := sorted({*self.line_search.options, "direction", "growth", "slope"} & set(group)):
                raise ValueError(f"{named[0]} cannot differ between parameter groups: one search moves all of them.")
            for param in group["params"]:
                if param.is_complex():
                    raise TypeError(
                        f"ALSALS takes real parameters, got one of {param.dtype}, of shape {list(param.shape)}."
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def step_size(self) -> float:
        """The step size found so far, before `lr`; before the first search the initial one."""
        return self.search.step_size

    @property
    def multipliers(self) -> dict[Tensor, float]:
        """The step sizes of single tensors over the common one, by parameter, where they differ."""
        return multipliers_of(self.tensors)

    def step_sizes(self) -> dict[str, list[float]]:
        """Return the step sizes of single tensors, before `lr`, by kind: hidden matrices, vectors and others.

        Kinds without a tensor that has a step size of its own are left out: in `growth=constant` all.
        """
        by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
        hidden = {id(p) for p in hidden_matrices(self.param_groups)}
        for p, tensor in self.tensors.items():
            kind = "vectors" if p.ndim < 2 else "hidden" if id(p) in hidden else "others"
            by_kind[kind].append(self.step_size * tensor.multiplier)
        return {kind: sizes for kind, sizes in by_kind.items() if sizes}

    @property
    def slope(self) -> float:
        """The slope that the last search measured."""
        return self.search.slope

    @property
    def actual_reduction(self) -> float:
        """The reduction of the loss at the step size that the last search ended at."""
        return self.search.actual_reduction

    @property
    def probes(self) -> int:
        """The number of probes of the last step."""
        return self.search.probes

    @property
    def searched(self) -> bool:
        """Whether the last step searched."""
        return self.search.searched

    @property
    def pending_loss(self) -> Tensor | float | None:
        """The loss that the next step starts from, `None` if only a call of its closure can tell."""
        pending = self.pending
        return pending.closure.loss if is_replayed(pending.closure) and pending.loss is None else pending.loss

    def set_closure(self, closure: Closure | ReplayedLoss, loss: Tensor | float | None = None) -> None:
        """Set what `step()` calls for the loss, where others call `step` without arguments.

        Args:
            closure (`Callable[[], Tensor]` or `ReplayedLoss`): Returns the loss of the batch that the gradients came
                from, a scalar, without a backward pass. A [`LossReplay`] is set once, before training; a plain
                function, which knows one batch only, serves the next step.
            loss (`Tensor` or `float`, *optional*): The loss that the gradients came from. If left out, a
                [`LossReplay`] knows it, and a plain function is called for it.

        Raises:
            TypeError: If the closure cannot be called.
        """
        check_closure(closure)
        self.pending = self.pending._replace(closure=closure, loss=loss)

    def set_clip_coef(self, clip_coef: Tensor | float, total_norm: Tensor | None = None) -> None:
        """Say what gradient clipping has multiplied the gradients of the next step by.

        Args:
            clip_coef (`Tensor` or `float`): `min(1, max_norm / (total_norm + 1e-6))`. The slope is divided by it: it
                has to be that of the loss.
            total_norm (`Tensor`, *optional*): The norm of all gradients before clipping. If it is given, they are not
                read again to see whether they are finite.

        Raises:
            TypeError: If it is not a number.
            ValueError: If it is not positive.
        """
        if not isinstance(clip_coef, Tensor):
            check_number("clip_coef", clip_coef, lambda x: 0 < x < math.inf, "a positive number")
        self.pending = self.pending._replace(clip_coef=clip_coef, total_norm=total_norm)

    @torch.no_grad()
    def step(self, closure: Closure | None = None, loss: Tensor | float | None = None) -> Any:
        """Take one step along the direction, with the step size of the line search.

        The gradients are in `.grad` already; a search takes their memory, and `.grad` is `None` after it, even if the
        closure raises. Parameters and search are where they were then; Adam's moments have taken up the gradients.

        Args:
            closure (`Callable[[], Tensor]`): Returns the loss of the batch that the gradients came from, a scalar.
                It is called under `no_grad`, without a backward pass. Without `loss` it may also zero the gradients
                and compute them anew, as in torch.optim; each probe then has a backward pass too. Optional after
                `set_closure`; if a [`LossReplay`] was set there, it is called once, for loss and gradients, records
                what it does, and the probes are the replay's.
            loss (`Tensor` or `float`, *optional*): The loss that the gradients came from; the closure is called for it
                if left out.

        Returns:
            `Tensor` or `float`: The loss before the step.

        Raises:
            RuntimeError: If there is no closure, it adds to gradients that were there or changes those it computed, a
                gradient is sparse, or the loss or a gradient was not finite in ten steps in a row.
            TypeError: If the closure cannot be called, or the loss is not a real number.
            ValueError: If the loss is not a scalar, or a learning rate is negative or not finite.
        """
        if torch.compiler.is_compiling():  # dynamo takes an error for a graph break, and calls the step as it is
            raise RuntimeError("ALSALS.step() cannot be compiled: compile the model.")
        closure, loss, clip_coef, total_norm = self._take_pending(closure, loss)
        if closure is None:
            return self._make_state(self.direction(self.param_groups, self.state))
        if loss is None:
            loss, closure = self._start_of(closure)
        check_loss(loss)
        direction = self.direction(self.param_groups, self.state)
        start = self._read_start(direction, loss, clip_coef, total_norm)
        if not start.is_finite:
            self._skip()
        elif direction.params:
            is_plain = not is_replayed(closure)
            is_first = not (self.search.is_initialized or self.search.initial_searches)
            if is_plain and is_first and not self._closure_has_backward:
                warn_unless_repeated(closure, self.loss)
            begin, self.consecutive_skips = time.perf_counter(), 0
            followed, tensors = self._follow(direction, start)
            with Line(direction, closure, self.loss, start.clip_coef, self.slope_method) as line:
                self.search = self.line_search.search(followed, line)
                self.search_seconds += time.perf_counter() - begin if self.searched else 0.0
                line.move(self.search.taken)
            self.tensors |= tensors
            if self.search.is_blind and self.searched:
                warnings.warn(f"ALSALS: {HIDDEN_GRADIENT}.", stacklevel=4)
            if is_plain and self.searched:
                self._warn_of_rejections()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the moments, the hyperparameters and, in every parameter group, the numbers of the search.

        What is noted of single tensors is in the state of each, as `path`.
        """
        search = self.line_search.state_dict(self.search) | self._names()
        for group in self.param_groups:
            group.setdefault("peak_lr", 0.0)  # a sharded load fills only what is there
            group.update({f"search_{name}": value for name, value in search.items()})
            group.update(skipped_steps=self.skipped_steps, consecutive_skips=self.consecutive_skips)
        state_dict = super().state_dict()
        if isinstance(self.line_search.growth, PathGrowth):
            for group, packed in zip(self.param_groups, state_dict["param_groups"], strict=True):
                for p, index in zip(group["params"], packed["params"], strict=True):
                    if "step" in self.state.get(p, {}):
                        # On the parameter's device, as torch.distributed.checkpoint wants it.
                        numbers = list(vars(self.tensors.get(p, TensorState())).values())
                        path = torch.tensor(numbers, dtype=torch.float64, device=p.device)
                        state_dict["state"][index] = state_dict["state"][index] | {"path": path}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit from what `state_dict` returned.

        Args:
            state_dict (`dict`): Another ALSALS optimizer's state, for the same parameters.

        Raises:
            ValueError: If it is that of another optimizer, another `growth` or an earlier version, or its parameter
                groups do not match.
        """
        hooked: list[dict[str, Any]] = []
        handles = [
            # After all hooks of the user's, and before anything is loaded.
            self.register_load_state_dict_pre_hook(lambda _, given: hooked.append(self._checked(given))),
            # Before all hooks of the user's: they find everything loaded.
            self.register_load_state_dict_post_hook(lambda _: self._load_rest(*hooked), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _load_rest(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["param_groups"][0]
        names = [*self.line_search.state_dict(self.search)]
        self.search = self.line_search.load_state_dict({name: saved[f"search_{name}"] for name in names})
        self.skipped_steps, self.consecutive_skips = saved["skipped_steps"], saved["consecutive_skips"]
        self.tensors = {}
        # torch has cast all tensors to the parameter's dtype, moments of bfloat16 and float16 parameters among them.
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name == "step":  # on a GPU each would cost a host-device sync
                    self.state[p][name] = torch.as_tensor(value, dtype=torch.float32).to("cpu", copy=True)
                elif name == "path":
                    self.tensors[p] = TensorState(*value.tolist())
                    del self.state[p][name]
                elif isinstance(value, Tensor):
                    dtype = state_dtype(p) if name in self.direction.buffer_names else value.dtype
                    if dtype != p.dtype:
                        self.state[p][name] = value.to(p.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name in self._copied}
        return super().__getstate__() | own | {"pending": Pending()}

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = state_dict["param_groups"][0]
        if "search_step_size" not in saved:
            raise ValueError("state_dict must be that of an ALSALS optimizer, got one without numbers of a search.")
        for name, value in self._names().items():
            if (other := saved.get(f"search_{name}", value)) != value:
                raise ValueError(f"{name} must be {other!r}, as in the state_dict, got {value!r}.")
        names = [f"search_{name}" for name in (*self.line_search.state_dict(self.search), *self._names())]
        if any("muon" in group for group in state_dict["param_groups"]):
            raise ValueError('state_dict must be of this version of hf_alsals, got one with "muon" in its groups.')
        if missing := [name for name in (*names, "skipped_steps", "consecutive_skips") if name not in saved]:
            raise ValueError(f"state_dict must be of this version of hf_alsals, got one without {', '.join(missing)}.")
        return state_dict

    def _names(self) -> dict[str, str]:
        return {"growth": self.line_search.growth.name, "direction": self.direction.name}

    def _take_pending(self, closure: Closure | None, loss: Tensor | float | None) -> Pending:
        pending = self.pending
        # Never a second step on the same batch.
        self.pending = Pending(pending.closure if is_replayed(pending.closure) else None)
        self.search = dataclasses.replace(self.search, searched=False, probes=0, nonfinite_probes=0)
        if closure is not None:
            check_closure(closure)
            if loss is None and is_replayed(pending.closure):
                try:
                    self._compute(closure, is_accumulated=True)  # it records what the probes repeat
                except BaseException:
                    pending.closure.clear()
                    raise
                return pending._replace(loss=pending.closure.take_loss())
            return pending._replace(closure=closure, loss=loss)
        if is_replayed(pending.closure):
            if not pending.closure.is_ready and self._may_make_state():
                return Pending()
            replayed = pending.closure.take_loss()
            return pending._replace(loss=replayed if loss is None else loss)
        return pending if loss is None else pending._replace(loss=loss)

    def _may_make_state(self) -> bool:
        # torch.distributed.checkpoint lets an optimizer make its state by a step of zero gradients at lr 0.
        return not self.state and all(group["lr"] == 0 for group in self.param_groups)

    def _make_state(self, direction: Direction) -> Any:
        if not self._may_make_state():
            raise RuntimeError(
                "ALSALS.step() needs a closure that returns the loss: pass it, or call set_closure() first."
            )
        if self.line_search.needs_path_slope(lr_fraction=1.0):
            path_slopes(direction)
        direction.update()

    def _start_of(self, closure: Closure) -> tuple[Tensor | float, Closure]:
        """Return the loss at the start, and the closure for probes; it may compute gradients, as in torch.optim."""
        loss = self._compute(closure)
        if not self._closure_has_backward:
            return loss, closure

        def probe() -> Tensor | float:
            with torch.enable_grad():
                return closure()

        return loss.detach() if isinstance(loss, Tensor) else loss, probe

    def _compute(self, closure: Closure, is_accumulated: bool = False) -> Tensor | float:
        params = [p for group in self.param_groups for p in group["params"]]
        loss, self._closure_has_backward = compute_loss(
            closure, params, has_backward=self._closure_has_backward, is_accumulated=is_accumulated
        )
        return loss

    def _read_start(
        self, direction: Direction, loss: Tensor | float, clip_coef: Tensor | float, total_norm: Tensor | None
    ) -> Start:
        if not direction.params:
            (self.loss,) = to_floats([loss])
            return Start(is_finite=True, clip_coef=1.0, lr_fraction=1.0, path_slopes={})
        lr_fraction = self._lr_fraction()
        direction.multipliers = self.multipliers
        slopes: list[Tensor] = []
        scale: Tensor | float = math.inf
        if self.line_search.needs_path_slope(lr_fraction):
            path, last = path_slopes(direction)
            slopes = path + last
            hidden, growth = self._hidden_matrices(direction), self.search.growth
            if hidden and isinstance(growth, PathGrowthState) and growth.weight_scale == math.inf:
                scale = weight_scale(hidden, self.state)
        flag = nonfinite_flag(direction.params) if total_norm is None else 0 * total_norm
        # The only host-device sync of a step without a search.
        self.loss, flagged, coef, scale, *numbers = to_floats([loss, flag, clip_coef, scale, *slopes])
        # A clip_coef of 0 is that of gradients whose norm is not finite.
        is_finite = math.isfinite(self.loss + flagged) and 0 < coef < math.inf
        found = {}
        if slopes and is_finite:
            rates = [(float(group["lr"]), group["params"]) for group in self.param_groups]
            lr_of = {p: lr for lr, params in rates for p in params}
            path_of, last_of = numbers[: len(direction.params)], numbers[len(direction.params) :]
            for p, slope, along in zip(direction.params, path_of, last_of):
                last_steps = SETTLED_STEPS * self.search.taken * lr_of[p] * along
                found[p] = PathSlope(slope / coef, (slope - last_steps) / coef)
        return Start(is_finite, coef, lr_fraction, found, scale or math.inf)

    def _follow(self, direction: Direction, start: Start) -> tuple[SearchState, dict[Tensor, TensorState]]:
        """Return the state of the search, and of each tensor, after the path slopes of a step."""
        slopes, growth = start.path_slopes, self.line_search.growth
        if not slopes:
            return self.line_search.follow(self.search, math.nan, start.lr_fraction), {}
        hidden = self._hidden_matrices(direction)
        steering = hidden or direction.params
        common = PathSlope(
            sum(slopes[p].slope for p in steering), sum(slopes[p].settled for p in steering), start.weight_scale
        )
        if not isinstance(growth, PathGrowth):
            return self.line_search.follow(self.search, common.slope, start.lr_fraction), {}
        followed = self.line_search.follow(self.search, common, start.lr_fraction)
        is_searched = self.line_search.is_searched(followed)
        largest = math.inf if is_searched else growth.largest_unsearched / followed.step_size
        is_hidden = dict.fromkeys(hidden, True)
        tensors = {}
        for p in direction.params:
            before = self.tensors.get(p, TensorState())
            tensors[p] = growth.follow_tensor(before, slopes[p], followed.growth, is_hidden.get(p, False), largest)
        direction.multipliers = multipliers_of(tensors)
        return followed, tensors

    @staticmethod
    def _hidden_matrices(direction: Direction) -> list[Tensor]:
        # A group whose lr has been 0 throughout has no path.
        moving = [group for group in direction.param_groups if group["peak_lr"] > 0] or direction.param_groups
        moved = {id(p) for group in moving for p in group["params"]}
        return [p for p in direction.hidden_matrices if p.grad is not None and id(p) in moved]

    def _lr_fraction(self) -> float:
        # Groups may have schedules of their own: it anneals when it does so for all of them.
        for group in self.param_groups:
            lr, peak = float(group["lr"]), group.get("peak_lr", 0.0)
            # The last rate of some of torch's schedules is 0 but for rounding.
            if not (math.isfinite(lr) and lr >= -1e-6 * peak):
                raise ValueError(f"lr must be finite and at least 0 in every step, got {lr}: look at the schedule.")
            group["peak_lr"] = max(peak, lr)
        return max(
            (float(group["lr"]) / group["peak_lr"] for group in self.param_groups if group["peak_lr"] > 0), default=1.0
        )

    def _warn_of_rejections(self) -> None:
        """Warn once many searches in a row have accepted nothing; in the Trainer its own checks do so."""
        is_rejected = not self.search.accepted and self.probes > 0
        self._rejections = self._rejections + 1 if is_rejected else 0
        if self._rejections == self.most_rejections:
            warnings.warn(
                f"ALSALS: no step size met the condition in {self._rejections} searches in a row, down to "
                f"{self.search.smallest_probe:.1e}: see whether the closure returns the loss that the gradients are "
                "of, and whether that is finite.",
                stacklevel=5,
            )

    def _skip(self) -> None:
        self.skipped_steps += 1
        self.consecutive_skips += 1
        if self.consecutive_skips >= self.max_consecutive_skips:
            raise RuntimeError(
                f"The loss or a gradient was not finite in {self.consecutive_skips} steps in a row (the last loss is "
                f"{self.loss}): the model or its data produce NaN or infinity, which the Trainer's logs hide unless "
                "logging_nan_inf_filter is false."
            )


def multipliers_of(tensors: dict[Tensor, TensorState]) -> dict[Tensor, float]:
    """Return the multipliers of the common step size that are not 1, by parameter.

    Args:
        tensors (`dict[Tensor, TensorState]`): The state of each parameter.
    """
    multipliers = {p: tensor.multiplier for p, tensor in tensors.items()}
    return {p: multiplier for p, multiplier in multipliers.items() if multiplier != 1}


def unwrap_alsals(optimizer: Any) -> ALSALS | None:
    """Return the [`ALSALS`] in an optimizer that Accelerate may have wrapped, `None` if it is another one.

    Args:
        optimizer (`Any`): An optimizer, as a Trainer callback is given it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, ALSALS) else None


def check_hyperparameters(group: dict[str, Any], names: dict[str, str] | None = None) -> None:
    """Raise unless the hyperparameters of a parameter group are in range.

    Args:
        group (`dict`): `lr`, `betas`, `eps` and `weight_decay`.
        names (`dict[str, str]`, *optional*): What messages call those that are called otherwise there.

    Raises:
        TypeError: If one is not a number.
        ValueError: If one is out of its range.
    """
    names = names or {}
    for name in ("lr", "eps", "weight_decay"):
        value, expected = group[name], "a finite number of at least 0"
        if name == "lr" and isinstance(value, Tensor):  # as torch.optim takes it
            if value.numel() != 1:
                raise ValueError(f"Tensor lr must be 1-element, got one of shape {list(value.shape)}.")
            value = value.item()
        check_number(names.get(name, name), value, lambda x: 0 <= x < math.inf, expected)
    betas, name = group["betas"], names.get("betas", "betas")
    if not isinstance(betas, (tuple, list)) or not all(isinstance(beta, Real) for beta in betas):
        raise TypeError(f"{name} must be two numbers in [0, 1), got {betas!r} of type {type(betas).__name__}.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{name} must be two numbers in [0, 1), got {betas!r}.")
