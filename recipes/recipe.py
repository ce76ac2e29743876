"""What all recipes share: arguments, the start of a run, its training and evaluation, and its end."""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from hf_alsals import AlsalsArgumentParser, AlsalsTrainer, AlsalsTrainingArguments
from hf_alsals.callbacks import one_line
from hf_alsals.checkpoint import checkpoint_state, complete_checkpoints, last_complete_checkpoint

try:
    import fcntl
except ImportError:  # as on Windows
    fcntl = None

logger = logging.getLogger(__name__)

# What a run leaves in its output directory, and the model card, which it writes last.
METRICS = ("train_results.json", "eval_results.json", "all_results.json")
RESULTS = (*METRICS, "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
CARD = "README.md"

# What a run holds a lock on while it lasts; the Hub is not sent what begins with an underscore.
LOCK = "_lock"

# Names that a model or an adapter is saved under.
WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|adapter_(model\.safetensors|config\.json)"
)

FAULTS = (ImportError, OSError, RuntimeError, TypeError, ValueError)

STARTED = time.time()


@dataclass
class RunArguments:
    """What becomes of the output directory."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether to train into an output directory that holds a finished run."}
    )


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The checkpoint to start from; leave out to train from scratch."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Config name or path if not the same as model_name_or_path."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where to store what is downloaded from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "The branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "The Hub token; by default that of `hf auth login`."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code from the model's repository on the Hub."}
    )

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of every `from_pretrained`."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class TextModelArguments(ModelArguments):
    """Which model and tokenizer to train."""

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer name or path if not the same as model_name_or_path."}
    )
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "Whether to use a fast tokenizer (of the tokenizers library)."}
    )


@dataclass
class LoraArguments:
    """Whether to train a LoRA adapter in place of the whole model."""

    use_peft: bool = field(default=False, metadata={"help": "Whether to train a LoRA adapter, not the whole model."})
    lora_r: int = field(default=8, metadata={"help": "The rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "The dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "The modules to adapt; by default those that peft knows, else all-linear."}
    )
    merge_and_unload: bool = field(
        default=False, metadata={"help": "Whether to merge the adapter into the model, and save that instead."}
    )

    def __post_init__(self) -> None:
        if self.merge_and_unload and not self.use_peft:
            raise ValueError("merge_and_unload needs use_peft.")
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}.")


def check_counts(arguments: Any, **least: int) -> None:
    """Raise a ValueError if one of the named arguments is set to less than it may be."""
    for name, count in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= count:
            raise ValueError(f"{name} must be at least {count}, got {value}.")


def check_file(name: str, path: str, extensions: tuple[str, ...]) -> None:
    """Raise a ValueError if the file that the argument `name` gives cannot be a file of examples."""
    if not path.endswith(tuple(f".{extension}" for extension in extensions)):
        raise ValueError(f"{name} must be a {' or '.join(extensions)} file, got {path!r}.")
    if not os.path.isfile(path):
        raise ValueError(f"{name} must be a file, but there is none at {path!r}.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name} must hold text, but {path!r} is empty.")
    if path.endswith((".json", ".jsonl")):
        # Reading null, or a line of it, would end Python itself (datasets 3 to 5).
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() in (b"null", b"[null]"):
                    raise ValueError(f"{name} must hold names and values, but line {number} of {path!r} is null.")


@contextlib.contextmanager
def one_line_error(parser: AlsalsArgumentParser) -> Iterator[None]:
    """End the program with one line where the block finds fault with data, names or values."""
    try:
        yield
    except FAULTS as error:
        parser.error(one_line(error))


@contextlib.contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Name the argument and its value where what it names on the Hub or on disk cannot be loaded."""
    try:
        yield
    except FAULTS as error:
        raise ValueError(
            f"{what} must be a name on the Hub or a path, and {name!r} cannot be loaded: {error}"
        ) from error


def make_parser(description: str, *dataclass_types: type) -> AlsalsArgumentParser:
    """Make the parser of a recipe, which logs the first and every tenth step unless it is told otherwise."""
    parser = AlsalsArgumentParser((RunArguments, *dataclass_types), description=description)
    parser.set_defaults(logging_steps=10, logging_first_step=True)
    return parser


def start(parser: AlsalsArgumentParser, predicts: bool = False) -> tuple[Any, ...]:
    """Parse the command line, check the output directory, and set up logging and the seed.

    The last of the dataclasses must be the training arguments. Without `--do_train`, `--do_eval` or `--do_predict` a
    recipe trains and evaluates.
    """
    run_args, *arguments, training_args = parser.parse_args_and_config()
    if training_args.do_predict and not predicts:
        parser.error("do_predict must be left out: this recipe has no test data to predict.")
    # An eval_strategy sets do_eval by itself, and is nothing without training.
    evaluates_only = training_args.do_eval and training_args.eval_strategy == "no"
    if not (training_args.do_train or training_args.do_predict or evaluates_only):
        training_args.do_train = training_args.do_eval = True
    named = any(getattr(one, "model_name_or_path", None) for one in arguments)
    if not (training_args.do_train or named):
        parser.error("model_name_or_path must be given where nothing is trained: a new model has learnt nothing.")
    was_to_resume = (training_args.resume_from_checkpoint or "").lower() == "true"
    with one_line_error(parser):
        check_numbers(training_args)
        check_output_dir(training_args, run_args.overwrite_output_dir)

    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    log_level = training_args.get_process_log_level()
    logger.setLevel(logging.INFO if training_args.should_log else log_level)
    datasets.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.set_verbosity(log_level)
    logger.warning(
        f"Process rank: {training_args.local_process_index}, device: {training_args.device}, "
        f"distributed training: {training_args.parallel_mode.value == 'distributed'}, "
        f"mixed precision: {training_args.mixed_precision}"
    )
    if was_to_resume and training_args.do_train and training_args.resume_from_checkpoint is None:
        logger.warning(
            f"resume_from_checkpoint true finds no whole checkpoint in output_dir {training_args.output_dir!r} with "
            f"save_strategy {training_args.save_strategy.value}: training begins at the first step"
        )
    set_seed(training_args.seed)
    return *arguments, training_args


def check_numbers(args: AlsalsTrainingArguments) -> None:
    """Raise a ValueError where the Trainer would train nothing, or fail after the data has been loaded."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    check_counts(args, **dict.fromkeys(sizes, 1), dataloader_num_workers=0, save_total_limit=1)
    check_counts(args, eval_accumulation_steps=1, max_grad_norm=0, neftune_noise_alpha=0)
    for name in ("logging", "save", "eval"):
        steps = getattr(args, f"{name}_steps")
        if getattr(args, f"{name}_strategy").value == "steps" and steps is not None and steps <= 0:
            raise ValueError(f"{name}_steps must be positive, got {steps:g}: to do without pass --{name}_strategy no.")
    if not 0 <= args.label_smoothing_factor < 1:
        raise ValueError(f"label_smoothing_factor must be in [0, 1), got {args.label_smoothing_factor}.")
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ValueError(f"{name} must be in [0, 2**32), got {getattr(args, name)}.")
    if args.max_steps != -1:
        check_counts(args, max_steps=1)
    elif not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs must be a positive finite number, got {args.num_train_epochs:g}.")


def lock_output_dir(output_dir: str) -> None:
    """Keep other processes from the output directory until this one ends; raise a ValueError if one keeps it."""
    if fcntl is None:
        return
    file = os.open(os.path.join(output_dir, LOCK), os.O_RDWR | os.O_CREAT, 0o666)  # never closed: that would unlock it
    try:
        # Unlike flock's, workers that outlive a killed run do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"output_dir must be a folder that no other run is writing into, got {output_dir!r}: wait for that run, "
            "or name another."
        ) from error
    except OSError:
        logger.warning(f"output_dir {output_dir!r} is on a disk without locks: start no other run into it")


def check_output_dir(args: AlsalsTrainingArguments, overwrite: bool) -> None:
    """Raise a ValueError where a run could not write, would overwrite what is there, or could not go on with it.

    Sets `resume_from_checkpoint` to a checkpoint's folder or `None`.
    """
    output_dir, checkpoint = args.output_dir, args.resume_from_checkpoint
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(bytes(2**16))
        if args.process_index == 0:
            lock_output_dir(output_dir)
    except OSError as error:
        raise ValueError(
            f"output_dir must be a folder that can be written to, got {output_dir!r}: {error.strerror}."
        ) from error
    names = set(os.listdir(output_dir))
    for name in (*RESULTS, CARD, CONFIG_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME):
        if os.path.isdir(os.path.join(output_dir, name)):
            raise ValueError(f"output_dir {output_dir!r} has a folder {name} where a run writes a file: remove it.")
    last = last_complete_checkpoint(output_dir)
    resumes = checkpoint is not None and checkpoint.lower() != "false"
    if resumes and checkpoint.lower() == "true":
        checkpoint = last  # from the first step if there is none
    elif resumes and checkpoint_state(checkpoint) is None:
        raise ValueError(f"resume_from_checkpoint must be true or a checkpoint's folder, got {checkpoint!r}.")
    args.resume_from_checkpoint = checkpoint if resumes else None
    if not args.do_train:
        return

    check_other_checkpoints(args, may_replace=overwrite or resumes)
    if overwrite:
        return
    advice = "name another, or pass --overwrite_output_dir."
    present = [name for name in (*RESULTS, CARD) if name in names]
    if CARD in names and not is_card_of_a_run(os.path.join(output_dir, CARD)):
        raise ValueError(f"output_dir {output_dir!r} holds a {CARD} that the model card would replace: {advice}")
    if last is not None and not resumes and CARD not in names:
        raise ValueError(
            f"output_dir {output_dir!r} holds an interrupted run ({os.path.basename(last)}): go on with it by "
            f"--resume_from_checkpoint true, {advice}"
        )
    if present and not resumes:
        raise ValueError(f"output_dir {output_dir!r} holds an earlier run ({', '.join(present)}): {advice}")
    if present and checkpoint is None:
        raise ValueError(
            f"output_dir {output_dir!r} holds an earlier run ({', '.join(present)}), and no checkpoint to go on with: "
            f"evaluate its model by --do_eval --model_name_or_path, {advice}"
        )
    if CARD in names and not has_steps_left(args):
        raise ValueError(f"output_dir {output_dir!r} holds a finished run, nothing is left to go on with: {advice}")


def check_other_checkpoints(args: AlsalsTrainingArguments, may_replace: bool) -> None:
    """Raise a ValueError where the Trainer could write into, or delete, a folder that is not one of its checkpoints.

    It writes into a folder of the right number, and save_total_limit deletes whatever is called a checkpoint. What a
    run left that was killed while it saved is of the right number, and `may_replace` says that it may.
    """
    complete = {os.path.basename(folder) for folder in complete_checkpoints(args.output_dir)}
    for name in sorted(set(os.listdir(args.output_dir)) - complete):
        is_folder = os.path.isdir(os.path.join(args.output_dir, name))
        is_numbered = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name) is not None
        is_replaced = is_numbered and not (is_folder and may_replace)
        resumes = args.resume_from_checkpoint is not None
        is_limited = (args.save_total_limit or 0) > 0 and not (is_numbered and resumes)
        if is_replaced or (is_limited and is_folder and name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")):
            raise ValueError(
                f"output_dir {args.output_dir!r} holds {name}, no whole checkpoint, which this run may replace or "
                "delete: move it away, or name another."
            )


def is_card_of_a_run(path: str) -> bool:
    """Return whether a README.md is a model card that the Trainer wrote."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return "generated_from_trainer" in file.read()


def has_steps_left(args: AlsalsTrainingArguments) -> bool:
    """Return whether training, if it is to be resumed, had not come to its end.

    With `--save_strategy no` it may have gone on to there from the last checkpoint; its card says that all is saved.
    """
    if args.resume_from_checkpoint is None:
        return True
    folders = [args.resume_from_checkpoint]
    if os.path.exists(os.path.join(args.output_dir, CARD)):
        folders.append(args.output_dir)
    return all(
        state.global_step < args.max_steps if args.max_steps > 0 else state.epoch < args.num_train_epochs
        for state in map(checkpoint_state, folders)
        if state is not None
    )


def load_tokenizer(model_args: TextModelArguments) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer by its name or path; return `None` if there is neither."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None:
        return None
    with loading("tokenizer_name" if model_args.tokenizer_name else "model_name_or_path", name):
        return AutoTokenizer.from_pretrained(name, use_fast=model_args.use_fast_tokenizer, **model_args.hub_kwargs)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Train a small tokenizer on texts: BERT's words and special tokens, RoBERTa's byte pairs in the words."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.BertNormalizer()
    words, byte_level = pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    # WordPiece would number its tokens differently in every process.
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


def override(config: PretrainedConfig, overrides: str | None) -> None:
    """Change values of a config as in `n_embd=10,resid_pdrop=0.2`."""
    if overrides is None:
        return
    before = config.to_dict()
    try:
        config.update_from_string(overrides)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config_overrides must look like a=10,b=0.2, got {overrides!r}: {error}") from error
    for name, value in config.to_dict().items():
        old = before.get(name)
        if type(value) not in (int, float) or type(old) not in (int, float) or name.endswith("_id"):
            continue
        # A number of layers or a size stays positive, and a rate does not become negative.
        if math.isnan(value) or value < 0 <= old or (type(old) is int and value < 1 <= old):
            raise ValueError(f"config_overrides: {name} must be a positive number, got {value}.")


def load_config(model_args: ModelArguments, default: Callable[[], PretrainedConfig]) -> PretrainedConfig:
    """Load the config by its name or path, or else make the recipe's own."""
    name = model_args.config_name or model_args.model_name_or_path
    if name is None:
        return default()
    with loading("config_name" if model_args.config_name else "model_name_or_path", name):
        return AutoConfig.from_pretrained(name, **model_args.hub_kwargs)


def load_model(auto_class: Any, model_args: ModelArguments, config: PretrainedConfig, **kwargs: Any) -> Any:
    """Load the checkpoint, or make a new model from the config."""
    name = model_args.model_name_or_path
    if name is not None:
        with loading("model_name_or_path", name):
            return auto_class.from_pretrained(name, config=config, **kwargs, **model_args.hub_kwargs)
    try:
        model = auto_class.from_config(config, trust_remote_code=model_args.trust_remote_code)
    except Exception as error:  # whatever a model thinks of its config
        raise ValueError(f"no {config.model_type} can be made of the config: {error}") from error
    logger.info(f"Training a new {config.model_type} with {model.num_parameters() / 1e6:.2f}M parameters")
    return model


def match_labels(config: PretrainedConfig, labels: list[str], is_trained: bool) -> dict[str, int]:
    """Give a config the labels of the data, and return the number of each as the data has them.

    A model that was trained on these labels, or more, keeps its own numbers of them, as those of MNLI on the Hub have
    their own. Upper and lower case are one where that leaves all labels different.

    Args:
        config (`PretrainedConfig`): The model's config.
        labels (`list[str]`): The labels of the data, in the order that a new head has them.
        is_trained (`bool`): Whether the config is that of a checkpoint.
    """
    known = [config.id2label[i] for i in range(config.num_labels)]
    for fold in (str, str.lower):
        numbers = {fold(label): i for i, label in enumerate(known)}
        folded = [fold(label) for label in labels]
        if len(numbers) == len(known) and len(set(folded)) == len(labels) and set(folded) <= set(numbers):
            return {label: numbers[fold(label)] for label in labels}
    if is_trained and known != [f"LABEL_{i}" for i in range(len(known))]:
        logger.warning(f"The labels of the model ({', '.join(known)}) give way to the data's ({', '.join(labels)})")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    return dict(config.label2id)


def add_adapter(model: nn.Module, lora_args: LoraArguments, task_type: str | None) -> nn.Module:
    """Put a LoRA adapter on a model, and freeze the rest; with `use_peft` false return the model as it is."""
    if not lora_args.use_peft:
        return model
    targets = lora_args.lora_target_modules
    if targets is None:
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, "all-linear")
    lora_config = LoraConfig(
        task_type=task_type,
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    if not model.name_or_path and not lora_args.merge_and_unload:
        logger.warning("The adapter is saved without its new model, and is of no use alone: see merge_and_unload")
    try:
        model = get_peft_model(model, lora_config)
    except ValueError as error:
        raise ValueError(f"lora_target_modules: {error}") from error
    trainable, total = model.get_nb_trainable_parameters()
    logger.info(f"Training an adapter with {trainable / 1e6:.2f}M of {total / 1e6:.2f}M parameters")
    return model


def remove_earlier_run(args: AlsalsTrainingArguments) -> None:
    """Remove what is about to be wrong: another run's checkpoints, and the results of fewer steps.

    A later resume_from_checkpoint would take these checkpoints for this run's, a later reader the results.
    """
    if args.resume_from_checkpoint is None:
        for folder in complete_checkpoints(args.output_dir):
            if not os.path.islink(folder):
                logger.warning(f"Removing {folder} of an earlier run")
                shutil.rmtree(folder)
    for name in (*METRICS, CARD):
        path = os.path.join(args.output_dir, name)
        if os.path.lexists(path) and (has_steps_left(args) or not is_readable(path)):
            os.remove(path)


def is_readable(path: str) -> bool:
    """Return whether a json file was written to its end; any other file is."""
    try:
        with open(path, encoding="utf-8") as file:
            return not path.endswith(".json") or isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def training(parser: AlsalsArgumentParser, args: AlsalsTrainingArguments) -> Iterator[None]:
    """End the program with one line where the block finds fault with the checkpoint, the data or the disk."""
    try:
        yield
    except ValueError as error:
        # What a worker process of the data loader raises comes with its traceback.
        text = str(error)
        lines = text.strip().splitlines()
        parser.error(lines[-1].removeprefix("ValueError: ") if text.startswith("Caught ") else one_line(error))
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        parser.error(one_line(error).strip("\"'"))
    except ImportError as error:  # of an optimizer
        parser.error(one_line(error))
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors have errors of their own for a full disk.
        is_torchs = any(writer in str(error) for writer in ("PytorchStreamWriter", "inline_container"))
        if not (is_torchs or isinstance(error, (OSError, SafetensorError))):
            raise
        reason = "a file could not be written to its end, as on a full disk" if is_torchs else one_line(error)
        parser.error(f"output_dir {args.output_dir!r} or the data cannot be read or written: {reason}")


def train(parser: AlsalsArgumentParser, trainer: AlsalsTrainer, lora_args: LoraArguments | None = None) -> None:
    """Train, merge the adapter if that is asked for, and save model, metrics and state."""
    with training(parser, trainer.args):
        train_and_save(trainer, lora_args)


def train_and_save(trainer: AlsalsTrainer, lora_args: LoraArguments | None) -> None:
    """Do what `train` does, and raise whatever goes wrong."""
    args = trainer.args
    if args.should_save:
        remove_earlier_run(args)
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    if trainer.state.global_step == 0:
        raise ValueError(
            "per_device_train_batch_size must be at most the number of training examples, got "
            f"{args.per_device_train_batch_size}: nothing was trained."
        )
    adapter = lora_args is not None and lora_args.use_peft
    if adapter and lora_args.merge_and_unload:
        trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
        adapter = False
    if args.should_save:
        # A model beside an adapter, or shards beside a model, would be taken for part of it.
        for entry in list(os.scandir(args.output_dir)):
            if WEIGHTS.fullmatch(entry.name) and entry.is_file():
                os.remove(entry.path)
    trainer.save_model(_internal_call=True)  # with the tokenizer; not yet to the Hub
    if adapter and args.should_save:
        trainer.model.get_base_model().config.save_pretrained(args.output_dir)  # with the labels
    if isinstance(trainer.train_dataset, datasets.Dataset):
        metrics["train_samples"] = len(trainer.train_dataset)
    trainer.log_metrics("train", metrics)
    if "train_loss" in metrics or not os.path.exists(os.path.join(args.output_dir, METRICS[0])):
        trainer.save_metrics("train", metrics)  # of a training that had ended before there may be better ones
    trainer.save_state()


def evaluate(parser: AlsalsArgumentParser, trainer: AlsalsTrainer, with_perplexity: bool = False) -> None:
    """Evaluate, and save the metrics."""
    with training(parser, trainer.args):
        metrics = trainer.evaluate()
        if isinstance(trainer.eval_dataset, datasets.Dataset):
            metrics["eval_samples"] = len(trainer.eval_dataset)
        if with_perplexity:
            metrics["perplexity"] = math.exp(metrics["eval_loss"]) if metrics["eval_loss"] < 700 else math.inf
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def finish(parser: AlsalsArgumentParser, trainer: AlsalsTrainer, **card: Any) -> None:
    """Write the model card, push everything if that is asked for, and name the files that were written.

    Where the push fails the program ends with one line that says so, and where the results are.
    """
    args = trainer.args
    if args.do_train:
        try:
            trainer.create_model_card(**card)
        except Exception as error:  # whatever it is, the results are written
            logger.warning(f"{os.path.join(args.output_dir, CARD)} is not written: {one_line(error)}")
    if trainer.is_world_process_zero():
        entries = list(os.scandir(args.output_dir))
        written = [
            entry.name
            for entry in entries
            if entry.stat(follow_symlinks=False).st_mtime >= STARTED and entry.name != LOCK
        ]
        logger.info(f"Wrote {', '.join(sorted(written))} to {args.output_dir}")
    if args.push_to_hub:
        try:
            trainer.push_to_hub(**card)
        except Exception as error:  # whatever the Hub or the network answered
            reason = " ".join(str(error).split())
            parser.exit(1, f"{parser.prog}: error: push_to_hub: {reason} The results are in {args.output_dir}.\n")
    trainer.accelerator.end_training()  # a process that ends with its process group up may abort
