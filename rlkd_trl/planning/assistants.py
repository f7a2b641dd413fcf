"""Sizes of teacher assistants: models between a teacher and a student that is much smaller."""

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.models.loading import making_model_of
from rlkd_trl.students.from_teacher import SIZES, smaller_config


def geometric_size(teacher: int, student: int, share: float, *, multiple_of: int = 1) -> int:
    """t^(1−w) s^w with w = `share`, to the nearest multiple, at least one: equal ratios from one model to the next."""
    exact = teacher ** (1 - share) * student**share
    return max(1, round(exact / multiple_of)) * multiple_of


def assistant_configs(teacher: PreTrainedConfig, student: PreTrainedConfig, count: int) -> list[PreTrainedConfig]:
    """Configs of `count` assistants, the largest first: the student's architecture, in sizes between the two models.

    Layers, width, heads and feed-forward width each fall by equal ratios; the width is a multiple of the heads.

    Raises:
        InputError: The student is not smaller than the teacher; no model can be made of a size.
    """
    if num_parameters(student) >= num_parameters(teacher):
        raise InputError(
            f"Assistants stand between a teacher and a smaller student, and the student has "
            f"{num_parameters(student):,} parameters, the teacher {num_parameters(teacher):,}: leave them out."
        )
    configs = []
    for number in range(1, count + 1):
        share, sizes = number / (count + 1), {}
        for size in ("num_heads", "num_layers", "hidden_size", "intermediate_size"):
            ends = [_size(config, size) for config in (teacher, student)]
            if None not in ends:
                multiple = sizes.get("num_heads", 1) if size == "hidden_size" else 1
                sizes[size] = geometric_size(*ends, share, multiple_of=multiple)
        configs.append(smaller_config(student, sizes))
    return configs


def num_parameters(config: PreTrainedConfig) -> int:
    """Of a language model of this config; tied weights count once. Raises `InputError` if there is none."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"), making_model_of(config):
        model = auto_class.from_config(copy.deepcopy(config))
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
    return next((value for name in SIZES[size] if (value := getattr(config, name, None)) is not None), None)
