"""Digests of the local files that a training run reads, by which a change of them in place is seen."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from rlkd_trl.commands.arguments import (
    DataArguments,
    EncoderHeldOutArguments,
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
from rlkd_trl.settings.files import INHERITED, Reads, files_read

WEIGHTS = ("*.safetensors", "*.bin")
# What `from_pretrained` reads of a checkpoint: weights, configs, tokenizer. Beside them stand results and reports.
CHECKPOINT_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.py"),
)
# A file of weights with more bytes is sampled: an 11B model has 40 GiB, half a minute for SHA-256 and longer to read.
SAMPLED_ABOVE = 2**30
HEAD, SAMPLES, SAMPLE_SIZE = 2**20, 1024, 2**16  # bytes, number, bytes


class FileDigests:
    """Takes digests, of each file once in the life of this object: what changes meanwhile is not seen."""

    def __init__(self):
        self._known: dict[Path, str] = {}

    def of_flags(self, values: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """The digest of each value of a flag that names something local, by "--flag value"."""
        flags_with_values = [(flag, value) for flag in READ_BY_FLAG for value in values.get(flag, [])]
        files = {f"{flag} {value}": FILES_OF[READ_BY_FLAG[flag]](value) for flag, value in flags_with_values}
        return {name: self.of_files(paths) for name, paths in files.items() if paths}

    def of_groups(self, *groups: object) -> dict[str, str]:
        """The same for groups of flags."""
        values = {}
        for group in groups:
            for name in files_read(type(group)):
                value = getattr(group, name)
                values[f"--{name}"] = value if isinstance(value, list) else [] if value is None else [value]
        return self.of_flags(values)

    def of_files(self, files: Sequence[Path]) -> str:
        """The digest of the files' contents and of their names below the directory that they share."""
        shared = os.path.commonpath(files)
        digest = hashlib.sha256()
        for file in files:
            if file not in self._known:
                self._known[file] = file_digest(file)
            digest.update(f"{file.relative_to(shared)} {self._known[file]}\n".encode())
        return digest.hexdigest()[:32]


def file_digest(file: Path) -> str:
    """SHA-256 of the content; of weights above `SAMPLED_ABOVE` of a part of it.

    There of the size, the first MiB, in which safetensors has the names and shapes, and 1,024 evenly spaced samples
    of 64 KiB. Training that moves all weights, or any tensor of more than a thousandth of the file, is seen; an edit
    of a few numbers may not be. Times of modification do not count, so that a copy is the same file.
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
    """The model files of a local checkpoint directory, sorted; none for a Hub id."""
    files = Path(name_or_path).glob("*")
    return sorted(file for file in files if _is_any_of(file, CHECKPOINT_FILES) and file.is_file())


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


def _preset_files(spec: str) -> list[Path]:
    """The file of a preset given by its path; none for the name of a preset of the package."""
    file = Path(spec)
    return [file] if file.suffix in (".yaml", ".yml") and file.is_file() else []


# The local files behind a value; none where it names something elsewhere.
FILES_OF: dict[Reads, Callable[[str], list[Path]]] = {
    Reads.DATA: data_files,
    Reads.TEMPLATES: _template_files,
    Reads.CHECKPOINT: checkpoint_files,
    Reads.RUN_CHECKPOINT: lambda path: sorted(file for file in Path(path).rglob("*") if file.is_file()),
    Reads.REWARD: _reward_files,
    Reads.PRESET: _preset_files,
    Reads.JSON: lambda path: [Path(path)] if Path(path).is_file() else [],
}
# Every flag of a training run that names files: of its trainer, and of the other groups of flags.
READ_BY_FLAG: dict[str, Reads] = {f"--{name}": reads for name, reads in INHERITED.items()} | {
    f"--{name}": reads
    for group in (
        *(DataArguments, HeldOutArguments, PromptArguments),
        *(TeacherArguments, StudentArguments, RewardArguments),
        *(GeneralDataArguments, TaskDataArguments, EncoderHeldOutArguments),
        *(EncoderTeacherArguments, EncoderStudentArguments),
    )
    for name, reads in files_read(group).items()
}
