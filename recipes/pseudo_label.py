r"""Pseudo-labels: the teacher's own answers, which stand in for references in the student's warm start.

    python recipes/pseudo_label.py --teacher runs/teacher --dataset train.csv --source_column mr \
        --templates templates.yaml --output runs/pseudo.jsonl

One line of JSON for each distinct input and template: the input's columns, `template`, and `pseudo_label`. Lines are
written as they are made. `--strategy greedy`, `beam` or `sample` chooses how the teacher answers (Kim & Rush 2016 use
beam search for sequence-level distillation). With `--teacher_column` each row is answered by the teacher that its
column names, and with `--template_column` through the template.

With `--strategy beam --num_beams K --interpolate --target_column ref`, the label is the one of the K beams that is
nearest to the references by smoothed sentence BLEU, and `candidate` its rank, 0 for the best beam: the same paper's
sequence-level interpolation, where K = 35 and the student was trained before. This uses human labels.
"""

from rlkd_trl.commands.checks import check_pseudo_labels, require, require_files
from rlkd_trl.commands.data import load_prompts, load_templates
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.loading import load_panel
from rlkd_trl.commands.prompt_lengths import check_questions
from rlkd_trl.commands.run_directory import part_held_alone
from rlkd_trl.commands.settings import PseudoLabelSettings, parse_settings
from rlkd_trl.errors import run


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_settings(PseudoLabelSettings, description=__doc__, recipe="pseudo_label")
    data, labels = settings.data, settings.labels
    require(**{"--dataset": data.dataset, "--teacher": settings.teacher.teacher, "--output": labels.output})
    require_files(settings)
    templates = load_templates(settings.prompts)
    rows = load_prompts(data, settings.prompts, templates)
    check_pseudo_labels(settings, templates, rows)
    check_questions(rows, "Data", templates, settings.teacher, max_completion_length=labels.max_completion_length)

    # Ask the teacher, and write its answers as they come.
    from rlkd_trl.teachers.pseudo_labels import write_pseudo_labels

    generation = {key: value for key, value in vars(labels).items() if key not in ("output", "overwrite_output_dir")}
    # The student's prompt is made anew wherever the labels are used, unless it is the source column itself.
    leave_out = ["references"] if data.source_column == "prompt" else ["references", "prompt"]
    with part_held_alone(labels.output, overwrite=labels.overwrite_output_dir):
        panel = load_panel(settings.teacher, templates, settings.panel)
        count = write_pseudo_labels(panel, list(rows), labels.output, leave_out=leave_out, **generation)
    say(f"{count} pseudo-labels are in {labels.output}.")


if __name__ == "__main__":
    run(main)
