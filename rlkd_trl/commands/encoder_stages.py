"""Plans the stages of an encoder's distillation, checks them, and builds the trainer of each."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.checks import refuse_unused, require_files
from rlkd_trl.commands.encoder_data import Rows, classes_of, load_stage_rows, with_next_sentences, with_numbers
from rlkd_trl.commands.encoder_models import (
    Stage,
    StudentPlan,
    check_stage_models,
    check_teacher,
    load_models,
    plan_student,
)
from rlkd_trl.commands.hub import check_push
from rlkd_trl.commands.run_directory import (
    FINISHED,
    check_free,
    checkpoint_to_resume,
    clear_results,
    is_finished,
    mark_finished,
)
from rlkd_trl.commands.run_record import check_own_checkpoint, command_record
from rlkd_trl.commands.settings import EncoderSettings
from rlkd_trl.commands.student_adapters import (
    check_encoder_adapters,
    check_pushed_adapters,
    encoder_adapters,
    report_adapters,
)
from rlkd_trl.errors import InputError, is_first_process

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rlkd_trl.trainers.encoder import EncoderKDTrainer

_TRAINER = "EncoderKDTrainer"


def check_data(settings: EncoderSettings) -> dict[str, Rows]:
    """Checks files, columns and rows, and loads the rows; a sketch of the trainer's config is enough.

    Raises:
        InputError: As `load_stage_rows`; or a file is missing; or several stages are to run under DeepSpeed.
    """
    require_files(settings)
    rows = load_stage_rows(settings)

    from rlkd_trl.trainers.processes import uses_deepspeed  # late: it takes seconds, and what is wrong is said before

    stages = settings.args.stages
    if len(stages) > 1 and uses_deepspeed(settings.args):
        raise InputError(
            f"--stages {' '.join(stages)}: under DeepSpeed a command trains one stage, since Accelerate allows one "
            "trainer in a process. Run one after the other, each with its own --stages, --losses, --layer_map, "
            "--temperature and --output_dir, and give the next one the last one's student by --student; or launch "
            "without DeepSpeed."
        )
    return rows


def check_directories(settings: EncoderSettings) -> None:
    """Checks the launch, that each stage's directory may be written, and the push. Raises `InputError`."""
    from rlkd_trl.trainers.checks import check_sharding

    args = settings.args
    check_sharding(args)
    for number in reversed(range(len(args.stages))):  # first the directory that a user has named
        check_free(args.of_stage(number).output_dir, settings.run, args)
    if len(args.stages) > 1 and args.resume_from_checkpoint is not None:
        raise InputError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} is of one stage, and there are "
            f"{len(args.stages)}: --resume goes on with the stage that was not finished."
        )
    check_pushed_adapters(settings.adapters, settings.student, args)
    check_push(args)


def plan_stages(settings: EncoderSettings, rows: dict[str, Rows]) -> list[Stage]:
    """The stages, with everything that is known before weights are read; finished stages are marked.

    Raises:
        InputError: Settings, models and data do not fit each other, or a run to resume is another run.
    """
    args = settings.args
    check_panel(settings)
    check_encoder_adapters(settings.adapters, settings.student, settings.panel, args.stages)
    stages, student = [], plan_student(settings)
    for number in range(len(args.stages)):
        stage = _stage(settings, number, rows, student)
        check_stage_models(settings, stage)
        stages.append(stage)
        student = StudentPlan(student.config, checkpoint=str(stage.directory))
    return _progress(settings, stages)


def _stage(settings: EncoderSettings, number: int, rows: dict[str, Rows], student: StudentPlan) -> Stage:
    from rlkd_trl.models.encoders import load_encoder_config
    from rlkd_trl.trainers.checks import check_endless

    args, teacher = settings.args.of_stage(number), settings.teacher
    objective = args.objective(0)
    of_stage = rows[objective.stage]
    is_stream = settings.streaming.streaming and objective.stage == "general"
    if is_stream:
        check_endless(args)
    name, revision = teacher.teacher, teacher.teacher_revision
    if objective.stage == "task" and teacher.task_teacher is not None:
        name, revision = teacher.task_teacher, teacher.task_teacher_revision
    if not objective.needs_teacher:
        name = revision = None
    if name is not None:
        check_teacher(name, revision, objective)
    classes = None
    if objective.stage == "task":
        has_labels = "label" in of_stage.train.column_names
        if "hard_ce" in objective.weights and not has_labels:
            raise InputError(
                "hard_ce learns from labels: name their column with --label_column, or leave hard_ce out of --losses "
                "(logits_kl alone, as in the preset soft_only, needs none)."
            )
        config = load_encoder_config(name, revision=revision) if objective.teachers_head == "classes" else None
        if config is not None or has_labels:
            classes = classes_of(of_stage, config)
        if has_labels:
            column = settings.task.label_column or "label"
            of_stage = Rows(*(with_numbers(part, classes, column) for part in (of_stage.train, of_stage.test)))
    elif "nsp_ce" in objective.weights:
        if is_stream:
            raise InputError("nsp_ce pairs texts of all data at random, which a stream cannot: leave out --streaming.")
        if "text_pair" not in of_stage.train.column_names:
            raise InputError(
                "nsp_ce learns which text follows which: name the second one's column with --pair_column."
            )
        of_stage = Rows(*(with_next_sentences(part, args.seed) for part in (of_stage.train, of_stage.test)))
    has_more = name is not None and objective.stage == _stage_of_more_teachers(settings.args.stages)
    more_teachers = tuple(settings.panel.more_teachers or ()) if has_more else ()
    for other in more_teachers:
        check_teacher(other, None, objective)
        if objective.stage == "task":
            _check_same_classes(name, load_encoder_config(name, revision=revision), other, load_encoder_config(other))
    is_last = number == len(settings.args.stages) - 1
    trained_along = tuple(settings.panel.train_along or ())
    return Stage(args, of_stage, name, revision, student, classes, is_last, more_teachers, trained_along)


def _stage_of_more_teachers(stages: Sequence[str]) -> str:
    """The stages that more teachers are for: those of the task where there are any."""
    return "task" if "task" in stages else "general"


def _check_same_classes(
    name: str, config: "PreTrainedConfig", other: str, config_of_other: "PreTrainedConfig"
) -> None:
    if config.id2label != config_of_other.id2label:
        raise InputError(
            f"--more_teachers {other} has other classes than {name} ({', '.join(config_of_other.id2label.values())}; "
            f"{', '.join(config.id2label.values())}): fine-tune both on the same labels."
        )


def check_panel(settings: EncoderSettings) -> None:
    """Checks the flags for several teachers. Raises `InputError`."""
    from rlkd_trl.trainers.encoder_checks import check_trained_along

    panel, stages, args = settings.panel, settings.args.stages, settings.args
    teaches = [
        number
        for number in range(len(stages))
        if (objective := args.objective(number)).stage == _stage_of_more_teachers(stages) and objective.needs_teacher
    ]
    named = settings.teacher.teacher or ("task" in stages and settings.teacher.task_teacher)
    refuse_unused(
        panel,
        "more_teachers",
        unless=bool(teaches and named),
        needs="a --teacher, or in a task stage a --task_teacher, and its losses",
    )
    of_task = bool(panel.more_teachers) and "task" in stages
    refuse_unused(panel, "teacher_weighting", unless=of_task, needs="--more_teachers of a task stage")
    if panel.train_along:
        check_trained_along(args.objective(0), None, len(panel.train_along))
        if settings.student.student is None or len(stages) > 1:
            raise InputError(
                "--train_along fine-tunes encoders together with --student, in one task stage: name that student, and "
                "no other stages."
            )


def _progress(settings: EncoderSettings, stages: Sequence[Stage]) -> list[Stage]:
    """The stages, those of a resumed run with their checkpoints, and marked if they are finished."""
    from rlkd_trl.trainers.run_record import check_same_run

    run = settings.run
    if len(stages) == 1:
        stages = [replace(stages[0], checkpoint=checkpoint_to_resume(run, stages[0].args))]
    elif run.resume and not any(_has_begun(stage.directory) for stage in stages):
        checkpoint_to_resume(run, settings.args)  # which says that there is none
    record = command_record(settings)
    with_progress, all_done = [], True
    for stage in stages:
        if run.resume and all_done and len(stages) > 1:
            if _has_checkpoint(stage.directory):
                stage = replace(stage, checkpoint=checkpoint_to_resume(run, stage.args))
            elif (stage.directory / FINISHED).is_file():
                check_same_run(stage.directory, _stage_record(stage, record))
                stage = replace(stage, is_done=True)
        check_own_checkpoint(stage.checkpoint, _TRAINER, stage.args, record, stage.rows.train)
        if not stage.is_done and is_finished(stage.checkpoint, stage.args):
            stage = replace(stage, is_done=True)
        all_done = all_done and stage.is_done
        with_progress.append(stage)
    return with_progress


def _has_begun(directory: Path) -> bool:
    """Whether there is a checkpoint of a stage, or its finished student."""
    return _has_checkpoint(directory) or (directory / FINISHED).is_file()


def _has_checkpoint(directory: Path) -> bool:
    """Whether there is a checkpoint, whole or harmed. One whose writing was broken off is none."""
    from rlkd_trl.trainers.checkpoint_files import newest_whole
    from rlkd_trl.trainers.processes import from_first_process

    whole, defects = from_first_process(lambda: newest_whole(directory))
    return whole is not None or bool(defects)


def _stage_record(stage: Stage, command: dict) -> dict[str, object]:
    """The record of a finished stage, by which a resumed run recognises it, also without checkpoints."""
    from rlkd_trl.trainers.run_record import rows_digest, settings_of

    return {
        "trainer": _TRAINER,
        "settings": settings_of(stage.args),
        "command": command,
        "data": rows_digest(stage.rows.train),
        "length": {"max_steps": stage.args.max_steps, "num_train_epochs": stage.args.num_train_epochs},
    }


def clear_unfinished(stages: Sequence[Stage]) -> None:
    """Removes an earlier run's results of the stages that are not finished; called when training begins."""
    for stage in stages:
        if stage.is_done:
            continue
        clear_results(stage.directory, goes_on=stage.checkpoint is not None)
        if not stage.is_last and stage.checkpoint is None and is_first_process():
            shutil.rmtree(stage.directory, ignore_errors=True)


def build(settings: EncoderSettings, stage: Stage) -> "EncoderKDTrainer":
    """The trainer of a stage, with its models loaded. Raises `InputError`."""
    from rlkd_trl.trainers.encoder import EncoderKDTrainer

    models = load_models(settings, stage)
    trainer = EncoderKDTrainer(
        models.student,
        models.teacher,
        stage.args,
        stage.rows.train,
        eval_dataset=stage.rows.test,
        processing_class=models.tokenizer,
        more_teachers=models.more_teachers,
        weigh_teachers=settings.panel.teacher_weighting == "per_example",
        trained_along=models.trained_along,
        peft_config=encoder_adapters(settings.adapters, stage.objective.head),
    )
    report_adapters(settings.adapters, trainer.student.model)
    trainer.run_record["command"] = command_record(settings)
    return trainer


def mark_stage(settings: EncoderSettings, stage: Stage, step: int) -> None:
    """Marks a stage before the last as finished, with its record, in its directory."""
    from rlkd_trl.trainers.run_record import RUN_RECORD

    if is_first_process():
        record = json.dumps(_stage_record(stage, command_record(settings)), indent=1)
        (stage.directory / RUN_RECORD).write_text(record + "\n", encoding="utf-8")
    mark_finished(stage.directory, step)
