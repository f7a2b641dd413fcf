"""Which ids may be sampled, which end a completion, and whether two tokenizers agree."""

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError

_SENTINEL = re.compile(r"<extra_id_\d+>")


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the generation config's (several, for chat models) or the tokenizer's.

    Raises:
        InputError: As `require_eos`.
    """
    require_eos(tokenizer)
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        eos = tokenizer.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos)


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` for a tokenizer without EOS, with which no target ends and no model learns to stop."""
    if tokenizer.eos_token_id is None:
        name = f" of {tokenizer.name_or_path!r}" if tokenizer.name_or_path else ""
        raise InputError(
            f"The tokenizer{name} has no EOS token, so no text would end: set `eos_token` to one of its tokens, and "
            "save it again with the model."
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding, always behind a mask: the pad token, else EOS, else 0. Nothing ever reads it."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(index for index in ids if index is not None)


def forbidden_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: list[int]) -> Tensor:
    """`[V]` bool, True on ids that a student must never sample.

    Those are the LM-head rows without a token (T5 pads 32,100 tokens to 32,128 rows), T5's `<extra_id_*>` sentinels,
    and every special token, with a role or without (Llama 3's reserved ones), except EOS and the unknown token.
    """
    vocab = tokenizer.get_vocab()
    sentinels = {index for token, index in vocab.items() if _SENTINEL.fullmatch(token)}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    allowed = set(vocab.values()) - sentinels - (special - {tokenizer.unk_token_id}) | set(eos_ids)
    forbidden_V = torch.ones(vocab_size, dtype=torch.bool)
    forbidden_V[[index for index in allowed if index < vocab_size]] = False
    return forbidden_V


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Teacher scores are per student token, so both must mean the same by an id.

    The tokenizers are compared, not `config.vocab_size`: t5-base and T0 share a tokenizer but differ in LM-head rows.

    Raises:
        InputError: Their vocabularies or EOS ids differ; the message shows where.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab != teacher_vocab:
        differing = [t for t, i in student_vocab.items() if teacher_vocab.get(t) != i]
        differing += [t for t in teacher_vocab if t not in student_vocab]
        example = min(differing)
        raise InputError(
            f"Teacher and student have different tokenizers ({len(teacher_vocab)} and {len(student_vocab)} tokens, "
            f"{len(differing)} of them different; e.g. {example!r} is {teacher_vocab.get(example, 'missing')} for the "
            f"teacher and {student_vocab.get(example, 'missing')} for the student). Per-token rewards need one "
            "tokenizer: choose a student of the teacher's family."
        )
    if student.eos_token_id != teacher.eos_token_id:
        raise InputError(
            f"Teacher and student end a completion with different tokens: EOS is {teacher.eos_token_id} for the "
            f"teacher, {student.eos_token_id} for the student."
        )
