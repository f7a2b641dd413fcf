r"""Evaluation: a student's outputs against references and in the eyes of its teacher, beside the teacher's own.

    python recipes/evaluate.py --student runs/ppo --teacher runs/teacher --dataset test.csv --source_column mr \
        --target_column ref --templates templates.yaml --output_dir runs/ppo_test

BLEU, ROUGE, distinct-n, length, (with `--ibleu`) iBLEU for paraphrase; the teacher's NLL of the student's outputs and
the student's NLL of the teacher's (likelihood and coverage risk; Wen et al. 2023, "f-Divergence Minimization for
Sequence-Level Knowledge Distillation"); the mean reward. Greedy outputs, or sampled with `--sample`.
"""

from contextlib import nullcontext

from rlkd_trl.commands.absent_teachers import check_evaluation_server
from rlkd_trl.commands.checks import (
    check_checkpoints,
    check_evaluation_panel,
    checked_rewards,
    refuse_unused,
    require,
    require_files,
)
from rlkd_trl.commands.data import load_prompts, load_templates
from rlkd_trl.commands.prompt_lengths import fit_rows
from rlkd_trl.commands.results import evaluate_checkpoints, report_evaluation
from rlkd_trl.commands.run_directory import check_evaluation_directory, held_alone
from rlkd_trl.commands.settings import EvaluationSettings, parse_settings
from rlkd_trl.errors import run


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_settings(EvaluationSettings, description=__doc__, recipe="evaluate")
    require(**{"--dataset": settings.data.dataset, "--student": settings.student.student})
    require_files(settings)
    check_evaluation_directory(settings.evaluation)
    templates = load_templates(settings.prompts)
    rows = load_prompts(settings.data, settings.prompts, templates)
    refuse_unused(settings.evaluation, "temperature", unless=settings.evaluation.sample, needs="--sample")
    rewards = checked_rewards(settings.reward, settings.evaluation.reward_weights)
    align = settings.evaluation.align_tokenizers
    has_teacher = settings.teacher.teacher or settings.absent.teacher_server
    refuse_unused(settings.evaluation, "align_tokenizers", unless=has_teacher, needs="--teacher")
    check_checkpoints(settings.teacher, settings.student, align=align)
    check_evaluation_panel(settings, templates, rows)
    check_evaluation_server(settings)
    of_prompts = (settings.prompts, templates, settings.student, settings.teacher)
    lengths = {name: getattr(settings.evaluation, name) for name in ("max_prompt_length", "max_completion_length")}
    rows = list(fit_rows(rows, "Data", *of_prompts, **lengths))

    # Evaluate and report.
    output_dir = settings.evaluation.output_dir
    with nullcontext() if output_dir is None else held_alone(output_dir):
        check_evaluation_directory(settings.evaluation)  # which another command may have filled in the meantime
        results = evaluate_checkpoints(settings, rows, templates, rewards)
        report_evaluation(results, output_dir)


if __name__ == "__main__":
    run(main)
