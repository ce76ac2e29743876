"""Trainers that hand the loss closure to ALSALS."""

import contextlib
import copy
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Seq2SeqTrainer, Trainer
from transformers.modelcard import TrainingSummary
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType
from transformers.utils import is_sagemaker_mp_enabled

from .callbacks import StepSizeCallback
from .failures import FailureCallback
from .hub import PublishedArguments, is_local_path, remove_local_base_model, without_local_paths
from .loss_replay import LossReplay
from .model_card import add_results_to_card, add_search_to_card, correct_start_in_card
from .optimizer import ALSALS, PRESETS
from .path_search import PathSearch

logger = logging.getLogger(__name__)


class AlsalsTrainerMixin:
    """Makes any [`~transformers.Trainer`] subclass train with [`ALSALS`]; others train as before.

    Put it first: `class MyTrainer(AlsalsTrainerMixin, SFTTrainer)`. The arguments are those of the trainer; its
    training arguments name the optimizer (see [`AlsalsArgumentsMixin`]), or `optimizers` holds an [`ALSALS`]. It adds
    [`StepSizeCallback`] and [`FailureCallback`]; `remove_callback` takes them away.

    Attributes:
        alsals (`ALSALS` or `None`): The optimizer, without Accelerate's wrapper, once training has begun.
        loss_replay (`LossReplay`): The micro-batches of the present optimizer step, once training has begun.
    """

    alsals: ALSALS | None = None
    loss_replay: LossReplay | None = None
    _logged_probes = (0, 0)
    _is_probing = False
    _hub_failed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        optimizer_cls, _ = self.optimizer_cls_and_kwargs or (None, None)
        if self.args.optim in PRESETS or isinstance(self.optimizer, ALSALS) or optimizer_cls is ALSALS:
            self._refuse_what_is_not_supported()
            for callback in (StepSizeCallback, FailureCallback):
                if not any(isinstance(one, callback) for one in self.callback_handler.callbacks):
                    self.add_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and note what its gradient clipping multiplies the gradients by."""
        super().create_accelerator_and_postprocess()
        clip_grad_norm_ = self.accelerator.clip_grad_norm_

        def clip_and_note(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            total_norm = clip_grad_norm_(parameters, max_norm, *args, **kwargs)
            if self.alsals is not None and total_norm is not None:
                norm = total_norm.full_tensor() if isinstance(total_norm, DTensor) else torch.as_tensor(total_norm)
                # The factor of torch.nn.utils.clip_grads_with_norm_.
                clip_coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
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
        self.loss_replay = None
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule; `"warmup_stable_decay"` needs no `lr_scheduler_kwargs`.

        Without `num_decay_steps` it falls from the end of `num_stable_steps` on, by default in the second half of what
        comes after a warm-up, whatever the optimizer. With an `optim` of ours, or without `num_decay_steps`, it falls
        linearly to 0 unless `lr_scheduler_kwargs` say otherwise.

        Args:
            num_training_steps (`int`): Optimizer steps of the whole training.
            args, kwargs: Passed on to the Trainer.

        Returns:
            `torch.optim.lr_scheduler.LRScheduler`: The schedule.
        """
        given = self.args
        changes = given.lr_scheduler_kwargs or {}
        is_ours = given.optim in PRESETS or "num_decay_steps" not in changes  # the Trainer refuses the latter
        if given.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and is_ours:
            steps = num_training_steps - given.get_warmup_steps(num_training_steps)
            stable = changes.get("num_stable_steps")
            decay_steps = steps // 2 if stable is None else max(steps - stable, 0)
            decay = {"num_decay_steps": decay_steps, "decay_type": "linear"}
            self.args = copy.copy(given)  # the user's own may serve another training
            self.args.lr_scheduler_kwargs = decay | changes
        try:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        finally:
            self.args = given

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint to resume from.
            args, kwargs: Passed on to the Trainer.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the Trainer's own training step and record the micro-batch for the loss closure.

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
        if self.loss_replay is None:
            probe_micro_batches = getattr(self.args, "probe_micro_batches", None)
            self.loss_replay = LossReplay(model, self.accelerator, probe_micro_batches)
            self._logged_probes = (self.state.global_step, self.alsals.line_search.total_probes)

        compute_loss, backward = self.compute_loss, self.accelerator.backward
        losses: list[Tensor] = []
        divisors: list[int] = []

        def compute_and_record(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # compute_loss takes the labels out of the inputs it is given.
            output = self.loss_replay.record(lambda: compute_loss(model, copy.copy(inputs), *args, **kwargs))
            losses.append(output[0] if isinstance(output, tuple) else output)
            return output

        def backward_and_note(loss: Tensor, **kwargs: Any) -> None:
            # The Trainer takes the loss of compute_loss as it is, or divided by the number of micro-batches.
            as_it_is = not losses or loss is losses[-1]
            divisors.append(1 if as_it_is else self.current_gradient_accumulation_steps)
            backward(loss, **kwargs)

        # What compute_loss is called with is what a probe has to call it with, whoever overrides which of the two.
        self.compute_loss, self.accelerator.backward = compute_and_record, backward_and_note
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            self.loss_replay.clear()
            raise
        finally:
            self.compute_loss, self.accelerator.backward = compute_loss, backward
        if len(losses) != 1 or len(divisors) != 1:
            raise RuntimeError(
                f"The training_step of {type(self).__name__} must call self.compute_loss and self.accelerator.backward"
                f" once, for a probe to repeat it; it called them {len(losses)} and {len(divisors)} times."
            )
        self.loss_replay.micro_batches[-1].divisor = divisors[0]
        if self.accelerator.sync_gradients:
            self._window_loss = self.loss_replay.loss
            self.alsals.set_closure(self._replay_loss, self._window_loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with step size, slope, decrease, Armijo ratio, path slope and probes per step beside the training loss.

        Args:
            logs (`dict[str, float]`): The values to log.
            args, kwargs: Passed on to the Trainer.
        """
        if self._is_probing:  # a compute_loss that logs has done so in training
            return
        if self.alsals is not None and "learning_rate" in logs:
            step, probes = self.state.global_step, self.alsals.line_search.total_probes
            last_step, last_probes = self._logged_probes
            self._logged_probes = (step, probes)
            logs["lr_multiplier"] = logs["learning_rate"]
            logs["learning_rate"] = logs["step_size"] = self.alsals.step_size
            search = self.alsals.line_search
            follows_path = isinstance(search, PathSearch)
            if not (follows_path and search.is_annealing):  # while it anneals they would be those of long ago
                logs["slope"] = search.slope
                logs["decrease"] = search.decrease
                logs["armijo_ratio"] = search.armijo_ratio
                if follows_path:
                    logs["path_slope"] = search.path_slope
            logs["probes"] = (probes - last_probes) / max(step - last_step, 1)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model, with training arguments that hold neither the Hub token nor a local path.

        Args:
            output_dir (`str`, *optional*): The folder, `args.output_dir` if left out.
            args, kwargs: Passed on to the Trainer.
        """
        with self._published_arguments():
            super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            remove_local_base_model(output_dir or self.args.output_dir)

    def save_state(self) -> None:
        """Save the Trainer's state, naming the best checkpoint without its path."""
        best_model_checkpoint = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = without_local_paths(best_model_checkpoint)
        try:
            super().save_state()
        finally:
            self.state.best_model_checkpoint = best_model_checkpoint

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository on the Hub; where that fails, warn, train, and try again in `push_to_hub`.

        Args:
            args, kwargs: Passed on to the Trainer.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
            self._hub_failed = False
        except Exception as error:  # whatever the Hub or the network does must not cost a run
            self._hub_failed = True
            self.push_in_progress = None
            self.hub_model_id = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            logger.warning(f"The Hub did not open the repository {self.hub_model_id}: {' '.join(str(error).split())}")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model, write the model card and push the output directory to the Hub.

        Args:
            args, kwargs: Passed on to the Trainer: `commit_message`, `blocking`, `token` and the fields of the card.

        Returns:
            `CommitInfo`, or a `Future` of it if `blocking=False`.

        Raises:
            Exception: What the Hub or the network answered; the results are on disk by then.
        """
        if self._hub_failed:
            self.init_hf_repo(token=kwargs.get("token", args[2] if len(args) > 2 else None))
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception:
            output_dir = self.args.output_dir
            logger.error(
                f"The push to the Hub failed, the results are in {output_dir}: push them later with "
                f"hf upload {self.hub_model_id} {output_dir} --exclude 'checkpoint-*'"
            )
            raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, with the results in its metadata and a section on the step size.

        Args:
            args, kwargs: Passed on to the Trainer; a local path among them is left out of the card.
        """
        if not self.is_world_process_zero():
            return
        start = kwargs.get("finetuned_from") or getattr(getattr(self.model, "config", None), "_name_or_path", None)
        for name in ("finetuned_from", "dataset_tags", "dataset", "dataset_args"):
            if is_local_path(kwargs.get(name)):
                kwargs[name] = None
        super().create_model_card(*args, **kwargs)
        remove_local_base_model(self.args.output_dir)
        path = os.path.join(self.args.output_dir, "README.md")
        correct_start_in_card(path, from_local_model=is_local_path(start))
        # A license is given so that the Hub is not asked for that of the base model.
        summary = TrainingSummary.from_trainer(self, **{"license": "unknown", **kwargs})
        dataset = {
            "dataset_type": _first(summary.dataset_tags) or "custom",
            "dataset_name": _first(summary.dataset) or "unknown",
            "dataset_config": _first(summary.dataset_args),
        }
        add_results_to_card(path, self.state.log_history, dataset, _first(summary.tasks) or "other")
        if self.alsals is not None:
            seconds = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
            steps = self.state.global_step
            add_search_to_card(path, self.args.optim, self.alsals, steps, seconds[-1] if seconds else None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Private, but it pickles self.args and pushes it at once (transformers 5.0 to 5.23).
        with self._published_arguments():
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _published_arguments(self) -> Iterator[None]:
        args = self.args
        self.args = args if isinstance(args, PublishedArguments) else PublishedArguments(args)
        try:
            yield
        finally:
            self.args = args

    def _replay_loss(self) -> Tensor:
        # TRL's trainers count tokens and collect metrics in compute_loss (TRL 1.16): a probe is no training.
        counters = {name: vars(self)[name] for name in ("_metrics", "_total_train_tokens") if name in vars(self)}
        vars(self).update(copy.deepcopy(counters), _is_probing=True)
        try:
            with self.compute_loss_context_manager():
                return self.loss_replay()
        finally:
            vars(self).update(counters, _is_probing=False)

    def _refuse_what_is_not_supported(self) -> None:
        fsdp_plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        sharded_at_load = getattr(self, "is_distributed_loading_by_transformers", False)  # since transformers 5.14
        if self.is_deepspeed_enabled:
            raise ValueError("ALSALS does not run under DeepSpeed: use FSDP2 (fsdp_version 2) instead.")
        if self.is_fsdp_enabled and getattr(fsdp_plugin, "fsdp_version", 1) == 1:
            raise ValueError("ALSALS does not run under FSDP1, which flattens parameters: set fsdp_version to 2.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"ALSALS does not run under torch.nn.DataParallel (one process, {self.args.n_gpu} GPUs): launch one "
                "process for each GPU with torchrun or accelerate launch."
            )
        if self.get_tp_size() > 1 or self.get_cp_size() > 1 or self.get_sp_size() > 1 or sharded_at_load:
            raise ValueError(
                "ALSALS does not run under tensor, context, sequence or expert parallelism: use data parallelism, "
                "with DDP or FSDP2."
            )
        if self.args.device.type == "xla":
            raise ValueError("ALSALS does not run on TPUs or under XLA: use a GPU or the CPU.")
        if is_sagemaker_mp_enabled():
            raise ValueError("ALSALS does not run under SageMaker's model parallelism: use DDP or FSDP2 instead.")


class AlsalsTrainer(AlsalsTrainerMixin, Trainer):
    """[`~transformers.Trainer`] for [`ALSALS`]; see [`AlsalsTrainerMixin`]."""


class AlsalsSeq2SeqTrainer(AlsalsTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] for [`ALSALS`]; see [`AlsalsTrainerMixin`]."""


def last_whole_checkpoint(output_dir: str) -> str | None:
    """Return the last checkpoint that was written to its end.

    The Trainer writes a checkpoint's trainer_state.json last: where a run was killed while it saved, there is none or
    a broken one.

    Args:
        output_dir (`str`): The output directory of a run.

    Returns:
        `str` or `None`: The checkpoint's folder, if there is one.
    """
    if not os.path.isdir(output_dir):
        return None
    steps = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in os.listdir(output_dir)]
    for step in sorted((int(match.group(1)) for match in steps if match), reverse=True):
        checkpoint = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        try:
            TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return checkpoint
    return None


def _first(names: str | list[str] | None) -> str | None:
    return names[0] if isinstance(names, list) and names else names or None
