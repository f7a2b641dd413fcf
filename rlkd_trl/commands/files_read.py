"""Digests of the local files that a training run reads, to notice when they have been changed in place."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from rlkd_trl.commands.arguments import (
    AbsentTeacherArguments,
    DataArguments,
    EncoderHeldOutArguments,
    EncoderPanelArguments,
    EncoderStudentArguments,
    EncoderTeacherArguments,
    GeneralDataArguments,
    HeldOutArguments,
    PromptArguments,
    RewardArguments,
    StudentArguments,
    TaskDataArguments,
    TeacherArguments,
)
from rlkd_trl.data import content_digest, data_files
from rlkd_trl.prompts.promptsource import resolve_file
from rlkd_trl.prompts.templates import BUILTIN_DIRECTORY, BUILTIN_PREFIX
from rlkd_trl.settings.files import INHERITED, Reads, adapted_model, files_read

WEIGHTS = ("*.safetensors", "*.bin")
# The files of a checkpoint that `from_pretrained` reads: weights, configs, tokenizer. Results and reports are not.
CHECKPOINT_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.py"),
)
# Only a part of larger weight files is read: for the 40 GiB of an 11B model SHA-256 alone takes half a minute.
SAMPLED_ABOVE = 2**30
HEAD, SAMPLES, SAMPLE_SIZE = 2**20, 1024, 2**16  # bytes, number, bytes


class FileDigests:
    """Computes digests of files, and keeps them: a file that changes during the life of this object is not noticed."""

    def __init__(self):
        self._known: dict[Path, str] = {}

    def of_flags(self, values: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """The digest of each flag's value that names something local, by "--flag value"."""
        flags_with_values = [(flag, value) for flag in READ_BY_FLAG for value in values.get(flag, [])]
        files = {f"{flag} {value}": FILES_OF[READ_BY_FLAG[flag]](value) for flag, value in flags_with_values}
        return {name: self.of_files(paths) for name, paths in files.items() if paths}

    def of_groups(self, *groups: object) -> dict[str, str]:
        """`of_flags` for all flags of these groups."""
        values = {}
        for group in groups:
            for name in files_read(type(group)):
                value = getattr(group, name)
                values[f"--{name}"] = value if isinstance(value, list) else [] if value is None else [value]
        return self.of_flags(values)

    def of_files(self, files: Sequence[Path]) -> str:
        """A digest of the files' contents, and of their names relative to their common directory."""
        files = [_absolute(file) for file in files]  # adapters may be named otherwise than their model
        shared = os.path.commonpath(files)
        digest = hashlib.sha256()
        for file in files:
            if file not in self._known:
                self._known[file] = file_digest(file)
            digest.update(f"{file.relative_to(shared)} {self._known[file]}\n".encode())
        return digest.hexdigest()[:32]


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content; for weights of more than `SAMPLED_ABOVE` bytes, of a part of it.

    That part is the size, the first MiB, where safetensors has names and shapes, and 1,024 evenly spaced samples of 64
    KiB. It differs if training has changed all weights, or any tensor that is more than a thousandth of the file; an
    edit of a few numbers may go unnoticed. Modification times do not count, so that a copy has the same digest.
    """
    size = file.stat().st_size
    if size <= SAMPLED_ABOVE or not _is_any_of(file, WEIGHTS):
        return content_digest([file])
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        digest.update(opened.read(HEAD))
        for number in range(SAMPLES):
            opened.seek(number * (size - SAMPLE_SIZE) // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_SIZE))
    return digest.hexdigest()


def checkpoint_files(name_or_path: str | Path) -> list[Path]:
    """The model files of a local checkpoint directory, sorted, of adapters with their model's; none for a Hub id."""
    model = adapted_model(name_or_path)
    files = [*Path(name_or_path).glob("*"), *(Path(model).glob("*") if model else ())]
    return sorted((file for file in files if _is_any_of(file, CHECKPOINT_FILES) and file.is_file()), key=_absolute)


def _absolute(file: Path) -> Path:
    return Path(os.path.abspath(file))


def _is_any_of(file: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in patterns)


def _template_files(spec: str) -> list[Path]:
    if spec.startswith(BUILTIN_PREFIX):
        return [BUILTIN_DIRECTORY / f"{spec.removeprefix(BUILTIN_PREFIX)}.yaml"]
    return [resolve_file(spec)]


def _reward_files(spec: str) -> list[Path]:
    """The file of path/to/file.py:function; none for the name of a reward of the package."""
    file = Path(spec.rpartition(":")[0])
    return [file] if file.is_file() else []


def _cache_files(spec: str) -> list[Path]:
    """The header of a teacher cache, which has digests of what is in its shards."""
    file = Path(spec) / "cache.json"
    return [file] if file.is_file() else []


def _chat_template_files(spec: str) -> list[Path]:
    """The file of a chat template, or a local checkpoint's files; none for a word of the package."""
    return [Path(spec)] if Path(spec).is_file() else checkpoint_files(spec)


def _preset_files(spec: str) -> list[Path]:
    """The file of a preset given by its path; none for the name of a preset of the package."""
    file = Path(spec)
    return [file] if file.suffix in (".yaml", ".yml") and file.is_file() else []


# The local files that a value of each kind stands for; none if it names something elsewhere.
FILES_OF: dict[Reads, Callable[[str], list[Path]]] = {
    Reads.DATA: data_files,
    Reads.TEACHER_CACHE: _cache_files,
    Reads.TEMPLATES: _template_files,
    Reads.CHECKPOINT: checkpoint_files,
    Reads.RUN_CHECKPOINT: lambda path: sorted(file for file in Path(path).rglob("*") if file.is_file()),
    Reads.REWARD: _reward_files,
    Reads.CHAT_TEMPLATE: _chat_template_files,
    Reads.PRESET: _preset_files,
    Reads.JSON: lambda path: [Path(path)] if Path(path).is_file() else [],
}
# Every flag of a training run that names files, of its trainer's config and of all groups of flags.
READ_BY_FLAG: dict[str, Reads] = {f"--{name}": reads for name, reads in INHERITED.items()} | {
    f"--{name}": reads
    for group in (
        *(DataArguments, HeldOutArguments, PromptArguments),
        *(TeacherArguments, AbsentTeacherArguments, StudentArguments, RewardArguments),
        *(GeneralDataArguments, TaskDataArguments, EncoderHeldOutArguments),
        *(EncoderTeacherArguments, EncoderPanelArguments, EncoderStudentArguments),
    )
    for name, reads in files_read(group).items()
}
