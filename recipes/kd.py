r"""Distillation without reinforcement learning: word level, sequence level, GKD, f-distill, DistiLLM, Hinton.

    accelerate launch recipes/kd.py                                        # the embedded demo, no network
    accelerate launch recipes/kd.py --config recipes/configs/gkd_glm_9b_glm_1_5b.yaml
    accelerate launch recipes/kd.py --teacher runs/teacher --student runs/warm --dataset runs/pseudo.jsonl \
        --source_column mr --target_column pseudo_label --templates templates.yaml --output_dir runs/kd

A divergence (`--divergence`) between the teacher's and the student's next-token distributions, over the whole
vocabulary, at every token of sequences that are the data's targets, fresh samples of the teacher (`--sequences`) or,
with probability `--lmbda`, samples of the student; mixed with the cross-entropy of the targets by `--alpha`. The
methods of the literature are settings of these: see recipes/configs/methods/kd/, one file per method with its paper.
Where this differs from the papers stands on `KDTrainer`.
"""

from pathlib import Path

from rlkd_trl.commands.results import evaluate, evaluate_teacher_of, finish_run
from rlkd_trl.commands.steps import check_inputs, load_panel, load_student, parse_distillation
from rlkd_trl.errors import run
from rlkd_trl.trainers.checks import check_targets
from rlkd_trl.trainers.full_vocabulary_config import KDConfig

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_kd.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_distillation(KDConfig, description=__doc__, demo_preset=DEMO_PRESET, with_reward=False)
    inputs = check_inputs(settings)
    check_targets(inputs.train, settings.args)

    # Build.
    from rlkd_trl import KDTrainer

    panel = load_panel(settings.teacher, inputs.templates)
    model, tokenizer = load_student(settings.student)
    trainer = KDTrainer(
        model, panel, settings.args, inputs.train, eval_dataset=inputs.test, processing_class=tokenizer
    )

    # Train, with the teacher and the student measured before and after.
    results = {"teacher": evaluate_teacher_of(trainer), "before": evaluate(trainer)}
    trainer.train(resume_from_checkpoint=inputs.checkpoint)
    results["after"] = evaluate(trainer)

    # Save.
    finish_run(trainer, results, settings, method="distillation on divergences")


if __name__ == "__main__":
    run(main)
