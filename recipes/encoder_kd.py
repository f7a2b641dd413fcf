r"""Distillation of encoders like BERT, layer by layer: KD, PKD, DistilBERT, MiniLM, MiniLMv2, TinyBERT, and mixtures.

    accelerate launch recipes/encoder_kd.py                                  # the embedded demo, no network
    # general: unlabelled text; a student with half of the teacher's layers that any task can be taught afterwards
    python recipes/encoder_kd.py --config minilmv2 --teacher bert-base-uncased --num_layers 6 \
        --dataset texts.csv --source_column text --output_dir runs/general
    # task: a classifier, from a teacher that was fine-tuned on the task
    python recipes/encoder_kd.py --config pkd --teacher runs/teacher --task_dataset train.csv \
        --task_source_column text --label_column label --output_dir runs/student
    # that teacher: an encoder on labels alone
    python recipes/encoder_kd.py --losses hard_ce --student bert-base-uncased --task_dataset train.csv \
        --task_source_column text --label_column label --output_dir runs/teacher

One stage or several, one after the other (`--stages`), each with its sum of losses (`--losses`), its layer map and its
temperature. The methods of the literature are settings of these: recipes/configs/methods/encoder_kd/ has one file for
each, with its paper and where it differs. The student of a stage before the last stands in OUTPUT_DIR/stage1-general
and the like; `--resume` goes on in the stage that was not finished.

Without `--student` a new one is made of the teacher, with some of its layers (`--init`) or with random weights.
"""

from pathlib import Path

from rlkd_trl.commands.encoder_data import Rows, is_demo
from rlkd_trl.commands.encoder_demo import use_demo_teachers
from rlkd_trl.commands.encoder_results import (
    evaluate,
    evaluate_untrained,
    finish_stage,
    save_student,
    warn_if_one_class,
)
from rlkd_trl.commands.encoder_stages import build, check_data, check_directories, clear_unfinished, plan_stages
from rlkd_trl.commands.hub import push
from rlkd_trl.commands.run_directory import held_alone, leaves_no_empty_directory
from rlkd_trl.commands.settings import CommandLine, EncoderSettings
from rlkd_trl.errors import run

CONFIG = "rlkd_trl.trainers.encoder_config:EncoderKDConfig"
DEMO_PRESET = Path(__file__).parent / "configs" / "demo_encoder.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded or made.
    command = CommandLine(
        EncoderSettings, description=__doc__, recipe="encoder_kd", config=CONFIG, demo_preset=DEMO_PRESET
    )
    sketch = command.sketch()
    rows = check_data(sketch)

    from rlkd_trl.trainers.processes import connect_processes

    connect_processes(sketch.args)
    with held_alone(sketch.args.output_dir):
        distil(command.settings(), rows)


def distil(settings: EncoderSettings, rows: dict[str, Rows]) -> None:
    # Check what is left to be checked before weights are read.
    check_directories(settings)
    if is_demo(settings):
        use_demo_teachers(settings, settings.args.output_dir, seed=settings.args.seed)
    stages = plan_stages(settings, rows)

    for number, stage in enumerate(stages):
        if stage.is_done:
            continue
        # Build, and measure teacher and student.
        with leaves_no_empty_directory(stage.directory):
            trainer = build(settings, stage)
            results = evaluate_untrained(trainer, stage)

        # Train, save, and measure the student again.
        clear_unfinished(stages[number:])
        trainer.train(resume_from_checkpoint=stage.checkpoint)
        save_student(trainer, results, merge=settings.adapters.merge_adapters)
        results["after"] = evaluate(trainer, "after training")
        warn_if_one_class(trainer)

        # Report.
        finish_stage(trainer, results, settings, stage)
    if stages[-1].is_done:  # before this command, which sends what was not sent then
        push(settings.args)


if __name__ == "__main__":
    run(main)
