"""What all recipes share: arguments, the start of a run, its training and evaluation, and its end."""

import contextlib
import glob
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
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
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_alsals import AlsalsArgumentParser, AlsalsTrainer, AlsalsTrainingArguments
from hf_alsals.checkpoint import last_complete_checkpoint

logger = logging.getLogger(__name__)

# What a finished training has left in an output directory.
RESULTS = ("train_results.json", "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")

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
        if value is not None and value < count:
            raise ValueError(f"{name} must be at least {count}, got {value}.")


def check_file(name: str, path: str, extensions: tuple[str, ...]) -> None:
    """Raise a ValueError if the file that the argument `name` gives cannot be a file of examples."""
    if not path.endswith(tuple(f".{extension}" for extension in extensions)):
        raise ValueError(f"{name} must be a {' or '.join(extensions)} file, got {path!r}.")
    if not os.path.isfile(path):
        raise ValueError(f"{name} must be a file, but there is none at {path!r}.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name} must hold text, but {path!r} is empty.")


@contextlib.contextmanager
def one_line_error(parser: AlsalsArgumentParser) -> Iterator[None]:
    """End the program with one line where the block finds fault with data, names or values."""
    try:
        yield
    except FAULTS as error:
        parser.error(" ".join(str(error).split()))


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
    with one_line_error(parser):
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        check_counts(training_args, **dict.fromkeys(sizes, 1))
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
    set_seed(training_args.seed)
    return *arguments, training_args


def check_output_dir(args: AlsalsTrainingArguments, overwrite: bool) -> None:
    """Raise a ValueError where training would overwrite an earlier run, or could not go on with one.

    Sets `resume_from_checkpoint` to a checkpoint's folder or `None`.
    """
    output_dir, checkpoint = args.output_dir, args.resume_from_checkpoint
    os.makedirs(output_dir, exist_ok=True)
    last = last_complete_checkpoint(output_dir)
    resumes = checkpoint is not None and checkpoint.lower() != "false"
    if resumes and checkpoint.lower() == "true":
        checkpoint = last  # from the first step if there is none
    elif resumes and not os.path.isfile(os.path.join(checkpoint, TRAINER_STATE_NAME)):
        raise ValueError(f"resume_from_checkpoint must be true or a checkpoint's folder, got {checkpoint!r}.")
    args.resume_from_checkpoint = checkpoint if resumes else None
    if not args.do_train or overwrite:
        return
    finished = [name for name in RESULTS if os.path.exists(os.path.join(output_dir, name))]
    advice = "name another, or pass --overwrite_output_dir."
    if finished and not resumes:
        raise ValueError(f"output_dir {output_dir!r} holds a finished run ({', '.join(finished)}): {advice}")
    if last is not None and not resumes:
        raise ValueError(
            f"output_dir {output_dir!r} holds an interrupted run ({os.path.basename(last)}): go on with it by "
            f"--resume_from_checkpoint true, {advice}"
        )
    if finished and resumes:
        ended = True
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            by_steps = args.max_steps > 0
            ended = state.global_step >= args.max_steps if by_steps else state.epoch >= args.num_train_epochs
        if ended:
            raise ValueError(
                f"output_dir {output_dir!r} holds a finished run, nothing is left to go on with: {advice}"
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
    try:
        config.update_from_string(overrides)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config_overrides must look like a=10,b=0.2, got {overrides!r}: {error}") from error


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


def train(trainer: AlsalsTrainer, lora_args: LoraArguments | None = None) -> None:
    """Train, merge the adapter if that is asked for, and save model, metrics and state."""
    output_dir, checkpoint = trainer.args.output_dir, trainer.args.resume_from_checkpoint
    if checkpoint is None and trainer.args.should_save:
        # Of a run that is overwritten: a later resume_from_checkpoint would take them for this run's.
        for folder in glob.glob(os.path.join(glob.escape(output_dir), f"{PREFIX_CHECKPOINT_DIR}-*")):
            logger.warning(f"Removing {folder} of an earlier run")
            shutil.rmtree(folder)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    adapter = lora_args is not None and lora_args.use_peft
    if adapter and lora_args.merge_and_unload:
        trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
        adapter = False
    if trainer.args.should_save:
        # A model beside an adapter, or shards beside a model, would be taken for part of it.
        for pattern in ("model*.safetensors*", "adapter_*"):
            for path in glob.glob(os.path.join(glob.escape(output_dir), pattern)):
                os.remove(path)
    trainer.save_model(_internal_call=True)  # with the tokenizer; not yet to the Hub
    if adapter and trainer.args.should_save:
        trainer.model.get_base_model().config.save_pretrained(output_dir)  # with the labels
    if isinstance(trainer.train_dataset, datasets.Dataset):
        metrics["train_samples"] = len(trainer.train_dataset)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: AlsalsTrainer, with_perplexity: bool = False) -> None:
    """Evaluate, and save the metrics."""
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
        trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        written = [entry.name for entry in os.scandir(args.output_dir) if entry.stat().st_mtime >= STARTED]
        logger.info(f"Wrote {', '.join(sorted(written))} to {args.output_dir}")
    if args.push_to_hub:
        try:
            trainer.push_to_hub(**card)
        except Exception as error:  # whatever the Hub or the network answered
            reason = " ".join(str(error).split())
            parser.exit(1, f"{parser.prog}: error: push_to_hub: {reason} The results are in {args.output_dir}.\n")
