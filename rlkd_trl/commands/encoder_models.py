"""Teacher and student of a stage of encoder distillation: first checked by their configs, then loaded or made."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlkd_trl.commands.arguments import EncoderStudentArguments
from rlkd_trl.commands.encoder_data import Classes, Rows
from rlkd_trl.commands.settings import EncoderSettings
from rlkd_trl.commands.student_adapters import check_fit, encoder_adapters
from rlkd_trl.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rlkd_trl.trainers.encoder_config import EncoderKDConfig
    from rlkd_trl.trainers.encoder_objective import Objective

_SIZES = ("num_layers", "hidden_size", "num_heads", "intermediate_size")


@dataclass(frozen=True)
class StudentPlan:
    """How a stage's student begins: from a checkpoint, or as a new model made of the teacher.

    config: the student's. sizes, init: of a new model, as in `students.from_teacher.smaller_student`.
    """

    config: "PreTrainedConfig"
    checkpoint: str | None = None
    revision: str | None = None
    sizes: dict[str, int | None] | None = None
    init: str = "uniform"


@dataclass(frozen=True)
class Stage:
    """One stage: its settings, rows and teacher, and the student that it begins with.

    classes: of a task stage. more_teachers: beside `teacher`. trained_along: more encoders, which are trained together
    with the student. checkpoint: from which the stage is resumed. is_done: whether it is already finished.
    """

    args: "EncoderKDConfig"
    rows: Rows
    teacher: str | None
    teacher_revision: str | None
    student: StudentPlan
    classes: Classes | None
    is_last: bool
    more_teachers: tuple[str, ...] = ()
    trained_along: tuple[str, ...] = ()
    checkpoint: str | None = None
    is_done: bool = False

    @property
    def objective(self) -> "Objective":
        return self.args.objective(0)

    @property
    def directory(self) -> Path:
        return Path(self.args.output_dir)


class Models(NamedTuple):
    """The loaded models of a stage, and the tokenizer that they share."""

    student: "PreTrainedModel"
    teacher: "PreTrainedModel | None"
    tokenizer: "PreTrainedTokenizerBase"
    more_teachers: "list[PreTrainedModel]"
    trained_along: "list[PreTrainedModel]"


def plan_student(settings: EncoderSettings) -> StudentPlan:
    """How the first stage's student begins. Raises `InputError` if none is named and none can be made."""
    from rlkd_trl.models.encoders import load_encoder_config
    from rlkd_trl.students.from_teacher import RANDOM, SIZES, check_init, smaller_config

    student = settings.student
    if student.student is not None:
        _refuse_sizes(student)
        config = load_encoder_config(student.student, revision=student.student_revision)
        return StudentPlan(config, student.student, student.student_revision)
    name, revision = _source(settings)
    if name is None:
        raise InputError("--student or --teacher is needed: a new student is made of its teacher.")
    of_teacher = load_encoder_config(name, revision=revision)
    sizes = {size: getattr(student, size) for size in SIZES}
    if sizes["num_layers"] is None:
        sizes["num_layers"] = max(of_teacher.num_hidden_layers // 2, 1)
    inner = next((value for n in SIZES["intermediate_size"] if (value := getattr(of_teacher, n, None))), None)
    if sizes["hidden_size"] is not None and sizes["intermediate_size"] is None and inner is not None:
        sizes["intermediate_size"] = inner * sizes["hidden_size"] // of_teacher.hidden_size
    config = smaller_config(of_teacher, sizes)
    is_resized = any(getattr(student, size) is not None for size in _SIZES[1:])
    init = student.init or (RANDOM if is_resized else "uniform")
    check_init(init, config, of_teacher)
    return StudentPlan(config, sizes=sizes, init=init)


def _source(settings: EncoderSettings) -> tuple[str | None, str | None]:
    """Name and revision of the teacher that a new student is made of: the first stage's."""
    teacher = settings.teacher
    is_of_task = settings.args.stages[0] == "task" and teacher.task_teacher is not None
    if is_of_task or teacher.teacher is None:
        return teacher.task_teacher, teacher.task_teacher_revision
    return teacher.teacher, teacher.teacher_revision


def _refuse_sizes(student: EncoderStudentArguments) -> None:
    for name in (*_SIZES, "init"):
        if (value := getattr(student, name)) is not None:
            raise InputError(
                f"--{name} {value} is for a new student, and --student {student.student} names one that there is: "
                "leave out one of them."
            )


def check_teacher(name: str, revision: str | None, objective: "Objective") -> None:
    """Raises `InputError` if a stage's teacher lacks the head that the losses need."""
    from rlkd_trl.models.encoders import check_has_head

    if objective.teachers_head == "none":
        return
    remedy = (
        "fine-tune it on the task (--stages task --losses hard_ce), or name another with --task_teacher."
        if objective.stage == "task"
        else "leave logits_kl out of --losses, or take a teacher with it."
    )
    check_has_head(name, objective.teachers_head, "The teacher", remedy, revision=revision)


def check_stage_models(settings: EncoderSettings, stage: Stage) -> None:
    """Checks tokenizers, layers and lengths before weights are read. Raises `InputError`."""
    from rlkd_trl.data.streams import known_rows
    from rlkd_trl.models.encoders import load_encoder_config, skeleton
    from rlkd_trl.models.limits import check_embedding_rows
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.models.precision import check_dtype
    from rlkd_trl.trainers.encoder_checks import check_inputs, check_models, check_same_vocabulary

    check_dtype(settings.teacher.teacher_dtype)
    objective, plan = stage.objective, stage.student
    student = skeleton(plan.config, objective.head, "The student")
    teacher = None
    name, revision = _tokenizer_of(settings)
    tokenizer = load_tokenizer(name, revision=revision)
    check_embedding_rows("The student", tokenizer, plan.config)
    if stage.teacher is not None:
        config = load_encoder_config(stage.teacher, revision=stage.teacher_revision)
        teacher = skeleton(config, objective.teachers_head, "The teacher")
        theirs = load_tokenizer(stage.teacher, revision=stage.teacher_revision)
        check_same_vocabulary(tokenizer, theirs)
        check_embedding_rows("The teacher", tokenizer, config)
    check_models(objective, student, teacher)
    data = [known_rows(stage.rows.train), stage.rows.test]
    check_inputs(stage.args, objective, data, tokenizer, student, teacher)
    for name in (*stage.more_teachers, *stage.trained_along):
        config = load_encoder_config(name)
        who = "The teacher" if name in stage.more_teachers else "The encoder"
        other = skeleton(config, objective.teachers_head if name in stage.more_teachers else objective.head, who)
        check_same_vocabulary(tokenizer, load_tokenizer(name))
        check_embedding_rows(who, tokenizer, config)
        if name in stage.more_teachers:
            check_models(objective, student, other)
        check_inputs(stage.args, objective, data, tokenizer, student, other)
    if (adapters := encoder_adapters(settings.adapters, objective.head)) is not None:
        check_fit(settings.adapters, student.model, adapters)


def _tokenizer_of(settings: EncoderSettings) -> tuple[str, str | None]:
    student = settings.student
    return (student.student, student.student_revision) if student.student is not None else _source(settings)


def load_models(settings: EncoderSettings, stage: Stage) -> Models:
    """Loads the stage's teacher, and loads or makes its student. Raises `InputError`."""
    from rlkd_trl.models.encoders import load_encoder
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.students.from_teacher import smaller_student

    objective, plan, seed = stage.objective, stage.student, stage.args.seed
    of_classes = {}
    if stage.classes is not None:
        of_classes = {"num_labels": stage.classes.num_labels, "label_names": stage.classes.names}
    teacher = None
    if stage.teacher is not None:
        teacher = load_encoder(
            stage.teacher,
            objective.teachers_head,
            "The teacher",
            revision=stage.teacher_revision,
            dtype=settings.teacher.teacher_dtype,
        )
    if plan.checkpoint is not None:
        student = load_encoder(
            plan.checkpoint,
            objective.head,
            "The student",
            revision=plan.revision,
            may_be_new=True,
            seed=seed,
            **of_classes,
        )
    else:
        name, revision = _source(settings)
        whole = load_encoder(
            name, objective.head, "The teacher", revision=revision, may_be_new=True, seed=seed, **of_classes
        )
        student = smaller_student(whole, plan.sizes, init=plan.init, seed=seed)
    name, revision = _tokenizer_of(settings)
    more_teachers = [
        load_encoder(checkpoint, objective.teachers_head, "The teacher", dtype=settings.teacher.teacher_dtype)
        for checkpoint in stage.more_teachers
    ]
    trained_along = [
        load_encoder(checkpoint, objective.head, "The encoder", may_be_new=True, seed=seed, **of_classes)
        for checkpoint in stage.trained_along
    ]
    return Models(student, teacher, load_tokenizer(name, revision=revision), more_teachers, trained_along)
