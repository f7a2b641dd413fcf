"""The settings of each command as one object, which is passed on whole from the parser to the results."""

import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, get_type_hints

from rlkd_trl.commands.arguments import (
    AbsentTeacherArguments,
    AdapterArguments,
    CacheArguments,
    CodeArguments,
    DataArguments,
    EncoderHeldOutArguments,
    EncoderPanelArguments,
    EncoderStudentArguments,
    EncoderTeacherArguments,
    EvaluationArguments,
    GeneralDataArguments,
    GeneratedDataArguments,
    HeldOutArguments,
    NewModelArguments,
    PanelArguments,
    PromptArguments,
    PseudoLabelArguments,
    RewardArguments,
    RoutingArguments,
    RunArguments,
    ServerArguments,
    StreamingArguments,
    StudentArguments,
    TaskDataArguments,
    TeacherArguments,
)
from rlkd_trl.commands.launched import check_launch
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.run_directory import check_apart
from rlkd_trl.errors import continued_by
from rlkd_trl.settings.declared import declared
from rlkd_trl.settings.files import Reads, check_names, files_read
from rlkd_trl.settings.trusted_code import trust_code_of

if TYPE_CHECKING:
    from rlkd_trl.trainers.config import RolloutConfig
    from rlkd_trl.trainers.encoder_config import EncoderKDConfig
    from rlkd_trl.trainers.supervised_config import SupervisedConfig

Settings = TypeVar("Settings")
_CONFIGS = ("RolloutConfig", "SupervisedConfig", "EncoderKDConfig")


@dataclass
class DistillationSettings:
    """Settings of a training method without a reward of its own."""

    data: DataArguments
    streaming: StreamingArguments
    held_out: HeldOutArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    panel: PanelArguments
    absent: AbsentTeacherArguments
    student: StudentArguments
    adapters: AdapterArguments
    code: CodeArguments
    run: RunArguments
    args: "RolloutConfig"


@dataclass
class RewardedSettings(DistillationSettings):
    """Settings of a method that learns from rewards: PPO, RLOO, REINFORCE."""

    reward: RewardArguments


@dataclass
class SupervisedSettings:
    """Settings of supervised training."""

    data: DataArguments
    streaming: StreamingArguments
    prompts: PromptArguments
    student: StudentArguments
    adapters: AdapterArguments
    new: NewModelArguments
    code: CodeArguments
    run: RunArguments
    args: "SupervisedConfig"


@dataclass
class EncoderSettings:
    """Settings of encoder distillation."""

    data: GeneralDataArguments
    streaming: StreamingArguments
    task: TaskDataArguments
    held_out: EncoderHeldOutArguments
    teacher: EncoderTeacherArguments
    panel: EncoderPanelArguments
    student: EncoderStudentArguments
    adapters: AdapterArguments
    code: CodeArguments
    run: RunArguments
    args: "EncoderKDConfig"


@dataclass
class PseudoLabelSettings:
    """Settings of pseudo-labelling."""

    data: DataArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    routing: RoutingArguments
    code: CodeArguments
    labels: PseudoLabelArguments

    @property
    def panel(self) -> PanelArguments:
        """The weights, all at their defaults, with the columns that name each row's teacher."""
        return PanelArguments(**vars(self.routing))


@dataclass
class CacheSettings:
    """Settings of a teacher cache."""

    data: DataArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    code: CodeArguments
    cache: CacheArguments


@dataclass
class GeneratedDataSettings:
    """Settings of data that a teacher writes."""

    prompts: PromptArguments
    teacher: TeacherArguments
    code: CodeArguments
    generated: GeneratedDataArguments


@dataclass
class EvaluationSettings:
    """Settings of an evaluation."""

    data: DataArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    panel: PanelArguments
    absent: ServerArguments
    student: StudentArguments
    code: CodeArguments
    reward: RewardArguments
    evaluation: EvaluationArguments


def groups_of(kind: type, args: type | None = None) -> dict[str, type]:
    """The class of flags of each field of a class of settings; `args` is the trainer's config class, a field too."""
    known = get_type_hints(kind, localns=dict.fromkeys(_CONFIGS, args))
    return {field.name: known[field.name] for field in fields(kind)}


class CommandLine(Generic[Settings]):
    """The command line of a recipe as one object of settings.

    It is read twice, since importing a trainer's config takes seconds: first with a sketch of the config, which has
    the fields that its source declares (see `settings.declared`), for `--help` and the first checks; then with the
    config itself.
    """

    def __init__(
        self,
        kind: type[Settings],
        *,
        description: str,
        recipe: str | None = None,
        config: str | None = None,
        demo_preset: Path | None = None,
    ):
        """
        Args:
            kind: The class of the settings; each field is a group of flags.
            description: The recipe's docstring, for `--help`.
            recipe: The recipe's name; a preset may have a section of that name.
            config: The trainer's config class, as "package.module:Class".
            demo_preset: As in `RecipeParser.parse`.
        """
        self.kind, self.description, self.recipe = kind, description, recipe
        self.config, self.demo_preset = config, demo_preset

    def sketch(self) -> Settings:
        """The settings with a sketch of the trainer's config.

        Raises:
            InputError: As `settings`.
        """
        check_launch(os.environ)
        kind = declared(self.config.replace(":", "."))
        if kind is None or "--help_all" in sys.argv:  # which also shows defaults that a sketch does not know
            return self.settings()
        return self._parse(kind)

    def settings(self) -> Settings:
        """The settings, with the trainer's config itself.

        Raises:
            InputError: As `check_launch`, `RecipeParser.parse`, `check_names`, `check_apart` and `check_hub_agrees`.
        """
        check_launch(os.environ)
        if self.config is None:
            return self._parse(None)
        settings = self._parse(pkgutil.resolve_name(self.config))  # with which the processes are connected

        from rlkd_trl.trainers.processes import check_hub_agrees

        check_hub_agrees()
        return settings

    def _parse(self, config: type | None) -> Settings:
        groups = groups_of(self.kind, config)
        parser = RecipeParser(*groups.values(), description=self.description, recipe=self.recipe)
        parsed = parser.parse(demo_preset=self.demo_preset)
        for group in parsed:
            check_names(group)
        check_apart(parsed, parser.preset)
        trust_code_of(
            _named_checkpoints(parsed) if any(getattr(g, "trust_remote_code", False) for g in parsed) else []
        )
        continued_by("the same command with --resume" if RunArguments in groups.values() else "")
        return self.kind(**dict(zip(groups, parsed, strict=True)))


def _named_checkpoints(groups: Sequence[object]) -> list[str]:
    """The values of all flags that name checkpoints."""
    values = [
        getattr(group, name)
        for group in groups
        for name, reads in files_read(type(group)).items()
        if reads == Reads.CHECKPOINT
    ]
    return [name for value in values if value for name in (value if isinstance(value, list) else [value])]


def parse_settings(
    kind: type[Settings], *, description: str, recipe: str | None = None, demo_preset: Path | None = None
) -> Settings:
    """The settings of a recipe without a trainer. Raises `InputError` as `CommandLine.settings`."""
    return CommandLine(kind, description=description, recipe=recipe, demo_preset=demo_preset).settings()


def described(settings: object) -> dict[str, dict]:
    """All flags of a command by group, in JSON's types."""
    return {
        type(group).__name__: group.to_dict() if hasattr(group, "to_dict") else json.loads(json.dumps(vars(group)))
        for group in vars(settings).values()
    }
