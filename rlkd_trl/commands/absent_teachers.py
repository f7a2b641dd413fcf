"""Teachers that are not in this process: what can be learnt from them, and how they are reached."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from rlkd_trl.commands.launched import say
from rlkd_trl.commands.loading import load_panel, student_writer
from rlkd_trl.commands.settings import DistillationSettings, RewardedSettings
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from rlkd_trl.teachers import TeacherPanel

_STILL_READ = ("teacher", "allowed_special_tokens")  # of the flags of teachers, without one


def check_absent_teacher(
    settings: DistillationSettings, rows: Sequence[Mapping[str, object]], templates: PromptTemplates | None
) -> None:
    """Checks that the method can learn from such a teacher, and that the teacher is there. Loads no model.

    Raises:
        InputError: It cannot, or it is not; the message says why.
    """
    from rlkd_trl.trainers.full_vocabulary_config import AllActionsKDConfig

    flag, absent = f"--teacher_cache {settings.absent.teacher_cache}", settings.absent
    if settings.teacher.teacher is not None:
        raise InputError(f"{flag} is in place of --teacher {' '.join(settings.teacher.teacher)}: give one of them.")
    if isinstance(settings, RewardedSettings) or isinstance(settings.args, AllActionsKDConfig):
        raise InputError(
            f"{flag} tells about fixed targets only, and this method learns from the student's own samples: use "
            "kd.py, or give the teacher itself with --teacher."
        )
    for group in (settings.teacher, settings.panel):
        for option in fields(group):
            value = getattr(group, option.name)
            if option.name not in _STILL_READ and value != option.default:
                raise InputError(f"--{option.name} {value} has no effect with {flag}, whose teacher is not loaded.")
    _check_cache(absent.teacher_cache, settings, rows, templates)


def _check_cache(
    directory: str,
    settings: DistillationSettings,
    rows: Sequence[Mapping[str, object]],
    templates: PromptTemplates | None,
) -> None:
    from rlkd_trl.models.vocabulary import check_same_tokenizer
    from rlkd_trl.teachers.cache import CachedPanel, TeacherCache, read_header
    from rlkd_trl.trainers.cache_checks import check_cache_settings, check_rows

    check_cache_settings(read_header(directory), settings.args)
    panel = CachedPanel(TeacherCache(directory), templates)
    tokenizer = student_writer(settings.student).processing_class
    check_same_tokenizer(tokenizer, panel.cache.processing_class)
    check_rows(panel, rows, tokenizer)


def load_any_panel(settings: DistillationSettings, templates: PromptTemplates | None) -> "TeacherPanel":
    """The teachers that the flags name, in this process or not. Raises `InputError`."""
    if settings.absent.named is None:
        length = settings.args.max_completion_length
        return load_panel(settings.teacher, templates, settings.panel, max_reference_length=length)
    from rlkd_trl.teachers.cache import CachedPanel, TeacherCache

    cache = TeacherCache(settings.absent.teacher_cache)
    say(f"Teacher: {cache.describe()}. It is not loaded.")
    return CachedPanel(cache, templates)
