"""The pretraining task of T5: fill in the spans of text that were taken out (arXiv 1910.10683, section 3.1.4)."""

import torch
from torch import Tensor


class SpanCorruption:
    """A data collator that takes random spans out of blocks of equal length.

    Inputs hold one sentinel for each span, labels hold each sentinel and the span that it stands for. As every block
    loses as many tokens in as many spans, nothing needs padding.

    Args:
        sentinel_ids (`list[int]`): The ids of the sentinels, in the order of their use.
        eos_token_id (`int`): The id that ends inputs and labels.
        noise_density (`float`, defaults to 0.15): The share of the tokens to take out.
        mean_noise_span_length (`float`, defaults to 3.0): The mean length of a span, in tokens.
    """

    def __init__(
        self,
        sentinel_ids: list[int],
        eos_token_id: int,
        noise_density: float = 0.15,
        mean_noise_span_length: float = 3.0,
    ) -> None:
        self.sentinel_ids = sentinel_ids
        self.eos_token_id = eos_token_id
        self.noise_density = noise_density
        self.mean_noise_span_length = mean_noise_span_length

    def counts(self, length: int) -> tuple[int, int]:
        """Return how many tokens are taken out of a block, and in how many spans.

        Args:
            length (`int`): Tokens in the block, at least 2.

        Raises:
            ValueError: If there are fewer sentinels than spans.
        """
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = min(max(round(noise / self.mean_noise_span_length), 1), noise, length - noise)
        if spans > len(self.sentinel_ids):
            raise ValueError(
                f"blocks of {length} tokens lose {spans} spans, but the tokenizer has {len(self.sentinel_ids)} "
                "sentinels (<extra_id_0>, ...): take shorter blocks or longer spans."
            )
        return noise, spans

    def __call__(self, blocks: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Return `input_ids` and `labels`, each of shape (blocks, tokens).

        Args:
            blocks (`list[dict]`): The blocks, each with its `input_ids`.
        """
        pairs = [self._corrupt(block["input_ids"]) for block in blocks]
        return {name: torch.tensor(rows) for name, rows in zip(("input_ids", "labels"), zip(*pairs, strict=True))}

    def _corrupt(self, ids: list[int]) -> tuple[list[int], list[int]]:
        noise, spans = self.counts(len(ids))
        kept_lengths = _split_at_random(len(ids) - noise, spans)
        noise_lengths = _split_at_random(noise, spans)
        inputs: list[int] = []
        labels: list[int] = []
        start = 0
        for sentinel, kept, lost in zip(self.sentinel_ids, kept_lengths, noise_lengths, strict=False):
            inputs += [*ids[start : start + kept], sentinel]
            labels += [sentinel, *ids[start + kept : start + kept + lost]]
            start += kept + lost
        return [*inputs, self.eos_token_id], [*labels, self.eos_token_id]


def _split_at_random(total: int, parts: int) -> list[int]:
    cuts = (torch.randperm(total - 1)[: parts - 1] + 1).sort().values.tolist()
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]
