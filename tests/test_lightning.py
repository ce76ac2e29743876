"""PyTorch Lightning's automatic optimization is the plain loop, to the bit."""

import pytest
import torch
from noisy_model import NoisyModel
from small_problems import assert_identical

from hf_alsals import ALSALS, LossReplay

lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is optional")
STEPS = 5


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = NoisyModel()
        self.seen = []

    def configure_optimizers(self):
        optimizer = ALSALS(self.parameters(), search_interval=1)
        accumulation = self.trainer.accumulate_grad_batches
        self.replay = LossReplay(self.model, gradient_accumulation_steps=accumulation)
        optimizer.set_closure(self.replay)
        return optimizer

    def training_step(self, batch, batch_idx):
        return self.replay.record(self.model, batch[0])

    def on_train_batch_end(self, *args):
        optimizer = self.optimizers().optimizer
        self.seen.append((optimizer.step_size, optimizer.search.total_probes))


def batches(accumulation):
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8 * STEPS * accumulation, 4, generator=generator))
    return torch.utils.data.DataLoader(data, batch_size=8)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_model_with_dropout_and_moving_buffers(accumulation, tmp_path):
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulation,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    lightning.seed_everything(1)
    trainer.fit(module, batches(accumulation))

    torch.manual_seed(0)
    model = NoisyModel().train()
    optimizer = ALSALS(model.parameters(), search_interval=1)
    replay = LossReplay(model, gradient_accumulation_steps=accumulation)
    optimizer.set_closure(replay)
    seen = []
    lightning.seed_everything(1)
    loader = batches(accumulation)
    for i, (x,) in enumerate(loader):
        (replay.record(model, x) / accumulation).backward()
        if i % accumulation == accumulation - 1:
            optimizer.step()
            optimizer.zero_grad()
        seen.append((optimizer.step_size, optimizer.search.total_probes))
    assert module.seen == seen
    assert seen[-1][1] >= STEPS
    assert_identical(dict(module.model.state_dict()), dict(model.state_dict()))


def test_clipping_is_refused(tmp_path):
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", gradient_clip_val=0.1, logger=False, enable_checkpointing=False
    )
    with pytest.raises(RuntimeError, match="in Lightning by manual optimization"):
        trainer.fit(Module(), batches(1))
