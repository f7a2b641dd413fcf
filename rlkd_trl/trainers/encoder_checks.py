"""Checks that losses, models and data of encoder distillation fit each other, from configs and data alone."""

import numbers
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.encoders import is_encoder
from rlkd_trl.models.layer_tensors import LayerReader
from rlkd_trl.models.limits import position_limits
from rlkd_trl.trainers.checks import check_column, check_texts
from rlkd_trl.trainers.encoder_config import EncoderKDConfig
from rlkd_trl.trainers.encoder_objective import (
    INGREDIENTS,
    PROJECTED,
    RELATIONS,
    SAME_HEADS,
    SAME_WIDTH,
    Objective,
)

_REMEDIES = {
    "cls_mse": "hidden_mse, which has a learned projection",
    "cosine": "hidden_mse, which has a learned projection",
}


def check_rows(rows: Dataset, objective: Objective, what: str) -> None:
    """Raises `InputError` if the data lacks texts, labels or pairs that the losses need. what: "training data"."""
    if "input_ids" not in getattr(rows, "column_names", ()):
        check_texts(rows, "text", what)
        if "text_pair" in rows.column_names:
            check_texts(rows, "text_pair", what)
    if "hard_ce" in objective.weights:
        if "label" not in rows.column_names:
            raise InputError(
                f"hard_ce learns from labels, and the {what} has no column `label`: name it, or leave hard_ce out of "
                "the losses."
            )
        for i, label in enumerate(rows["label"]):
            if isinstance(label, bool) or not isinstance(label, numbers.Real):
                raise InputError(f"Row {i + 1} of the {what}: the label {label!r} is not a number.")
    if "nsp_ce" in objective.weights:
        check_column(rows, "next_sentence_label", what)


def check_trained_along(objective: Objective, peft_config: object, count: int) -> None:
    """Raises `InputError` if encoders are to be trained along with the model in another stage than on labels alone."""
    if count and (set(objective.weights) != {"hard_ce"} or peft_config is not None):
        how = (
            "adapters" if peft_config is not None else f"a {objective.stage} stage of {' + '.join(objective.weights)}"
        )
        raise InputError(
            f"Encoders are trained together on labels alone (stage task, losses hard_ce), and without adapters; this "
            f"is with {how}."
        )


def check_inputs(
    args: EncoderKDConfig,
    objective: Objective,
    data: Sequence[Dataset],
    tokenizer: PreTrainedTokenizerBase,
    student: LayerReader,
    teacher: LayerReader | None,
) -> None:
    """Raises `InputError` if the models have too few positions, or tokenizer or data lack what the losses need.

    data: rows to train on, and to evaluate on if there are any.
    """
    if tokenizer.pad_token_id is None:
        raise InputError(
            "The tokenizer has no pad token to fill up batches with: set one, as `tokenizer.pad_token = "
            "tokenizer.eos_token`."
        )
    for who, reader in (("student", student), ("teacher", teacher)):
        limit = None if reader is None else position_limits(reader.model).prompt
        if limit is not None and args.max_length > limit:
            raise InputError(
                f"--max_length {args.max_length}: the {who} has positions for {limit} tokens; lower it to that."
            )
    if "mlm_ce" in objective.weights and tokenizer.mask_token_id is None:
        raise InputError("mlm_ce needs a mask token, and the tokenizer has none: leave it out of the losses.")
    if not student.config.is_encoder_decoder:
        return
    for rows in data:
        if objective.stage == "task":
            _check_one_eos(rows, tokenizer, student, args.max_length)
        elif not {"text_pair", "input_ids"} & set(rows.column_names):
            raise InputError(
                f"The student, a {student.config.model_type}, reads pairs of source and target: name the target's "
                "column with --pair_column (`text_pair` in the data)."
            )


def _check_one_eos(rows: Dataset, tokenizer: PreTrainedTokenizerBase, student: LayerReader, max_length: int) -> None:
    """Raises `InputError` unless each text ends with EOS and has it only there: an encoder-decoder's classes are read
    at the last EOS, and transformers' models want the same number of them in all texts.
    """
    if "text" not in rows.column_names:
        return
    first = tokenizer(rows["text"][0], truncation=True, max_length=max_length)["input_ids"]
    if first.count(student.config.eos_token_id) != 1:
        raise InputError(
            f"A {student.config.model_type} classifies a text by its state at EOS, and the tokenizer ends no text "
            f"with the model's, {student.config.eos_token_id}: save the checkpoint's own tokenizer with it."
        )
    for name in {"text", "text_pair"} & set(rows.column_names):
        for i, text in enumerate(rows[name]):
            if tokenizer.eos_token in text:
                raise InputError(
                    f"Row {i + 1}: the text holds {tokenizer.eos_token}, and a {student.config.model_type} classifies "
                    "a text by its state at this token: take it out."
                )


def check_models(objective: Objective, student: LayerReader, teacher: LayerReader | None) -> None:
    """Raises `InputError` if the losses cannot compare these two models; the message names a remedy."""
    if {"mlm_ce"} & objective.weights.keys() and not is_encoder(student.config):
        raise InputError(
            f"mlm_ce is for encoders with masked language modelling, and the student is a "
            f"{student.config.model_type}: leave it out, and use recipes/kd.py for the language model's own loss."
        )
    if not objective.needs_teacher:
        return
    if teacher is None:
        raise InputError(f"The losses {', '.join(objective.weights)} need a teacher, and there is none.")
    if set(student.stacks) != set(teacher.stacks):
        raise InputError(
            f"The student has {' and '.join(student.stacks)}, the teacher {' and '.join(teacher.stacks)}: choose two "
            "encoders, two encoder-decoders or two decoder-only models."
        )
    if "cls_mse" in objective.weights and not is_encoder(student.config):
        raise InputError(
            "cls_mse compares the first token's states, which in a decoder know nothing of the text behind it, and "
            f"the student is a {student.config.model_type}: use hidden_mse."
        )
    student.check_offers(objective.kinds(), "The student")
    teacher.check_offers(objective.kinds(), "The teacher")
    for stack in student.stacks:
        _check_stack(objective, stack, student, teacher)


def _check_stack(objective: Objective, stack: str, student: LayerReader, teacher: LayerReader) -> None:
    if any(INGREDIENTS[name].where == "map" for name in objective.weights):
        objective.pairs(student.num_layers(stack), teacher.num_layers(stack))
    widths = student.config.hidden_size, teacher.config.hidden_size
    for name in SAME_WIDTH:
        if name in objective.weights and widths[0] != widths[1]:
            raise InputError(
                f"{name} compares states of one width: the student's is {widths[0]}, the teacher's {widths[1]}. Use "
                f"{_REMEDIES[name]} (the presets minilmv2 and mix_no_attention bridge any width), or make hidden_size "
                f"{widths[1]}."
            )
    heads = student.num_heads(stack), teacher.num_heads(stack)
    for name in SAME_HEADS:
        if name in objective.weights and heads[0] != heads[1]:
            raise InputError(
                f"{name} compares attention head by head: the student has {heads[0]} heads, the teacher {heads[1]}. "
                "Use query_, key_ and value_relation_kl, which have heads of their own (preset minilmv2), or make "
                f"num_heads {heads[1]}."
            )
    relation_heads = relation_heads_of(objective, teacher)
    for name in RELATIONS:
        if name in objective.weights:
            kind = INGREDIENTS[name].reads
            for who, reader in (("student", student), ("teacher", teacher)):
                width = reader.vector_width(stack, kind)
                if width % relation_heads:
                    raise InputError(
                        f"{name}: {relation_heads} relation heads do not divide the {who}'s {kind} of width {width}: "
                        "choose relation_heads that divide both models'."
                    )


def relation_heads_of(objective: Objective, teacher: LayerReader | None) -> int:
    """A_r, the number of relation heads: as set, or as many as the teacher's attention heads."""
    if objective.relation_heads is not None:
        return objective.relation_heads
    return 1 if teacher is None else teacher.num_heads(teacher.stacks[0])


def projections_needed(
    objective: Objective, student: LayerReader, teacher: LayerReader | None
) -> dict[str, tuple[int, int]]:
    """By name, the widths (student's, teacher's) of the projections that the losses need; {} if they are equal."""
    if teacher is None or student.config.hidden_size == teacher.config.hidden_size:
        return {}
    widths = student.config.hidden_size, teacher.config.hidden_size
    return {f"{stack}_{name}": widths for stack in student.stacks for name in PROJECTED if name in objective.weights}


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` if the two read a text as different ids: layers are compared token by token."""
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab == teacher_vocab:
        return
    differing = [
        token for token in {**student_vocab, **teacher_vocab} if student_vocab.get(token) != teacher_vocab.get(token)
    ]
    example = min(differing)
    raise InputError(
        f"Teacher and student have different tokenizers ({len(teacher_vocab)} and {len(student_vocab)} tokens, "
        f"{len(differing)} of them different; e.g. {example!r} is {teacher_vocab.get(example, 'missing')} for the "
        f"teacher and {student_vocab.get(example, 'missing')} for the student). Layers are compared token by token: "
        "choose a student of the teacher's family, or make one with num_layers."
    )
