"""What all recipes share: arguments, the start of a run, its training and evaluation, and its end."""

import contextlib
import logging
import math
import os
import sys
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

from hf_alsals import AlsalsArgumentParser, AlsalsTrainer
from hf_alsals.trainer import last_whole_checkpoint

logger = logging.getLogger(__name__)

# What an earlier training has left in an output directory.
RESULTS = ("train_results.json", "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


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
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


@contextlib.contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Name the argument and its value where what it names on the Hub or on disk cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what} must be a name on the Hub or a path, and {name!r} cannot be loaded: {error}"
        ) from error


def make_parser(description: str, *dataclass_types: type) -> AlsalsArgumentParser:
    """Make the parser of a recipe, which logs the first and every tenth step unless it is told otherwise."""
    parser = AlsalsArgumentParser((RunArguments, *dataclass_types), description=description)
    parser.set_defaults(logging_steps=10, logging_first_step=True)
    return parser


def start(parser: AlsalsArgumentParser) -> tuple[Any, ...]:
    """Parse the command line, check the output directory, and set up logging and the seed.

    The last of the dataclasses must be the training arguments. Without `--do_train`, `--do_eval` or `--do_predict` a
    recipe trains and evaluates.
    """
    run_args, *arguments, training_args = parser.parse_args_and_config()
    # An eval_strategy sets do_eval by itself, and is nothing without training.
    evaluates_only = training_args.do_eval and training_args.eval_strategy == "no"
    if not (training_args.do_train or training_args.do_predict or evaluates_only):
        training_args.do_train = training_args.do_eval = True

    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is not None and checkpoint.lower() != "true" and not os.path.isdir(checkpoint):
        parser.error(f"resume_from_checkpoint must be true or a checkpoint's folder, got {checkpoint!r}.")
    output_dir = training_args.output_dir
    finished = [name for name in RESULTS if os.path.exists(os.path.join(output_dir, name))]
    overwrite = run_args.overwrite_output_dir or checkpoint is not None
    if training_args.do_train and finished and not overwrite:
        parser.error(
            f"output_dir {output_dir!r} holds a finished run ({', '.join(finished)}): name another, or pass "
            "--overwrite_output_dir, or --resume_from_checkpoint true to go on from its last checkpoint."
        )

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


def load_tokenizer(model_args: TextModelArguments) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer by its name or path; return `None` if there is neither."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None:
        return None
    with loading("tokenizer_name" if model_args.tokenizer_name else "model_name_or_path", name):
        return AutoTokenizer.from_pretrained(name, use_fast=model_args.use_fast_tokenizer, **model_args.hub_kwargs)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Train a small WordPiece tokenizer, as BERT has one, on texts."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=2048, special_tokens=list(special.values()), continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


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
    model = auto_class.from_config(config, trust_remote_code=model_args.trust_remote_code)
    logger.info(f"Training a new {config.model_type} with {model.num_parameters() / 1e6:.2f}M parameters")
    return model


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
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint is not None and checkpoint.lower() == "true":  # from the last one, if there is any
        checkpoint = last_whole_checkpoint(trainer.args.output_dir)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if lora_args is not None and lora_args.merge_and_unload:
        trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    trainer.save_model(_internal_call=True)  # with the tokenizer; not yet to the Hub
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
        logger.info(f"Wrote {', '.join(sorted(os.listdir(args.output_dir)))} to {args.output_dir}")
    if args.push_to_hub:
        try:
            trainer.push_to_hub(**card)
        except Exception as error:  # whatever the Hub or the network answered
            reason = " ".join(str(error).split())
            parser.exit(1, f"{parser.prog}: error: push_to_hub: {reason} The results are in {args.output_dir}.\n")
