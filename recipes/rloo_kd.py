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

from rlkd_trl import cli, recipe_results, recipe_steps
from rlkd_trl.trainers.config import RLOOKDConfig

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_rloo.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    parser = cli.RecipeParser(
        cli.DataArguments,
        cli.HeldOutArguments,
        cli.PromptArguments,
        cli.TeacherArguments,
        cli.StudentArguments,
        cli.RewardArguments,
        cli.RunArguments,
        RLOOKDConfig,
        description=__doc__,
    )
    data, held_out, prompts, teacher, student, reward, run, args = parser.parse(demo_preset=DEMO_PRESET)
    recipe_steps.check_rewards(reward, args.reward_weights, args)
    templates = recipe_steps.load_templates(prompts)
    train, test = recipe_steps.load_train_and_held_out(data, held_out, prompts, templates, args)
    checkpoint = recipe_steps.last_checkpoint(run, args.output_dir)
    recipe_steps.name_or_make_models(teacher, student, data, templates, args)
    recipe_steps.check_checkpoints(teacher, student)

    # Build.
    from rlkd_trl import RLOOKDTrainer

    reward_model = recipe_steps.load_reward_model(
        reward, teacher, templates, gamma=args.gamma, weights=args.reward_weights
    )
    model, tokenizer = recipe_steps.load_student(student)
    trainer = RLOOKDTrainer(model, reward_model, args, train, eval_dataset=test, processing_class=tokenizer)

    # Train, with the teacher and the student measured before and after.
    results = {"teacher": recipe_results.evaluate_teacher_of(trainer), "before": recipe_results.evaluate(trainer)}
    trainer.train(resume_from_checkpoint=checkpoint)
    results["after"] = recipe_results.evaluate(trainer)

    # Save.
    settings = recipe_results.describe_settings(data, held_out, prompts, teacher, student, reward, args)
    recipe_results.finish_run(
        trainer,
        results,
        method=f"RLOO, {args.level} level",
        teacher=teacher,
        student=student,
        data=data,
        settings=settings,
    )


if __name__ == "__main__":
    cli.run(main)
