"""Step time and peak memory of ALSALS beside other optimizers, in the Trainer's loop on a GPT-2.

Every run is a process of its own; each round runs all optimizers once, one after the other, and the ratios to
adamw_torch_fused are taken within a round. Needs schedulefree, prodigyopt and salsa-optimizer for their
rows, pytorch_optimizer for Muon's.

    python recipes/benchmarks/overhead.py --output recipes/benchmarks/overhead.json
    python recipes/benchmarks/overhead.py --mode optimizer --output recipes/benchmarks/overhead-optimizer.json
    python recipes/benchmarks/overhead.py --n_layer 12 --n_embd 768 --n_head 12 --vocab_size 50257 --batch_size 32 \
        --sequence_length 1024 --bf16 --processes 1 8 --output overhead-gpt2.json
"""

import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import bare_step
import torch
import transformers
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, TrainerCallback, set_seed

from hf_alsals import AlsalsTrainer, AlsalsTrainingArguments
from hf_alsals.optimizer import unwrap_alsals

# A constant schedule, because nothing is searched while it anneals.
EVERY_STEP = {"optim": "alsals", "optim_args": "search_interval=1", "lr_scheduler_type": "constant"}

# Row of the table: training arguments, or the package that brings the optimizer.
OPTIMIZERS: dict[str, dict[str, str]] = {
    "adamw_torch_fused": {"optim": "adamw_torch_fused"},
    "adamw_torch": {"optim": "adamw_torch"},
    "alsals": {"optim": "alsals"},
    "alsals, a search at every step": EVERY_STEP,
    "alsals, a search at every step, probe_micro_batches=1": EVERY_STEP
    | {"optim_args": "search_interval=1,probe_micro_batches=1"},
    "muon, adamw for the rest": {"package": "torch.optim.Muon"},
    "alsals_muon": {"optim": "alsals_muon"},
    "alsals_muon, a search at every step": EVERY_STEP | {"optim": "alsals_muon"},
    "schedule_free_adamw": {"optim": "schedule_free_adamw"},
    "prodigy": {"package": "prodigyopt"},
    "salsa-optimizer, a search at every step": {"package": "salsa"},
}
BASELINE = "adamw_torch_fused"

# The parts of a step of ALSALS, as the profiler names them.
PARTS = {
    "forward": ["forward"],
    "backward": ["backward"],
    "probes": ["ALSALS.probe"],
    "path slope": ["ALSALS.path_slope"],
    "are gradients finite": ["ALSALS.nonfinite_flag"],
    "moments and step": ["ALSALS.step_direction"],
    "moments, slope and first move of a search": ["ALSALS.first_move"],
    "other moves of a search": ["ALSALS.move"],
    "host-device sync": ["ALSALS.to_floats"],
}
PROFILED = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


@dataclass
class OverheadArguments:
    """What is measured, and on which model."""

    output: str = field(metadata={"help": "The json file to write; the picture lies beside it."})
    mode: str = field(
        default="trainer",
        metadata={
            "help": "Whether to train through the Trainer, or to take steps of the optimizer alone.",
            "choices": ["trainer", "optimizer"],
        },
    )
    optimizers: list[str] | None = field(default=None, metadata={"help": "The rows to measure; by default all."})
    n_layer: int = field(default=4, metadata={"help": "Layers of the GPT-2."})
    n_embd: int = field(default=256, metadata={"help": "Width of the GPT-2."})
    n_head: int = field(default=4, metadata={"help": "Attention heads of the GPT-2."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the GPT-2."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a micro-batch."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    gradient_accumulation_steps: list[int] = field(
        default_factory=lambda: [1, 4], metadata={"help": "Micro-batches in an optimizer step, one table for each."}
    )
    processes: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Processes of a run (DDP), each with a batch of its own."}
    )
    warmup: int = field(default=10, metadata={"help": "Optimizer steps of a run that do not count."})
    steps: int = field(default=20, metadata={"help": "Optimizer steps of a run that count."})
    rounds: int = field(default=3, metadata={"help": "Runs of each optimizer."})
    bf16: bool = field(default=False, metadata={"help": "Whether to train in bfloat16 autocast."})
    torch_compile: bool = field(default=False, metadata={"help": "Whether to compile the model."})
    only: str | None = field(default=None, metadata={"help": "Only this run, to standard output; for internal use."})

    @property
    def config(self) -> GPT2Config:
        """The config of the GPT-2."""
        return GPT2Config(
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            n_head=self.n_head,
            vocab_size=self.vocab_size,
            n_positions=self.sequence_length,
            bos_token_id=0,
            eos_token_id=0,
        )


class RandomTokens(Dataset):
    """Sequences of random tokens."""

    def __init__(self, args: OverheadArguments, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        # Few different tokens, so that there is something to learn and the search does not run into the ground.
        self.rows = torch.randint(0, 64, (count, args.sequence_length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Stopwatch(TrainerCallback):
    """Marks every optimizer step after the warm-up, from its first micro-batch to its last move."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.steps: list[tuple[Any, Any]] = []
        self.probes: list[int] = []
        self.annealing: list[bool] = []
        self.profiler: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup and self.profiler is not None:
            self.profiler.start()
        self.begin = mark()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step > self.warmup:
            self.steps.append((self.begin, mark()))
            alsals = unwrap_alsals(optimizer)
            self.probes.append(alsals.probes if alsals else 0)
            self.annealing.append(alsals.search.is_annealing if alsals else False)


def mark() -> Any:
    """Return a point in time: on a GPU an event in its stream, which is not waited for."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: list[tuple[Any, Any]]) -> list[float]:
    """Return the seconds from the first to the second of each pair of points in time."""
    if not torch.cuda.is_available():
        return [end - begin for begin, end in marks]
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in marks]


def recorded(owner: Any, method: str, part: str) -> None:
    """Have the profiler see the calls of an object's method as a part."""
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return original(*args, **kwargs)

    setattr(owner, method, call)


def peak_memory() -> float:
    """Return the most memory that was in use so far, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run(args: OverheadArguments, name: str, accumulation: int, is_profiled: bool = False) -> dict[str, Any]:
    """Train with one optimizer and return its step times in seconds, its probes and its peak memory in MB."""
    set_seed(0)
    model = GPT2LMHeadModel(args.config)
    count = args.warmup + args.steps
    data = RandomTokens(args, count * accumulation * args.batch_size)
    package = OPTIMIZERS[name].get("package")
    before = peak_memory()
    if package == "salsa":
        return plain_loop(args, model, data, accumulation) | {"peak_mb": peak_memory() - before}
    optimizer = None
    if package == "prodigyopt":
        from prodigyopt import Prodigy

        optimizer = Prodigy(model.parameters())
    if package == "torch.optim.Muon":
        from baseline import MuonAndAdamW

        optimizer = MuonAndAdamW(model, lr=1e-3, rest_lr=1e-3)
    with tempfile.TemporaryDirectory() as output_dir:
        training_args = AlsalsTrainingArguments(
            output_dir=output_dir,
            max_steps=count,
            warmup_steps=args.warmup,  # so that the steps that count have the shares of a whole run
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=accumulation,
            bf16=args.bf16,
            torch_compile=args.torch_compile,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **({} if package else OPTIMIZERS[name]),
        )
        watch = Stopwatch(args.warmup)
        trainer = AlsalsTrainer(
            model, training_args, train_dataset=data, callbacks=[watch], optimizers=(optimizer, None)
        )
        if is_profiled:
            recorded(trainer, "compute_loss", "forward")
            recorded(trainer.accelerator, "backward", "backward")
            watch.profiler = profile(activities=PROFILED)
        trainer.train()
    seconds = seconds_between(watch.steps)
    result = {"seconds": seconds, "probes": watch.probes, "annealing": watch.annealing}
    if is_profiled:
        watch.profiler.stop()
        events = {event.key: event for event in watch.profiler.key_averages()}
        spent = {part: sum(time_of(events[key]) for key in keys if key in events) for part, keys in PARTS.items()}
        spent["forward"] -= spent["probes"]  # a probe calls compute_loss too
        result["breakdown"] = {part: one / sum(seconds) for part, one in spent.items()}
    return result | {"peak_mb": peak_memory() - before}


def time_of(event: Any) -> float:
    """Return the seconds of an event with all that it called, on the GPU if there is one."""
    return (event.device_time_total if torch.cuda.is_available() else event.cpu_time_total) / 1e6


def plain_loop(args: OverheadArguments, model: Any, data: RandomTokens, accumulation: int) -> dict[str, Any]:
    """Train with salsa-optimizer, whose `step` runs forward and backward pass itself, in a loop of its own."""
    from salsa.SaLSA import SaLSA

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = SaLSA(model.parameters(), speed_up=False)
    marks, probes = [], []
    size = args.batch_size
    for step in range(args.warmup + args.steps):
        forwards = optimizer.state["n_forwards"]
        rows = data.rows[step * accumulation * size :][: accumulation * size].to(device)
        begin = mark()
        optimizer.zero_grad()

        def closure(backwards: bool = False, rows: torch.Tensor = rows) -> torch.Tensor:
            total = torch.zeros(1, device=device)
            with torch.set_grad_enabled(backwards):
                for batch in rows.split(size):
                    with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
                        loss = model(input_ids=batch, labels=batch).loss / accumulation
                    if backwards:
                        loss.backward()
                    total += loss.detach()
            return total

        optimizer.step(closure=closure)
        marks.append((begin, mark()))
        probes.append(optimizer.state["n_forwards"] - forwards - 1)  # the first is the step's own
    seconds = seconds_between(marks[args.warmup :])
    return {"seconds": seconds, "probes": probes[args.warmup :], "annealing": [False] * args.steps}


def seconds_a_step(run: dict[str, Any]) -> float:
    """Return the seconds of a run's step: the medians of its kinds of steps, by how many there are.

    They are steps with a search, steps that follow the path slope, and those at the end that do neither.
    """
    kinds = defaultdict(list)
    for seconds, probes, annealing in zip(run["seconds"], run["probes"], run["annealing"], strict=True):
        kinds[probes > 0, annealing].append(seconds)
    return sum(len(kind) * statistics.median(kind) for kind in kinds.values()) / len(run["seconds"])


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each case and optimizer: medians over the rounds, ratios taken within each round."""
    rows = []

    def runs_of(processes: int, accumulation: int, name: str) -> list[dict[str, Any]]:
        wanted = (processes, accumulation, name)
        return [run for run in runs if (run["processes"], run["accumulation"], run["optimizer"]) == wanted]

    for processes, accumulation, name in dict.fromkeys(
        (run["processes"], run["accumulation"], run["optimizer"]) for run in runs
    ):
        ratios, memory = [], []
        mine = runs_of(processes, accumulation, name)
        for one in mine:
            bases = runs_of(processes, accumulation, BASELINE)
            base = next(run for run in bases if run["round"] == one["round"])
            ratios.append(seconds_a_step(one) / seconds_a_step(base))
            memory.append(one["peak_mb"] / base["peak_mb"])
        rows.append(
            {
                "processes": processes,
                "accumulation": accumulation,
                "optimizer": name,
                "milliseconds": 1000 * statistics.median(seconds_a_step(run) for run in mine),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "probes": statistics.median(statistics.mean(run["probes"]) for run in mine),
                "peak_ratio": statistics.median(memory),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| processes | micro-batches | optimizer | step, ms | times adamw_torch_fused | probes per step "
        "| peak memory, times |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['processes']} | {row['accumulation']} | {row['optimizer']} | {row['milliseconds']:.0f} "
            f"| {row['ratio']:.2f} | {row['probes']:.2f} | {row['peak_ratio']:.2f} |"
        )
    return "\n".join(lines)


def breakdown_table(breakdown: dict[str, float]) -> str:
    """Return the parts of a step of ALSALS, as shares of its time, as a Markdown table."""
    lines = ["| part of a step of alsals | share |", "| --- | --- |"]
    return "\n".join(lines + [f"| {part} | {share:.1%} |" for part, share in breakdown.items()])


def draw(rows: list[dict[str, Any]], breakdown: dict[str, float], path: str) -> None:
    """Draw the ratios and what a step of ALSALS spends its time on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    ratio_axes, part_axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    cases = list(dict.fromkeys((row["processes"], row["accumulation"]) for row in rows))
    for i, (processes, accumulation) in enumerate(cases):
        mine = [row for row in rows if (row["processes"], row["accumulation"]) == (processes, accumulation)]
        height = 0.8 / len(cases)
        places = [names.index(row["optimizer"]) + (i - (len(cases) - 1) / 2) * height for row in mine]
        label = f"processes {processes}, micro-batches {accumulation}"
        ratio_axes.barh(places, [row["ratio"] for row in mine], height, label=label)
    ratio_axes.set_yticks(range(len(names)), names)
    ratio_axes.invert_yaxis()
    ratio_axes.axvline(1, color="black", linewidth=0.8)
    ratio_axes.set_xlabel(f"step time, times {BASELINE}")
    figure.legend(loc="outside lower center", ncols=len(cases), frameon=False)
    part_axes.barh(list(breakdown), [100 * share for share in breakdown.values()])
    part_axes.invert_yaxis()
    part_axes.set_xlabel("share of a step of alsals, %")
    figure.savefig(path, dpi=120)


def measure(only: str, processes: int = 1) -> dict[str, Any]:
    """Return what a run in a process of its own, or several, has measured."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), __file__, *sys.argv[1:], "--only", only]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(args: OverheadArguments, numbers: dict[str, Any]) -> None:
    """Write the numbers, and what they were measured on, to the json file."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "arguments": asdict(args),
        "revision": revision.stdout.strip(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": device,
        "threads": torch.get_num_threads(),
        **numbers,
    }
    with open(args.output, "w") as file:
        json.dump(report, file, indent=1)


def main() -> None:
    parser = HfArgumentParser(OverheadArguments, description=__doc__.splitlines()[0])
    (args,) = parser.parse_args_into_dataclasses()
    known, baseline = (
        (list(OPTIMIZERS), BASELINE) if args.mode == "trainer" else (list(bare_step.OPTIMIZERS), bare_step.BASELINE)
    )
    optimizers = args.optimizers or known
    if unknown := [name for name in optimizers if name not in known]:
        parser.error(f"optimizers must be some of {', '.join(known)}, got {unknown[0]!r}.")
    if baseline not in optimizers:
        parser.error(f"optimizers must include {baseline}, which the others are compared with.")
    if args.only is not None:
        name, accumulation, kind = args.only.rsplit("/", 2)
        if args.mode == "optimizer":
            result = bare_step.run(name, args.config, args.warmup, args.steps)
        else:
            result = run(args, name, int(accumulation), is_profiled=kind == "profiled")
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        return

    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    if args.mode == "optimizer":
        runs = []
        for i, name in itertools.product(range(args.rounds), optimizers):
            runs.append({"round": i, "optimizer": name} | measure(f"{name}/1/timed"))
            print(i, name, f"{1000 * statistics.median(runs[-1]['seconds']):.0f} ms", flush=True)
        rows = bare_step.summarize(runs)
        write(args, {"rows": rows, "runs": runs})
        print(bare_step.table(rows))
        return

    runs = []
    for processes, accumulation, i, name in itertools.product(
        args.processes, args.gradient_accumulation_steps, range(args.rounds), optimizers
    ):
        if processes > 1 and OPTIMIZERS[name].get("package") == "salsa":  # its loop is for one
            continue
        result = measure(f"{name}/{accumulation}/timed", processes)
        runs.append({"processes": processes, "accumulation": accumulation, "round": i, "optimizer": name, **result})
        milliseconds = 1000 * seconds_a_step(result)
        print(processes, accumulation, i, name, f"{milliseconds:.0f} ms", flush=True)

    rows = summarize(runs)
    breakdown = measure(f"alsals/{args.gradient_accumulation_steps[0]}/profiled")["breakdown"]
    write(args, {"rows": rows, "breakdown": breakdown, "runs": runs})
    draw(rows, breakdown, os.path.splitext(args.output)[0] + ".png")
    print(table(rows), breakdown_table(breakdown), sep="\n\n")


if __name__ == "__main__":
    main()
