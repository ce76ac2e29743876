"""Pretrain T5 by span corruption, from scratch or from a checkpoint, with `--optim alsals`.

The flags are those of transformers' examples/flax/language-modeling/run_t5_mlm_flax.py and of run_mlm.py. Without a
model it builds a small T5, without data it takes the language reference that every Python has, without a tokenizer it
trains on bytes.

    python recipes/run_t5_mlm.py --optim alsals --output_dir out
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from recipe import (
    check_counts,
    evaluate,
    finish,
    load_config,
    load_model,
    load_tokenizer,
    make_parser,
    one_line_error,
    start,
    train,
)
from sklearn.metrics import accuracy_score
from span_corruption import SpanCorruption
from text_data import (
    LanguageModelArguments,
    TextDataArguments,
    card_of_text,
    cut_into_blocks,
    load_texts,
    take_blocks,
)
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForSeq2SeqLM,
    ByT5Tokenizer,
    T5Config,
)

from hf_alsals import AlsalsTrainer, AlsalsTrainingArguments

# 0.9 M parameters.
SMALL_T5 = {
    "d_model": 128,
    "d_ff": 512,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


@dataclass
class T5ModelArguments(LanguageModelArguments):
    """Which model and tokenizer to train, or what new model to make."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_model_type(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)


@dataclass
class T5DataArguments(TextDataArguments):
    """Which text to train on, in blocks of which size, and how much of it to take out."""

    max_seq_length: int = field(default=256, metadata={"help": "Tokens of text in a training sequence."})
    mlm_probability: float = field(default=0.15, metadata={"help": "The share of the tokens to take out."})
    mean_noise_span_length: float = field(default=3.0, metadata={"help": "The mean length of a span, in tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, max_seq_length=8, mean_noise_span_length=1)
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be in (0, 1), got {self.mlm_probability}.")


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], T5ModelArguments, T5DataArguments, AlsalsTrainingArguments)
    model_args, data_args, training_args = start(parser)
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        parser.error("max_steps must be set with streaming: the length of the text is not known.")

    # Data, tokenizer and config: by name or path, else bytes and a small T5.
    with one_line_error(parser):
        texts = load_texts(data_args, model_args)
        tokenizer = load_tokenizer(model_args) or ByT5Tokenizer()
        config = load_config(model_args, lambda: model_args.new_config(T5Config(**SMALL_T5), tokenizer))
        sentinels = [name for name in tokenizer.all_special_tokens if name.startswith("<extra_id_")]
        sentinels = sorted(sentinels, key=lambda name: int(name[10:-1]))
        span_corruption = SpanCorruption(
            tokenizer.convert_tokens_to_ids(sentinels),
            tokenizer.eos_token_id,
            data_args.mlm_probability,
            data_args.mean_noise_span_length,
        )
        span_corruption.counts(data_args.max_seq_length)
    if config.decoder_start_token_id is None:
        config.decoder_start_token_id = config.pad_token_id

    # Preprocessing: tokenize, then concatenate and cut into blocks.
    def tokenize(texts: list[str]) -> dict[str, list]:
        return {"input_ids": tokenizer(texts, verbose=False)["input_ids"]}

    with one_line_error(parser):
        blocks = cut_into_blocks(texts, tokenize, data_args.max_seq_length, data_args, training_args)
        train_dataset = eval_dataset = None
        if training_args.do_train:
            train_dataset = take_blocks(
                blocks, "train", data_args.max_train_samples, "max_seq_length", data_args.max_seq_length
            )
        if training_args.do_eval:
            eval_dataset = take_blocks(
                blocks, "validation", data_args.max_eval_samples, "max_seq_length", data_args.max_seq_length
            )
        model = load_model(AutoModelForSeq2SeqLM, model_args, config, dtype=model_args.dtype)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))

    def predictions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(eval_preds: Any) -> dict[str, float]:
        return {"accuracy": accuracy_score(eval_preds.label_ids.reshape(-1), eval_preds.predictions.reshape(-1))}

    with one_line_error(parser):
        trainer = AlsalsTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=span_corruption,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=predictions,
        )

    if training_args.do_train:
        train(parser, trainer)
    if training_args.do_eval:
        evaluate(parser, trainer, with_perplexity=True)
    finish(parser, trainer, tasks="text2text-generation", **card_of_text(data_args, model_args))


if __name__ == "__main__":
    main()
