"""What test_distributed.py runs: `torchrun --nproc_per_node 2 distributed_tasks.py OUTPUT_DIR [TASK ...]`.

Each process writes the results of all tasks to OUTPUT_DIR/RANK.json. The test calls the same tasks in one process.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from tiny_training import Observer, Sequences, arguments, gpt2, training_logs, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback

from hf_alsals import ALSALS, AlsalsTrainer, LossReplay

GLOBAL_BATCH = 8


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def described(trainer):
    return {
        "step_sizes": [entry["step_size"] for entry in training_logs(trainer)],
        "losses": [entry["loss"] for entry in training_logs(trainer)],
        "weights": weights(trainer).tolist(),
    }


def trainer_of(folder, accumulation=1, model=None, **kwargs):
    batch_size = GLOBAL_BATCH // processes() // accumulation
    args = arguments(
        folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **kwargs
    )
    # In float64: Adam makes whole steps of the rounding noise of gradients that are zero, as those of the key biases.
    return AlsalsTrainer(model or gpt2(dropout=0, dtype=torch.float64), args, train_dataset=Sequences())


def ddp(folder, accumulation=1):
    trainer = trainer_of(folder / f"ddp{accumulation}", accumulation, max_steps=30)
    trainer.train()
    return described(trainer)


def accumulated(folder):
    return ddp(folder, accumulation=2)


def dropout(folder):
    seen = []
    trainer = trainer_of(folder / "dropout", model=gpt2(dropout=0.1), max_steps=10)
    trainer.add_callback(
        Observer(lambda: seen.append((trainer.loss_replay().item(), trainer.loss_replay.loss.item())))
    )
    trainer.train()
    return described(trainer) | {"seen": seen}


class HostReads(TorchFunctionMode):
    """Counts what would be host-device syncs on a GPU: tensors read as numbers, but for those that stay on the CPU."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        reads = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__)
        on_host = {id(state["step"]) for state in self.optimizer.state.values() if "step" in state}
        self.count += function in reads and id(args[0]) not in on_host
        return function(*args, **(kwargs or {}))


class Counted(ALSALS):
    """Notes the host-device syncs of every step, and the probes beside them."""

    def step(self, *args, **kwargs):
        with HostReads(self) as reads:
            loss = super().step(*args, **kwargs)
        self.seen.append((reads.count, self.searched, self.probes))
        return loss


class Bigrams(nn.Module):
    """A model whose forward pass reads no tensor, as those of transformers do to find their masks."""

    def __init__(self, norm):
        super().__init__()
        self.embedding = nn.Embedding(31, 8)
        self.norm = norm
        self.head = nn.Linear(8, 31)

    def forward(self, input_ids, labels):
        logits = self.head(self.norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def host_reads(folder):
    torch.manual_seed(0)
    model = Bigrams(nn.Identity())
    optimizer = Counted(model.parameters(), search_interval=3)
    optimizer.seen = []
    args = arguments(
        folder / "reads", per_device_train_batch_size=GLOBAL_BATCH // processes(), lr_scheduler_type="constant"
    )
    trainer = AlsalsTrainer(model, args, train_dataset=Sequences(), optimizers=(optimizer, None))
    trainer.train()
    return described(trainer) | {"seen": optimizer.seen}


def communication(folder):
    torch.manual_seed(0)
    trainer = trainer_of(folder / "communication", model=Bigrams(nn.BatchNorm1d(8)), max_steps=3)
    counts = []

    def probe():
        with CommDebugMode() as mode:
            trainer.loss_replay()
        counts.append(mode.get_total_counts())

    trainer.add_callback(Observer(probe))
    trainer.train()
    return {"counts": counts}


def resumed(folder):
    whole = trainer_of(folder / "resume", max_steps=8, save_strategy="steps", save_steps=5)
    whole.train()
    again = trainer_of(folder / "resume", max_steps=8, save_strategy="no")
    try:
        again.train(resume_from_checkpoint=str(folder / "resume" / "checkpoint-5"))
    except RuntimeError as error:
        if "don't know how to restore data location" not in str(error):
            raise
        return {"unsupported": "this transformers cannot resume two processes on CPUs: it loads to a device cpu:0"}
    return {"whole": described(whole), "again": described(again)}


def accelerate_loop(folder, mixed_precision="no"):
    torch.manual_seed(0)
    accumulation = 2
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, mixed_precision=mixed_precision, cpu=True)
    alsals = ALSALS((model := gpt2(dropout=0)).parameters(), search_interval=1)
    loader = torch.utils.data.DataLoader(Sequences(), batch_size=GLOBAL_BATCH // processes() // accumulation)
    model, optimizer, loader = accelerator.prepare(model, alsals, loader)
    replay = LossReplay(model, accelerator)
    alsals.set_closure(replay)
    step_sizes, replayed = [], []
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = replay.record(lambda batch: model(**batch).logits.float().square().mean(), batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    replayed.append((replay().item(), replay.loss.item()))
                optimizer.step()
                if accelerator.sync_gradients:
                    step_sizes.append(alsals.step_size)
                optimizer.zero_grad()
    flat = torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])
    return {"step_sizes": step_sizes, "weights": flat.tolist(), "seen": replayed}


def accelerate_loop_bf16(folder):
    return accelerate_loop(folder, mixed_precision="bf16")


def sharded_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 1)).double()
    if processes() > 1:
        for module in (model[0], model[2], model):
            fully_shard(module)
    return model, ALSALS(model.parameters(), weight_decay=0.01, search_interval=1)


def sharded(folder, saved_at=None):
    """FSDP2 in a loop of its own: parameters and moments are DTensors, with shards of unequal size."""
    model, optimizer = sharded_model()
    rank = dist.get_rank() if processes() > 1 else 0
    generator = torch.Generator().manual_seed(1)
    step_sizes, slopes = [], []
    for step in range(30):
        if step == saved_at:
            dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=folder / "dcp")
            model, optimizer = sharded_model()
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
            dcp.load(state, checkpoint_id=folder / "dcp")
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        x = torch.randn(16, 8, generator=generator, dtype=torch.float64).chunk(processes())[rank]

        def mean_loss(model=model, x=x):
            loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
            total = loss.detach().clone()
            if processes() > 1:
                dist.all_reduce(total)
            return loss, total / processes()

        loss, total = mean_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lambda: mean_loss()[1], total)
        step_sizes.append(optimizer.step_size)
        slopes.append(optimizer.slope)
    kinds = {type(state["exp_avg"]) is DTensor for state in optimizer.state.values()}
    flat = [(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()]
    return {
        "step_sizes": step_sizes,
        "slopes": slopes,
        "weights": torch.cat(flat).tolist(),
        "sharded_moments": kinds == {True},
    }


def sharded_and_saved(folder):
    return sharded(folder, saved_at=13)


def sharded_replay(folder):
    """FSDP2 with parameters in the root, which stay gathered after a forward pass, and rejected probes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 1)).double()
    rank = dist.get_rank() if processes() > 1 else 0
    if processes() > 1:
        fully_shard(model)
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=True)
    optimizer = ALSALS(model.parameters(), lr=0.5, growth="constant", initial_step_size=3.0)
    replay = LossReplay(model, accelerator)
    optimizer.set_closure(replay)
    generator = torch.Generator().manual_seed(1)
    step_sizes, losses = [], []
    for _ in range(20):
        x = torch.randn(16, 8, generator=generator, dtype=torch.float64).chunk(processes())[rank]
        optimizer.zero_grad()
        with accelerator.accumulate(model):
            loss = replay.record(lambda x: (model(x) - x[:, :1] * x[:, 1:2]).square().mean(), x)
        loss.backward()
        losses.append(replay.loss.item())
        optimizer.step()
        step_sizes.append(optimizer.step_size)
    flat = [(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()]
    probes = optimizer.search.total_probes
    return {"step_sizes": step_sizes, "losses": losses, "weights": torch.cat(flat).tolist(), "probes": probes}


class RunningMean(nn.Module):
    """A model whose loss depends on a buffer that moves, and that DDP broadcasts."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 1)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        with torch.no_grad():
            self.mean.lerp_(x.mean(dim=0), 0.5)
        return self.head(x - self.mean).square().mean()


def broadcast_buffers(folder):
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=True)
    model = RunningMean()
    alsals = ALSALS(model.parameters(), search_interval=1)
    model, optimizer = accelerator.prepare(model, alsals)
    replay = LossReplay(model, accelerator)
    alsals.set_closure(replay)
    rank = dist.get_rank() if processes() > 1 else 0
    seen = []
    for step in range(5):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).chunk(processes())[rank]
        with accelerator.accumulate(model):
            accelerator.backward(replay.record(model, x))
            seen.append((replay().item(), replay.loss.item()))
            optimizer.step()
            optimizer.zero_grad()
    return {"seen": seen}


def not_finite_on_one_process(folder):
    """One process meets an infinite loss: all skip that step, and go on in step."""

    class Poisoned(AlsalsTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            poisoned = self.state.global_step == 2 and self.args.process_index == processes() - 1
            return loss * float("inf") if poisoned else loss

    args = arguments(folder / "poisoned", per_device_train_batch_size=GLOBAL_BATCH // processes(), max_steps=6)
    trainer = Poisoned(gpt2(dropout=0), args, train_dataset=Sequences())
    before = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            before.append(weights(trainer).sum().item())

    trainer.add_callback(Watch())
    trainer.train()
    return {"sums": before, "skipped": trainer.alsals.skipped_steps, "step_size": trainer.alsals.step_size}


TASKS = (
    ddp,
    accumulated,
    dropout,
    host_reads,
    communication,
    resumed,
    accelerate_loop,
    sharded,
    sharded_and_saved,
    sharded_replay,
    broadcast_buffers,
    not_finite_on_one_process,
)


if __name__ == "__main__":
    output = Path(sys.argv[1])
    dist.init_process_group("gloo")
    tasks = [globals()[name] for name in sys.argv[2:]] or TASKS
    results = {task.__name__: task(output) for task in tasks}
    (output / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
