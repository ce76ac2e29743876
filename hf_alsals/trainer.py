"""Trainers that supply the loss closure to ALSALS."""

import contextlib
import copy
from collections.abc import Iterator
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
from .presets import PRESETS
from .publishing import PublishingMixin
from .schedule import ScheduleMixin
from .search_log import SearchLogMixin
from .unsupported import refuse_unsupported


class AlsalsTrainerMixin(PublishingMixin, CheckpointMixin, ScheduleMixin, SearchLogMixin):
    """Makes any [`~transformers.Trainer`] subclass train with [`ALSALS`]; others train as before.

    Put it first: `class MyTrainer(AlsalsTrainerMixin, SFTTrainer)`. The arguments are those of the trainer; its
    training arguments name the optimizer (see [`AlsalsArgumentsMixin`]), or `optimizers` holds an [`ALSALS`]. It adds
    [`StepSizeCallback`] and [`FailureCallback`]; `remove_callback` takes them away.

    Attributes:
        alsals (`ALSALS` or `None`): The optimizer, without Accelerate's wrapper, once training has begun.
        loss_replay (`LossReplay`): Its closure, once training has begun.
    """

    compute_loss: Any
    loss_replay: LossReplay | None = None
    _is_probing = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        optimizer_cls, _ = self.optimizer_cls_and_kwargs or (None, None)
        if self.args.optim in PRESETS or isinstance(self.optimizer, ALSALS) or optimizer_cls is ALSALS:
            refuse_unsupported(self)
            for callback in (StepSizeCallback, FailureCallback):
                if not any(isinstance(one, callback) for one in self.callback_handler.callbacks):
                    self.add_callback(callback)

    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """Return the optimizer class and its keyword arguments.

        Args:
            args (`TrainingArguments`): The training arguments.
            model (`nn.Module`, *optional*): The model, which some of the Trainer's optimizers need.
        """
        if args.optim in PRESETS:
            return ALSALS, args.alsals_kwargs()
        return super().get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer; the arguments are the Trainer's."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self.alsals, self.loss_replay = unwrap_alsals(optimizer), None
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and tell the optimizer what its gradient clipping multiplies the gradients by."""
        super().create_accelerator_and_postprocess()
        clip_grad_norm_ = self.accelerator.clip_grad_norm_

        def clip_and_tell(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            total_norm = clip_grad_norm_(parameters, max_norm, *args, **kwargs)
            if self.alsals is not None and total_norm is not None:
                norm = total_norm.full_tensor() if isinstance(total_norm, DTensor) else torch.as_tensor(total_norm)
                # The factor of torch.nn.utils.clip_grads_with_norm_.
                self.alsals.set_clip_coef((max_norm / (norm + 1e-6)).clamp(max=1.0))
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
        if replay is None:
            probe_micro_batches = getattr(self.args, "probe_micro_batches", None)
            replay = self.loss_replay = LossReplay(model, self.accelerator, probe_micro_batches, self._probing)
            self.alsals.set_closure(replay)
            self.start_search_log()

        compute_loss, backward = self.compute_loss, self.accelerator.backward
        losses: list[Tensor] = []
        divisors: list[int] = []

        def compute_and_record(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # compute_loss takes the labels out of the inputs it is given.
            output = replay.record(lambda: compute_loss(model, copy.copy(inputs), *args, **kwargs))
            losses.append(output[0] if isinstance(output, tuple) else output)
            return output

        def backward_and_note(loss: Tensor, **kwargs: Any) -> None:
            # The Trainer takes the loss of compute_loss as it is, or divided by the number of micro-batches.
            is_whole = not losses or loss is losses[-1]
            divisors.append(1 if is_whole else self.current_gradient_accumulation_steps)
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
        # TRL's trainers count tokens and collect metrics in compute_loss (TRL 1.16): a probe is no training.
        own = self.__dict__
        counters: dict[str, Any] = {name: own[name] for name in ("_metrics", "_total_train_tokens") if name in own}
        own.update(copy.deepcopy(counters), _is_probing=True)
        try:
            with self.compute_loss_context_manager():
                yield
        finally:
            own.update(counters, _is_probing=False)


class AlsalsTrainer(AlsalsTrainerMixin, Trainer):
    """[`~transformers.Trainer`] for [`ALSALS`]; see [`AlsalsTrainerMixin`]."""


class AlsalsSeq2SeqTrainer(AlsalsTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] for [`ALSALS`]; see [`AlsalsTrainerMixin`]."""
