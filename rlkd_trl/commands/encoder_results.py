"""Measures, saves and reports the student of a stage of encoder distillation."""

from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.encoder_models import Stage
from rlkd_trl.commands.encoder_stages import mark_stage
from rlkd_trl.commands.hub import push
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.model_card import card_sections, place_on_hub
from rlkd_trl.commands.run_directory import mark_finished
from rlkd_trl.commands.settings import EncoderSettings, described

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rlkd_trl.trainers.encoder import EncoderKDTrainer

Results = dict[str, dict[str, float]]


def evaluate_untrained(trainer: "EncoderKDTrainer", stage: Stage) -> Results:
    """The metrics of the teacher, and of the student before training, on the held-out rows.

    Raises:
        TrainingError: There are numbers that are not finite. The students of earlier stages are kept.
    """
    from rlkd_trl.evaluation.not_finite import check_finite

    results = {"teacher": trainer.evaluate_teacher(), "before": evaluate(trainer, "before training")}
    check_finite(results, f"The {stage.objective.stage} stage was not begun.")
    return results


def evaluate(trainer: "EncoderKDTrainer", when: str) -> dict[str, float]:
    """The student's metrics on the held-out rows. when: "before training" or "after training"."""
    say(f"Evaluating the student {when}, on {len(trainer.eval_dataset)} held-out texts.")
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def warn_if_one_class(trainer: "EncoderKDTrainer") -> None:
    """Says so if the trained student gives every held-out text the same class, where several are right."""
    if trainer.only_class is not None:
        say(
            f"Warning: the student gives each of the {len(trainer.eval_dataset)} held-out texts the class "
            f"{trainer.only_class!r}, where several are right: it has not learnt to tell them apart. Train it "
            "for more steps, or with another --learning_rate."
        )


def save_student(trainer: "EncoderKDTrainer", results: Results, *, merge: bool) -> None:
    """Writes the trained student, `cost.json`, and the metrics so far to `metrics.json`.

    If an evaluation or the report fails later, nothing is lost. A signal to stop waits until all is written. merge:
    whether the student's adapters are merged into it first.
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
        save_without_push(trainer, output_dir)  # the push to the Hub, if any, comes when all files are there
        trainer.save_cost(output_dir / "cost.json")


def finish_stage(trainer: "EncoderKDTrainer", results: Results, settings: EncoderSettings, stage: Stage) -> None:
    """Reports on a saved student: writes `metrics.json`, `report.html` and the model card, and prints the table.

    A signal to stop waits until all is written; a push to the Hub, and stages that are left, do not begin then.

    Raises:
        TrainingError: An evaluation met numbers that are not finite. Everything is written then, but not pushed, and
            no later stage begins.
        PushError: The push failed.
    """
    from rlkd_trl.trainers.interruption import StopRequest
    from rlkd_trl.trainers.trainer_internals import finish_pushes

    pushes = stage.is_last and trainer.args.push_to_hub
    with StopRequest().listening(is_last=stage.is_last and not pushes):
        _report(trainer, results, settings, stage)
    finish_pushes(trainer)
    if stage.is_last:
        push(trainer.args)  # last, so that a failing push loses nothing


def _report(trainer: "EncoderKDTrainer", results: Results, settings: EncoderSettings, stage: Stage) -> None:
    from rlkd_trl.evaluation.not_finite import check_finite
    from rlkd_trl.trainers.processes import wait_for_all

    directory, step = stage.directory, trainer.state.global_step
    if trainer.is_world_process_zero():
        _write(trainer, results, settings, stage)
    wait_for_all()  # else the others' error could end the first process before it has written
    check_finite(results, f"The student, metrics.json and report.html are in {directory}.")
    if not stage.is_last:
        mark_stage(settings, stage, step)
        return
    mark_finished(directory, step)
    say(f"Student, metrics.json and report.html are in {directory}.")


def _write(trainer: "EncoderKDTrainer", results: Results, settings: EncoderSettings, stage: Stage) -> None:
    from peft import PeftModel

    from rlkd_trl.evaluation.report import (
        ENCODER_COLUMNS,
        columns_in,
        comparison_table,
        write_metrics,
        write_model_card,
        write_report,
    )
    from rlkd_trl.evaluation.run_log import RunLog

    directory, objective = stage.directory, stage.objective
    method = f"{objective.stage} distillation: {' + '.join(objective.weights)}"
    columns = columns_in(results, ENCODER_COLUMNS)
    write_metrics(directory / "metrics.json", results)
    print(f"\nHeld-out texts ({method}):\n\n{comparison_table(results, columns)}\n", flush=True)
    log = RunLog(
        f"{method}: {directory.name}",
        results,
        trainer.state.log_history,
        samples=trainer.sample_table,
        samples_heading="Sample texts",
        config=described(settings),
        headline=list(columns),
    )
    log.save(directory)
    write_report(directory / "report.html", {directory.name: log})
    write_model_card(
        directory / "README.md",
        title=directory.name,
        results=results,
        method=method,
        teacher=", ".join([stage.teacher, *stage.more_teachers]) if stage.teacher else "none, but labels",
        student=settings.student.student or "a smaller model of the teacher's architecture",
        dataset=_dataset(settings, objective.stage),
        auto_class=_auto_class(objective.head, trainer.student.config),
        has_adapters=isinstance(trainer.student.model, PeftModel),
        columns=columns,
        sections=card_sections(trainer, settings),
        checkpoint=place_on_hub(trainer),
    )


def _dataset(settings: EncoderSettings, stage: str) -> str:
    named = settings.task.task_dataset if stage == "task" else settings.data.dataset
    return named or "the embedded demo of rlkd_trl"


def _auto_class(head: str, config: "PreTrainedConfig") -> str:
    """The class that loads a student with this head, for its model card."""
    from rlkd_trl.models.encoders import is_encoder

    if head in ("tokens", "kept") and not is_encoder(config):
        return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    return {
        "kept": "AutoModel",
        "tokens": "AutoModelForMaskedLM",
        "tokens and next sentence": "AutoModelForPreTraining",
        "classes": "AutoModelForSequenceClassification",
    }[head]
