from pydoc_data.topics import topics

import pytest
import recipe
import text_data
from datasets import Dataset, DatasetDict
from transformers import BertConfig, ByT5Tokenizer, GPT2Config, RobertaConfig, TrainingArguments


def test_the_topics_are_split_without_overlap():
    texts = text_data.load_texts(text_data.TextDataArguments(), recipe.ModelArguments())
    train, validation = set(texts["train"]["text"]), set(texts["validation"]["text"])
    assert train | validation == set(topics.values())
    seen = {line.strip() for text in train for line in text.splitlines()}
    assert not [line for text in validation for line in text.splitlines() if len(line) > 40 and line.strip() in seen]
    assert 0.05 < sum(map(len, validation)) / sum(map(len, topics.values())) < 0.15


def blocks_of(texts, block_size, tmp_path, **kwargs):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    return text_data.cut_into_blocks(
        DatasetDict({split: Dataset.from_dict(columns) for split, columns in texts.items()}),
        lambda rows: {"input_ids": tokenizer(rows)["input_ids"]},
        block_size,
        text_data.TextDataArguments(**kwargs),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
    )


def test_blocks_hold_the_text_in_its_order_and_drop_the_rest(tmp_path):
    blocks = blocks_of({"train": {"id": [1, 2, 3], "text": ["abcd", None, "efghij"]}}, 4, tmp_path)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    ids = [*tokenizer("abcd").input_ids, *tokenizer("").input_ids, *tokenizer("efghij").input_ids]
    assert blocks["train"].column_names == ["input_ids"]
    assert [row for block in blocks["train"]["input_ids"] for row in block] == ids[:12]


def test_the_first_column_is_taken_where_none_is_named_text(tmp_path):
    assert len(blocks_of({"train": {"content": ["abcdefgh"], "id": [1]}}, 4, tmp_path)["train"]) == 2
    with pytest.raises(ValueError, match="must have a column of text named text, got id, content"):
        blocks_of({"train": {"id": [1], "content": ["abcdefgh"]}}, 4, tmp_path)
    with pytest.raises(ValueError, match="the train text must hold at least one line or row"):
        blocks_of({"train": {"text": []}}, 4, tmp_path)


def test_what_a_model_takes_at_most():
    tokenizer = ByT5Tokenizer()
    assert text_data.longest_input(tokenizer, BertConfig(max_position_embeddings=64)) == 64
    tokenizer.model_max_length = 32
    assert text_data.longest_input(tokenizer, BertConfig(max_position_embeddings=64)) == 32


def test_a_new_config_has_the_tokens_of_the_tokenizer():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    args = text_data.LanguageModelArguments(config_overrides="n_layer=3,resid_pdrop=0.5")
    config = args.new_config(GPT2Config(), tokenizer)
    assert (config.n_layer, config.resid_pdrop, config.vocab_size) == (3, 0.5, 259)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 1)
    assert text_data.LanguageModelArguments(model_type="bert").new_config(GPT2Config(), tokenizer).model_type == "bert"


def test_the_card_names_hub_data_and_keeps_quiet_of_files(tmp_path):
    def card(**kwargs):
        return text_data.card_of_text(text_data.TextDataArguments(**kwargs), recipe.ModelArguments())

    assert card()["dataset"] == "Python language reference"
    hub = card(dataset_name="wikimedia/wikipedia", dataset_config_name="20231101.en")
    assert (hub["dataset_tags"], hub["dataset_args"]) == ("wikimedia/wikipedia", "20231101.en")
    (tmp_path / "secret.txt").write_text("text")
    assert "secret" not in str(card(train_file=str(tmp_path / "secret.txt")))


def test_roberta_counts_positions_from_its_padding_token_on():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert text_data.longest_input(tokenizer, RobertaConfig(max_position_embeddings=66)) == 64


def test_one_line_cannot_be_trained_on_and_evaluated_on(tmp_path):
    (tmp_path / "one.txt").write_text("one line")
    args = text_data.TextDataArguments(train_file=str(tmp_path / "one.txt"))
    with pytest.raises(ValueError, match="the train text must have two lines or rows to keep one to evaluate"):
        text_data.load_texts(args, recipe.ModelArguments())
