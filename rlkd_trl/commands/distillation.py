"""The body of the distillation recipes: parse, check, build, train, report, with one object of settings."""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.absent_teachers import check_absent_teacher, check_cached_rows, load_any_panel
from rlkd_trl.commands.checks import (
    check_checkpoints,
    check_panel,
    check_routing,
    checked_rewards,
    is_demo,
    require_files,
)
from rlkd_trl.commands.data import load_templates, load_train_and_held_out
from rlkd_trl.commands.demo import use_demo_models
from rlkd_trl.commands.hub import check_push, push
from rlkd_trl.commands.loading import load_reward_model, load_student, weigh_by_validation
from rlkd_trl.commands.prompt_lengths import fit_rows, fit_stream
from rlkd_trl.commands.results import evaluate, evaluate_teacher_of, finish_run, save_student, warn_if_spoilt
from rlkd_trl.commands.run_directory import (
    check_free,
    checkpoint_to_resume,
    clear_results,
    held_alone,
    is_finished,
)
from rlkd_trl.commands.run_record import check_own_checkpoint, command_record
from rlkd_trl.commands.settings import CommandLine, DistillationSettings, RewardedSettings
from rlkd_trl.commands.student_adapters import check_adapters, check_pushed_adapters, report_adapters, student_adapters
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from datasets import Dataset

    from rlkd_trl.data.streams import RowStream
    from rlkd_trl.rewards import TeacherReward
    from rlkd_trl.trainers.rollout_trainer import RolloutTrainer


@dataclass(frozen=True)
class CheckedData:
    """Templates, and training and test rows for all of which they render."""

    templates: PromptTemplates | None
    train: "Dataset | RowStream"
    test: "Dataset"


@dataclass(frozen=True)
class CheckedInputs(CheckedData):
    """What has been checked before a model is loaded.

    rewards: the functions and classes that the flags name. checkpoint: the one to resume from, if any.
    """

    rewards: Sequence["type[TeacherReward] | Callable"]
    checkpoint: str | None


def distil(
    recipe: str,
    config: str,
    trainer: str,
    *,
    title: str | Callable[[DistillationSettings], str],
    description: str,
    demo_preset: Path,
    kind: type[DistillationSettings] = RewardedSettings,
) -> None:
    """A distillation recipe, from its command line to a finished output directory.

    Args:
        recipe: The recipe's name; a preset may have a section of that name.
        config: The trainer's config class, as "package.module:Class"; it is imported when it is needed.
        trainer: The trainer's class, likewise.
        title: The method's name in the results, or a function from the settings to it.
        description: The recipe's docstring, for `--help`.
        demo_preset: A YAML file of defaults for runs that name neither data nor models.
        kind: The class of the settings: with flags for rewards, or without.

    Raises:
        InputError: Something in the input is wrong.
        TrainingError: Numbers that are not finite have stopped the run, or are in its results. Whatever there is, is
            saved.
    """
    # 1 parse and check, before any model is loaded or made.
    command = CommandLine(kind, description=description, recipe=recipe, config=config, demo_preset=demo_preset)
    sketch = command.sketch()
    data = check_data(sketch)

    from rlkd_trl.trainers.processes import connect_processes

    connect_processes(sketch.args)
    with held_alone(sketch.args.output_dir):
        settings = command.settings()
        inputs = check(settings, data)

        # 2 make the demo's models, if none are named.
        if is_demo(settings):
            use_demo_models(settings, settings.args.output_dir, seed=settings.args.seed)

        inputs = within_lengths(settings, inputs)
        check_cached_rows(settings, inputs.train, inputs.templates)
        record = command_record(settings)
        check_own_checkpoint(inputs.checkpoint, trainer.partition(":")[2], settings.args, record, inputs.train)
        if is_finished(inputs.checkpoint, settings.args):
            push(settings.args)
            return

        from rlkd_trl.evaluation.not_finite import check_finite

        # 3 build, and measure teacher and student, which calls the reward for the first time.
        trainer = build(pkgutil.resolve_name(trainer), settings, inputs)
        trainer.run_record["command"] = record
        results = {"teacher": evaluate_teacher_of(trainer), "before": evaluate(trainer, "before training")}
        check_finite(results, "Nothing was trained.")

        # 4 train, save at once, and measure the student again.
        clear_results(settings.args.output_dir, goes_on=inputs.checkpoint is not None)
        trainer.train(resume_from_checkpoint=inputs.checkpoint)
        save_student(trainer, results, merge=settings.adapters.merge_adapters)
        results["after"] = evaluate(trainer, "after training")

        # 5 report.
        method = title if isinstance(title, str) else title(settings)
        warn_if_spoilt(trainer, results)
        finish_run(trainer, results, settings, inputs.templates, method=method)


def check_data(settings: DistillationSettings, *, held_out_flag: str = "--eval_dataset") -> CheckedData:
    """Checks files, templates and rows, and loads the latter; a sketch of the trainer's config is enough.

    held_out_flag: the name that `--eval_dataset` has for the user.

    Raises:
        InputError: One of them is wrong; the message names it.
    """
    is_demo(settings)
    require_files(settings)
    templates = load_templates(settings.prompts)
    return CheckedData(templates, *load_train_and_held_out(settings, templates, flag=held_out_flag))


def check(settings: DistillationSettings, data: CheckedData) -> CheckedInputs:
    """Checks rewards, the output directory, the launch, whether data suit the method, checkpoints, and the push.

    Raises:
        InputError: One of them is wrong; the message names it.
    """
    from rlkd_trl.trainers.checks import check_best_metric, check_prompts, check_sharding, check_targets
    from rlkd_trl.trainers.full_vocabulary_config import KDConfig

    rewards = []
    if isinstance(settings, RewardedSettings):
        rewards = checked_rewards(settings.reward, settings.args.reward_weights, settings.args)
    check_free(settings.args.output_dir, settings.run, settings.args)
    check_sharding(settings.args)
    check_prompts(data.train, settings.args)
    check_best_metric(settings.args, data.test, has_teacher=True)
    if isinstance(settings.args, KDConfig):
        check_targets(data.train, settings.args)
    if settings.absent.teacher_cache is not None and settings.streaming.streaming:
        raise InputError("--teacher_cache is of rows that are known beforehand: leave out --streaming.")
    check_absent_teacher(settings, data.templates)
    check_panel(settings.panel, settings.teacher, data.templates)
    check_owners(settings, data)
    checkpoint = checkpoint_to_resume(settings.run, settings.args)
    if not is_demo(settings):
        args = settings.args
        align = args.align_tokenizers if args.can_align else None
        check_checkpoints(settings.teacher, settings.student, fp16=args.fp16, top_k=args.top_k, align=align)
    check_adapters(settings.adapters, settings.student, has_dropout=False)
    check_pushed_adapters(settings.adapters, settings.student, settings.args)
    check_push(settings.args)
    return CheckedInputs(**vars(data), rewards=rewards, checkpoint=checkpoint)


def check_owners(settings: DistillationSettings, data: CheckedData) -> None:
    """Raises `InputError` if a row names no teacher or template, or held-out references to weigh by are missing."""
    panel = settings.panel
    references = data.test["references"] if "references" in data.test.column_names else [[]]
    if panel.teacher_weighting == "validation" and not all(references):
        raise InputError(
            "--teacher_weighting validation weighs teachers by their loss on held-out references, and not every "
            "held-out row has one: name their column with --target_column, or choose another weighting."
        )
    if not is_demo(settings):
        train = data.train.head if settings.streaming.streaming else data.train
        rows = {"Training data": train, "Held-out data": data.test}
        check_routing(panel, settings.teacher, data.templates, rows)


def within_lengths(settings: DistillationSettings, inputs: CheckedInputs) -> CheckedInputs:
    """The inputs with prompts of at most `max_prompt_length` tokens, which takes the checkpoints' tokenizers.

    Raises:
        InputError: As `fit_rows`.
    """
    from rlkd_trl.data.streams import RowStream

    of_prompts = (settings.prompts, inputs.templates, settings.student, settings.teacher)
    lengths = {name: getattr(settings.args, name) for name in ("max_prompt_length", "max_completion_length")}
    if isinstance(inputs.train, RowStream):
        train = fit_stream(inputs.train, *of_prompts, **lengths)
    else:
        train = fit_rows(inputs.train, "Training data", *of_prompts, **lengths)
    test = fit_rows(inputs.test, "Held-out data", *of_prompts, **lengths)
    return replace(inputs, train=train, test=test)


def build(trainer: type["RolloutTrainer"], settings: DistillationSettings, inputs: CheckedInputs) -> "RolloutTrainer":
    """The trainer, with teacher and student loaded, and the log of completions. Raises `InputError`."""
    from rlkd_trl.trainers.sample_log import SampleLog

    args = settings.args
    panel = load_any_panel(settings, inputs.templates)
    if settings.panel.teacher_weighting == "validation":
        weigh_by_validation(panel, inputs.test)
    scorer = panel
    if isinstance(settings, RewardedSettings):
        scorer = load_reward_model(
            inputs.rewards, settings.reward, panel, gamma=args.gamma, weights=args.reward_weights
        )
    model, writer = load_student(settings.student)
    built = trainer(
        model,
        scorer,
        args,
        inputs.train,
        eval_dataset=inputs.test,
        processing_class=writer.processing_class,
        peft_config=student_adapters(settings.adapters, settings.student, model),
        chat=writer.chat,
    )
    report_adapters(settings.adapters, built.policy.model)
    built.add_callback(SampleLog(built))
    return built
