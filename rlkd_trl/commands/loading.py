"""Loads or makes the models that a command's checked flags name."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import NewModelArguments, RewardArguments, StudentArguments, TeacherArguments
from rlkd_trl.commands.launched import say
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlkd_trl.rewards import RewardModel, TeacherReward
    from rlkd_trl.teachers import TeacherPanel


def load_or_make_model(
    student: StudentArguments, new: NewModelArguments, pairs: Sequence[Mapping[str, str]], *, seed: int
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The student's checkpoint, or a new model with the named tokenizer or one trained on the pairs.

    Raises:
        InputError: Either cannot be loaded or made.
    """
    if student.student is not None:
        return load_student(student)
    from rlkd_trl.data import train_tokenizer
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.models.vocabulary import require_eos
    from rlkd_trl.students.from_scratch import new_model

    if new.tokenizer is not None:
        tokenizer = load_tokenizer(new.tokenizer)
        require_eos(tokenizer)
    else:
        texts = [pair[column] for column in ("prompt", "target") for pair in pairs]
        tokenizer = train_tokenizer(texts, vocab_size=new.vocab_size)
    sizes = {
        name: getattr(new, name) for name in ("architecture", "d_model", "num_layers", "num_heads", "d_ff", "dropout")
    }
    return new_model(tokenizer, **sizes, seed=seed), tokenizer


def load_panel(teacher: TeacherArguments, templates: PromptTemplates | None) -> "TeacherPanel":
    """The named teachers, asked through the templates; prints how each is kept. Raises `InputError`."""
    from rlkd_trl.teachers import Teacher, TeacherPanel

    teachers = [
        Teacher.from_pretrained(
            name,
            revision=teacher.teacher_revision,
            dtype=teacher.teacher_dtype,
            max_prompt_length=teacher.teacher_max_prompt_length,
            max_batch_tokens=teacher.teacher_batch_tokens,
            allowed_special_tokens=teacher.allowed_special_tokens or [],
            **teacher.placement_settings(),
        )
        for name in teacher.teacher
    ]
    for name, loaded in zip(teacher.teacher, teachers, strict=True):
        say(f"Teacher {name}: {loaded.describe()}.")
    return TeacherPanel(teachers, templates)


def load_reward_model(
    rewards: Sequence["type[TeacherReward] | Callable"],
    reward: RewardArguments,
    teacher: TeacherArguments,
    templates: PromptTemplates | None,
    *,
    gamma: float,
    weights: Sequence[float] | None,
) -> "RewardModel":
    """The rewards (see `checks.checked_rewards`) on one panel of the named teachers.

    Raises:
        InputError: As `Teacher.from_pretrained`, `TeacherForcingReward` and `RewardModel`.
    """
    from rlkd_trl.rewards import RewardModel, TeacherForcingReward, TeacherReward
    from rlkd_trl.rewards.own_rewards import construct

    panel = load_panel(teacher, templates)
    terms = []
    for term in rewards:
        if isinstance(term, type) and issubclass(term, TeacherForcingReward):
            terms.append(construct(term, panel, value=reward.value, k=reward.k, tau=reward.tau, gamma=gamma))
        elif isinstance(term, type) and issubclass(term, TeacherReward):
            terms.append(construct(term, panel))
        else:
            terms.append(term)
    return RewardModel(terms, weights, panel=panel)


def load_student(student: StudentArguments) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The student and its tokenizer. Raises `InputError`."""
    from rlkd_trl.models.loading import load_model, load_tokenizer

    model = load_model(student.student, revision=student.student_revision, dtype=student.student_dtype)
    return model, load_tokenizer(student.student, revision=student.student_revision)
