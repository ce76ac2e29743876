"""What only a GPU can show: its dropout kernels and scalers, its host-device syncs, and FSDP2 through the Trainer."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import sharded_run
import torch
from exactness import build, train_and_compare
from tiny_training import Sequences, arguments, gpt2, training_logs

from hf_alsals import ALSALS, AlsalsTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "t5", "resnet"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_at_step_size_zero_the_closure_is_the_training_loss(name, precision, accumulation, tmp_path):
    model, dataset = build(name)
    args = arguments(tmp_path, use_cpu=False, gradient_accumulation_steps=accumulation, **precision)
    train_and_compare(AlsalsTrainer(model, args, train_dataset=dataset))


def test_a_step_without_a_search_has_one_host_device_sync():
    model = torch.nn.Linear(4, 1).cuda()
    optimizer = ALSALS(model.parameters(), search_interval=10)
    x = torch.randn(16, 4, device="cuda")

    def closure():
        return (model(x) - x[:, :1]).square().mean()

    for step in range(3):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step(closure, loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer.searched == (step == 0)
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1


def test_fsdp2_through_the_trainer(tmp_path):
    alone = AlsalsTrainer(gpt2(dropout=0), arguments(tmp_path, use_cpu=False, max_steps=10), train_dataset=Sequences())
    alone.train()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([*command, sharded_run.__file__, str(tmp_path)], env=environment, check=True, timeout=300)
    whole, resumed = json.loads((tmp_path / "logs.json").read_text())
    assert whole == resumed
    step_sizes = [entry["step_size"] for entry in training_logs(alone)]
    assert [entry["step_size"] for entry in whole] == pytest.approx(step_sizes, rel=1e-4)
