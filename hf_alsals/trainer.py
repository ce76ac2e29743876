"""Trainers that supply the loss closure to ALSALS."""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Seq2SeqTrainer, Trainer

from .callbacks import StepSizeCallback
from .checkpoint import CheckpointMixin
from .failure_callback import FailureCallback
from .loss_replay import LossReplay
from .optimizer import ALSALS, unwrap_alsals
from .optimizer_direction import MuonDirection, direction_of, set_hidden_matrices
from .plain_state import PlainState, plain_values
from .presets import PRESETS, line_search_of
from .publishing import PublishingMixin
from .schedule import ScheduleMixin
from .search_log import SearchLogMixin
from .unsupported import refuse_unsupported

logger = logging.getLogger(__name__)


class OnInstanceOrClass:
    """A method that may be called on the class too: the Trainer's is static, sentence-transformers' is not.

    Args:
        function (`Callable`): Takes the instance, or the class, first.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return functools.partial(self.function, owner if instance is None else instance)


class Unrecorded:
    """Stands for the closure until a training step has been recorded: one that never is has this said of it.

    Args:
        trainer_cls (`type`): The class of the Trainer.
    """

    is_ready = False
    loss = None

    def __init__(self, trainer_cls: type) -> None:
        self.trainer_cls = trainer_cls

    def __call__(self) -> Tensor:
        """Raise a RuntimeError that says what the Trainer's training step has to do."""
        name = next(cls.__name__ for cls in self.trainer_cls.__mro__ if "training_step" in vars(cls))
        raise RuntimeError(
            f"The training_step of {name} must call super().training_step(), for a probe to repeat it, or be that of "
            f"a class behind the mixin, as in class {name}(AlsalsTrainerMixin, MyTrainer), and there call "
            "self.compute_loss and self.accelerator.backward once."
        )

    take_loss = __call__


def _optimizer_cls_and_kwargs(trainer: Any, args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """Return the optimizer class and its keyword arguments.

    Args:
        trainer (`AlsalsTrainerMixin` or its type): The Trainer.
        args (`TrainingArguments`): The training arguments.
        model (`nn.Module`, *optional*): The model, which some of the Trainer's optimizers need.
    """
    parent: Any = super(AlsalsTrainerMixin, trainer)
    if args.optim not in PRESETS:
        return parent.get_optimizer_cls_and_kwargs(args, model)
    plain = copy.copy(args)
    plain.optim, plain.optim_args = "adamw_torch", None
    _, kwargs = parent.get_optimizer_cls_and_kwargs(plain, model)
    # Parameter groups of its own, as sentence-transformers' trainers have.
    groups = {name: kwargs[name] for name in ("params", "model", "optimizer_dict") if name in kwargs}
    lists = (part for part in groups.values() if isinstance(part, list))
    rates = [group["lr"] for part in lists for group in part if isinstance(group, dict) and "lr" in group]
    if rates and min(rates) < 0.1:
        logger.warning(
            "The learning rate of a parameter group, as in learning_rate_mapping, multiplies the step size that "
            f"{args.optim} finds, and {min(rates):g} makes it much smaller: leave it out, or keep it near 1."
        )
    return ALSALS, args.alsals_kwargs() | groups


class AlsalsTrainerMixin(PublishingMixin, CheckpointMixin, ScheduleMixin, SearchLogMixin):
    """Makes any [`~transformers.Trainer`] subclass train with [`ALSALS`]; others train as before.

    Put it first: `class MyTrainer(AlsalsTrainerMixin, SFTTrainer)`. The arguments are those of the trainer; its
    training arguments name the optimizer (see [`AlsalsArgumentsMixin`]), or `optimizers` holds an [`ALSALS`]. It adds
    [`StepSizeCallback`], whatever the optimizer, and [`FailureCallback`]; `remove_callback` takes them away.

    Attributes:
        alsals (`ALSALS` or `None`): The optimizer, without Accelerate's wrapper, once training has begun.
        loss_replay (`LossReplay`): Its closure, once training has begun.
    """

    compute_loss: Any
    loss_replay: LossReplay | None = None
    _is_probing = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        optimizer_cls, kwargs = self.optimizer_cls_and_kwargs or (None, {})
        watching: list[Any] = [StepSizeCallback]  # of AdamW too: runs are there to be compared
        if self.args.optim in PRESETS or isinstance(self.optimizer, ALSALS) or optimizer_cls is ALSALS:
            if isinstance(self.optimizer, ALSALS):
                direction = self.optimizer.direction
            else:
                given = kwargs if optimizer_cls is ALSALS else self.args.alsals_kwargs()
                growth = line_search_of(given.get("growth", "path")).growth
                direction = direction_of(given.get("direction"), growth.direction)
            refuse_unsupported(self, direction)
            watching.append(FailureCallback)
        for callback in watching:
            if not any(isinstance(one, callback) for one in self.callback_handler.callbacks):
                self.add_callback(callback)

    def _hp_search_setup(self, trial: Any) -> None:
        # Private, but nothing else sees the values of a trial before it begins (transformers 5.0 to 5.24).
        optim = self.args.optim
        super()._hp_search_setup(trial)
        given, self.args.optim = self.args.optim, optim
        if given != optim and {given, optim} & set(PRESETS):
            raise ValueError(
                f"hp_space must leave out optim, got {given!r} where the training arguments have {optim!r}: "
                "learning_rate and others depend on it, so search with a Trainer for each."
            )
        self.args.optim = given

    get_optimizer_cls_and_kwargs = OnInstanceOrClass(_optimizer_cls_and_kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer; the arguments are the Trainer's."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self.alsals, self.loss_replay = unwrap_alsals(optimizer), None
        if self.alsals is not None:
            set_hidden_matrices(self.alsals, self.model, layers_only=issubclass(self.alsals.direction, MuonDirection))
        if self.alsals is not None and self.alsals.pending.closure is None:
            self.alsals.set_closure(Unrecorded(type(self)))
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and tell the optimizer what its gradient clipping multiplies the gradients by."""
        super().create_accelerator_and_postprocess()
        clip_grad_norm_ = self.accelerator.clip_grad_norm_

        def clip_and_tell(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            parameters = list(parameters)
            total_norm = clip_grad_norm_(parameters, max_norm, *args, **kwargs)
            if self.alsals is not None and total_norm is not None:
                norm = total_norm.full_tensor() if isinstance(total_norm, DTensor) else torch.as_tensor(total_norm)
                clipped = {id(p) for p in parameters}
                is_whole = all(id(p) in clipped for group in self.alsals.param_groups for p in group["params"])
                # The factor of torch.nn.utils.clip_grads_with_norm_.
                clip_coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
                self.alsals.set_clip_coef(clip_coef, norm if is_whole else None)
            return total_norm

        self.accelerator.clip_grad_norm_ = clip_and_tell

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the Trainer's own training step and record the micro-batch for the closure.

        Args:
            model (`nn.Module`): The model to train.
            inputs (`dict[str, Any]`): The micro-batch.
            args, kwargs: Passed on, `num_items_in_batch` among them.

        Returns:
            `Tensor`: The micro-batch's share of the training loss, without a graph.

        Raises:
            RuntimeError: If the Trainer's training step does not call `compute_loss` and `accelerator.backward` once.
        """
        if self.alsals is None:
            return super().training_step(model, inputs, *args, **kwargs)
        replay = self.loss_replay
        is_first = replay is None
        if replay is None:
            probe_micro_batches = getattr(self.args, "probe_micro_batches", None)
            replay = self.loss_replay = LossReplay(model, self.accelerator, probe_micro_batches, self._probing)
            self.alsals.set_closure(replay)
            self.start_search_log()
        self._learning_rate = self.alsals.param_groups[0]["lr"]

        compute_loss, backward = self.compute_loss, self.accelerator.backward
        losses: list[Tensor] = []
        divisors: list[int] = []

        def compute_and_record(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            before = plain_values(self)

            def compute() -> Any:
                # It may change coefficients for later ones, and takes the labels out of the inputs it is given.
                self.__dict__.update(before, _is_probing=self._is_probing)
                return compute_loss(model, copy.copy(inputs), *args, **kwargs)

            output = replay.record(compute)
            losses.append(output[0] if isinstance(output, tuple) else output)
            return output

        def backward_and_note(loss: Tensor, **kwargs: Any) -> None:
            # The Trainer takes the loss of compute_loss as it is, or divided by the number of micro-batches.
            is_whole = not losses or loss is losses[-1]
            divisors.append(1 if is_whole else self.current_gradient_accumulation_steps)
            # Compared once, for it is a host-device sync.
            if is_first and losses and not torch.allclose(loss, losses[-1] / divisors[-1], rtol=1e-3, equal_nan=True):
                raise RuntimeError(
                    f"The training_step of {type(self).__name__} must give accelerator.backward the loss of "
                    "compute_loss, or that divided by gradient_accumulation_steps, for a probe to repeat it; "
                    f"got {loss.item():.6g} where compute_loss gave {losses[-1].item():.6g}: scale it in compute_loss."
                )
            backward(loss, **kwargs)

        # What compute_loss is called with is what a probe has to call it with, whoever overrides which of the two.
        self.compute_loss, self.accelerator.backward = compute_and_record, backward_and_note
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            replay.clear()
            raise
        finally:
            self.compute_loss, self.accelerator.backward = compute_loss, backward
        if len(losses) != 1 or len(divisors) != 1:
            raise RuntimeError(
                f"The training_step of {type(self).__name__} must call self.compute_loss and self.accelerator.backward"
                f" once, for a probe to repeat it; it called them {len(losses)} and {len(divisors)} times."
            )
        replay.micro_batches[-1].divisor = divisors[0]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, unless a probe does: what it computes has been logged in training.

        Args:
            logs (`dict[str, float]`): The values to log.
            args, kwargs: Passed on to the Trainer.
        """
        if not self._is_probing:
            super().log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _probing(self) -> Iterator[None]:
        # Trainers count tokens, collect metrics and adapt coefficients in compute_loss: a probe is no training.
        before = PlainState(self)
        self._is_probing = True
        try:
            with self.compute_loss_context_manager():
                yield
        finally:
            before.restore()


class AlsalsTrainer(AlsalsTrainerMixin, Trainer):
    """[`~transformers.Trainer`] for [`ALSALS`]; see [`AlsalsTrainerMixin`]."""


class AlsalsSeq2SeqTrainer(AlsalsTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] for [`ALSALS`]; see [`AlsalsTrainerMixin`]."""
