"""The tasks and optimizers that are compared, the command of a run, and its key: all that its results depend on."""

import os
from dataclasses import dataclass
from typing import Any

from hf_alsals.presets import METHOD_VERSION, PRESETS


@dataclass
class Task:
    """A recipe with its data and model, on how many steps, and by which metric it is judged."""

    recipe: str
    flags: str = ""
    max_steps: int | None = None  # else the recipe's three epochs
    schedule: str = "cosine"
    metric: str = "eval_loss"
    higher_is_better: bool = False
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 6e-3, 1e-2)
    # AdamW's best learning rate with the schedule; Muon's runs need it for what Muon leaves out.
    adamw: float | None = None

    def length(self, share: float) -> str:
        """Return the flag for a share of the steps."""
        if self.max_steps is None:
            return f"--num_train_epochs {3 * share:g}"
        return f"--max_steps {round(share * self.max_steps)}"


FINE_TUNING = (
    "--task_name {0} --train_file DATA/glue/{0}/train.json --validation_file DATA/glue/{0}/validation.json"
    " --model_name_or_path MINILM --per_device_train_batch_size 32 --pad_to_max_length false"
)
CIFAR10 = (
    "--train_file DATA/cifar10/train.parquet --validation_file DATA/cifar10/test.parquet"
    " --per_device_train_batch_size 64 --max_eval_samples 2500"
)
SHAKESPEARE = "--train_file DATA/text/tinyshakespeare.txt --block_size 128"
SIXTEEN = f"{SHAKESPEARE} --per_device_train_batch_size 16"
LOW = (3e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3)
HIGH = (3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 6e-2)

TASKS = {
    "digits": Task("run_image_classification.py", metric="eval_accuracy", higher_is_better=True),
    "cifar10": Task("run_image_classification.py", CIFAR10, 600, adamw=3e-3),
    "bert-mlm": Task("run_mlm.py", adamw=1e-3),
    "topics": Task("run_glue.py", adamw=3e-4),
    "t5": Task("run_t5_mlm.py", adamw=1e-3),
    "gpt2-shakespeare": Task("run_clm.py", SIXTEEN, 600, adamw=1e-2),
    "gpt2-reference": Task("run_clm.py", adamw=3e-3),
    "sst2": Task("run_glue.py", FINE_TUNING.format("sst2"), 216, "linear", learning_rates=LOW),
    "cola": Task("run_glue.py", FINE_TUNING.format("cola"), 226, "linear", learning_rates=LOW),
    "gpt2-dropout": Task(
        "run_clm.py", f"{SIXTEEN} --config_overrides resid_pdrop=0.1,embd_pdrop=0.1,attn_pdrop=0.1", 600
    ),
    "gpt2-batch-8": Task("run_clm.py", f"{SHAKESPEARE} --per_device_train_batch_size 8", 600),
    "gpt2-batch-64": Task("run_clm.py", f"{SHAKESPEARE} --per_device_train_batch_size 64", 600),
    "gpt2-wide": Task("run_clm.py", f"{SIXTEEN} --config_overrides n_embd=256", 600),
    "gpt2-accumulation": Task(
        "run_clm.py", f"{SHAKESPEARE} --per_device_train_batch_size 4 --gradient_accumulation_steps 4", 600
    ),
    "gpt2-3000": Task("run_clm.py", SIXTEEN, 3000),
    # Twenty epochs, of which the first few are enough for the training set to be memorized.
    "digits-long": Task("run_image_classification.py", "", 3820, metric="eval_accuracy", higher_is_better=True),
    "vit-cifar10": Task(
        "run_image_classification.py",
        f"{CIFAR10} --model_type vit --config_overrides patch_size=4,hidden_size=96,num_hidden_layers=4,"
        "num_attention_heads=3,intermediate_size=192",
        600,
    ),
    "sst2-lora": Task(
        "run_glue.py",
        f"{FINE_TUNING.format('sst2')} --use_peft true",
        216,
        "linear",
        learning_rates=(3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 3e-2),
    ),
    "sst2-whole": Task(
        "run_glue.py",
        FINE_TUNING.format("sst2").replace("MINILM", "WHOLE_MODEL"),
        216,
        "linear",
        learning_rates=LOW,
    ),
    # The GPT-2 that run_clm.py makes of Python's reference goes on with another text.
    "gpt2-fine-tuned": Task("run_clm.py", f"{SIXTEEN} --model_name_or_path GPT2_REFERENCE", 300, "linear"),
    "lstm": Task("benchmarks/plain.py", "--model lstm", 600, learning_rates=HIGH),
    "mlp": Task("benchmarks/plain.py", "--model mlp", 600, metric="eval_accuracy", higher_is_better=True),
}

OTHER_LENGTHS = (0.8, 1.25)  # of AdamW's runs, to tell how many steps it needs for a loss

WARMUP = "--learning_rate {learning_rate} --lr_scheduler_type {schedule} --warmup_steps 0.1"

# The flags of each; those with {learning_rate} are run over the task's grid.
OPTIMIZERS = {
    "alsals": "--optim alsals",
    "adamw": f"--optim adamw_torch {WARMUP}",
    "adamw, linear": "--optim adamw_torch --learning_rate {learning_rate} --lr_scheduler_type linear"
    " --warmup_steps 0.1",
    "adamw, warmup_stable_decay": "--optim adamw_torch --learning_rate {learning_rate}"
    " --lr_scheduler_type warmup_stable_decay --warmup_steps 0.1",
    **{
        f"adamw, {share:g} times the steps": "--optim adamw_torch --learning_rate {learning_rate}"
        f" --lr_scheduler_type warmup_stable_decay --warmup_steps 0.1 {{steps[{share}]}}"
        for share in OTHER_LENGTHS
    },
    "adamw, constant": "--optim adamw_torch --learning_rate {learning_rate} --lr_scheduler_type constant",
    "adamw, library default": "--optim adamw_torch",
    "schedule-free": "--optim schedule_free_adamw --learning_rate {learning_rate} --lr_scheduler_type constant",
    "adafactor": f"--optim adafactor {WARMUP}",
    "adamw, greedy": "--optim adamw_torch --learning_rate {learning_rate} --lr_scheduler_type greedy"
    " --eval_strategy steps --eval_steps 25",
    "lamb": WARMUP,
    "prodigy": "--learning_rate 1.0 --lr_scheduler_type {schedule}",
    "mechanic": "--learning_rate 1.0 --lr_scheduler_type {schedule} --warmup_steps 0.1",
    "muon": f"{WARMUP} --optim_args {{rest}}",
    "c-adamw": "--learning_rate {learning_rate} --lr_scheduler_type warmup_stable_decay --warmup_steps 0.1",
    "nesterov-adamw": "--learning_rate {learning_rate} --lr_scheduler_type warmup_stable_decay --warmup_steps 0.1",
    "alsals_muon": "--optim alsals_muon",
    "alsals_paper": "--optim alsals_paper",
    "salsa": "--optim salsa",
    "adam_sls": "--optim adam_sls",
    # About the time of the searches is saved.
    "alsals, 5 % fewer steps": "--optim alsals {steps[0.95]}",
    "alsals, linear": "--optim alsals --lr_scheduler_type linear",
    "alsals, cosine": "--optim alsals --lr_scheduler_type cosine",
    "alsals, no schedule": "--optim alsals --lr_scheduler_type constant",
    "alsals, from 1e-6": "--optim alsals --optim_args initial_step_size=1e-6",
    "alsals, from 10": "--optim alsals --optim_args initial_step_size=10",
    "alsals, a search every step": "--optim alsals --optim_args search_interval=1",
    "alsals, linear, probe_micro_batches 1": "--optim alsals --lr_scheduler_type linear"
    " --optim_args probe_micro_batches=1",
    "alsals, cosine, adaptive cadence": "--optim alsals --lr_scheduler_type cosine"
    " --optim_args search_interval=adaptive",
    "alsals, cosine, constant growth": "--optim alsals --lr_scheduler_type cosine --optim_args growth=constant",
}

# Other settings of alsals, and other schedules of AdamW.
VARIANTS = [name for name in OPTIMIZERS if name.startswith(("alsals, ", "adamw, "))]
VARIANTS.remove("adamw, library default")

# Those that transformers does not have, by what baseline.py calls them.
BASELINES = {
    "lamb": "Lamb",
    "prodigy": "Prodigy",
    "mechanic": "Mechanic",
    "muon": "Muon",
    "c-adamw": "CautiousAdamW",
    "nesterov-adamw": "NesterovAdamW",
}

# Flags that results do not depend on.
OUTPUT_FLAGS = ("output_dir", "save_strategy", "report_to")


def command_of(task: str, optimizer: str, learning_rate: float | None, seed: int) -> str:
    """Return the command of a run, in which DATA, MINILM, WHOLE_MODEL and GPT2_REFERENCE stand for folders."""
    spec = TASKS[task]
    launcher = f"recipes/benchmarks/baseline.py {BASELINES[optimizer]} " if optimizer in BASELINES else ""
    steps = {f"{share}": spec.length(share) for share in (0.95, *OTHER_LENGTHS)}
    flags = OPTIMIZERS[optimizer].format(
        learning_rate=learning_rate, schedule=spec.schedule, steps=steps, rest=spec.adamw
    )
    flags = " ".join(f"{spec.flags} {spec.length(1)} {flags}".split())
    output = "--save_strategy no --report_to none --output_dir out"
    return f"python {launcher}recipes/{spec.recipe} {flags} --seed {seed} {output}"


def _value(text: str) -> float | int | str:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def options_of(command: str) -> dict[str, Any]:
    """Return what a command resolves to: recipe, optimizer and flags, the last one where a flag comes twice."""
    launch, *flags = command.split(" --")
    _, *launcher, recipe = launch.split()
    options: dict[str, Any] = {"recipe": os.path.basename(recipe)}
    if launcher:
        options["optimizer"] = launcher[-1]
    for flag in flags:
        name, _, value = flag.partition(" ")
        if name not in OUTPUT_FLAGS:
            options[name] = _value(value.strip())
    return dict(sorted(options.items()))


def version_of(options: dict[str, Any]) -> int | None:
    """Return today's version of the method for an optimizer of this package, None for all others."""
    return METHOD_VERSION if options.get("optim") in PRESETS else None


def key_of(options: dict[str, Any], method_version: int | None) -> str:
    """Return the key of a run, the same whatever the run is called and in whatever order its flags came."""
    flags = [f"{name}={value}" for name, value in sorted(options.items()) if name != "recipe"]
    version = [] if method_version is None else [f"method_version={method_version}"]
    return " ".join([options["recipe"], *flags, *version])


def row_of(options: dict[str, Any]) -> str:
    """Return the key of what the learning rates and seeds of one optimizer on one task have in common."""
    shared = {name: value for name, value in options.items() if name not in ("seed", "learning_rate")}
    return key_of(shared, None)


def names() -> dict[str, tuple[str, str]]:
    """Return the names of task and optimizer by what their runs have in common; of two names for it the first."""
    found: dict[str, tuple[str, str]] = {}
    for task in TASKS:
        for optimizer in OPTIMIZERS:
            found.setdefault(row_of(options_of(command_of(task, optimizer, 1.0, 1))), (task, optimizer))
    return found
