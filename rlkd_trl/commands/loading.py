"""Loads or makes the models that a command's checked flags name."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import (
    NewModelArguments,
    PanelArguments,
    RewardArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.commands.launched import say
from rlkd_trl.prompts import PromptTemplates, source_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlkd_trl.models.chat import PromptWriter
    from rlkd_trl.rewards import RewardModel, TeacherReward
    from rlkd_trl.teachers import TeacherPanel
    from rlkd_trl.teachers.routing import Routing


def teacher_writer(teacher: TeacherArguments, name: str) -> "PromptWriter":
    """How prompts are written for the teacher of this name, by its tokenizer and the flags. Raises `InputError`."""
    from rlkd_trl.models.chat import PromptWriter
    from rlkd_trl.models.loading import load_tokenizer

    return PromptWriter(load_tokenizer(name, revision=teacher.teacher_revision), teacher.chat_format())


def student_writer(student: StudentArguments) -> "PromptWriter":
    """The same of the student that is named."""
    from rlkd_trl.models.chat import PromptWriter
    from rlkd_trl.models.loading import load_tokenizer

    return PromptWriter(load_tokenizer(student.student, revision=student.student_revision), student.chat_format())


def supervised_writer(
    student: StudentArguments, new: NewModelArguments, pairs: Sequence[Mapping[str, object]]
) -> "PromptWriter":
    """As `student_writer`; without `--student` over `--tokenizer`, or over a tokenizer trained on the pairs."""
    if student.student is not None:
        return student_writer(student)
    from rlkd_trl.data import train_tokenizer
    from rlkd_trl.models.chat import PromptWriter
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.models.vocabulary import require_eos

    if new.tokenizer is not None:
        tokenizer = load_tokenizer(new.tokenizer)
        require_eos(tokenizer)
    else:
        texts = [source_text(pair[column]) for column in ("prompt", "target") for pair in pairs]
        tokenizer = train_tokenizer(texts, vocab_size=new.vocab_size)
    return PromptWriter(tokenizer, student.chat_format())


def load_or_make_model(
    student: StudentArguments, new: NewModelArguments, writer: "PromptWriter", *, seed: int
) -> "PreTrainedModel":
    """`--student`'s checkpoint, or a new model over the writer's tokenizer. Raises `InputError`."""
    if student.student is not None:
        model, _ = load_student(student)
        return model
    from rlkd_trl.students.from_scratch import new_model

    sizes = {
        name: getattr(new, name) for name in ("architecture", "d_model", "num_layers", "num_heads", "d_ff", "dropout")
    }
    return new_model(writer.processing_class, **sizes, seed=seed)


def load_panel(
    teacher: TeacherArguments, templates: PromptTemplates | None, panel: PanelArguments | None = None, **settings
) -> "TeacherPanel":
    """The named teachers, asked through the templates; prints how each is kept. Raises `InputError`.

    panel: how they are weighed, and which examples are whose; by default equally, and everyone's. settings: of
    `TeacherPanel` too.
    """
    from rlkd_trl.teachers import Teacher, TeacherPanel

    teachers = [
        Teacher.from_pretrained(
            name,
            revision=teacher.teacher_revision,
            dtype=teacher.teacher_dtype,
            max_prompt_length=teacher.teacher_max_prompt_length,
            max_batch_tokens=teacher.teacher_batch_tokens,
            allowed_special_tokens=teacher.allowed_special_tokens or [],
            chat=teacher.chat_format(),
            **teacher.placement_settings(),
        )
        for name in teacher.teacher
    ]
    for name, loaded in zip(teacher.teacher, teachers, strict=True):
        say(f"Teacher {name}: {loaded.describe()}.")
    panel = panel or PanelArguments()
    return TeacherPanel(
        teachers,
        templates,
        teacher_weights=panel.teacher_weights,
        template_weights=panel.template_weights,
        weighting="per_example" if panel.teacher_weighting == "per_example" else "fixed",
        routing=routing_of(panel, teacher),
        **settings,
    )


def routing_of(panel: PanelArguments, teacher: TeacherArguments) -> "Routing | None":
    """Which examples are whose, by the columns that the flags name."""
    from rlkd_trl.teachers.routing import Routing

    if panel.teacher_column is None and panel.template_column is None:
        return None
    return Routing(panel.teacher_column, panel.template_column, tuple(teacher.teacher or []))


def weigh_by_validation(panel: "TeacherPanel", rows: Sequence[Mapping[str, object]]) -> None:
    """Weighs the scorers by their mean loss on their own rows' first references, and prints losses and weights.

    Raises `InputError` as `TeacherPanel.mean_reference_losses`.
    """
    losses = panel.mean_reference_losses(rows)
    panel.weigh_by(losses)
    listed = ", ".join(f"{loss:.3f} → {weight:.3f}" for loss, weight in zip(losses, panel.weights, strict=True))
    say(f"Validation losses of the teachers, per token, on {len(rows)} references, and their weights: {listed}.")


def load_reward_model(
    rewards: Sequence["type[TeacherReward] | Callable"],
    reward: RewardArguments,
    panel: "TeacherPanel",
    *,
    gamma: float,
    weights: Sequence[float] | None,
) -> "RewardModel":
    """The rewards (see `checks.checked_rewards`) on one panel of teachers.

    Raises:
        InputError: As `TeacherForcingReward` and `RewardModel`.
    """
    from rlkd_trl.rewards import RewardModel, TeacherForcingReward, TeacherReward
    from rlkd_trl.rewards.own_rewards import construct

    terms = []
    for term in rewards:
        if isinstance(term, type) and issubclass(term, TeacherForcingReward):
            terms.append(construct(term, panel, value=reward.value, k=reward.k, tau=reward.tau, gamma=gamma))
        elif isinstance(term, type) and issubclass(term, TeacherReward):
            terms.append(construct(term, panel))
        else:
            terms.append(term)
    return RewardModel(terms, weights, panel=panel)


def load_student(student: StudentArguments) -> tuple["PreTrainedModel", "PromptWriter"]:
    """The student, and how prompts are written for it, with its tokenizer. Raises `InputError`."""
    from rlkd_trl.models.loading import load_model

    writer = student_writer(student)
    model = load_model(
        student.student,
        revision=student.student_revision,
        dtype=student.student_dtype,
        quantization=student.quantization,
    )
    return model, writer
