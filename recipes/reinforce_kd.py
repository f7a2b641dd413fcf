r"""REINFORCE distillation as in LLMR and KETCHUP: a teacher scores every token that a lagging student samples.

    accelerate launch recipes/reinforce_kd.py                              # the embedded demo, no network
    accelerate launch recipes/reinforce_kd.py --config recipes/configs/llmr_t0_3b_t5_base.yaml
    accelerate launch recipes/reinforce_kd.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --target_column ref --templates templates.yaml --output_dir runs/reinforce

Plain policy gradient on the reward that a teacher-forced language model implies (Hao, Liu & Mou 2022; Li, Hao & Mou
2024, "LLMR"), with their lagging behaviour policy (`--behaviour_sync_steps`), top-k sampling, divided and clipped
returns; on K-step returns with `--k` (Fan, Luo, Bowling & Mou 2026, "KETCHUP"). Where this differs from the papers,
the presets naming their values: by default the student itself samples, from all tokens, with the mean as baseline and
the teacher's V_t as potential, and completions that hit the length cap are bootstrapped; with `--top_k` the importance
ratio is over the sampled-from tokens for both policies; the entropy bonus is the entropy.
"""

from pathlib import Path

from rlkd_trl.commands.results import evaluate, evaluate_teacher_of, finish_run
from rlkd_trl.commands.steps import check_inputs, load_reward_model, load_student, parse_distillation
from rlkd_trl.errors import run
from rlkd_trl.trainers.config import ReinforceKDConfig

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_reinforce.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_distillation(ReinforceKDConfig, description=__doc__, demo_preset=DEMO_PRESET)
    inputs = check_inputs(settings)

    # Build.
    from rlkd_trl import ReinforceKDTrainer

    args, reward = settings.args, settings.reward
    reward_model = load_reward_model(
        reward, settings.teacher, inputs.templates, gamma=args.gamma, weights=args.reward_weights
    )
    model, tokenizer = load_student(settings.student)
    trainer = ReinforceKDTrainer(
        model, reward_model, args, inputs.train, eval_dataset=inputs.test, processing_class=tokenizer
    )

    # Train, with the teacher and the student measured before and after.
    results = {"teacher": evaluate_teacher_of(trainer), "before": evaluate(trainer)}
    trainer.train(resume_from_checkpoint=inputs.checkpoint)
    results["after"] = evaluate(trainer)

    # Save.
    method = "REINFORCE" if reward.k == 1 else f"REINFORCE on {reward.k}-step returns"
    finish_run(trainer, results, settings, method=method)


if __name__ == "__main__":
    run(main)
