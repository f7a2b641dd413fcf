"""Which settings name files that are read, and places that are written: part of the type of their fields.

    dataset: DataPath | None = field(default=None, ...)

Parsers of dataclasses ignore the annotation and see a plain `str`. A value may also name something that is not a file:
a dataset or a checkpoint on the Hub, a reward or templates of the package.
"""

import dataclasses
import enum
import json
import typing
from functools import cache
from pathlib import Path
from typing import Annotated

from rlkd_trl.errors import InputError
from rlkd_trl.settings.hub import require_on_hub, split_revision


class Reads(enum.Enum):
    """The kind of thing that a value names and that is read."""

    DATA = "data"
    CHECKPOINT = "checkpoint"
    RUN_CHECKPOINT = "checkpoint of a run"
    TEACHER_CACHE = "teacher cache"
    TEMPLATES = "templates"
    REWARD = "reward"
    CHAT_TEMPLATE = "chat template"
    PRESET = "preset"
    JSON = "JSON"


class Writes(enum.Enum):
    """The kind of thing that is written to the place that a value names."""

    OUTPUT = "output"


DataPath = Annotated[str, Reads.DATA]
CheckpointPath = Annotated[str, Reads.CHECKPOINT]
TeacherCachePath = Annotated[str, Reads.TEACHER_CACHE]
TemplatesPath = Annotated[str, Reads.TEMPLATES]
RewardPath = Annotated[str, Reads.REWARD]
ChatTemplatePath = Annotated[str, Reads.CHAT_TEMPLATE]
PresetPath = Annotated[str, Reads.PRESET]
JsonPath = Annotated[str, Reads.JSON]
OutputPath = Annotated[str, Writes.OUTPUT]  # a file, or a directory of results
# Fields of transformers.TrainingArguments, whose types do not say so.
INHERITED = {
    "resume_from_checkpoint": Reads.RUN_CHECKPOINT,
    "deepspeed": Reads.JSON,
    "fsdp_config": Reads.JSON,
    "accelerator_config": Reads.JSON,
}
_INHERITED_WRITTEN = "output_dir"
ADAPTERS_CONFIG = "adapter_config.json"  # as PEFT names it


@cache
def files_read(settings: type) -> dict[str, Reads]:
    """The fields of a dataclass, inherited ones included, whose values name something to read, and its kind."""
    hints = typing.get_type_hints(settings, include_extras=True)
    names = [field.name for field in dataclasses.fields(settings)]
    declared_here = {name: reads for name in names if (reads := _noted(hints[name], Reads)) is not None}
    return {name: reads for name, reads in INHERITED.items() if name in names} | declared_here


@cache
def places_written(settings: type) -> list[str]:
    """The fields of a dataclass, inherited ones included, whose values name the place of an output."""
    hints = typing.get_type_hints(settings, include_extras=True)
    names = [field.name for field in dataclasses.fields(settings)]
    return [name for name in names if name == _INHERITED_WRITTEN or _noted(hints[name], Writes) is not None]


def check_names(group: object) -> None:
    """Raises `InputError` if a value that names something to read or write is empty, or impossible as a path."""
    for name in (*files_read(type(group)), *places_written(type(group))):
        value = getattr(group, name, None)
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, str):  # None, or DeepSpeed's settings as a mapping
                continue
            if not path.strip():
                raise InputError(f"--{name} is empty: name something, or leave it out.")
            try:
                Path(path).exists()
            except (OSError, ValueError) as error:  # too long, a zero byte
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError(f"--{name} {path[:60]}… cannot be a path ({reason}): name another.") from error


def require_checkpoint(flag: str, name_or_path: str) -> None:
    """Checks, within seconds, that a model checkpoint is a local directory or on the Hub; so for adapters' model.

    Raises:
        InputError: It looks like a path and is missing; it is a directory without `config.json`; or the Hub does not
            have it, or cannot be reached (see `require_on_hub`).
    """
    path = Path(name_or_path)
    repository, _ = split_revision(name_or_path)
    looks_local = path.is_absolute() or name_or_path.startswith((".", "~")) or repository.count("/") > 1
    if path.is_dir():
        if (path / ADAPTERS_CONFIG).is_file():
            if model := adapted_model(path):
                require_checkpoint(f"{flag} {name_or_path}, whose adapters are for", model)
            return
        if not (path / "config.json").is_file():
            raise InputError(f"`{flag} {name_or_path}` is a directory without config.json, so not a model checkpoint.")
    elif looks_local or path.exists():
        raise InputError(f"`{flag} {name_or_path}` is not a directory. Give a checkpoint directory or a Hub id.")
    else:
        require_on_hub(flag, name_or_path)


def adapted_model(directory: str | Path) -> str | None:
    """The checkpoint that adapters in this directory are for; None if there are none, or their config is damaged."""
    try:
        config = json.loads((Path(directory) / ADAPTERS_CONFIG).read_text(encoding="utf-8"))
        model = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return model if isinstance(model, str) and model else None


def _noted(hint: object, kind: type[enum.Enum]) -> enum.Enum | None:
    """The member of `kind` in a type hint: in `Annotated[str, …]` itself, or inside a list or a union; or None."""
    if typing.get_origin(hint) is Annotated:
        return next((note for note in typing.get_args(hint) if isinstance(note, kind)), None)
    return next((note for inner in typing.get_args(hint) if (note := _noted(inner, kind)) is not None), None)
