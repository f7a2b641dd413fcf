r"""Which method should I use, and is reinforcement learning worth it here? Methods side by side on one budget.

    python recipes/compare.py --smoke                                     # the embedded demo, minutes, no network
    python recipes/compare.py --teacher runs/teacher --student runs/warm --dataset runs/pseudo.jsonl \
        --source_column mr --target_column pseudo_label --templates templates.yaml \
        --validation_dataset dev.csv --test_dataset test.csv --eval_target_column ref \
        --methods seq_kd ppo rloo_sequence --baseline seq_kd --seeds 0 1 2 --max_steps 150 400 \
        --learning_rates 2e-4 5e-4 1e-3 --common per_device_train_batch_size=64 logging_steps=50

A method is a preset in recipes/configs/methods/ or your own YAML file in a directory named for its recipe; its teacher
may be of another teacher_dtype or teacher_quantization than the one that judges. Every
method starts from the same student with the same seeds and gets the same budget: optimizer steps, generated tokens or
CPU seconds. The learning rate is chosen for each method from the same grid, on the validation inputs, at the first
seed and the smallest budget. The test inputs serve the tables only. With a budget of tokens or time, where the number
of steps is not known beforehand, the learning rate is constant (after --common warmup_steps=N) instead of decaying.

Each training run has a directory of its own, OUTPUT_DIR/BUDGET/METHOD/seedN; a finished one is not run again, and
is refused if its command or a local file that it read has changed. In OUTPUT_DIR: comparison.md, comparison.csv,
comparison.json, metrics.png and quality_diversity.png.
"""

import sys
from pathlib import Path

from rlkd_trl.commands.arguments import DataArguments, PromptArguments, StudentArguments, TeacherArguments
from rlkd_trl.commands.checks import check_checkpoints
from rlkd_trl.commands.comparison.cells import Method
from rlkd_trl.commands.comparison.figures import write_figures
from rlkd_trl.commands.comparison.grid import Grid
from rlkd_trl.commands.comparison.statistics import Entry, summarise
from rlkd_trl.commands.comparison.steps import (
    ComparisonArguments,
    Examiner,
    MeasurementArguments,
    as_flags,
    check_flags,
    check_named,
    find_methods,
    load_test_rows,
    use_demo,
)
from rlkd_trl.commands.comparison.tables import budget_section, csv_text, failure_section, learning_rate_section
from rlkd_trl.commands.data import load_templates
from rlkd_trl.commands.files_read import FileDigests
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.prompt_lengths import fit_rows
from rlkd_trl.commands.run_directory import check_apart, check_writable
from rlkd_trl.errors import run
from rlkd_trl.evaluation.report import write_metrics
from rlkd_trl.trainers.config import PPOKDConfig, ReinforceKDConfig, RLOOKDConfig
from rlkd_trl.trainers.full_vocabulary_config import AllActionsKDConfig, KDConfig

RECIPES = Path(__file__).resolve().parent
DEMO_PRESET = RECIPES / "configs" / "demo_compare.yaml"
# The recipes that can be compared, with their settings.
CONFIGS = {
    "ppo_kd": PPOKDConfig,
    "rloo_kd": RLOOKDConfig,
    "reinforce_kd": ReinforceKDConfig,
    "kd": KDConfig,
    "all_actions_kd": AllActionsKDConfig,
}
INTRODUCTION = """{rows} test inputs; teacher {teacher}, warm start {student}. Mean over seeds ± half-width of its 95 %
interval (Student's t). The reward is the teacher-forcing reward (V = max, γ = 1) in every line, whatever a method was
trained on. The teacher is asked through its first template. Tokens that a method reads from data count as generated;
making pseudo-labels is charged to no method."""


def tested(grid: Grid, budget: str, method: Method, rate: float | None, examiner: Examiner) -> Entry:
    """A method at one budget: its finished seeds, tested."""
    cells = {} if rate is None else {seed: grid.cell(budget, method, seed, rate) for seed in grid.seeds}
    done = {seed: cell for seed, cell in cells.items() if cell.is_done}
    return Entry(
        method.name,
        [examiner.test_trained(cell.directory) for cell in done.values()],
        rate,
        seeds=list(done),
        costs=[cell.read("cost.json") for cell in done.values()],
        failed_seeds=[seed for seed in grid.seeds if seed not in done],
    )


def write_results(output_dir: Path, introduction: str, results: dict, num_samples: int) -> None:
    """comparison.md (printed too), comparison.csv, comparison.json and the figures."""
    parts = ["# Comparison", introduction]
    for budget, rows in results["budgets"].items():
        parts.append(budget_section(budget, rows, baseline=results["baseline"], num_samples=num_samples))
    if results["search"]["scores"]:
        parts.append(learning_rate_section(results["search"]))
    if results["failures"]:
        parts.append(failure_section(results["failures"]))
    text = "\n\n".join(parts) + "\n"
    write_metrics(output_dir / "comparison.json", results)
    (output_dir / "comparison.csv").write_text(csv_text(results["budgets"]), encoding="utf-8")
    (output_dir / "comparison.md").write_text(text, encoding="utf-8")
    print(f"\n{text}", flush=True)
    written = ["comparison.md", "comparison.csv", "comparison.json"]
    written += [path.name for path in write_figures(output_dir, results["budgets"])]
    print(f"{', '.join(written)} are in {output_dir}.")


def main() -> None:
    # Parse, and find out what is wrong with the input before anything runs.
    parser = RecipeParser(
        DataArguments,
        PromptArguments,
        TeacherArguments,
        StudentArguments,
        ComparisonArguments,
        MeasurementArguments,
        description=__doc__,
    )
    smoke_preset = DEMO_PRESET if "--smoke" in sys.argv else None
    data, prompts, teacher, student, compare, measurement = parser.parse(demo_preset=smoke_preset)
    check_named(data, teacher, student, compare, measurement)
    methods = find_methods(compare, RECIPES)
    check_flags(methods, compare.common or [], CONFIGS, teacher)
    templates = load_templates(prompts)
    output_dir = Path(compare.output_dir)
    check_apart("--output_dir", output_dir, data, prompts, teacher, student, compare, measurement)
    check_writable("--output_dir", output_dir)
    if compare.smoke:
        use_demo(data, teacher, student, measurement, prompts, output_dir / "demo")
    rows = load_test_rows(data, prompts, templates, measurement)
    check_checkpoints(teacher, student)
    lengths = {name: getattr(measurement, name) for name in ("max_prompt_length", "max_completion_length")}
    rows = list(fit_rows(rows, "Test data", prompts, templates, student, teacher, **lengths))
    flags = [*as_flags(data, prompts, teacher, student), *measurement.run_flags()]
    digests = FileDigests()
    grid = Grid(
        output_dir,
        methods,
        compare.budgets(),
        compare.seeds,
        compare.learning_rates,
        flags=[*flags, *compare.common_flags()],
        select_on=compare.select_on,
        jobs=compare.jobs,
        digests=digests,
    )
    grid.check()

    # Train: for each method's learning rate, then every budget and seed with it.
    failures: dict[Path, str] = {}
    search = grid.search(failures)
    grid.train(search["chosen"], failures)

    # Test: the teacher, the warm start, and what each run made of it.
    examiner = Examiner(rows, prompts, teacher, student, measurement, templates, digests)
    of_teacher = examiner.test_teacher(output_dir / "teacher")
    of_warm_start = examiner.test_warm_start(output_dir / "warm_start")
    baseline = compare.baseline or methods[0].name
    budgets = {}
    for budget in grid.budgets:
        of_methods = [tested(grid, budget, method, search["chosen"][method.name], examiner) for method in methods]
        entries = [Entry("teacher", [of_teacher]), Entry("warm_start", [of_warm_start]), *of_methods]
        budgets[budget] = summarise(
            entries, teacher=of_teacher, baseline=baseline, num_resamples=measurement.num_resamples
        )

    # Compare, save, and say by the exit code if a run failed.
    groups = (data, prompts, teacher, student, compare, measurement)
    results = {
        "settings": {type(group).__name__: vars(group) for group in groups},
        "baseline": baseline,
        "budgets": budgets,
        "search": search,
        "failures": {str(directory): reason for directory, reason in failures.items()},
    }
    names = {"teacher": ", ".join(teacher.teacher), "student": student.student}
    introduction = INTRODUCTION.format(rows=len(rows), **names)
    write_results(output_dir, introduction, results, measurement.num_samples)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
