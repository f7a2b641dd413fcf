"""Checks of a command's input, before any model is loaded. A check changes nothing and makes nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import PanelArguments, RewardArguments, StudentArguments, TeacherArguments
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.loading import routing_of, student_writer, teacher_writer
from rlkd_trl.commands.run_directory import check_not_there
from rlkd_trl.commands.settings import (
    DistillationSettings,
    EvaluationSettings,
    GeneratedDataSettings,
    PseudoLabelSettings,
    SupervisedSettings,
)
from rlkd_trl.data import require_dataset
from rlkd_trl.errors import InputError
from rlkd_trl.settings.files import Reads, files_read, require_checkpoint
from rlkd_trl.settings.hub import require_on_hub

if TYPE_CHECKING:
    from rlkd_trl.prompts import PromptTemplates
    from rlkd_trl.rewards import TeacherReward
    from rlkd_trl.teachers.generated_inputs import Schema
    from rlkd_trl.trainers.config import OnPolicyConfig

# Flags that apply only to something on the Hub, and the flags that name it.
_ON_THE_HUB = {
    ("dataset_revision", "dataset_config"): ("dataset", "eval_dataset", "validation_dataset", "test_dataset"),
    ("task_revision", "task_config"): ("task_dataset", "task_eval_dataset"),
    ("teacher_revision",): ("teacher",),
    ("task_teacher_revision",): ("task_teacher",),
    ("student_revision",): ("student",),
}


def is_demo(settings: DistillationSettings) -> bool:
    """Whether the flags name neither data nor models, so that those of the embedded demo are used.

    Raises:
        InputError: Some of data, teacher and student are named and others are not.
    """
    named = {
        "--dataset": settings.data.dataset,
        "--teacher": settings.teacher.teacher or settings.absent.named,
        "--student": settings.student.student,
    }
    missing = [flag for flag, value in named.items() if value is None]
    if 0 < len(missing) < len(named):
        raise InputError(
            f"{' and '.join(missing)} missing: give --dataset, --teacher and --student, or none of them for the demo."
        )
    return bool(missing)


def require_files(settings: object) -> None:
    """Raises `InputError` for a flag whose data or checkpoint is neither local nor on the Hub.

    Also for the revision of something that is local.
    """
    for flag, path in _named(settings, Reads.DATA):
        require_dataset(path)
        if not Path(path).expanduser().exists():
            require_on_hub(flag, path, "dataset")
    for flag, path in _named(settings, Reads.CHECKPOINT):
        require_checkpoint(flag, path)
    _check_revisions(settings)


def _named(settings: object, reads: Reads) -> Iterator[tuple[str, str]]:
    """Each flag that names something of this kind, with each value that it has."""
    for group in vars(settings).values():
        for name in (name for name, kind in files_read(type(group)).items() if kind is reads):
            yield from ((f"--{name}", value) for value in _values(group, [name]))


def _check_revisions(settings: object) -> None:
    """Raises `InputError` for the revision, or configuration, of something that is local and not on the Hub."""
    groups = vars(settings).values()
    for options, names in _ON_THE_HUB.items():
        named = [value for group in groups for value in _values(group, names)]
        if not named or not all(Path(value).expanduser().exists() for value in named):
            continue
        for group in groups:
            for option in options:
                if (value := getattr(group, option, None)) is not None:
                    raise InputError(
                        f"--{option} {value} is for what is on the Hub, and {', '.join(named)} is here: leave it out."
                    )


def _values(group: object, names: Sequence[str]) -> list[str]:
    values = [getattr(group, name, None) for name in names]
    return [name for value in values for name in (value if isinstance(value, list) else [value]) if name is not None]


def refuse_unused(group: object, *names: str, unless: bool, needs: str) -> None:
    """Raises `InputError` for one of these flags if it is set and would change nothing; `needs` is what it needs.

    unless: True if that is set too.
    """
    for option in fields(group):
        value = getattr(group, option.name)
        if option.name in names and value != option.default and not unless:
            raise InputError(f"--{option.name} {value} has no effect without {needs}: give that, or leave it out.")


def check_new_model(settings: SupervisedSettings) -> None:
    """Raises `InputError` if flags name a student and also describe a new model, or put adapters on a new one."""
    if settings.student.student is None:
        if settings.adapters.use_peft:
            raise InputError(
                "--use_peft trains adapters on a checkpoint, and without --student the model is new, with random "
                "weights: name one, or leave --use_peft out."
            )
        return
    for option in fields(settings.new):
        value = getattr(settings.new, option.name)
        if value != option.default:
            raise InputError(
                f"--{option.name} {value} is for a new model, and --student {settings.student.student} names one that "
                "there is: leave out one of them."
            )


def require(**flags: object) -> None:
    """Raises `InputError` for the first flag without a value."""
    for flag, value in flags.items():
        if value is None:
            raise InputError(f"{flag} is needed here.")


def check_checkpoints(
    teacher: TeacherArguments,
    student: StudentArguments,
    *,
    fp16: bool = False,
    top_k: int = 0,
    align: bool | None = None,
) -> None:
    """Checks that teacher and student share a tokenizer, and have an embedding for each of its tokens.

    Only configs and tokenizers are read. fp16: whether the student is trained in mixed precision with float16. top_k:
    of how many tokens each is sampled, 0 for all. align: as in `check_tokenizers`.

    Raises:
        InputError: They do not, or as `check_teacher` and `check_student`; the message names what differs.
    """
    from rlkd_trl.models.limits import check_embedding_rows
    from rlkd_trl.models.loading import load_config
    from rlkd_trl.models.vocabulary import check_special_tokens, check_tokenizers

    check_teacher(teacher)
    check_student(student, fp16=fp16)
    student_tokenizer = student_writer(student).processing_class
    check_special_tokens(student_tokenizer, teacher.allowed_special_tokens or [])
    config = load_config(student.student, revision=student.student_revision)
    check_embedding_rows("The student", student_tokenizer, config)
    teachers = {name: teacher_writer(teacher, name).processing_class for name in teacher.teacher or []}
    check_tokenizers(student_tokenizer, list(teachers.values()), align=align)
    for name, tokenizer in teachers.items():
        config = load_config(name, revision=teacher.teacher_revision)
        check_embedding_rows("The teacher", tokenizer if align else student_tokenizer, config)
        check_special_tokens(tokenizer, teacher.allowed_special_tokens or [])
    if top_k > len(student_tokenizer):
        raise InputError(f"top_k = {top_k}, but the student has {len(student_tokenizer)} tokens: set top_k to 0.")


def check_teacher(teacher: TeacherArguments) -> None:
    """Checks that the teachers are language models with an EOS, and can be kept as asked for. Raises `InputError`."""
    from rlkd_trl.models.loading import load_config, load_tokenizer, refuse_sharded_adapters
    from rlkd_trl.models.precision import check_dtype, check_precision
    from rlkd_trl.models.vocabulary import require_eos
    from rlkd_trl.teachers.placement import Placement

    is_sharded = Placement(**teacher.placement_settings(), dtype=teacher.teacher_dtype).is_sharded
    check_dtype(teacher.teacher_dtype)
    for name in teacher.teacher or []:
        if is_sharded:
            refuse_sharded_adapters(name, revision=teacher.teacher_revision)
        check_precision(load_config(name, revision=teacher.teacher_revision), teacher.teacher_dtype)
        require_eos(load_tokenizer(name, revision=teacher.teacher_revision))
        if teacher_writer(teacher, name).is_chat:
            say(f"Teacher {name}: asked through a chat template (--teacher_chat_template none: without).")


def check_panel(panel: PanelArguments, teacher: TeacherArguments, templates: "PromptTemplates | None") -> None:
    """Checks the flags for several teachers or templates. Raises `InputError`."""
    num_teachers, num_templates = len(teacher.teacher or ["the demo's"]), 1 if templates is None else len(templates)
    for flag, weights, count, what in (
        ("--teacher_weights", panel.teacher_weights, num_teachers, "teachers"),
        ("--template_weights", panel.template_weights, num_templates, "templates"),
    ):
        if weights is not None and len(weights) != count:
            raise InputError(f"{flag} has {len(weights)} weights for {count} {what}: give one each.")
    refuse_unused(panel, "teacher_column", unless=num_teachers > 1, needs="several teachers (--teacher A B)")
    refuse_unused(panel, "template_column", unless=num_templates > 1, needs="several templates")
    for what in ("teacher", "template"):
        if (column := getattr(panel, f"{what}_column")) and (weights := getattr(panel, f"{what}_weights")):
            raise InputError(
                f"--{what}_weights {' '.join(map(str, weights))} has no effect with --{what}_column {column}: each "
                f"example has one {what}. Leave one of them out."
            )
    counts = [
        1 if column is not None else count
        for column, count in ((panel.teacher_column, num_teachers), (panel.template_column, num_templates))
    ]
    refuse_unused(
        panel, "teacher_weighting", unless=max(counts) > 1, needs="several teachers or templates for each example"
    )
    if teacher.teacher and panel.teacher_weighting != "fixed":
        check_one_tokenizer(teacher, f"--teacher_weighting {panel.teacher_weighting}")
    if teacher.teacher and panel.teacher_column is not None:
        check_one_tokenizer(teacher, f"--teacher_column {panel.teacher_column}")


def check_one_tokenizer(teacher: TeacherArguments, flag: str) -> None:
    """Raises `InputError` if the teachers have different tokenizers; flag: what needs one."""
    from rlkd_trl.models.vocabulary import are_same_tokens

    first, *others = [(name, teacher_writer(teacher, name).processing_class) for name in teacher.teacher]
    for name, tokenizer in others:
        if not are_same_tokens(first[1], tokenizer):
            raise InputError(
                f"{flag} needs teachers with one tokenizer, and those of {first[0]} and {name} differ, so that "
                "neither losses per token nor answers can be compared: leave it out, or name other teachers."
            )


def check_routing(
    panel: PanelArguments,
    teacher: TeacherArguments,
    templates: "PromptTemplates | None",
    parts: Mapping[str, Sequence[Mapping[str, object]]],
) -> None:
    """Raises `InputError` if a row names no teacher or template; parts: the rows, by what they are called."""
    routing = routing_of(panel, teacher)
    for name, rows in parts.items() if routing is not None else ():
        routing.check(rows, templates.names if templates is not None else [], name)


def check_evaluation_panel(
    settings: EvaluationSettings, templates: "PromptTemplates | None", rows: Sequence[Mapping[str, object]]
) -> None:
    """As `check_panel` and `check_routing`; refuses weights that would come from the rows to be measured on."""
    check_panel(settings.panel, settings.teacher, templates)
    if settings.panel.teacher_weighting == "validation":
        raise InputError(
            "--teacher_weighting validation would weigh the teachers by the rows that are measured: give the weights "
            "that the training run has printed, with --teacher_weights."
        )
    if settings.teacher.teacher is not None:
        check_routing(settings.panel, settings.teacher, templates, {"Data": rows})


def check_student(student: StudentArguments, *, fp16: bool = False) -> None:
    """Checks that the student, if one is named, is a language model with an EOS, in a precision that suits it.

    fp16: as in `check_checkpoints`. Raises `InputError`.
    """
    from rlkd_trl.models.loading import load_config, load_tokenizer
    from rlkd_trl.models.precision import check_dtype, check_precision
    from rlkd_trl.models.vocabulary import require_eos

    check_dtype(student.student_dtype)
    if student.student is not None:
        config = load_config(student.student, revision=student.student_revision)
        check_precision(config, student.student_dtype, fp16=fp16)
        require_eos(load_tokenizer(student.student, revision=student.student_revision))
        if student_writer(student).is_chat:
            say(f"Student {student.student}: asked through a chat template (--student_chat_template none: without).")


def check_pseudo_labels(
    settings: PseudoLabelSettings, templates: "PromptTemplates | None", rows: Sequence[Mapping[str, object]]
) -> None:
    """Checks the flags of pseudo-labelling: who answers which row, a known strategy and its needs, a writable file.

    Raises:
        InputError: One of them is wrong.
    """
    from rlkd_trl.models.answers import check_strategy
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.models.vocabulary import check_special_tokens

    teacher, labels = settings.teacher, settings.labels
    check_teacher(teacher)
    if len(teacher.teacher) != 1 and settings.routing.teacher_column is None:
        raise InputError(
            f"{len(teacher.teacher)} teachers: pseudo-labels are one teacher's answers. Name one, or the column that "
            "says whose each row is (--teacher_column)."
        )
    check_panel(settings.panel, teacher, templates)
    check_routing(settings.panel, teacher, templates, {"Data": rows})
    for name in teacher.teacher if teacher.allowed_special_tokens else ():
        tokenizer = load_tokenizer(name, revision=teacher.teacher_revision)
        check_special_tokens(tokenizer, teacher.allowed_special_tokens)
    check_strategy(labels.strategy)
    refuse_unused(labels, "num_beams", unless=labels.strategy == "beam", needs="--strategy beam")
    refuse_unused(labels, "temperature", unless=labels.strategy == "sample", needs="--strategy sample")
    if labels.interpolate and (labels.strategy != "beam" or settings.data.target_column is None):
        raise InputError(
            "--interpolate takes the teacher's beam that is nearest to the references: it needs --strategy beam and "
            "--target_column with the references."
        )
    if Path(labels.output).is_dir():
        raise InputError(f"--output {labels.output} is a directory: name a file in it.")
    check_not_there("--output", labels.output, overwrite=labels.overwrite_output_dir)


def check_generated_data(settings: GeneratedDataSettings, templates: "PromptTemplates | None") -> "Schema | None":
    """Checks the flags of data from a teacher, and reads its schema, if there is one.

    Raises:
        InputError: One of them is wrong.
    """
    from rlkd_trl.models.loading import load_config
    from rlkd_trl.teachers.generated_inputs import Schema, refuse_to_begin

    teacher, generated = settings.teacher, settings.generated
    check_teacher(teacher)
    if len(teacher.teacher) != 1:
        raise InputError(f"{len(teacher.teacher)} teachers: inputs are one teacher's.")
    for_data = ("student_template", "rename_columns")
    refuse_unused(settings.prompts, *for_data, unless=False, needs="data, which are made here")
    for template in templates or []:
        if template.input_variables:
            raise InputError(
                f"The template {template.name!r} reads {', '.join(sorted(template.input_variables))}, and there are "
                "no data to read: ask for an input in words alone ('Invent a restaurant.')."
            )
    if templates is None and generated.schema is None:
        refuse_to_begin(load_config(teacher.teacher[0], revision=teacher.teacher_revision))
    if generated.schema is not None:
        refuse_unused(generated, "temperature", unless=False, needs="sampling, and --schema draws from its values")
        if templates is None and generated.keep_share != 1:
            raise InputError(
                f"--keep_share {generated.keep_share} keeps what the teacher finds likeliest, so with --schema it "
                "needs a --template through which the teacher is asked for an input; or set it to 1."
            )
    if Path(generated.output).is_dir():
        raise InputError(f"--output {generated.output} is a directory: name a file in it.")
    check_not_there("--output", generated.output, overwrite=generated.overwrite_output_dir)
    return None if generated.schema is None else Schema.load(generated.schema)


def checked_rewards(
    reward: RewardArguments, weights: Sequence[float] | None, args: "OnPolicyConfig | None" = None
) -> list["type[TeacherReward] | Callable"]:
    """The named rewards, as functions and classes.

    Raises:
        InputError: One does not exist, V is unknown, there are other numbers of weights and rewards, or they do not go
            with the trainer's settings.
    """
    from rlkd_trl.ops.rewards import VALUES
    from rlkd_trl.rewards import TeacherForcingReward, load_reward
    from rlkd_trl.rewards.recipes import FAULTS
    from rlkd_trl.trainers.checks import check_k_step, check_log_ratio

    rewards = [load_reward(name) for name in reward.reward]
    if reward.value not in VALUES:
        raise InputError(f"--value {reward.value}: choose one of {', '.join(VALUES)}.")
    has_value = any(isinstance(loaded, type) and issubclass(loaded, TeacherForcingReward) for loaded in rewards)
    refuse_unused(reward, "value", "k", unless=has_value, needs="--reward teacher_forcing")
    refuse_unused(reward, "tau", unless=has_value and reward.value == "soft", needs="--value soft")
    if weights is not None and len(weights) != len(reward.reward):
        raise InputError(f"{len(weights)} --reward_weights for {len(reward.reward)} rewards: give one each.")
    if weights and not any(weights):
        raise InputError(f"--reward_weights {' '.join(map(str, weights))}: all are 0, so nothing is rewarded.")
    for name, weight in zip(reward.reward, weights or [1.0] * len(reward.reward), strict=True):
        if name in FAULTS and weight > 0:
            raise InputError(
                f"--reward {name} measures a fault, and with weight {weight:g} the student would learn it: give it a "
                "negative one with --reward_weights."
            )
    if args is not None:
        check_k_step(reward.k, args)
        for loaded in rewards:
            check_log_ratio(loaded, args)
    return rewards
