r"""Evaluation: a student's outputs against references and in the eyes of its teacher, beside the teacher's own.

    python recipes/evaluate.py --student runs/ppo --teacher runs/teacher --dataset test.csv --source_column mr \
        --target_column ref --templates templates.yaml --output_dir runs/ppo/test

BLEU, ROUGE, distinct-n, length, (with `--ibleu`) iBLEU for paraphrase; the teacher's NLL of the student's outputs and
the student's NLL of the teacher's (likelihood and coverage risk; Wen et al. 2023, "f-Divergence Minimization for
Sequence-Level Knowledge Distillation"); the mean reward. Greedy outputs, or sampled with `--sample`.
"""

from rlkd_trl import arguments, cli, recipe_data, recipe_results, recipe_steps


def main() -> None:
    parser = cli.RecipeParser(
        arguments.DataArguments,
        arguments.PromptArguments,
        arguments.TeacherArguments,
        arguments.StudentArguments,
        arguments.RewardArguments,
        arguments.EvaluationArguments,
        description=__doc__,
    )
    data, prompts, teacher, student, reward, evaluation = parser.parse()
    recipe_steps.require(**{"--dataset": data.dataset, "--student": student.student})
    recipe_steps.check_rewards(reward, evaluation.reward_weights)
    templates = recipe_data.load_templates(prompts)
    rows = recipe_data.load_prompts(data, prompts, templates)
    recipe_steps.check_checkpoints(teacher, student)

    results, outputs = recipe_results.evaluate_checkpoints(list(rows), teacher, student, reward, evaluation, templates)
    recipe_results.report_evaluation(results, outputs, list(rows), evaluation.output_dir)


if __name__ == "__main__":
    cli.run(main)
