"""Prompt texts to token ids."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    padding_side: str | None,
    max_length: int | None = None,
) -> tuple[Tensor | list[list[int]], Tensor | list[list[int]]]:
    """Ids and mask of each prompt with the tokenizer's special tokens, cut at `max_length` tokens.

    With a `padding_side` ("right" for encoder-decoder models, "left" for decoder-only ones) they are tensors
    `[P, S]`; with None, ragged lists.
    """
    encoded = tokenizer(
        list(prompts), truncation=max_length is not None, max_length=max_length, add_special_tokens=True
    )
    if padding_side is None:
        return encoded["input_ids"], encoded["attention_mask"]
    padded = tokenizer.pad(
        {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]},
        padding_side=padding_side,
        return_tensors="pt",
    )
    return padded["input_ids"], padded["attention_mask"]
