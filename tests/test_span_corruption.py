import pytest
import torch
from span_corruption import SpanCorruption
from transformers import set_seed

SENTINELS = list(range(900, 1000))
EOS = 1


def corrupt(length, rows=4, **kwargs):
    blocks = [{"input_ids": list(range(10, 10 + length))} for _ in range(rows)]
    return SpanCorruption(SENTINELS, EOS, **kwargs)(blocks)


def restore(inputs, labels):
    """Put every span of the labels in the place of its sentinel."""
    spans, text = {}, []
    assert labels[-1] == inputs[-1] == EOS
    for token in labels[:-1]:
        if token in SENTINELS:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    for token in inputs[:-1]:
        text += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return text


@pytest.mark.parametrize("length", [2, 3, 8, 57, 256, 512])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 1.0), (0.9, 20.0)])
def test_the_labels_fill_the_gaps_of_the_inputs(length, density, mean):
    try:
        batch = corrupt(length, noise_density=density, mean_noise_span_length=mean)
    except ValueError as error:
        assert "sentinels" in str(error) and length * density / mean > 100
        return
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert restore(inputs, labels) == list(range(10, 10 + length))
        used = [token for token in inputs if token in SENTINELS]
        assert used == SENTINELS[: len(used)]  # in order, so the model can count on it
        assert used == [token for token in labels if token in SENTINELS]


def test_density_and_span_length_are_those_asked_for():
    batch = corrupt(512)
    assert batch["input_ids"].shape == (4, 512 - 77 + 26 + 1)  # 15 % of 512 in 77 / 3 spans
    assert batch["labels"].shape == (4, 77 + 26 + 1)


def test_every_place_is_taken_out_as_often_as_another():
    set_seed(0)
    length, rows = 40, 4000
    inputs = corrupt(length, rows)["input_ids"]
    kept = torch.tensor([(inputs == token).sum().item() for token in range(10, 10 + length)]) / rows
    lost = 1 - kept
    # A block begins with text and ends with a span, as T5's do.
    assert (lost[0], lost[-1]) == (0, 1)
    assert lost.mean().item() == pytest.approx(6 / 40)
    assert lost[5:-8].max() < 2.5 * lost[5:-8].min()


def test_the_seed_decides(tmp_path):
    set_seed(3)
    first = corrupt(64)
    again = corrupt(64)
    set_seed(3)
    assert corrupt(64)["input_ids"].equal(first["input_ids"])
    assert not again["input_ids"].equal(first["input_ids"])


def test_too_few_sentinels_are_refused():
    with pytest.raises(ValueError, match="lose 77 spans, but the tokenizer has 3 sentinels"):
        SpanCorruption(SENTINELS[:3], EOS, mean_noise_span_length=1.0).counts(512)
