r"""PPO distillation: a teacher scores every token that a student samples, PPO with a value head updates the student.

    accelerate launch recipes/ppo_kd.py                                   # the embedded demo, no network
    accelerate launch recipes/ppo_kd.py --config recipes/configs/t0_3b_t5_base_dailydialog.yaml
    accelerate launch recipes/ppo_kd.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --target_column ref --templates templates.yaml --output_dir runs/ppo

The reward is the one that a teacher-forced language model implies (Hao, Liu & Mou 2022; Li, Hao & Mou 2024, "LLMR").
Where this differs from those papers: PPO with GAE and a critic instead of REINFORCE with a lagging behaviour policy;
rewards per token with the teacher's V as baseline, not only their sum; completions that hit the length cap are
bootstrapped instead of dropped; sampling from the whole distribution instead of its top k.
"""

from pathlib import Path

from rlkd_trl.commands.results import evaluate, evaluate_teacher_of, finish_run
from rlkd_trl.commands.steps import check_inputs, load_reward_model, load_student, parse_distillation
from rlkd_trl.errors import run
from rlkd_trl.trainers.config import PPOKDConfig

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_ppo.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_distillation(PPOKDConfig, description=__doc__, demo_preset=DEMO_PRESET)
    inputs = check_inputs(settings)

    # Build.
    from rlkd_trl import PPOKDTrainer

    args, reward = settings.args, settings.reward
    reward_model = load_reward_model(
        reward, settings.teacher, inputs.templates, gamma=args.gamma, weights=args.reward_weights
    )
    model, tokenizer = load_student(settings.student)
    trainer = PPOKDTrainer(
        model, reward_model, args, inputs.train, eval_dataset=inputs.test, processing_class=tokenizer
    )

    # Train, with the teacher and the student measured before and after.
    results = {"teacher": evaluate_teacher_of(trainer), "before": evaluate(trainer)}
    trainer.train(resume_from_checkpoint=inputs.checkpoint)
    results["after"] = evaluate(trainer)

    # Save.
    method = "PPO"
    finish_run(trainer, results, settings, method=method)


if __name__ == "__main__":
    run(main)
