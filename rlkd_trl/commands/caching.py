"""The steps of cache_teacher.py: its checks, and the cache itself."""

from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.checks import check_teacher
from rlkd_trl.commands.loading import load_panel, teacher_writer
from rlkd_trl.commands.prompt_lengths import fit_student_prompts
from rlkd_trl.commands.run_directory import check_writable
from rlkd_trl.commands.settings import CacheSettings
from rlkd_trl.errors import InputError, is_first_process
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from datasets import Dataset


def check_cache_flags(settings: CacheSettings, rows: "Dataset") -> None:
    """Checks the flags, that each row has a target, and that the directory can be written. Loads no model.

    Raises:
        InputError: One of them is wrong.
    """
    from rlkd_trl.ops.divergences import ENSEMBLES
    from rlkd_trl.teachers.cache import DTYPES
    from rlkd_trl.teachers.cache_writer import is_place_of_cache

    cache, directory = settings.cache, Path(settings.cache.output)
    if cache.dtype not in DTYPES:
        raise InputError(f"--dtype {cache.dtype}: choose one of {', '.join(DTYPES)}.")
    if cache.ensemble not in ENSEMBLES:
        raise InputError(f"--ensemble {cache.ensemble}: choose one of {', '.join(ENSEMBLES)}.")
    if settings.teacher.teacher_placement != "replicated":
        raise InputError(
            f"--teacher_placement {settings.teacher.teacher_placement}: a cache is written by one process, which "
            "holds the whole teacher. Leave it at replicated, with --teacher_dtype or --teacher_quantization if it is "
            "large."
        )
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output {cache.output} is a file: name a directory.")
    if directory.is_dir() and any(directory.iterdir()) and not is_place_of_cache(directory):
        raise InputError(
            f"--output {cache.output} holds files that are no teacher cache of this version: name another directory."
        )
    check_writable("--output", directory)
    check_teacher(settings.teacher)
    for i, row in enumerate(rows):
        if not row["references"]:
            raise InputError(f"Row {i + 1} has no target to cache: name the column of targets with --target_column.")


def as_teacher_reads(settings: CacheSettings, rows: "Dataset", templates: PromptTemplates | None) -> "Dataset":
    """The rows, with the student's prompts cut as kd.py cuts them, where they are what the teacher is asked.

    Raises:
        InputError: The template's own words are too many tokens.
    """
    template, max_length = settings.prompts.student_template, settings.cache.max_prompt_length
    if templates is not None or template is None or max_length is None:
        return rows
    writer = teacher_writer(settings.teacher, settings.teacher.teacher[0])
    return fit_student_prompts(rows, "Data", template, writer, max_length)


def cache_targets(settings: CacheSettings, rows: "Dataset", templates: PromptTemplates | None) -> str:
    """Writes the cache, and returns a line about it. Only the first of several processes does anything.

    Raises:
        InputError: A teacher cannot be loaded; or as `write_cache`.
    """
    from rlkd_trl.teachers.cache import TeacherCache
    from rlkd_trl.teachers.cache_writer import remove_cache, write_cache
    from rlkd_trl.trainers.run_record import model_record

    if not is_first_process():
        return ""
    values = dict(vars(settings.cache))
    directory, temperature = values.pop("output"), values.pop("distillation_temperature")
    del values["max_prompt_length"]  # to which the rows are cut
    panel = load_panel(settings.teacher, templates)
    if values.pop("overwrite_output_dir"):
        remove_cache(Path(directory))
    teachers = list({id(scorer.teacher): scorer.teacher for scorer in panel.scorers}.values())
    write_cache(
        panel,
        list(rows),
        directory,
        names=settings.teacher.teacher,
        identities=[model_record(teacher.model) for teacher in teachers],
        temperature=temperature,
        progress="Teacher cache",
        **values,
    )
    size = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    return f"{TeacherCache(directory).describe()}. {size:,} bytes are in {directory}."
