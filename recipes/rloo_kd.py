r"""RLOO distillation: a teacher scores every token that a student samples; the completions of a prompt are compared.

    accelerate launch recipes/rloo_kd.py                                   # the embedded demo, no network
    accelerate launch recipes/rloo_kd.py --config recipes/configs/t0_3b_t5_base_dailydialog.yaml
    accelerate launch recipes/rloo_kd.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --target_column ref --templates templates.yaml --output_dir runs/rloo

REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024) on the reward that a teacher-forced language model
implies (Hao, Liu & Mou 2022). `--level sequence` is the paper's method, `--level token` credits each token with its
own return. Where this differs from the RLOO paper: the reward is the teacher's and needs no reward model; the ratio
is clipped as in TRL; no KL penalty unless `--beta` is set; completions that hit the length cap are bootstrapped.
"""

from pathlib import Path

from rlkd_trl.commands.results import evaluate, evaluate_teacher_of, finish_run
from rlkd_trl.commands.steps import check_inputs, load_reward_model, load_student, parse_distillation
from rlkd_trl.errors import run
from rlkd_trl.trainers.config import RLOOKDConfig

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_rloo.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_distillation(RLOOKDConfig, description=__doc__, demo_preset=DEMO_PRESET)
    inputs = check_inputs(settings)

    # Build.
    from rlkd_trl import RLOOKDTrainer

    args, reward = settings.args, settings.reward
    reward_model = load_reward_model(
        reward, settings.teacher, inputs.templates, gamma=args.gamma, weights=args.reward_weights
    )
    model, tokenizer = load_student(settings.student)
    trainer = RLOOKDTrainer(
        model, reward_model, args, inputs.train, eval_dataset=inputs.test, processing_class=tokenizer
    )

    # Train, with the teacher and the student measured before and after.
    results = {"teacher": evaluate_teacher_of(trainer), "before": evaluate(trainer)}
    trainer.train(resume_from_checkpoint=inputs.checkpoint)
    results["after"] = evaluate(trainer)

    # Save.
    method = f"RLOO, {args.level} level"
    finish_run(trainer, results, settings, method=method)


if __name__ == "__main__":
    run(main)
