"""Checks, before a run, of what would end in an IndexError in the middle of it: positions and embedding rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.generation_config import completion_start_ids
from rlkd_trl.models.loading import model_without_weights
from rlkd_trl.models.prompts import prompt_lengths

_BATCH_SIZE = 1000  # texts that are tokenised at a time

# The names of position tables in GPT-2 and GPT-Neo, OpenAI-GPT, BART, OPT and their relatives, BERT and ProphetNet; in
# GPT-J and CodeGen `embed_positions` is a buffer of rotations. The table of M2M100 and XGLM is called `weights` and
# grows as needed, so it is no limit.
_TABLE = re.compile(r"(^|\.)(wpe|positions_embed|embed_positions|position_embeddings)$")


@dataclass(frozen=True)
class PositionLimits:
    """How many tokens a model has positions for; None: no limit (T5's relative positions, rotary, ALiBi).

    is_shared: True for decoder-only models, whose prompt and completion share one sequence of `prompt` tokens.
    """

    prompt: int | None
    completion: int | None
    is_shared: bool

    def longest_prompt(self, max_completion_length: int) -> int | None:
        """The longest prompt that leaves room for a completion of this length, in tokens; may be less than 1."""
        if self.is_shared and self.prompt is not None:
            return self.prompt - max_completion_length
        return self.prompt


def position_limits(model: PreTrainedModel) -> PositionLimits:
    """The sizes of the model's position tables, less the rows that are not positions (the first 2 in OPT and BART)."""
    sizes = {"encoder": None, "decoder": None}
    for name, size in _tables(model):
        side = "encoder" if model.config.is_encoder_decoder and ".encoder." in f".{name}" else "decoder"
        sizes[side] = size if sizes[side] is None else min(size, sizes[side])
    if model.config.model_type == "mpt":  # it has no table, but makes its ALiBi bias for so many tokens only
        sizes["decoder"] = model.config.max_seq_len
    if not model.config.is_encoder_decoder:
        return PositionLimits(sizes["decoder"], sizes["decoder"], is_shared=True)
    completion = None if sizes["decoder"] is None else sizes["decoder"] - len(completion_start_ids(model))
    return PositionLimits(sizes["encoder"], completion, is_shared=False)


def position_limits_of_config(config: PreTrainedConfig) -> PositionLimits:
    """`position_limits` before any weights are read, from a model on the meta device. Raises `InputError`."""
    return position_limits(model_without_weights(config))


def _tables(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _TABLE.search(name):
            padding = -1 if module.padding_idx is None else module.padding_idx
            yield name, module.num_embeddings - getattr(module, "offset", padding + 1)
    for name, buffer in model.named_buffers():
        if _TABLE.search(name) and buffer.dim() == 2:
            yield name, len(buffer)


def check_lengths(
    who: str,
    limits: PositionLimits,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    *,
    max_prompt_length: int | None,
    max_completion_length: int,
    prompt_flag: str = "max_prompt_length",
) -> None:
    """Checks that the model has positions for each prompt, cut to `max_prompt_length`, and the longest completion.

    The prompts are read only if the two caps alone do not already fit.

    Args:
        who: "The teacher" or "The student", for the message.
        prompt_flag: The name that `max_prompt_length` has for this model, for the message.

    Raises:
        InputError: There are too few positions; the message has the numbers, and the row counted from 1.
    """
    longest = _longest_prompt(who, limits, max_completion_length)
    if longest is None or (max_prompt_length is not None and max_prompt_length <= longest):
        return
    for row, length in enumerate(_lengths(tokenizer, prompts), start=1):
        used = length if max_prompt_length is None else min(length, max_prompt_length)
        if used > longest:
            completion = f" + max_completion_length {max_completion_length}" if limits.is_shared else ""
            raise InputError(
                f"{who} has positions for {limits.prompt} tokens, too few for row {row}: its prompt of {used} tokens"
                f"{completion}. Cut prompts with {prompt_flag} {longest}"
                + (", or lower max_completion_length." if limits.is_shared else ".")
            )


def check_read(who: str, limits: PositionLimits, lengths: Iterable[tuple[int, int]]) -> None:
    """Raises `InputError` if the model has too few positions for one of the pairs that it is about to read.

    lengths: tokens of each prompt, and of the completion that follows it.
    """
    for prompt, completion in lengths:
        used = prompt + completion if limits.is_shared else prompt
        if limits.prompt is not None and used > limits.prompt:
            behind = f" and a completion of {completion}" if limits.is_shared else ""
            raise InputError(
                f"{who} has positions for {limits.prompt} tokens, too few for a prompt of {prompt}{behind}: shorten "
                "prompts (max_prompt_length), or let completions be shorter."
            )
        if limits.completion is not None and completion > limits.completion:
            raise InputError(
                f"{who} has positions for completions of {limits.completion} tokens, too few for one of {completion}: "
                "let completions be shorter."
            )


def check_caps(who: str, limits: PositionLimits, *, max_prompt_length: int, max_completion_length: int) -> None:
    """`check_lengths` for a prompt and a completion that are as long as they may be."""
    longest = _longest_prompt(who, limits, max_completion_length)
    if longest is not None and max_prompt_length > longest:
        beside = f" with a completion of {max_completion_length}" if limits.is_shared else ""
        raise InputError(
            f"{who} has positions for {limits.prompt} tokens, too few for a prompt of {max_prompt_length}{beside}: "
            f"give max_prompt_length {longest} at most."
        )


def _longest_prompt(who: str, limits: PositionLimits, max_completion_length: int) -> int | None:
    """The longest prompt that leaves room for such a completion; None: there is no limit. Raises `InputError`."""
    room = limits.completion if limits.completion is None or not limits.is_shared else limits.completion - 1
    if room is not None and max_completion_length > room:
        raise InputError(
            f"{who} has positions for completions of {room} tokens, and max_completion_length is "
            f"{max_completion_length}: lower it."
        )
    return limits.longest_prompt(max_completion_length)


def _lengths(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> Iterator[int]:
    prompts = iter(prompts)
    while batch := list(islice(prompts, _BATCH_SIZE)):
        yield from prompt_lengths(tokenizer, batch)


def check_embedding_rows(who: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises `InputError` if the tokenizer has ids for which the model has no embedding.

    Special tokens count only if the model reads them, as padding or as EOS: all others are neither in texts nor
    sampled (bart-large-cnn has no row for `<mask>`).
    """
    rows = config.get_text_config().vocab_size
    unused = set(tokenizer.all_special_tokens) - {tokenizer.pad_token, tokenizer.eos_token}
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows and token not in unused}
    if beyond:
        token = min(beyond, key=beyond.get)
        raise InputError(
            f"{who}'s tokenizer has {len(beyond)} tokens for which its model has no embedding: {token!r} is id "
            f"{beyond[token]}, and there are {rows} rows. Save the two that belong together, or call "
            "`model.resize_token_embeddings(len(tokenizer))` and train the new rows."
        )
