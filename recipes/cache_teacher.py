r"""A teacher's distributions along fixed targets, in files: kd.py then learns from them without the teacher.

    python recipes/cache_teacher.py --teacher runs/teacher --dataset runs/pseudo.jsonl --source_column mr \
        --target_column pseudo_label --templates templates.yaml --output runs/cache
    accelerate launch recipes/kd.py --teacher_cache runs/cache --student runs/warm --dataset runs/pseudo.jsonl \
        --source_column mr --target_column pseudo_label --templates templates.yaml --output_dir runs/kd

For each token of each distinct target (pseudo-labels, references) the `--k` most likely ids with their
log-probabilities, and the mass of all other ids as one number. With `--k 0` all ids are kept, and kd.py has the same
loss as with the teacher; with fewer a lower bound of it (`rlkd_trl/ops/truncated.py` says how far below). Several
teachers and templates are kept as what they are to kd.py, one distribution.

The targets are written in files of `--rows_per_shard`, which appear whole or not at all. A command that was stopped
goes on where it stopped when it is given again.
"""

from rlkd_trl.commands.caching import as_teacher_reads, cache_targets, check_cache_flags
from rlkd_trl.commands.checks import require, require_files
from rlkd_trl.commands.data import load_prompts, load_templates
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.prompt_lengths import check_questions
from rlkd_trl.commands.run_directory import held_alone
from rlkd_trl.commands.settings import CacheSettings, parse_settings
from rlkd_trl.errors import run


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    settings = parse_settings(CacheSettings, description=__doc__, recipe="cache_teacher")
    data, cache = settings.data, settings.cache
    require(**{"--dataset": data.dataset, "--teacher": settings.teacher.teacher, "--output": cache.output})
    require(**{"--target_column": data.target_column})
    require_files(settings)
    templates = load_templates(settings.prompts)
    rows = load_prompts(data, settings.prompts, templates)
    check_cache_flags(settings, rows)
    rows = as_teacher_reads(settings, rows, templates)
    check_questions(rows, "Data", templates, settings.teacher, max_completion_length=cache.max_completion_length)

    # Read the targets with the teacher, and write down what it says about each token.
    with held_alone(cache.output, flag="--output"):
        say(cache_targets(settings, rows, templates))


if __name__ == "__main__":
    run(main)
