"""Prompt texts to token ids."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.vocabulary import padding_id


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, padding_side: str, max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask `[P, S]` of prompts; see `prompt_token_ids` and `pad_prompts`."""
    prompt_ids = prompt_token_ids(tokenizer, prompts, max_length=max_length)
    return pad_prompts(prompt_ids, padding_side=padding_side, pad_id=padding_id(tokenizer))


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_length: int | None = None
) -> list[list[int]]:
    """Ids of each prompt with the tokenizer's special tokens, cut at `max_length` tokens.

    Where a chat template has written the BOS that the tokenizer adds too, one of them is kept.

    Raises:
        InputError: A prompt has no tokens, so that nothing could predict a completion's first one.
    """
    encoded = tokenizer(
        list(prompts), truncation=max_length is not None, max_length=max_length, add_special_tokens=True
    )
    bos = tokenizer.bos_token_id
    prompt_ids = [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded["input_ids"]]
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not ids:
            raise InputError(f"The prompt {prompt!r} has no tokens: drop that row, or ask with a template's words.")
    return prompt_ids


def target_token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int) -> list[int]:
    """A completion's ids with exactly one EOS, cut to `max_length` (EOS is then lost, as when sampling)."""
    ids = tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id][:max_length]


def pad_prompts(prompt_ids: Sequence[Sequence[int]], *, padding_side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[P, S]`, padded on the "right" (encoder-decoder) or "left" (decoder-only).

    The mask comes from the lengths: the pad id may stand inside a prompt.
    """
    width = max(map(len, prompt_ids))
    ids_PS = torch.full((len(prompt_ids), width), pad_id)
    mask_PS = torch.zeros_like(ids_PS)
    for p, ids in enumerate(prompt_ids):
        first = 0 if padding_side == "right" else width - len(ids)
        ids_PS[p, first : first + len(ids)] = torch.tensor(ids)
        mask_PS[p, first : first + len(ids)] = 1
    return ids_PS, mask_PS
