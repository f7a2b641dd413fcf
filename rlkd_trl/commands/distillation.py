"""The body of the distillation recipes: check, build, train, finish, with one object of settings through all."""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.checks import check_checkpoints, checked_rewards, is_demo, require_files
from rlkd_trl.commands.data import load_templates, load_train_and_held_out
from rlkd_trl.commands.demo import use_demo_models
from rlkd_trl.commands.loading import load_panel, load_reward_model, load_student
from rlkd_trl.commands.prompt_lengths import fit_rows
from rlkd_trl.commands.results import evaluate, evaluate_teacher_of, finish_run, save_student
from rlkd_trl.commands.run_directory import (
    check_free,
    checkpoint_to_resume,
    clear_results,
    is_finished,
    leaves_no_empty_directory,
)
from rlkd_trl.commands.run_record import check_own_checkpoint, command_record
from rlkd_trl.commands.settings import CommandLine, DistillationSettings, RewardedSettings
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from datasets import Dataset

    from rlkd_trl.rewards import TeacherReward
    from rlkd_trl.trainers.rollout_trainer import RolloutTrainer


@dataclass(frozen=True)
class CheckedData:
    """Templates, and rows that they can be rendered for."""

    templates: PromptTemplates | None
    train: "Dataset"
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
        recipe: Its name, which a preset can have a section for.
        config: The class of the trainer's settings, as "package.module:Class": it is imported when it is needed.
        trainer: The trainer, likewise.
        title: The method as the results call it.
        description: The recipe's docstring, for `--help`.
        demo_preset: YAML file of defaults where no teacher is named.
        kind: Class of the settings: with flags for rewards, or without.

    Raises:
        InputError: Something in the input is wrong.
        TrainingError: Numbers that are not finite stopped the run, or stand in its results; what there is is saved.
    """
    # 1 parse, and find out what is wrong with the input before any model is loaded or made.
    command = CommandLine(kind, description=description, recipe=recipe, config=config, demo_preset=demo_preset)
    sketch = command.sketch()
    data = check_data(sketch)

    from rlkd_trl.trainers.processes import connect_processes

    connect_processes(sketch.args)
    settings = command.settings()
    inputs = check(settings, data)

    # 2 make the demo's models, where none are named.
    if is_demo(settings):
        use_demo_models(settings, settings.args.output_dir, seed=settings.args.seed)

    inputs = within_lengths(settings, inputs)
    record = command_record(settings)
    check_own_checkpoint(inputs.checkpoint, trainer.partition(":")[2], settings.args, record, inputs.train)
    if is_finished(inputs.checkpoint, settings.args):
        return

    from rlkd_trl.evaluation.evaluate import check_finite

    # 3 build, and measure the teacher and the student, which asks the reward for the first time.
    with leaves_no_empty_directory(settings.args.output_dir):
        trainer = build(pkgutil.resolve_name(trainer), settings, inputs)
        trainer.run_record["command"] = record
        results = {"teacher": evaluate_teacher_of(trainer), "before": evaluate(trainer, "before training")}
        check_finite(results, "Nothing was trained.")

    # 4 train, and measure the student again, which is saved as soon as it is there.
    clear_results(settings.args.output_dir, goes_on=inputs.checkpoint is not None)
    trainer.train(resume_from_checkpoint=inputs.checkpoint)
    save_student(trainer, results)
    results["after"] = evaluate(trainer, "after training")

    # 5 report.
    finish_run(trainer, results, settings, method=title if isinstance(title, str) else title(settings))


def check_data(settings: DistillationSettings) -> CheckedData:
    """What is named, files, templates and rows; of the trainer's settings a sketch is enough.

    Raises:
        InputError: One of them is wrong; the message names it.
    """
    is_demo(settings)
    require_files(settings)
    templates = load_templates(settings.prompts)
    return CheckedData(templates, *load_train_and_held_out(settings, templates))


def check(settings: DistillationSettings, data: CheckedData) -> CheckedInputs:
    """How the run was launched, rewards, whether the data suits the method, checkpoints, in this order.

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
    checkpoint = checkpoint_to_resume(settings.run, settings.args)
    if not is_demo(settings):
        check_checkpoints(settings.teacher, settings.student, fp16=settings.args.fp16)
    return CheckedInputs(**vars(data), rewards=rewards, checkpoint=checkpoint)


def within_lengths(settings: DistillationSettings, inputs: CheckedInputs) -> CheckedInputs:
    """The inputs with prompts that fit `max_prompt_length`, for which the checkpoints' tokenizers are needed.

    Raises:
        InputError: As `fit_rows`.
    """
    of_prompts = (settings.prompts, inputs.templates, settings.student, settings.teacher)
    lengths = {name: getattr(settings.args, name) for name in ("max_prompt_length", "max_completion_length")}
    train = fit_rows(inputs.train, "Training data", *of_prompts, **lengths)
    test = fit_rows(inputs.test, "Held-out data", *of_prompts, **lengths)
    return replace(inputs, train=train, test=test)


def build(trainer: type["RolloutTrainer"], settings: DistillationSettings, inputs: CheckedInputs) -> "RolloutTrainer":
    """The trainer, with teacher and student loaded. Raises `InputError`."""
    if isinstance(settings, RewardedSettings):
        args = settings.args
        scorer = load_reward_model(
            inputs.rewards,
            settings.reward,
            settings.teacher,
            inputs.templates,
            gamma=args.gamma,
            weights=args.reward_weights,
        )
    else:
        scorer = load_panel(settings.teacher, inputs.templates)
    model, tokenizer = load_student(settings.student)
    return trainer(model, scorer, settings.args, inputs.train, eval_dataset=inputs.test, processing_class=tokenizer)
