r"""All-actions distillation: the policy gradient exact over the next token, sampled over what follows it.

    accelerate launch recipes/all_actions_kd.py                            # the embedded demo, no network
    accelerate launch recipes/all_actions_kd.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --target_column ref --templates templates.yaml --output_dir runs/all_actions

The teacher scores every token of the vocabulary anyway, so the immediate term of the policy gradient needs no sampled
action; the future does, with the weight `--future_weight`, a discount `--gamma`, or `--length_normalization`. MiniLLM
(Gu et al. 2024) is recipes/configs/methods/all_actions_kd/minillm.yaml. The derivation stands in
rlkd_trl/ops/all_actions.py.
"""

from pathlib import Path

from rlkd_trl.commands.results import evaluate, evaluate_teacher_of, finish_run
from rlkd_trl.commands.steps import check_inputs, load_panel, load_student, parse_distillation
from rlkd_trl.errors import run
from rlkd_trl.trainers.full_vocabulary_config import AllActionsKDConfig

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_all_actions.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_distillation(AllActionsKDConfig, description=__doc__, demo_preset=DEMO_PRESET, with_reward=False)
    inputs = check_inputs(settings)

    # Build.
    from rlkd_trl import AllActionsKDTrainer

    panel = load_panel(settings.teacher, inputs.templates)
    model, tokenizer = load_student(settings.student)
    trainer = AllActionsKDTrainer(
        model, panel, settings.args, inputs.train, eval_dataset=inputs.test, processing_class=tokenizer
    )

    # Train, with the teacher and the student measured before and after.
    results = {"teacher": evaluate_teacher_of(trainer), "before": evaluate(trainer)}
    trainer.train(resume_from_checkpoint=inputs.checkpoint)
    results["after"] = evaluate(trainer)

    # Save.
    finish_run(trainer, results, settings, method="all-actions policy gradient")


if __name__ == "__main__":
    run(main)
