"""Train a masked language model (BERT and others) from scratch or from a checkpoint, with `--optim alsals`.

The flags are those of transformers' examples/pytorch/language-modeling/run_mlm.py, but for line_by_line and
pad_to_max_length: texts are always joined and cut into blocks. Without a model it builds a small BERT, without data it
takes the language reference of Python, without a tokenizer it trains one on the data.

    python recipes/run_mlm.py --optim alsals --output_dir out
    python recipes/run_mlm.py recipes/configs/bert-mlm.yaml
"""

from dataclasses import dataclass, field
from itertools import islice
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
    train_tokenizer,
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
    text_column,
)
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForMaskedLM,
    BertConfig,
    DataCollatorForLanguageModeling,
)

from hf_alsals import AlsalsTrainer, AlsalsTrainingArguments

# 0.7 M parameters.
SMALL_BERT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass
class MlmModelArguments(LanguageModelArguments):
    """Which model and tokenizer to train, or what new model to make."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_model_type(MODEL_FOR_MASKED_LM_MAPPING)


@dataclass
class MlmDataArguments(TextDataArguments):
    """Which text to train on, in blocks of which size, and how much of it to mask."""

    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Tokens in a training sequence; by default what the model takes, at most 1024."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "The share of the tokens to mask."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, max_seq_length=8)
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be in (0, 1), got {self.mlm_probability}.")


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], MlmModelArguments, MlmDataArguments, AlsalsTrainingArguments)
    model_args, data_args, training_args = start(parser)
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        parser.error("max_steps must be set with streaming: the length of the text is not known.")

    # Data, tokenizer and config: by name or path, else WordPiece of the data and a small BERT.
    with one_line_error(parser):
        texts = load_texts(data_args, model_args)
        tokenizer = load_tokenizer(model_args)
        if tokenizer is None:
            rows, column = next(iter(texts.values())), text_column(texts)
            tokenizer = train_tokenizer(row[column] or "" for row in islice(rows, 100_000))
        small = BertConfig(**SMALL_BERT)
        config = load_config(model_args, lambda: model_args.new_config(small, tokenizer))
    if tokenizer.mask_token is None:
        name = model_args.tokenizer_name or model_args.model_name_or_path
        parser.error(f"tokenizer_name must be a tokenizer with a mask token, but {name!r} has none.")

    # Preprocessing: tokenize, then concatenate and cut into blocks.
    longest = longest_input(tokenizer, config)
    max_seq_length = data_args.max_seq_length or int(min(longest, 1024))
    if max_seq_length > longest:
        parser.error(f"max_seq_length must be at most {longest}, what model and tokenizer take, got {max_seq_length}.")

    def tokenize(texts: list[str]) -> dict[str, list]:
        rows = tokenizer(texts, return_special_tokens_mask=True, return_token_type_ids=False, verbose=False)
        return {name: rows[name] for name in ("input_ids", "special_tokens_mask")}

    with one_line_error(parser):
        blocks = cut_into_blocks(texts, tokenize, max_seq_length, data_args, training_args)
        train_dataset = eval_dataset = None
        if training_args.do_train:
            train_dataset = take_blocks(blocks, "train", data_args.max_train_samples, "max_seq_length", max_seq_length)
        if training_args.do_eval:
            eval_dataset = take_blocks(
                blocks, "validation", data_args.max_eval_samples, "max_seq_length", max_seq_length
            )
        model = load_model(AutoModelForMaskedLM, model_args, config, dtype=model_args.dtype)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))

    def predictions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def compute_metrics(eval_preds: Any) -> dict[str, float]:
        masked = eval_preds.label_ids != -100
        return {"accuracy": accuracy_score(eval_preds.label_ids[masked], eval_preds.predictions[masked])}

    with one_line_error(parser):
        trainer = AlsalsTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability),
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=predictions,
        )

    if training_args.do_train:
        train(parser, trainer)
    if training_args.do_eval:
        evaluate(parser, trainer, with_perplexity=True)
    finish(parser, trainer, tasks="fill-mask", **card_of_text(data_args, model_args))


if __name__ == "__main__":
    main()
