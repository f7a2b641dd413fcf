r"""Data from the teacher alone: inputs that it writes itself, for distillation where there are no texts to learn on.

    python recipes/generate_data.py --teacher runs/teacher --template "Invent a restaurant." \
        --output runs/sources.jsonl
    python recipes/generate_data.py --teacher runs/teacher --schema slots.json --template "Invent a restaurant." \
        --output runs/sources.jsonl
    python recipes/generate_data.py --teacher runs/decoder_only_teacher --output runs/sources.jsonl

Three ways: the teacher is asked for an input through *inverse* templates, which read no source (T0 was trained on such
too); inputs are put together from the slots and values of a `--schema`; or a decoder-only teacher writes on from its
BOS. Of `--num_rows` / `--keep_share` distinct candidates those are kept that the teacher finds likeliest per token.

The file is an ordinary dataset with the column `source`: `--dataset runs/sources.jsonl --source_column source` of
`pseudo_label.py` and then of every other recipe.
"""

from rlkd_trl.commands.checks import check_generated_data, require, require_files
from rlkd_trl.commands.data import load_templates
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.loading import load_panel
from rlkd_trl.commands.run_directory import check_not_there
from rlkd_trl.commands.settings import GeneratedDataSettings, parse_settings
from rlkd_trl.errors import is_first_process, run


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_settings(GeneratedDataSettings, description=__doc__, recipe="generate_data")
    generated = settings.generated
    require(**{"--teacher": settings.teacher.teacher, "--output": generated.output})
    require_files(settings)
    templates = load_templates(settings.prompts)
    schema = check_generated_data(settings, templates)

    # Draw candidates, keep those that the teacher finds likeliest, and write them.
    from rlkd_trl.teachers.generated_inputs import generate_inputs, start_text, write_inputs

    teacher = load_panel(settings.teacher, None).scorers[0].teacher
    if templates is not None:
        questions = teacher.writer.texts(templates.render({}))
    else:
        questions = [] if schema is not None else [start_text(teacher)]
    inputs = generate_inputs(
        teacher,
        questions,
        schema=schema,
        num_inputs=generated.num_rows,
        keep_share=generated.keep_share,
        temperature=generated.temperature,
        max_input_length=generated.max_input_length,
        batch_size=generated.batch_size,
        seed=generated.seed,
    )
    if is_first_process():
        # Another command may have written it in the meantime.
        check_not_there("--output", generated.output, overwrite=generated.overwrite_output_dir)
        write_inputs(inputs, generated.output)
    say(f"{len(inputs)} inputs are in {generated.output}.")


if __name__ == "__main__":
    run(main)
