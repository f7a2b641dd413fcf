r"""Evaluation: a student's outputs against references and in the eyes of its teacher, beside the teacher's own.

    python recipes/evaluate.py --student runs/ppo --teacher runs/teacher --dataset test.csv --source_column mr \
        --target_column ref --templates templates.yaml --output_dir runs/ppo/test

BLEU, ROUGE, distinct-n, length, (with `--ibleu`) iBLEU for paraphrase; the teacher's NLL of the student's outputs and
the student's NLL of the teacher's (likelihood and coverage risk; Wen et al. 2023, "f-Divergence Minimization for
Sequence-Level Knowledge Distillation"); the mean reward. Greedy outputs, or sampled with `--sample`.
"""

from rlkd_trl.commands.arguments import (
    DataArguments,
    EvaluationArguments,
    PromptArguments,
    RewardArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.commands.data import load_prompts, load_templates
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.results import evaluate_checkpoints, report_evaluation
from rlkd_trl.commands.steps import check_checkpoints, check_rewards, require
from rlkd_trl.errors import run


def main() -> None:
    parser = RecipeParser(
        DataArguments,
        PromptArguments,
        TeacherArguments,
        StudentArguments,
        RewardArguments,
        EvaluationArguments,
        description=__doc__,
    )
    data, prompts, teacher, student, reward, evaluation = parser.parse()
    require(**{"--dataset": data.dataset, "--student": student.student})
    check_rewards(reward, evaluation.reward_weights)
    templates = load_templates(prompts)
    rows = load_prompts(data, prompts, templates)
    check_checkpoints(teacher, student)

    results, outputs = evaluate_checkpoints(list(rows), teacher, student, reward, evaluation, templates)
    report_evaluation(results, outputs, list(rows), evaluation.output_dir)


if __name__ == "__main__":
    run(main)
