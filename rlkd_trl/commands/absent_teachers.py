"""Teachers that are not in this process: what can be learnt from them, and how they are reached."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import RewardArguments, ServerArguments
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.loading import load_panel, routing_of, student_writer
from rlkd_trl.commands.settings import DistillationSettings, EvaluationSettings, RewardedSettings
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from rlkd_trl.teachers import TeacherPanel
    from rlkd_trl.teachers.served import ServedTeacher

# The flags of `TeacherArguments` that are still read, and those of `AbsentTeacherArguments` that belong together.
_WITH_A_CACHE = ("allowed_special_tokens",)
_WITH_A_SERVER = (
    *("teacher_max_prompt_length", "allowed_special_tokens"),
    *("teacher_chat_template", "teacher_system_prompt", "teacher_chat_template_kwargs"),
)
_OF_PANELS_WITH_A_SERVER = ("template_weights", "teacher_weighting", "template_column")


def check_absent_teacher(settings: DistillationSettings, templates: PromptTemplates | None) -> None:
    """Checks that the method can learn from such a teacher, if one is named, and that it is there. Loads no model.

    Raises:
        InputError: It cannot, or it is not; the message says why.
    """
    absent = settings.absent
    if absent.named is None:
        _refuse_others(absent, (), "a teacher in this process")
        return
    names = {"--teacher": settings.teacher.teacher and " ".join(settings.teacher.teacher)}
    names |= {"--teacher_cache": absent.teacher_cache, "--teacher_server": absent.teacher_server}
    given = [f"{flag} {name}" for flag, name in names.items() if name is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are teachers in place of each other: give one of them.")
    if absent.teacher_cache is not None:
        _check_cache(settings, templates)
    else:
        _check_server(settings)


def check_evaluation_server(settings: EvaluationSettings) -> None:
    """Checks that the server, if one is named, is there and tells the rewards. Raises `InputError` if not."""
    if settings.absent.teacher_server is None:
        _refuse_others(settings.absent, (), "a teacher in this process")
        return
    if settings.teacher.teacher is not None:
        raise InputError("--teacher and --teacher_server are teachers in place of each other: give one of them.")
    gamma = settings.evaluation.gamma
    if gamma < 1 and "teacher_forcing" in settings.reward.reward:
        raise InputError(
            f"--gamma {gamma} with --teacher_server: a completion's discounted reward needs the mean logits, which a "
            "server does not tell. Leave it at 1, or give the teacher itself with --teacher."
        )
    _check_reachable(settings, align=settings.evaluation.align_tokenizers)


def check_cached_rows(
    settings: DistillationSettings, rows: Sequence[Mapping[str, object]], templates: PromptTemplates | None
) -> None:
    """Checks that the cache, if one is named, has every target of the rows, whose prompts are cut to their length.

    Raises:
        InputError: One is missing; the message names its row.
    """
    from rlkd_trl.teachers.cache import CachedPanel, TeacherCache
    from rlkd_trl.trainers.cache_checks import check_rows

    directory = settings.absent.teacher_cache
    if directory is not None:
        panel = CachedPanel(TeacherCache(directory), templates)
        check_rows(panel, rows, student_writer(settings.student).processing_class)


def _refuse_others(group: object, read: Sequence[str], why: str) -> None:
    """Raises `InputError` for a flag of the group that is set and not read."""
    for option in fields(group):
        value = getattr(group, option.name)
        if option.name not in read and value != option.default:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"--{option.name} {shown} has no effect with {why}: leave it out.")


def _check_cache(settings: DistillationSettings, templates: PromptTemplates | None) -> None:
    from rlkd_trl.models.vocabulary import check_same_tokenizer
    from rlkd_trl.teachers.cache import CachedPanel, TeacherCache, read_header
    from rlkd_trl.trainers.cache_checks import check_cache_settings
    from rlkd_trl.trainers.full_vocabulary_config import AllActionsKDConfig

    directory = settings.absent.teacher_cache
    flag = f"--teacher_cache {directory}"
    if isinstance(settings, RewardedSettings) or isinstance(settings.args, AllActionsKDConfig):
        raise InputError(
            f"{flag} tells about fixed targets only, and this method learns from the student's own samples: use "
            "kd.py, or give the teacher itself with --teacher."
        )
    _refuse_others(settings.teacher, _WITH_A_CACHE, f"{flag}, whose teacher is not loaded")
    _refuse_others(settings.panel, (), f"{flag}, whose teacher is not loaded")
    _refuse_others(settings.absent, ("teacher_cache",), f"{flag}, which is no server")
    check_cache_settings(read_header(directory), settings.args)
    panel = CachedPanel(TeacherCache(directory), templates)
    tokenizer = student_writer(settings.student).processing_class
    check_same_tokenizer(tokenizer, panel.cache.processing_class)


def _check_server(settings: DistillationSettings) -> None:
    from rlkd_trl.trainers.checks import check_tells_rewards

    args = settings.args
    if not isinstance(settings, RewardedSettings):
        raise InputError(
            "--teacher_server tells log p of each written token and of the best one, and this method compares teacher "
            "and student over all tokens: use ppo_kd.py, rloo_kd.py or reinforce_kd.py (the reward log_ratio is "
            "per-token distillation), or give the teacher itself with --teacher."
        )
    if "teacher_forcing" in settings.reward.reward:
        check_tells_rewards(settings.reward.value, _tau(settings.reward), args)
    _check_reachable(settings, align=args.align_tokenizers if args.can_align else None)


def _tau(reward: RewardArguments) -> float | None:
    return reward.tau if reward.value == "soft" else None


def _check_reachable(settings: RewardedSettings | EvaluationSettings, *, align: bool | None) -> None:
    """Checks the flags beside `--teacher_server`, and asks the server. Raises `InputError`."""
    from rlkd_trl.models.vocabulary import check_tokenizers
    from rlkd_trl.teachers.served import check_wanted

    flag, reward = "--teacher_server", settings.reward
    if settings.absent.teacher_tokenizer is None:
        raise InputError(f"{flag} needs --teacher_tokenizer: a directory or Hub id with the served model's tokenizer.")
    _refuse_others(settings.teacher, _WITH_A_SERVER, f"{flag}, whose teacher is loaded elsewhere")
    _refuse_others(settings.panel, _OF_PANELS_WITH_A_SERVER, f"{flag}, which is one teacher")
    if "teacher_forcing" in reward.reward:
        check_wanted(expected=reward.value == "expected", tau=_tau(reward))
    teacher = connect_server(settings)
    tokenizer = student_writer(settings.student).processing_class
    check_tokenizers(tokenizer, [teacher.processing_class], align=align)


def api_key_of(absent: ServerArguments) -> str | None:
    """The key in the environment variable that a flag names. Raises `InputError` if there is none."""
    name = absent.teacher_api_key_env
    if name is None:
        return None
    if name not in os.environ:
        # What was given may be the key itself, so it is not repeated.
        raise InputError(
            "--teacher_api_key_env names no variable of the environment: export the key under a name, and give that."
        )
    return os.environ[name]


def connect_server(settings: DistillationSettings | EvaluationSettings) -> "ServedTeacher":
    """The teacher behind the server that the flags name. Raises `InputError` if it cannot be asked."""
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.teachers.completions_api import CompletionsClient
    from rlkd_trl.teachers.served import ServedTeacher

    absent, teacher = settings.absent, settings.teacher
    tokenizer = load_tokenizer(absent.teacher_tokenizer)
    client = CompletionsClient(
        absent.teacher_server,
        tokenizer,
        model=absent.teacher_server_model,
        api_key=api_key_of(absent),
        timeout=absent.teacher_server_timeout,
        patience=absent.teacher_server_patience,
        concurrency=absent.teacher_server_concurrency,
    )
    return ServedTeacher(
        client,
        tokenizer,
        max_prompt_length=teacher.teacher_max_prompt_length,
        allowed_special_tokens=teacher.allowed_special_tokens or [],
        chat=teacher.chat_format(),
    )


def load_any_panel(settings: DistillationSettings, templates: PromptTemplates | None) -> "TeacherPanel":
    """The teachers that the flags name, in this process or not. Raises `InputError`."""
    from rlkd_trl.teachers.cache import CachedPanel, TeacherCache

    absent, panel, length = settings.absent, settings.panel, settings.args.max_completion_length
    if absent.named is None:
        return load_panel(settings.teacher, templates, panel, max_reference_length=length)
    if absent.teacher_cache is not None:
        cache = TeacherCache(absent.teacher_cache)
        say(f"Teacher: {cache.describe()}. It is not loaded.")
        return CachedPanel(cache, templates)
    return load_served_panel(settings, templates, max_reference_length=length)


def load_served_panel(
    settings: DistillationSettings | EvaluationSettings, templates: PromptTemplates | None, **of_panel
) -> "TeacherPanel":
    """The teacher behind a server. Raises `InputError`."""
    from rlkd_trl.teachers import TeacherPanel

    panel, teacher = settings.panel, connect_server(settings)
    say(f"Teacher: {teacher.describe()}. It is not loaded.")
    return TeacherPanel(
        [teacher],
        templates,
        template_weights=panel.template_weights,
        weighting="per_example" if panel.teacher_weighting == "per_example" else "fixed",
        routing=routing_of(panel, settings.teacher),
        **of_panel,
    )
