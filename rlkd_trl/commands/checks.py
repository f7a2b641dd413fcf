"""What is found wrong with a command's input before any model is loaded. A check makes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import RewardArguments, StudentArguments, TeacherArguments
from rlkd_trl.commands.run_directory import check_not_there
from rlkd_trl.commands.settings import DistillationSettings, PseudoLabelSettings
from rlkd_trl.data import require_dataset
from rlkd_trl.errors import InputError
from rlkd_trl.settings.files import Reads, files_read, require_checkpoint
from rlkd_trl.settings.hub import require_on_hub

if TYPE_CHECKING:
    from rlkd_trl.trainers.config import OnPolicyConfig


def is_demo(settings: DistillationSettings) -> bool:
    """Whether nothing is named, so that data and models are the embedded demo's.

    Raises:
        InputError: Some of data, teacher and student are named and others not.
    """
    named = {
        "--dataset": settings.data.dataset,
        "--teacher": settings.teacher.teacher,
        "--student": settings.student.student,
    }
    missing = [flag for flag, value in named.items() if value is None]
    if 0 < len(missing) < len(named):
        raise InputError(
            f"{' and '.join(missing)} missing: give --dataset, --teacher and --student, or none of them for the demo."
        )
    return bool(missing)


def require_files(settings: object) -> None:
    """Raises `InputError` for a flag whose data or checkpoint is neither here nor to be had from the Hub."""
    for group in vars(settings).values():
        for name, reads in files_read(type(group)).items():
            value = getattr(group, name)
            for path in value if isinstance(value, list) else [value]:
                if path is not None and reads is Reads.DATA:
                    require_dataset(path)
                    if not Path(path).expanduser().exists():
                        require_on_hub(f"--{name}", path, "dataset")
                elif path is not None and reads is Reads.CHECKPOINT:
                    require_checkpoint(f"--{name}", path)


def require(**flags: object) -> None:
    """Raises `InputError` for the first flag without a value."""
    for flag, value in flags.items():
        if value is None:
            raise InputError(f"{flag} is needed here.")


def check_checkpoints(teacher: TeacherArguments, student: StudentArguments) -> None:
    """Teacher and student exist, share a tokenizer and have an embedding for each token; before weights are read.

    Raises:
        InputError: They do not; the message names what differs.
    """
    from rlkd_trl.models.limits import check_embedding_rows
    from rlkd_trl.models.loading import load_config, load_tokenizer
    from rlkd_trl.models.vocabulary import check_same_tokenizer, check_special_tokens

    check_teacher(teacher)
    check_student(student)
    student_tokenizer = load_tokenizer(student.student, revision=student.student_revision)
    check_special_tokens(student_tokenizer, teacher.allowed_special_tokens or [])
    config = load_config(student.student, revision=student.student_revision)
    check_embedding_rows("The student", student_tokenizer, config)
    for name in teacher.teacher or []:
        check_same_tokenizer(student_tokenizer, load_tokenizer(name, revision=teacher.teacher_revision))
        config = load_config(name, revision=teacher.teacher_revision)
        check_embedding_rows("The teacher", student_tokenizer, config)


def check_teacher(teacher: TeacherArguments) -> None:
    """The teachers are checkpoints or may be Hub ids, have an EOS, can be kept as asked for. Raises `InputError`."""
    from rlkd_trl.models.loading import check_dtype, check_quantization, load_tokenizer
    from rlkd_trl.models.vocabulary import require_eos
    from rlkd_trl.teachers.placement import Placement

    check_dtype(teacher.teacher_dtype)
    check_quantization(teacher.teacher_quantization)
    Placement(**teacher.placement_settings(), dtype=teacher.teacher_dtype)
    for name in teacher.teacher or []:
        require_checkpoint("--teacher", name)
        require_eos(load_tokenizer(name, revision=teacher.teacher_revision))


def check_student(student: StudentArguments) -> None:
    """A named student is a checkpoint or may be a Hub id, and has an EOS; the dtype is known. Raises `InputError`."""
    from rlkd_trl.models.loading import check_dtype, load_tokenizer
    from rlkd_trl.models.vocabulary import require_eos

    check_dtype(student.student_dtype)
    if student.student is not None:
        require_checkpoint("--student", student.student)
        require_eos(load_tokenizer(student.student, revision=student.student_revision))


def check_pseudo_labels(settings: PseudoLabelSettings) -> None:
    """One teacher, a known strategy, beams and references to interpolate, and a writable file. Raises `InputError`."""
    from rlkd_trl.models.answers import check_strategy
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.models.vocabulary import check_special_tokens

    teacher, labels = settings.teacher, settings.labels
    check_teacher(teacher)
    if len(teacher.teacher) != 1:
        raise InputError(f"{len(teacher.teacher)} teachers: pseudo-labels are one teacher's answers.")
    if teacher.allowed_special_tokens:
        tokenizer = load_tokenizer(teacher.teacher[0], revision=teacher.teacher_revision)
        check_special_tokens(tokenizer, teacher.allowed_special_tokens)
    check_strategy(labels.strategy)
    if labels.interpolate and (labels.strategy != "beam" or settings.data.target_column is None):
        raise InputError(
            "--interpolate takes the teacher's beam that is nearest to the references: it needs --strategy beam and "
            "--target_column with the references."
        )
    if Path(labels.output).is_dir():
        raise InputError(f"--output {labels.output} is a directory: name a file in it.")
    check_not_there("--output", labels.output, overwrite=labels.overwrite_output_dir)


def check_rewards(
    reward: RewardArguments, weights: Sequence[float] | None, args: "OnPolicyConfig | None" = None
) -> None:
    """The rewards exist, with as many weights, a known V, and fit the trainer's settings. Raises `InputError`."""
    from rlkd_trl.ops.rewards import VALUES
    from rlkd_trl.rewards import load_reward
    from rlkd_trl.trainers.checks import check_k_step, check_log_ratio

    for name in reward.reward:
        loaded = load_reward(name)
        if args is not None:
            check_log_ratio(loaded, args)
    if reward.value not in VALUES:
        raise InputError(f"--value {reward.value}: choose one of {', '.join(VALUES)}.")
    if weights is not None and len(weights) != len(reward.reward):
        raise InputError(f"{len(weights)} --reward_weights for {len(reward.reward)} rewards: give one each.")
    if args is not None:
        check_k_step(reward.k, args)
