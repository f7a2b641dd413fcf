"""The record of a command that every checkpoint holds, and that a resumed command compares before it loads a model."""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.files_read import FILES_OF, FileDigests
from rlkd_trl.settings.files import Reads, files_read

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

# Groups and flags that are not compared: evaluation data and how a teacher is kept, which do not change what is
# learnt; and training data, as its rows themselves are compared.
_LEFT_OUT = (
    *("DataArguments", "HeldOutArguments", "RunArguments"),
    *("GeneralDataArguments", "TaskDataArguments", "EncoderHeldOutArguments"),
    *("teacher_placement", "teacher_offload_path", "teacher_batch_tokens"),
    *("teacher_server", "teacher_api_key_env", "teacher_server_timeout", "teacher_server_patience"),
    *("teacher_server_concurrency", "merge_adapters"),
)


def command_record(settings: object) -> dict[str, dict[str, object]]:
    """The flags of a command by group, without the trainer's config; files and directories are given by digests.

    With `--resume_from_checkpoint` the student is that checkpoint, so the recorded student is the one with which the
    checkpoint's run began.
    """
    from rlkd_trl.trainers.run_record import RUN_RECORD

    digests = FileDigests()
    groups = [group for name, group in vars(settings).items() if name != "args"]
    record = {
        type(group).__name__: {
            item.name: _recorded(getattr(group, item.name), files_read(type(group)).get(item.name), digests)
            for item in fields(group)
            if item.name not in _LEFT_OUT
        }
        for group in groups
        if type(group).__name__ not in _LEFT_OUT
    }
    named = settings.args.resume_from_checkpoint
    if named is not None:
        of_checkpoint = json.loads((Path(named) / RUN_RECORD).read_text(encoding="utf-8")).get("command") or {}
        record |= {name: of_checkpoint.get(name) for name in record if name.endswith("StudentArguments")}
    return record


def _recorded(value: object, reads: Reads | None, digests: FileDigests) -> object:
    """A flag's value, or the digest of the files that it names."""
    if reads is None or value is None:
        return value
    if isinstance(value, list):
        return [_recorded(item, reads, digests) for item in value]
    files = FILES_OF[reads](value)
    return digests.of_files(files) if files else value


def check_own_checkpoint(
    checkpoint: str | None, trainer: str, args: "TrainingArguments", command: dict, rows: "Dataset | None" = None
) -> None:
    """Raises `InputError` if the checkpoint is of another run than this command's; the message says in what."""
    from rlkd_trl.trainers.run_record import check_same_run, rows_digest, settings_of

    if checkpoint is None:
        return
    record = {
        "trainer": trainer,
        "processes": args.world_size,
        "settings": settings_of(args),
        "command": command,
    }
    if rows is not None:
        record["data"] = rows_digest(rows)
    check_same_run(Path(checkpoint), record)
