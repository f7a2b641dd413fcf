r"""Which method should I use, and is reinforcement learning worth it here? Methods side by side on one budget.

    python recipes/compare.py --smoke                                     # the embedded demo, minutes, no network
    python recipes/compare.py --teacher runs/teacher --student runs/warm --dataset runs/pseudo.jsonl \
        --source_column mr --target_column pseudo_label --templates templates.yaml \
        --validation_dataset dev.csv --test_dataset test.csv --eval_target_column ref \
        --methods seq_kd ppo seq_kd+recommended --baseline seq_kd --seeds 0 1 2 --max_steps 150 400 \
        --learning_rates 2e-4 5e-4 1e-3 --common per_device_train_batch_size=64 logging_steps=50

A method is a preset in recipes/configs/methods/ or your own YAML file in a directory named for its recipe; its teacher
may be of another teacher_dtype or teacher_quantization than the one that judges. With a + between them, as in
seq_kd+recommended, methods follow one another, each with an equal share of the budget. Every
method starts from the same student with the same seeds and gets the same budget: optimizer steps, generated tokens or
CPU seconds. The learning rate is chosen for each method from the same grid, on the validation inputs, at the first
seed and the smallest budget. The test inputs serve the tables only. With a budget of tokens or time, where the number
of steps is not known beforehand, the learning rate is constant (after --common warmup_steps=N) instead of decaying.

Each training run has a directory of its own, OUTPUT_DIR/BUDGET/METHOD/seedN; a finished one is not run again, and
is refused if its command or a local file that it read has changed. In OUTPUT_DIR: comparison.md, comparison.csv,
comparison.json, metrics.png and quality_diversity.png.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rlkd_trl.commands.checks import require_files
from rlkd_trl.commands.comparison.arguments import ComparisonSettings
from rlkd_trl.commands.comparison.cells import Method
from rlkd_trl.commands.comparison.checks import (
    CONFIGS,
    check_flags,
    check_named,
    check_runs,
    checked_rows,
    find_methods,
    first_runs,
    name_demo,
)
from rlkd_trl.commands.comparison.grid import Grid
from rlkd_trl.commands.data import load_templates
from rlkd_trl.commands.demo import make_smoke_demo
from rlkd_trl.commands.run_directory import check_writable, held_alone
from rlkd_trl.commands.settings import parse_settings
from rlkd_trl.errors import continued_by, run
from rlkd_trl.prompts import PromptTemplates

RECIPES = Path(__file__).resolve().parent
DEMO_PRESET = RECIPES / "configs" / "demo_compare.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before anything runs.
    demo_preset = DEMO_PRESET if "--smoke" in sys.argv else None
    settings = parse_settings(ComparisonSettings, description=__doc__, recipe="compare", demo_preset=demo_preset)
    continued_by("the same command")
    check_named(settings)
    require_files(settings)
    methods = find_methods(settings.compare, RECIPES)
    templates = load_templates(settings.prompts)
    check_flags(methods, settings.compare.common or [], CONFIGS, settings.teacher)
    check_writable("--output_dir", Path(settings.compare.output_dir))
    with held_alone(settings.compare.output_dir):
        compare(settings, methods, templates)


def compare(settings: ComparisonSettings, methods: Sequence[Method], templates: PromptTemplates | None) -> None:
    # Check the runs, as far as can be without models.
    demo = name_demo(settings) if settings.compare.smoke else None
    grid = Grid.of(settings, methods)
    runs = first_runs(grid, CONFIGS)
    if demo is not None:
        make_smoke_demo(demo)
    tests = checked_rows(settings, templates)
    check_runs(runs)
    grid.check()

    from rlkd_trl.commands.comparison.examiner import Examiner
    from rlkd_trl.commands.comparison.results import write_results
    from rlkd_trl.evaluation.not_finite import check_finite

    # Test the teacher and the warm start: if one of them is broken, no run is begun.
    examiner = Examiner(settings, tests, templates, grid.digests)
    examiner.test_given_models(grid.output_dir)

    # Train: for each method's learning rate, then every budget and seed with it.
    failures: dict[Path, str] = {}
    search = grid.search(failures)
    best = grid.train(search["chosen"], failures)

    # Test what each run made of the warm start.
    summaries = examiner.summaries(grid, search["chosen"], best, failures)

    # Compare, save, and say by the exit code if a run failed, or a test met numbers that are not finite.
    num_rows = {test: len(rows) for test, rows in tests.items()}
    write_results(settings, methods, summaries, search, failures, num_rows=num_rows)
    check_finite(examiner.not_finite)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
