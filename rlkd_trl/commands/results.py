"""The end of recipes: evaluations, the table of results, and a finished output directory."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.absent_teachers import load_served_panel
from rlkd_trl.commands.hub import push
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.loading import load_panel, load_reward_model, load_student
from rlkd_trl.commands.model_card import card_sections, place_on_hub
from rlkd_trl.commands.run_directory import mark_finished
from rlkd_trl.commands.settings import DistillationSettings, EvaluationSettings, described
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from rlkd_trl.evaluation.completions import Evaluation
    from rlkd_trl.rewards import TeacherReward
    from rlkd_trl.trainers.rollout_trainer import RolloutTrainer


# Of the held-out inputs, so many are shown in a terminal with the answers to them.
ANSWERS_SHOWN = 3


def evaluate_teacher_of(trainer: "RolloutTrainer") -> dict[str, float]:
    """The metrics of the first teacher's greedy outputs on the held-out rows; none without a teacher that answers.

    The outputs are left in `trainer.teacher_answers`: a teacher whose weights are in files takes minutes for them.
    """
    from rlkd_trl.evaluation.evaluate import evaluate_teacher

    if not any(scorer.teacher.can_answer for panel in trainer.reward_model.panels for scorer in panel.scorers):
        return {}
    say(f"Evaluating the teacher: its greedy outputs on {len(trainer.eval_dataset)} held-out inputs.")
    found = evaluate_teacher(
        list(trainer.eval_dataset),
        trainer.reward_model,
        max_completion_length=trainer.args.max_completion_length,
        batch_size=trainer.args.per_device_eval_batch_size,
        progress=None if trainer.args.disable_tqdm else "Evaluating the teacher",
    )
    trainer.teacher_answers = found.completions
    return found.metrics


def evaluate(trainer: "RolloutTrainer", when: str) -> dict[str, float]:
    """Metrics of the student's greedy outputs on the held-out rows. when: "before training" or "after training"."""
    say(f"Evaluating the student {when}: its greedy outputs on {len(trainer.eval_dataset)} held-out inputs.")
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def warn_if_spoilt(trainer: "RolloutTrainer", results: dict[str, dict[str, float]]) -> None:
    """Says so if the student's held-out outputs are worse than before training while a distillation loss fell.

    A policy gradient's loss says nothing of that kind; its trainers watch their rollouts (`guards`).
    """
    from rlkd_trl.trainers.guards import spoilt
    from rlkd_trl.trainers.kd import KDTrainer

    args = trainer.args
    if not isinstance(trainer, KDTrainer) or not args.guards:
        return
    remedies = ["fewer steps", "a lower --learning_rate"]
    remedies += ["another --divergence"] if args.alpha > 0 else []
    remedies += ["texts of the data or the teacher (--lmbda 0)"] if args.lmbda > 0 else []
    remedies += ["hard labels (--alpha below 1)"] if args.alpha == 1 and args.lmbda == 0 else []
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for warning in spoilt(losses, results["before"], results["after"], remedies):
        say(f"Warning: {warning}.")


def save_student(trainer: "RolloutTrainer", results: dict[str, dict[str, float]], *, merge: bool) -> None:
    """Writes the trained student, `cost.json`, and `metrics.json` with what has been measured so far.

    So nothing is lost if an evaluation or the report fails after training. A signal to stop waits until it is saved.
    merge: whether its adapters are merged into it first.
    """
    from rlkd_trl.evaluation.report import write_metrics
    from rlkd_trl.trainers.interruption import StopRequest
    from rlkd_trl.trainers.trainer_internals import save_without_push

    output_dir = Path(trainer.args.output_dir)
    with StopRequest().listening():
        if merge:
            trainer.merge_adapters()
        if trainer.is_world_process_zero():
            write_metrics(output_dir / "metrics.json", results)
        save_without_push(trainer, output_dir)  # `finish_run` pushes, when all files are there
        trainer.save_cost(output_dir / "cost.json")


def finish_run(
    trainer: "RolloutTrainer",
    results: dict[str, dict[str, float]],
    settings: DistillationSettings,
    templates: PromptTemplates | None,
    *,
    method: str,
) -> None:
    """Writes `metrics.json`, `report.html` and the model card of a saved student, and prints the final table.

    A signal to stop waits until all of it is there; it then ends a push.

    Raises:
        TrainingError: An evaluation met numbers that are not finite. Everything is written then, but not pushed.
        PushError: The push failed.
    """
    from rlkd_trl.trainers.interruption import StopRequest
    from rlkd_trl.trainers.trainer_internals import finish_pushes

    with StopRequest().listening(is_last=not trainer.args.push_to_hub):
        _report(trainer, results, settings, templates, method=method)
    finish_pushes(trainer)
    push(trainer.args)  # last, so that a failing push loses nothing


def _report(
    trainer: "RolloutTrainer",
    results: dict[str, dict[str, float]],
    settings: DistillationSettings,
    templates: PromptTemplates | None,
    *,
    method: str,
) -> None:
    from rlkd_trl.evaluation.not_finite import check_finite
    from rlkd_trl.trainers.processes import wait_for_all

    output_dir = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        _write(trainer, results, settings, templates, method=method)
    wait_for_all()  # else the others' error could end the first process before it has written
    check_finite(results, f"The student, metrics.json and report.html are in {output_dir}.")
    mark_finished(output_dir, trainer.state.global_step)
    say(f"Student, metrics.json and report.html are in {output_dir}.")


def _write(
    trainer: "RolloutTrainer",
    results: dict[str, dict[str, float]],
    settings: DistillationSettings,
    templates: PromptTemplates | None,
    *,
    method: str,
) -> None:
    from peft import PeftModel

    from rlkd_trl.evaluation.report import (
        all_columns,
        comparison_table,
        write_metrics,
        write_model_card,
        write_report,
    )
    from rlkd_trl.evaluation.run_log import COMPLETIONS_FILE, RunLog, read_completions
    from rlkd_trl.models.vocabulary import allowed_special_tokens

    output_dir = Path(trainer.args.output_dir)
    write_metrics(output_dir / "metrics.json", results)
    print(f"\nHeld-out inputs, greedy outputs ({method}):\n\n{comparison_table(results)}\n", flush=True)
    completions = read_completions(output_dir / COMPLETIONS_FILE)
    _show_last_answers(completions)
    log = RunLog(
        f"{method}: {output_dir.name}",
        results,
        trainer.state.log_history,
        samples=trainer.sample_table,
        config=described(settings),
        headline=list(all_columns(results)),
        completions=completions,
    )
    log.save(output_dir)
    write_report(output_dir / "report.html", {output_dir.name: log})
    config = trainer.model.config
    write_model_card(
        output_dir / "README.md",
        title=output_dir.name,
        results=results,
        method=method,
        teacher=", ".join(settings.teacher.teacher or _descriptions(trainer)),
        student=settings.student.student,
        dataset=settings.data.dataset or "the embedded demo of rlkd_trl",
        auto_class="AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM",
        has_adapters=isinstance(trainer.policy.model, PeftModel),
        has_content_tokens=bool(allowed_special_tokens(trainer.policy.model)),
        chat=trainer.policy.writer.chat if trainer.policy.writer.is_chat else None,
        sections=card_sections(trainer, settings, templates),
        checkpoint=place_on_hub(trainer),
    )


def _show_last_answers(completions: Sequence[Mapping]) -> None:
    """Shows the student's last answers to a few held-out inputs, if somebody is looking."""
    from rlkd_trl.evaluation.terminal import answers_view, shows_colours

    of_student = [record for record in completions if record.get("by") == "student"]
    last = [record for record in of_student if record["step"] == of_student[-1]["step"]][:ANSWERS_SHOWN]
    if not last or not sys.stdout.isatty():
        return
    colours = shows_colours(sys.stdout)
    legend = ", each token coloured by its reward from orange, the lowest, to blue" if colours else ""
    print(f"Its answers after training{legend}:\n\n{answers_view(last, colours=colours)}\n", flush=True)


def _descriptions(trainer: "RolloutTrainer") -> list[str]:
    """What the trainer's teachers, which no flag names, say of themselves."""
    scorers = [scorer for panel in trainer.reward_model.panels for scorer in panel.scorers]
    return list(dict.fromkeys(scorer.teacher.describe() for scorer in scorers))


def evaluate_checkpoints(
    settings: EvaluationSettings,
    rows: list[dict],
    templates: PromptTemplates | None,
    rewards: Sequence["type[TeacherReward] | Callable"],
) -> dict[str, dict[str, float]]:
    """Evaluates the student and, if one is named, the teacher; results are written after each evaluation.

    Returns:
        Each model's metrics by its name.

    Raises:
        InputError: A model cannot be loaded, or does not fit the others.
    """
    from rlkd_trl.data import reference_texts
    from rlkd_trl.evaluation.evaluate import evaluate_student, evaluate_teacher
    from rlkd_trl.models.loading import default_device
    from rlkd_trl.models.vocabulary import allow_special_tokens, share_special_tokens
    from rlkd_trl.students import Policy

    evaluation = settings.evaluation
    model, writer = load_student(settings.student)
    tokenizer = writer.processing_class
    model.to(default_device())
    allow_special_tokens(model, tokenizer, settings.teacher.allowed_special_tokens or [])
    lengths = {"max_completion_length": evaluation.max_completion_length, "batch_size": evaluation.batch_size}
    evaluations, reward_model, teacher_completions, teacher_tokenizer = {}, None, None, None
    share_special_tokens([(model, tokenizer)], reference_texts(rows))
    of_panel = {"max_reference_length": evaluation.max_completion_length}
    panel = None
    if settings.teacher.teacher is not None:
        panel = load_panel(settings.teacher, templates, settings.panel, **of_panel)
    elif settings.absent.teacher_server is not None:
        panel = load_served_panel(settings, templates, **of_panel)
    if panel is not None:
        reward_model = load_reward_model(
            rewards, settings.reward, panel, gamma=evaluation.gamma, weights=evaluation.reward_weights
        )
        teachers = [scorer.teacher for panel in reward_model.panels for scorer in panel.scorers]
        in_process = [(teacher.model, teacher.processing_class) for teacher in teachers if teacher.model is not None]
        share_special_tokens([(model, tokenizer), *in_process])
        if reward_model.panels and in_process:
            say(f"Evaluating the teacher: its greedy outputs on {len(rows)} inputs.")
            teacher_tokenizer = teachers[0].processing_class
            evaluations["teacher"] = evaluate_teacher(
                rows,
                reward_model,
                with_ibleu=evaluation.ibleu,
                progress="Evaluating the teacher",
                **lengths,
            )
            teacher_completions = evaluations["teacher"].completions
            _write_evaluation(evaluation.output_dir, evaluations, rows)
    kind = "sampled" if evaluation.sample else "greedy"
    say(f"Evaluating the student: its {kind} outputs on {len(rows)} inputs.")
    evaluations["student"] = evaluate_student(
        Policy(model, tokenizer, temperature=evaluation.temperature, writer=writer),
        tokenizer,
        rows,
        reward_model,
        max_prompt_length=evaluation.max_prompt_length,
        seed=evaluation.seed if evaluation.sample else None,
        teacher_completions=teacher_completions,
        teacher_tokenizer=teacher_tokenizer,
        with_ibleu=evaluation.ibleu,
        progress="Evaluating the student",
        **lengths,
    )
    _write_evaluation(evaluation.output_dir, evaluations, rows)
    return {name: evaluation.metrics for name, evaluation in evaluations.items()}


def _write_evaluation(
    output_dir: str | None, evaluations: Mapping[str, "Evaluation"], rows: Sequence[Mapping]
) -> None:
    """Writes `metrics.json` and `outputs.jsonl` of the models evaluated so far, if there is a directory."""
    from rlkd_trl.evaluation.report import write_metrics

    if output_dir is None:
        return
    write_metrics(
        Path(output_dir) / "metrics.json", {name: evaluation.metrics for name, evaluation in evaluations.items()}
    )
    with (Path(output_dir) / "outputs.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            outputs = {name: evaluation.outputs[i] for name, evaluation in evaluations.items()}
            line = {"prompt": row["prompt"], **outputs}
            file.write(json.dumps({**line, "references": row["references"]}, ensure_ascii=False) + "\n")


def report_evaluation(results: dict[str, dict[str, float]], output_dir: str | None) -> None:
    """Prints the table of results. Raises `TrainingError` if an evaluation met numbers that are not finite."""
    from rlkd_trl.evaluation.not_finite import check_finite
    from rlkd_trl.evaluation.report import all_columns, comparison_table

    print(comparison_table(results, all_columns(results)))
    if output_dir is not None:
        print(f"metrics.json and outputs.jsonl are in {output_dir}.", flush=True)
    check_finite(results)
