"""What ALSALS does not run under, refused before training starts."""

from transformers import Trainer
from transformers.utils import is_sagemaker_mp_enabled

from .direction import Direction


def refuse_unsupported(trainer: Trainer, direction: type[Direction]) -> None:
    """Raise if a Trainer is set up for something that the search cannot do.

    Args:
        trainer (`Trainer`): The Trainer, after its constructor.
        direction (`type[Direction]`): The direction of its optimizer.

    Raises:
        ValueError: If it is; the message says what to do instead.
    """
    fsdp_plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    is_sharded_at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)  # since transformers 5.14
    if trainer.is_deepspeed_enabled:
        raise ValueError("ALSALS does not run under DeepSpeed: use FSDP2 (fsdp_version 2) instead.")
    if trainer.is_fsdp_enabled and getattr(fsdp_plugin, "fsdp_version", 1) == 1:
        raise ValueError("ALSALS does not run under FSDP1, which flattens parameters: set fsdp_version to 2.")
    if trainer.is_fsdp_enabled and not direction.takes_shards:
        raise ValueError(f"{direction.description} needs whole parameters, not shards: use DDP, or direction=adam.")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"ALSALS does not run under torch.nn.DataParallel (one process, {trainer.args.n_gpu} GPUs): launch one "
            "process for each GPU with torchrun or accelerate launch."
        )
    if trainer.get_tp_size() > 1 or trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1 or is_sharded_at_load:
        raise ValueError(
            "ALSALS does not run under tensor, context, sequence or expert parallelism: use data parallelism, "
            "with DDP or FSDP2."
        )
    if trainer.args.device.type == "xla":
        raise ValueError("ALSALS does not run on TPUs or under XLA: use a GPU or the CPU.")
    if is_sagemaker_mp_enabled():
        raise ValueError("ALSALS does not run under SageMaker's model parallelism: use DDP or FSDP2 instead.")
