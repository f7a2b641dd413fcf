"""The settings of each command as one object, which travels whole from its parser to its results."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

from rlkd_trl.commands.arguments import (
    DataArguments,
    EvaluationArguments,
    HeldOutArguments,
    NewModelArguments,
    PromptArguments,
    PseudoLabelArguments,
    RewardArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.commands.launched import check_launch
from rlkd_trl.commands.parser import RecipeParser

if TYPE_CHECKING:
    from rlkd_trl.trainers.config import RolloutConfig
    from rlkd_trl.trainers.supervised_config import SupervisedConfig

Settings = TypeVar("Settings")


@dataclass
class DistillationSettings:
    """Of a method without a reward of its own."""

    data: DataArguments
    held_out: HeldOutArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    student: StudentArguments
    run: RunArguments
    args: "RolloutConfig"


@dataclass
class RewardedSettings(DistillationSettings):
    """Of a method on rewards: PPO, RLOO, REINFORCE."""

    reward: RewardArguments


@dataclass
class SupervisedSettings:
    """Of supervised training."""

    data: DataArguments
    prompts: PromptArguments
    student: StudentArguments
    new: NewModelArguments
    run: RunArguments
    args: "SupervisedConfig"


@dataclass
class PseudoLabelSettings:
    """Of pseudo-labelling."""

    data: DataArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    labels: PseudoLabelArguments


@dataclass
class EvaluationSettings:
    """Of evaluation."""

    data: DataArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    student: StudentArguments
    reward: RewardArguments
    evaluation: EvaluationArguments


def groups_of(kind: type, **others: type) -> dict[str, type]:
    """Field of a class of settings to its class of flags; `others` are the classes that only the recipe knows."""
    known = get_type_hints(kind, localns={"RolloutConfig": object, "SupervisedConfig": object})
    return {field.name: others.get(field.name, known[field.name]) for field in fields(kind)}


def parse_settings(
    kind: type[Settings], *, description: str, demo_preset: Path | None = None, **others: type
) -> Settings:
    """The command line as one object; `others` as in `groups_of`, `demo_preset` as in `RecipeParser.parse`.

    Raises:
        InputError: As `RecipeParser.parse`.
    """
    groups = groups_of(kind, **others)
    check_launch(os.environ)
    parsed = RecipeParser(*groups.values(), description=description).parse(demo_preset=demo_preset)
    return kind(**dict(zip(groups, parsed, strict=True)))


def described(settings: object) -> dict[str, dict]:
    """All flags of a command by group, as JSON's types."""
    return {
        type(group).__name__: group.to_dict() if hasattr(group, "to_dict") else json.loads(json.dumps(vars(group)))
        for group in vars(settings).values()
    }
