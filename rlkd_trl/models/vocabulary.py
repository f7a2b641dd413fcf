"""Which ids may be sampled, which end a completion, and whether two tokenizers agree."""

import re
from collections.abc import Collection, Iterable, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError

_SENTINEL = re.compile(r"<extra_id_\d+>")
ALLOWED_SPECIAL_TOKENS = "allowed_special_tokens"  # the name in generation_config.json


def eos_token_ids(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the generation config's (several, for chat models), and the tokenizer's.

    The tokenizer's is what targets end with; of a chat model it is the token that ends a turn (see `PromptWriter`).
    model: None for one that is not in this process.

    Raises:
        InputError: As `require_eos`.
    """
    require_eos(tokenizer)
    config = None if model is None else model.generation_config
    eos = None if config is None else config.eos_token_id
    of_model = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return list(dict.fromkeys([*of_model, tokenizer.eos_token_id]))


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` for a tokenizer without EOS: no target would end, and no model would learn to stop."""
    if tokenizer.eos_token_id is None:
        name = f" of {tokenizer.name_or_path!r}" if tokenizer.name_or_path else ""
        raise InputError(
            f"The tokenizer{name} has no EOS token, so no text would end: set `eos_token` to one of its tokens, and "
            "save it again with the model."
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding: the pad token's, else EOS's, else 0. Nothing reads it, as padding is masked."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(index for index in ids if index is not None)


def forbidden_ids(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: list[int], content: Collection[str] = ()
) -> Tensor:
    """`[V]` bool, True on ids that are never sampled: the one rule for training, scoring and evaluation.

    May be sampled: every token that is not special, EOS, and the special tokens in `content` (for example the relation
    markers of an information-extraction model). Never sampled: LM-head rows without a token (T5 pads 32,100 tokens to
    32,128 rows), T5's `<extra_id_*>` sentinels, the padding and unknown tokens, and all other special tokens, also
    those without a role (such as Llama 3's reserved ones).
    """
    vocab = tokenizer.get_vocab()
    never = {index for token, index in vocab.items() if _SENTINEL.fullmatch(token)}
    never |= {tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = {vocab[token] for token in _special_tokens(tokenizer) - set(content) if token in vocab}
    allowed = set(vocab.values()) - never - special | set(eos_ids)
    forbidden_V = torch.ones(vocab_size, dtype=torch.bool)
    forbidden_V[[index for index in allowed if index < vocab_size]] = False
    return forbidden_V


def forbidden_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`forbidden_ids` of a model's LM head, with the special tokens that it is allowed."""
    vocab_size = model.config.get_text_config().vocab_size
    return forbidden_ids(tokenizer, vocab_size, eos_token_ids(model, tokenizer), allowed_special_tokens(model))


def allowed_special_tokens(model: PreTrainedModel) -> list[str]:
    """The special tokens that are content to a model, as its checkpoint says (`allow_special_tokens`)."""
    return list(getattr(model.generation_config, ALLOWED_SPECIAL_TOKENS, None) or [])


def allow_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> None:
    """Lets a model write these special tokens too; its generation config keeps the list, also when it is saved.

    Raises:
        InputError: As `check_special_tokens`.
    """
    tokens = list(tokens)
    check_special_tokens(tokenizer, tokens)
    allowed_before = allowed_special_tokens(model)
    allowed = list(dict.fromkeys([*allowed_before, *tokens]))
    if allowed != allowed_before:
        setattr(base_of(model).generation_config, ALLOWED_SPECIAL_TOKENS, allowed)


def share_special_tokens(
    models: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]], texts: Iterable[str] = ()
) -> None:
    """Lets all models write the same special tokens: those that any of them may write, and those in target `texts`.

    models: each with its tokenizer; the texts' special tokens are those of the first one.

    Raises:
        InputError: As `check_special_tokens`.
    """
    tokens = [token for model, _ in models for token in allowed_special_tokens(model)]
    tokens += special_tokens_in(models[0][1], texts)
    for model, tokenizer in models:
        allow_special_tokens(model, tokenizer, tokens)


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> None:
    """Raises `InputError` for a token that is not in the vocabulary, or that is never content."""
    for token in tokens:
        if token not in tokenizer.get_vocab():
            raise InputError(
                f"{token!r} is to be allowed as content, but the tokenizer has no such token: add it to its special "
                "tokens, or leave it out."
            )
        if token in {tokenizer.pad_token, tokenizer.unk_token} or _SENTINEL.fullmatch(token):
            raise InputError(f"{token!r} cannot be content: padding, unknown and sentinel tokens are never sampled.")


def special_tokens_in(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    """The special tokens that occur in target texts, sorted, without EOS and those that are never content.

    They are searched for as text, which is how tokenizers find them.
    """
    never = {tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token}
    candidates = [token for token in _special_tokens(tokenizer) - never if not _SENTINEL.fullmatch(token)]
    if not candidates or getattr(tokenizer, "split_special_tokens", False):
        return []
    pattern = re.compile("|".join(map(re.escape, sorted(candidates, key=len, reverse=True))))
    return sorted({token for text in texts for token in pattern.findall(text)})


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model that adapters sit in, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def are_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether an id is the same token for both, and the same one ends a text."""
    return student.get_vocab() == teacher.get_vocab() and student.eos_token_id == teacher.eos_token_id


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, can_align: bool = False
) -> None:
    """Checks that an id is the same token for both, since the teacher scores the student's tokens one by one.

    Tokenizers are compared, not `config.vocab_size`: t5-base and T0 share a tokenizer but differ in LM-head rows.

    can_align: whether there is a setting `align_tokenizers`, which the message then names.

    Raises:
        InputError: Their vocabularies or EOS ids differ; the message shows where.
    """
    or_align = ", or set align_tokenizers to sum the teacher's rewards over the text that both have read"
    remedy = f"choose a student of the teacher's family{or_align if can_align else ''}."
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab != teacher_vocab:
        differing = [t for t, i in student_vocab.items() if teacher_vocab.get(t) != i]
        differing += [t for t in teacher_vocab if t not in student_vocab]
        example = min(differing)
        raise InputError(
            f"Teacher and student have different tokenizers ({len(teacher_vocab)} and {len(student_vocab)} tokens, "
            f"{len(differing)} of them different; e.g. {example!r} is {teacher_vocab.get(example, 'missing')} for the "
            f"teacher and {student_vocab.get(example, 'missing')} for the student). Per-token rewards need one "
            f"tokenizer: {remedy}"
        )
    if student.eos_token_id != teacher.eos_token_id:
        raise InputError(
            f"Teacher and student end a completion with different tokens: EOS is {teacher.eos_token_id} for the "
            f"teacher, {student.eos_token_id} for the student. If one is asked in a chat and the other is not, give "
            "the student the teacher's chat template (--student_chat_template TEACHER), or the teacher none "
            f"(--teacher_chat_template none). Else give both the same `eos_token`{or_align if can_align else ''}."
        )


def check_tokenizers(
    student: PreTrainedTokenizerBase, teachers: Sequence[PreTrainedTokenizerBase], *, align: bool | None
) -> None:
    """Checks the teachers' tokenizers against the student's.

    align: whether they may differ (`align_tokenizers`); None where there is no such setting.

    Raises:
        InputError: They differ and may not; they may, and none does; or one cannot be aligned (`check_alignable`).
    """
    for teacher in teachers:
        if not align:
            check_same_tokenizer(student, teacher, can_align=align is not None)
        elif not are_same_tokens(student, teacher):
            check_alignable(teacher)
    if align and teachers and all(are_same_tokens(student, teacher) for teacher in teachers):
        raise InputError("align_tokenizers has no effect: teacher and student have one tokenizer. Leave it out.")


def check_alignable(teacher: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` if texts of others cannot be aligned with this tokenizer's tokens."""
    require_eos(teacher)
    if not teacher.is_fast:
        raise InputError(
            f"The teacher's tokenizer ({type(teacher).__name__}) cannot say where its tokens end in a text, so the "
            "student's tokens cannot be aligned with them: give the teacher a fast one (a tokenizer.json)."
        )
