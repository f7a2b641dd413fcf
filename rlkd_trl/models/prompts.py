"""Prompt texts to token ids."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.vocabulary import padding_id
from rlkd_trl.prompts import ChatText, RenderedPrompt, can_fit, cannot_fit, shortened


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, padding_side: str, max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask `[P, S]` of prompts; see `prompt_token_ids` and `pad_prompts`."""
    prompt_ids = prompt_token_ids(tokenizer, prompts, max_length=max_length)
    return pad_prompts(prompt_ids, padding_side=padding_side, pad_id=padding_id(tokenizer))


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_length: int | None = None
) -> list[list[int]]:
    """Ids of each prompt with the tokenizer's special tokens, at most `max_length` of them.

    A too long prompt from a template (`RenderedPrompt`) keeps the template's words, and its documents are cut; any
    other text is cut at its end. What a chat template wrote (`ChatText`) has its special tokens already, and gets no
    others; where another text begins with the BOS that the tokenizer puts there too, one of them is dropped.

    Raises:
        InputError: A prompt has no tokens, so that there is no state to predict a completion's first token from; or a
            template's own words are more than `max_length` tokens.
    """
    if max_length is None or not any(isinstance(prompt, RenderedPrompt) for prompt in prompts):
        prompt_ids = _token_ids(tokenizer, prompts, max_length)
    else:
        prompt_ids = _token_ids(tokenizer, prompts)
        for p, prompt in enumerate(prompts):
            if len(prompt_ids[p]) > max_length:
                [prompt_ids[p]] = _token_ids(tokenizer, [shorten(tokenizer, prompt, max_length)], max_length)
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not ids:
            raise InputError(f"The prompt {prompt!r} has no tokens: drop that row, or ask with a template's words.")
    return prompt_ids


def shorten(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    *,
    read_as: Callable[[str], str] = lambda prompt: prompt,
) -> str:
    """A prompt of more than `max_length` tokens with its documents cut, or as it is where no template rendered it.

    `read_as` gives the text whose tokens count, in a chat template for instance (`PromptWriter.text`).

    Raises:
        InputError: As `prompts.shortened`.
    """
    if not isinstance(prompt, RenderedPrompt):
        return prompt
    measures = _measures(tokenizer)
    measures["count_tokens"] = lambda text: prompt_lengths(tokenizer, [read_as(text)])[0]
    return shortened(prompt, max_length=max_length, **measures)


def check_can_fit(tokenizer: PreTrainedTokenizerBase, prompt: RenderedPrompt, max_length: int) -> None:
    """Raises `InputError` if `shorten` would raise it, in the time of one rendering."""
    measures = _measures(tokenizer)
    if not can_fit(prompt, max_length=max_length, **measures):
        raise cannot_fit(prompt, max_length=max_length, **measures)


def forget_last_call(tokenizer: PreTrainedTokenizerBase) -> None:
    """Removes truncation and padding from a fast tokenizer, before it is saved.

    Each call leaves its own there, and `save_pretrained` would write them into `tokenizer.json`, where a reader that
    is not transformers (which sets them at each call) would cut every text by them.
    """
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """Tokens of each whole prompt, special tokens included."""
    return [len(ids) for ids in _token_ids(tokenizer, prompts)]


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int | None = None
) -> list[list[int]]:
    """Ids with special tokens, cut on the right at `max_length`, with at most one BOS at the start."""
    is_of_chat = [isinstance(prompt, ChatText) for prompt in prompts]
    of_chats = [prompt for prompt, is_chat in zip(prompts, is_of_chat, strict=True) if is_chat]
    of_texts = [prompt for prompt, is_chat in zip(prompts, is_of_chat, strict=True) if not is_chat]
    chats = iter(_encoded(tokenizer, of_chats, max_length, add_special_tokens=False))
    texts = iter(_encoded_with_one_bos(tokenizer, of_texts, max_length))
    return [next(chats if is_chat else texts) for is_chat in is_of_chat]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int | None, *, add_special_tokens: bool
) -> list[list[int]]:
    if not prompts:
        return []
    return tokenizer(
        [str(prompt) for prompt in prompts],
        truncation=max_length is not None,
        max_length=max_length,
        add_special_tokens=add_special_tokens,
        verbose=False,  # no warning about the length, which is checked elsewhere
    )["input_ids"]


def _encoded_with_one_bos(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int | None
) -> list[list[int]]:
    prompt_ids, bos = _encoded(tokenizer, prompts, max_length, add_special_tokens=True), tokenizer.bos_token_id
    doubled = [p for p, ids in enumerate(prompt_ids) if bos is not None and ids[:2] == [bos, bos]]
    if doubled and max_length is not None:  # dropping one BOS makes room for another token
        longer = _encoded(tokenizer, [prompts[p] for p in doubled], max_length + 1, add_special_tokens=True)
        for p, ids in zip(doubled, longer, strict=True):
            prompt_ids[p] = ids
    for p in doubled:
        prompt_ids[p] = prompt_ids[p][1:]
    return prompt_ids


def _measures(tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable]:
    """The functions by which `prompts.shortened` counts tokens and finds where they end."""

    def token_ends(text: str) -> list[int]:
        if not tokenizer.is_fast:  # it cannot tell where its tokens end: any character may be the last
            return list(range(1, len(text) + 1))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = sorted({end for start, end in encoded["offset_mapping"] if end > start})
        return [*ends[:-1], len(text)] if ends else []

    return {"count_tokens": lambda text: prompt_lengths(tokenizer, [text])[0], "token_ends": token_ends}


def target_token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int) -> list[int]:
    """A target's ids with one EOS at the end, cut to `max_length`: like a sample, a target that is cut has no EOS."""
    ids = tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id][:max_length]


def pad_prompts(prompt_ids: Sequence[Sequence[int]], *, padding_side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[P, S]`, padded on the "right" (encoder-decoder) or "left" (decoder-only).

    The mask is made from the lengths, not from the ids: the pad id may occur in a prompt.
    """
    width = max(map(len, prompt_ids))
    ids_PS = torch.full((len(prompt_ids), width), pad_id)
    mask_PS = torch.zeros_like(ids_PS)
    for p, ids in enumerate(prompt_ids):
        first = 0 if padding_side == "right" else width - len(ids)
        ids_PS[p, first : first + len(ids)] = torch.tensor(ids)
        mask_PS[p, first : first + len(ids)] = 1
    return ids_PS, mask_PS
