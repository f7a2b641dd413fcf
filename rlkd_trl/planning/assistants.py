"""Sizes of teacher assistants: models between a teacher and a student that is much smaller."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.models.loading import making_model_of
from rlkd_trl.students.from_teacher import DECODER_SIZES, SIZES, smaller_config


def geometric_size(teacher: int, student: int, share: float, *, multiple_of: int = 1) -> int:
    """t^(1−w) s^w with w = `share`, to the nearest multiple, at least one: equal ratios from one model to the next."""
    exact = teacher ** (1 - share) * student**share
    return max(1, round(exact / multiple_of)) * multiple_of


def assistant_configs(teacher: PreTrainedConfig, student: PreTrainedConfig, count: int) -> list[PreTrainedConfig]:
    """Configs of `count` assistants, the largest first: the student's architecture, in sizes between the two models.

    Layers, width, heads and feed-forward width each fall by equal ratios, a decoder's beside an encoder apart from the
    encoder's. The width is a multiple of the heads; where positions rotate a head's pairs, of twice them.

    Raises:
        InputError: The student is not smaller than the teacher; no model can be made of a size; or the sizes, whole
            numbers, leave no room for so many models each smaller than the last.
    """
    if num_parameters(student) >= num_parameters(teacher):
        raise InputError(
            f"Assistants stand between a teacher and a smaller student, and the student has "
            f"{num_parameters(student):,} parameters, the teacher {num_parameters(teacher):,}: leave them out."
        )
    configs = [_between(teacher, student, number / (count + 1)) for number in range(1, count + 1)]
    counts = [num_parameters(config) for config in (teacher, *configs, student)]
    if any(larger <= smaller for larger, smaller in pairwise(counts)):
        listed = ", ".join(f"{number:,}" for number in counts)
        raise InputError(
            f"{count} assistants between teacher and student would have sizes that do not fall, from first to last: "
            f"{listed} parameters. Ask for fewer, or make assistants of your own (--assistants)."
        )
    return configs


def _between(teacher: PreTrainedConfig, student: PreTrainedConfig, share: float) -> PreTrainedConfig:
    """The student's config in sizes that lie between the two models' by this share. Raises `InputError`."""
    sizes, decoder_sizes = {}, {}
    for size, names in SIZES.items():
        if size != "hidden_size" and (ends := _ends(teacher, student, names, names)):
            sizes[size] = geometric_size(*ends, share)
        decoder_names = DECODER_SIZES.get(size, ())
        if student.is_encoder_decoder and (ends := _ends(teacher, student, (*decoder_names, *names), decoder_names)):
            decoder_sizes[size] = geometric_size(*ends, share)
    heads = math.lcm(*(of_part.get("num_heads", 1) for of_part in (sizes, decoder_sizes)))
    widths = _ends(teacher, student, SIZES["hidden_size"], SIZES["hidden_size"])
    if widths is not None:
        sizes["hidden_size"] = geometric_size(*widths, share, multiple_of=heads * _rotated(student))
    return smaller_config(student, sizes, decoder_sizes=decoder_sizes)


def _ends(
    teacher: PreTrainedConfig, student: PreTrainedConfig, teachers: Sequence[str], students: Sequence[str]
) -> tuple[int, int] | None:
    """Both models' first size of these names; None if one of them has none."""
    ends = tuple(_first(config, names) for config, names in ((teacher, teachers), (student, students)))
    return None if None in ends else ends


def _rotated(config: PreTrainedConfig) -> int:
    """What a head's width must be a multiple of: rotary positions turn pairs of the share of it that they rotate."""
    rotary = getattr(config, "rope_parameters", None)
    return round(2 / rotary.get("partial_rotary_factor", 1.0)) if rotary else 1


def num_parameters(config: PreTrainedConfig) -> int:
    """Of a language model of this config; tied weights count once. Raises `InputError` if none can be made."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"), making_model_of(config):
        try:
            model = auto_class.from_config(copy.deepcopy(config))
        except ValueError as error:
            raise InputError(f"No {config.model_type} model can be made of these sizes: {error}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def assistants_table(
    teacher: PreTrainedConfig, assistants: Sequence[PreTrainedConfig], student: PreTrainedConfig
) -> str:
    """The chain's sizes in Markdown."""
    names = ["teacher", *(f"assistant {number}" for number in range(1, len(assistants) + 1)), "student"]
    rows = [
        [name, *(str(_size(config, size) or "") for size in SIZES), f"{num_parameters(config) / 1e6:,.2f}"]
        for name, config in zip(names, [teacher, *assistants, student], strict=True)
    ]
    return markdown_table(["model", *SIZES, "M parameters"], rows)


def _size(config: PreTrainedConfig, size: str) -> int | None:
    return _first(config, SIZES[size])


def _first(config: PreTrainedConfig, names: Sequence[str]) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
