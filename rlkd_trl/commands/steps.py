"""The steps that recipes share, from parsed flags to a trainer. Each recipe is a story of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import (
    DataArguments,
    HeldOutArguments,
    NewModelArguments,
    PromptArguments,
    PseudoLabelArguments,
    RewardArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.commands.data import load_templates, load_train_and_held_out
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from rlkd_trl.rewards import RewardModel
    from rlkd_trl.teachers import TeacherPanel
    from rlkd_trl.trainers.config import OnPolicyConfig, RolloutConfig


@dataclass
class DistillationSettings:
    """All flags of a distillation recipe. `reward` is None where the method has no reward of its own."""

    data: DataArguments
    held_out: HeldOutArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    student: StudentArguments
    run: RunArguments
    args: "RolloutConfig"
    reward: RewardArguments | None = None


@dataclass(frozen=True)
class CheckedInputs:
    """What is known to be in order before a model is loaded. checkpoint: where to resume from, if anywhere."""

    templates: PromptTemplates | None
    train: "Dataset"
    test: "Dataset"
    checkpoint: str | None


def parse_distillation(
    config: type["RolloutConfig"], *, description: str, demo_preset: Path, with_reward: bool = True
) -> DistillationSettings:
    """The command line of a distillation recipe; without a teacher on it, `demo_preset` gives the defaults.

    Raises `InputError`.
    """
    kinds = [
        DataArguments,
        HeldOutArguments,
        PromptArguments,
        TeacherArguments,
        StudentArguments,
        RunArguments,
        config,
    ]
    if with_reward:
        kinds.insert(-2, RewardArguments)
    groups = RecipeParser(*kinds, description=description).parse(demo_preset=demo_preset)
    found = dict(zip(kinds, groups, strict=True))
    return DistillationSettings(
        data=found[DataArguments],
        held_out=found[HeldOutArguments],
        prompts=found[PromptArguments],
        teacher=found[TeacherArguments],
        student=found[StudentArguments],
        run=found[RunArguments],
        args=found[config],
        reward=found.get(RewardArguments),
    )


def check_inputs(settings: DistillationSettings) -> CheckedInputs:
    """How the run was launched, rewards, data, templates and checkpoints, in this order; makes the demo's models where
    nothing is named.

    Raises:
        InputError: One of them is wrong; the message names it.
    """
    from rlkd_trl.trainers.checks import check_sharding

    check_sharding(settings.args)
    if settings.reward is not None:
        check_rewards(settings.reward, settings.args.reward_weights, settings.args)
    templates = load_templates(settings.prompts)
    train, test = load_train_and_held_out(settings.data, settings.held_out, settings.prompts, templates, settings.args)
    checkpoint = last_checkpoint(settings.run, settings.args.output_dir)
    name_or_make_models(settings.teacher, settings.student, settings.data, templates, settings.args)
    check_checkpoints(settings.teacher, settings.student)
    return CheckedInputs(templates, train, test, checkpoint)


def load_or_make_model(
    student: StudentArguments, new: NewModelArguments, pairs: "Dataset", *, seed: int
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """`--student`'s checkpoint, or a new model over `--tokenizer` or one trained on the pairs. Raises `InputError`."""
    if student.student is not None:
        check_student(student)
        return load_student(student)
    from rlkd_trl.data import train_tokenizer
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.students.from_scratch import new_model

    if new.tokenizer is not None:
        tokenizer = load_tokenizer(new.tokenizer)
    else:
        tokenizer = train_tokenizer([*pairs["prompt"], *pairs["target"]], vocab_size=new.vocab_size)
    sizes = {
        name: getattr(new, name) for name in ("architecture", "d_model", "num_layers", "num_heads", "d_ff", "dropout")
    }
    return new_model(tokenizer, **sizes, seed=seed), tokenizer


def require(**flags: object) -> None:
    """Raises `InputError` for the first flag without a value."""
    for flag, value in flags.items():
        if value is None:
            raise InputError(f"{flag} is needed here.")


def check_checkpoints(teacher: TeacherArguments, student: StudentArguments) -> None:
    """Teacher and student exist and share a tokenizer; before any weights are read. Raises `InputError`."""
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.models.vocabulary import check_same_tokenizer

    check_teacher(teacher)
    check_student(student)
    student_tokenizer = load_tokenizer(student.student, revision=student.student_revision)
    for name in teacher.teacher or []:
        check_same_tokenizer(student_tokenizer, load_tokenizer(name, revision=teacher.teacher_revision))


def check_teacher(teacher: TeacherArguments) -> None:
    """The teachers are checkpoints or may be Hub ids, and can be kept as asked for. Raises `InputError`."""
    from rlkd_trl.models.loading import check_dtype, check_quantization, require_checkpoint
    from rlkd_trl.teachers.placement import Placement

    check_dtype(teacher.teacher_dtype)
    check_quantization(teacher.teacher_quantization)
    Placement(**_placement(teacher), dtype=teacher.teacher_dtype)
    for name in teacher.teacher or []:
        require_checkpoint("--teacher", name)


def check_student(student: StudentArguments) -> None:
    """The student is a checkpoint or may be a Hub id, and the dtype is known. Raises `InputError`."""
    from rlkd_trl.models.loading import check_dtype, require_checkpoint

    check_dtype(student.student_dtype)
    require_checkpoint("--student", student.student)


def check_pseudo_labels(data: DataArguments, teacher: TeacherArguments, labels: PseudoLabelArguments) -> None:
    """One teacher, a known strategy, beams and references to interpolate, and a writable file. Raises `InputError`."""
    from rlkd_trl.models.answers import check_strategy

    check_teacher(teacher)
    if len(teacher.teacher) != 1:
        raise InputError(f"{len(teacher.teacher)} teachers: pseudo-labels are one teacher's answers.")
    check_strategy(labels.strategy)
    if labels.interpolate and (labels.strategy != "beam" or data.target_column is None):
        raise InputError(
            "--interpolate takes the teacher's beam that is nearest to the references: it needs --strategy beam and "
            "--target_column with the references."
        )
    if Path(labels.output).is_dir():
        raise InputError(f"--output {labels.output} is a directory: name a file in it.")


def load_panel(teacher: TeacherArguments, templates: PromptTemplates | None) -> "TeacherPanel":
    """The named teachers, asked through the templates; prints how each is kept. Raises `InputError`."""
    from rlkd_trl.models.sharding import is_first_process
    from rlkd_trl.teachers import Teacher, TeacherPanel

    teachers = [
        Teacher.from_pretrained(
            name,
            revision=teacher.teacher_revision,
            dtype=teacher.teacher_dtype,
            max_prompt_length=teacher.teacher_max_prompt_length,
            max_batch_tokens=teacher.teacher_batch_tokens,
            **_placement(teacher),
        )
        for name in teacher.teacher
    ]
    if is_first_process():
        for name, loaded in zip(teacher.teacher, teachers, strict=True):
            print(f"Teacher {name}: {loaded.describe()}.", flush=True)
    return TeacherPanel(teachers, templates)


def _placement(teacher: TeacherArguments) -> dict[str, str | None]:
    return {
        "placement": teacher.teacher_placement,
        "quantization": teacher.teacher_quantization,
        "offload_path": teacher.teacher_offload_path,
    }


def load_reward_model(
    reward: RewardArguments,
    teacher: TeacherArguments,
    templates: PromptTemplates | None,
    *,
    gamma: float,
    weights: Sequence[float] | None,
) -> "RewardModel":
    """The named rewards on one panel of the named teachers.

    Raises:
        InputError: As `load_reward`, `Teacher.from_pretrained`, `TeacherForcingReward` and `RewardModel`.
    """
    from rlkd_trl.rewards import RewardModel, TeacherForcingReward, TeacherReward, load_reward

    found = [load_reward(name) for name in reward.reward]  # names first: loading a teacher takes minutes
    panel = load_panel(teacher, templates)
    terms = []
    for one in found:
        if one is TeacherForcingReward:
            terms.append(one(panel, value=reward.value, k=reward.k, tau=reward.tau, gamma=gamma))
        elif isinstance(one, type) and issubclass(one, TeacherReward):
            terms.append(one(panel))
        else:
            terms.append(one)
    return RewardModel(terms, weights, panel=panel)


def check_rewards(
    reward: RewardArguments, weights: Sequence[float] | None, args: "OnPolicyConfig | None" = None
) -> None:
    """The rewards exist, with as many weights, a known V, and fit the trainer's settings. Raises `InputError`."""
    from rlkd_trl.rewards import load_reward
    from rlkd_trl.rewards.teacher_rewards import VALUES
    from rlkd_trl.trainers.checks import check_k_step, check_log_ratio

    for name in reward.reward:
        found = load_reward(name)
        if args is not None:
            check_log_ratio(found, args)
    if reward.value not in VALUES:
        raise InputError(f"--value {reward.value}: choose one of {', '.join(VALUES)}.")
    if weights is not None and len(weights) != len(reward.reward):
        raise InputError(f"{len(weights)} --reward_weights for {len(reward.reward)} rewards: give one each.")
    if args is not None:
        check_k_step(reward.k, args)


def name_or_make_models(
    teacher: TeacherArguments,
    student: StudentArguments,
    data: DataArguments,
    templates: PromptTemplates | None,
    args: "TrainingArguments",
) -> None:
    """Fills in the demo's teacher and warm start, trained here, where none of data, teacher and student is named.

    Raises:
        InputError: Some of the three are named and others not.
    """
    named = {"--dataset": data.dataset, "--teacher": teacher.teacher, "--student": student.student}
    missing = [flag for flag, value in named.items() if value is None]
    if not missing:
        return
    if len(missing) < len(named):
        raise InputError(
            f"{' and '.join(missing)} missing: give --dataset, --teacher and --student, or none of them for the demo."
        )
    from rlkd_trl.commands.demo import make_demo_models

    models = make_demo_models(Path(args.output_dir) / "demo_models", templates, seed=args.seed)
    teacher.teacher, student.student = [models.teacher], models.student


def load_student(student: StudentArguments) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The student and its tokenizer. Raises `InputError`."""
    from rlkd_trl.models.loading import load_model, load_tokenizer

    model = load_model(student.student, revision=student.student_revision, dtype=student.student_dtype)
    return model, load_tokenizer(student.student, revision=student.student_revision)


def last_checkpoint(run: RunArguments, output_dir: str) -> str | None:
    """The newest checkpoint in `output_dir` if `--resume` asks for it.

    Raises:
        InputError: There is none, or `output_dir` is a file.
    """
    from transformers.trainer_utils import get_last_checkpoint

    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise InputError(f"--output_dir {output_dir} is a file: name a directory.")
    if not run.resume:
        return None
    found = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if found is None:
        raise InputError(f"--resume: there is no checkpoint in {output_dir}; save some with --save_steps.")
    return found
