"""Trainers that hand the loss closure to ALSALS."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from .loss_replay import LossReplay
from .optimizer import ALSALS, PRESETS


class AlsalsTrainerMixin:
    """Makes any [`~transformers.Trainer`] subclass train with [`ALSALS`]; with another optimizer it changes nothing.

    Put it first: `class MyTrainer(AlsalsTrainerMixin, SFTTrainer)`. The arguments are those of the trainer; its
    training arguments name the optimizer (see [`AlsalsArgumentsMixin`]), or `optimizers` holds an [`ALSALS`].

    Attributes:
        alsals (`ALSALS` or `None`): The optimizer, without Accelerate's wrapper, once training has begun.
        loss_replay (`LossReplay`): The micro-batches of the present optimizer step, once training has begun.
    """

    alsals: ALSALS | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and note what its gradient clipping multiplies the gradients by."""
        super().create_accelerator_and_postprocess()
        clip_grad_norm_ = self.accelerator.clip_grad_norm_

        def clip_and_note(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            total_norm = clip_grad_norm_(parameters, max_norm, *args, **kwargs)
            if self.alsals is not None and total_norm is not None:
                # The factor of torch.nn.utils.clip_grads_with_norm_.
                clip_coef = (max_norm / (torch.as_tensor(total_norm) + 1e-6)).clamp(max=1.0)
                self.alsals.set_closure(self._replay_loss, self._window_loss, clip_coef)
            return total_norm

        self.accelerator.clip_grad_norm_ = clip_and_note

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
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper, on a second call of train()
        self.alsals = inner if isinstance(inner, ALSALS) else None
        self.loss_replay = LossReplay(self.model, self.accelerator)
        self._logged_probes: tuple[int, int] | None = None
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the Trainer's own training step and record the micro-batch for the loss closure.

        Args:
            model (`nn.Module`): The model to train.
            inputs (`dict[str, Any]`): The micro-batch.
            args, kwargs: Passed on, `num_items_in_batch` among them.

        Returns:
            `Tensor`: The micro-batch's share of the training loss, without a graph.
        """
        if self.alsals is None:
            return super().training_step(model, inputs, *args, **kwargs)
        if self._logged_probes is None:
            self._logged_probes = (self.state.global_step, self.alsals.line_search.total_probes)

        compute_loss = self.compute_loss

        def compute_and_record(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # compute_loss takes the labels out of the inputs it is given.
            return self.loss_replay.record(lambda: compute_loss(model, copy.copy(inputs), *args, **kwargs))

        # What compute_loss is called with is what a probe has to call it with, whoever overrides which of the two.
        self.compute_loss = compute_and_record
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss = compute_loss

        # The Trainer returns the loss of compute_loss as it is, or divided by the number of micro-batches.
        micro_batch = self.loss_replay.micro_batches[-1]
        as_it_is = loss.data_ptr() == micro_batch.loss.data_ptr()
        micro_batch.divisor = 1 if as_it_is else self.current_gradient_accumulation_steps
        if self.accelerator.sync_gradients:
            self._window_loss = self.loss_replay.loss
            self.alsals.set_closure(self._replay_loss, self._window_loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the step size, slope, decrease and probes per step beside the training loss.

        Args:
            logs (`dict[str, float]`): The values to log.
            args, kwargs: Passed on to the Trainer.
        """
        if self.alsals is not None and "learning_rate" in logs:
            step, probes = self.state.global_step, self.alsals.line_search.total_probes
            last_step, last_probes = self._logged_probes
            self._logged_probes = (step, probes)
            logs["lr_multiplier"] = logs["learning_rate"]
            logs["learning_rate"] = logs["step_size"] = self.alsals.step_size
            logs["slope"] = self.alsals.slope
            logs["decrease"] = self.alsals.decrease
            logs["probes"] = (probes - last_probes) / max(step - last_step, 1)
        super().log(logs, *args, **kwargs)

    def _replay_loss(self) -> Tensor:
        with self.compute_loss_context_manager():
            return self.loss_replay()


class AlsalsTrainer(AlsalsTrainerMixin, Trainer):
    """[`~transformers.Trainer`] for [`ALSALS`]; see [`AlsalsTrainerMixin`]."""


class AlsalsSeq2SeqTrainer(AlsalsTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] for [`ALSALS`]; see [`AlsalsTrainerMixin`]."""
