"""Train a causal language model (GPT-2 and others) from scratch or from a checkpoint, with `--optim alsals`.

The flags are those of transformers' examples/pytorch/language-modeling/run_clm.py. Without a model it builds a small
GPT-2, without data it takes the language reference that every Python has, without a tokenizer it trains on bytes.

    python recipes/run_clm.py --optim alsals --output_dir out
    python recipes/run_clm.py recipes/configs/gpt2-openwebtext.yaml --per_device_train_batch_size 16
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from recipe import (
    LoraArguments,
    add_adapter,
    check_counts,
    evaluate,
    finish,
    load_config,
    load_model,
    load_tokenizer,
    logger,
    make_parser,
    one_line_error,
    start,
    train,
)
from sklearn.metrics import accuracy_score
from text_data import (
    LanguageModelArguments,
    TextDataArguments,
    card_of_text,
    cut_into_blocks,
    load_texts,
    longest_input,
    take_blocks,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    default_data_collator,
)

from hf_alsals import AlsalsTrainer, AlsalsTrainingArguments

# 0.9 M parameters: three epochs of the embedded text in some four minutes on a CPU core.
SMALL_GPT2 = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@dataclass
class ClmModelArguments(LanguageModelArguments):
    """Which model and tokenizer to train, or what new model to make."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_model_type(MODEL_FOR_CAUSAL_LM_MAPPING)


@dataclass
class ClmDataArguments(TextDataArguments):
    """Which text to train on, in blocks of which size."""

    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens in a training sequence; by default what the model takes, at most 1024."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, block_size=2)


def main() -> None:
    parser = make_parser(
        __doc__.splitlines()[0], ClmModelArguments, ClmDataArguments, LoraArguments, AlsalsTrainingArguments
    )
    model_args, data_args, lora_args, training_args = start(parser)
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        parser.error("max_steps must be set with streaming: the length of the text is not known.")

    with one_line_error(parser):
        texts = load_texts(data_args, model_args)

    # Tokenizer and config: by name or path, else bytes and a small GPT-2.
    with one_line_error(parser):
        tokenizer = load_tokenizer(model_args) or ByT5Tokenizer(extra_ids=0)
        small = GPT2Config(**SMALL_GPT2)
        if data_args.block_size is not None:
            small.n_positions = data_args.block_size
        config = load_config(model_args, lambda: model_args.new_config(small, tokenizer))

    # Preprocessing: tokenize, then concatenate and cut into blocks.
    longest = longest_input(tokenizer, config)
    block_size = data_args.block_size or int(min(longest, 1024))
    if block_size > longest:
        parser.error(f"block_size must be at most {longest}, what model and tokenizer take, got {block_size}.")
    # The lines of a txt file are one text: no special tokens between them.
    lines = (data_args.train_file or data_args.validation_file or "").endswith(".txt")

    def tokenize(texts: list[str]) -> dict[str, list]:
        ids = tokenizer(texts, add_special_tokens=not lines, verbose=False)["input_ids"]
        return {"input_ids": ids, "labels": ids}

    with one_line_error(parser):
        blocks = cut_into_blocks(texts, tokenize, block_size, data_args, training_args)
        train_dataset = eval_dataset = None
        if training_args.do_train:
            train_dataset = take_blocks(blocks, "train", data_args.max_train_samples, "block_size", block_size)
        if training_args.do_eval:
            eval_dataset = take_blocks(blocks, "validation", data_args.max_eval_samples, "block_size", block_size)

    with one_line_error(parser):
        model = load_model(AutoModelForCausalLM, model_args, config, dtype=model_args.dtype)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        model = add_adapter(model, lora_args, "CAUSAL_LM")

    def predictions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(eval_preds: Any) -> dict[str, float]:
        predicted, labels = eval_preds.predictions[:, :-1], eval_preds.label_ids[:, 1:]  # position i predicts i + 1
        return {"accuracy": accuracy_score(labels.reshape(-1), predicted.reshape(-1))}

    with one_line_error(parser):
        trainer = AlsalsTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=predictions,
        )

    if training_args.do_train:
        train(parser, trainer, lora_args)
    if training_args.do_eval:
        evaluate(parser, trainer, with_perplexity=True)

    # On every process: under FSDP each holds a shard of the model.
    prompt = tokenizer("The ", add_special_tokens=False, return_tensors="pt")["input_ids"].to(training_args.device)
    prompt = prompt[:, : int(min(longest - 1, prompt.shape[1]))]
    length = int(min(longest, prompt.shape[1] + 120))
    sample = trainer.model.eval().generate(
        input_ids=prompt, max_length=length, do_sample=True, top_k=40, synced_gpus=training_args.world_size > 1
    )
    logger.info(f"A sample: {tokenizer.decode(sample[0], skip_special_tokens=True)!r}")

    finish(parser, trainer, tasks="text-generation", **card_of_text(data_args, model_args))


if __name__ == "__main__":
    main()
