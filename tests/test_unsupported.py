from types import SimpleNamespace

import pytest
import torch
from tiny_training import Sequences, arguments, gpt2
from transformers import TrainingArguments

from hf_alsals import ALSALS, AlsalsTrainer, AlsalsTrainingArguments
from hf_alsals.adam import AdamDirection
from hf_alsals.unsupported import refuse_unsupported


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed: use FSDP2"),
        ({"is_fsdp_enabled": True}, "FSDP1.*set fsdp_version to 2"),
        ({"get_tp_size": lambda: 2}, "tensor, context, sequence or expert parallelism: use data parallelism"),
        ({"get_cp_size": lambda: 2}, "tensor, context, sequence or expert parallelism: use data parallelism"),
        ({"get_sp_size": lambda: 2}, "tensor, context, sequence or expert parallelism: use data parallelism"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_exact_is_refused_when_the_trainer_is_built(changed, message, tmp_path):
    class Elsewhere(AlsalsTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            vars(self).update(changed)

    with pytest.raises(ValueError, match=message):
        Elsewhere(gpt2(), arguments(tmp_path), train_dataset=Sequences())


def test_shards_are_refused_along_a_direction_that_needs_whole_parameters(tmp_path):
    class Sharded(AlsalsTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True
            self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)

    with pytest.raises(ValueError, match="Muon's direction needs whole parameters, not shards: use DDP, or"):
        Sharded(gpt2(), arguments(tmp_path, optim="alsals_muon"), train_dataset=Sequences())


def test_a_hand_made_optimizer_is_refused_there_too(tmp_path):
    class TensorParallel(AlsalsTrainer):
        def get_tp_size(self):
            return 2

    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch")
    TensorParallel(gpt2(), args, train_dataset=Sequences())
    with pytest.raises(ValueError, match="tensor, context, sequence or expert parallelism"):
        model = gpt2()
        TensorParallel(model, args, train_dataset=Sequences(), optimizers=(ALSALS(model.parameters()), None))


def test_data_parallelism_in_one_process_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel \(one process, 2 GPUs\): launch one process for each GPU"):
        AlsalsTrainer(gpt2(), args, train_dataset=Sequences())


def test_a_model_that_transformers_has_sharded_at_load_is_refused(tmp_path):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences())
    trainer.is_distributed_loading_by_transformers = True  # from transformers 5.14 on it is the model's
    with pytest.raises(ValueError, match="tensor, context, sequence or expert parallelism: use data parallelism"):
        refuse_unsupported(trainer, AdamDirection)


def test_a_device_of_xla_is_refused(tmp_path, monkeypatch):
    trainer = AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences())
    monkeypatch.setattr(AlsalsTrainingArguments, "device", torch.device("xla"))
    with pytest.raises(ValueError, match="does not run on TPUs or under XLA: use a GPU or the CPU"):
        refuse_unsupported(trainer, AdamDirection)


def test_model_parallelism_of_sagemaker_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_alsals.unsupported.is_sagemaker_mp_enabled", lambda: True)
    with pytest.raises(ValueError, match="SageMaker's model parallelism: use DDP or FSDP2"):
        AlsalsTrainer(gpt2(), arguments(tmp_path), train_dataset=Sequences())
