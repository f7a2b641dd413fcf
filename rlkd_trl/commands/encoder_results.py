"""How the stages of encoder distillation end: measured, saved, reported."""

from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.encoder_models import Stage
from rlkd_trl.commands.encoder_stages import mark_stage
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.run_directory import mark_finished
from rlkd_trl.commands.settings import EncoderSettings, described

if TYPE_CHECKING:
    from rlkd_trl.trainers.encoder import EncoderKDTrainer

Results = dict[str, dict[str, float]]


def evaluate(trainer: "EncoderKDTrainer", when: str) -> dict[str, float]:
    """The student on the held-out rows; `when` is "before training" or "after training"."""
    say(f"Evaluating the student {when}, on {len(trainer.eval_dataset)} held-out texts.")
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def save_student(trainer: "EncoderKDTrainer", results: Results) -> None:
    """Writes the trained student, `cost.json`, and in `metrics.json` what is measured so far.

    Whatever fails after training then, an evaluation or the report, has nothing to lose. A signal to stop waits.
    """
    from rlkd_trl.evaluation.report import write_metrics
    from rlkd_trl.trainers.interruption import StopRequest
    from rlkd_trl.trainers.trainer_internals import save_without_push

    output_dir = Path(trainer.args.output_dir)
    with StopRequest().listening():
        if trainer.is_world_process_zero():
            write_metrics(output_dir / "metrics.json", results)
        save_without_push(trainer, output_dir)  # the push to the Hub, if any, comes when all files are there
        trainer.save_cost(output_dir / "cost.json")


def finish_stage(trainer: "EncoderKDTrainer", results: Results, settings: EncoderSettings, stage: Stage) -> None:
    """Of a saved student: writes `metrics.json`, prints the table, writes `report.html` and the model card.

    A signal to stop waits until all of it is there; it then ends a push, or the stages that are left.
    """
    from rlkd_trl.trainers.interruption import StopRequest

    pushes = stage.is_last and trainer.args.push_to_hub
    with StopRequest().listening(is_last=stage.is_last and not pushes):
        _report(trainer, results, settings, stage)
    if pushes and trainer.is_world_process_zero():  # last: all that it may fail on is over
        trainer.push_to_hub()


def _report(trainer: "EncoderKDTrainer", results: Results, settings: EncoderSettings, stage: Stage) -> None:
    from rlkd_trl.evaluation.report import (
        ENCODER_COLUMNS,
        columns_in,
        comparison_table,
        write_metrics,
        write_model_card,
        write_report,
    )

    if not trainer.is_world_process_zero():
        return
    directory, objective = stage.directory, stage.objective
    method = f"{objective.stage} distillation: {' + '.join(objective.weights)}"
    columns = columns_in(results, ENCODER_COLUMNS)
    write_metrics(directory / "metrics.json", results)
    print(f"\nHeld-out texts ({method}):\n\n{comparison_table(results, columns)}\n", flush=True)
    write_report(
        directory / "report.html",
        title=f"{method}: {directory.name}",
        results=results,
        history=trainer.state.log_history,
        samples=trainer.sample_table,
        config=described(settings),
        columns=columns,
        samples_heading="Sample texts",
    )
    write_model_card(
        directory / "README.md",
        title=directory.name,
        results=results,
        method=method,
        teacher=stage.teacher or "none, but labels",
        student=settings.student.student or "a smaller model of the teacher's architecture",
        dataset=_dataset(settings, objective.stage),
        auto_class=_AUTO_CLASSES[objective.head],
        columns=columns,
    )
    step = trainer.state.global_step
    if stage.is_last:
        mark_finished(directory, step)
        print(f"Student, metrics.json and report.html are in {directory}.", flush=True)
    else:
        mark_stage(settings, stage, step)


def _dataset(settings: EncoderSettings, stage: str) -> str:
    named = settings.task.task_dataset if stage == "task" else settings.data.dataset
    return named or "the embedded demo of rlkd_trl"


_AUTO_CLASSES = {
    "none": "AutoModel",
    "tokens": "AutoModelForMaskedLM",
    "tokens and next sentence": "AutoModelForPreTraining",
    "classes": "AutoModelForSequenceClassification",
}
