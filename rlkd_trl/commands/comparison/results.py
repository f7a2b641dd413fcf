"""What a comparison leaves: tables as Markdown, CSV and JSON, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rlkd_trl.commands.comparison.arguments import ComparisonSettings
from rlkd_trl.commands.comparison.cells import Method
from rlkd_trl.commands.comparison.figures import write_figures
from rlkd_trl.commands.comparison.tables import (
    budget_section,
    csv_text,
    failure_section,
    learning_rate_section,
    titled,
)
from rlkd_trl.evaluation.report import write_metrics, write_report
from rlkd_trl.evaluation.run_log import LOG_FILE, RunLog

INTRODUCTION = """{rows} test inputs; teacher {teacher}, warm start {student}. Mean over seeds ± half-width of its 95 %
interval (Student's t). The reward is the teacher-forcing reward (V = max, γ = 1) in every line, whatever a method was
trained on. The teacher is asked through its first template. Coverage is the model's NLL per token of the teacher's
samples, one for each input, in nats: it rises where a student drops what its teacher can say. Distinct outputs are
different texts over all texts. Tokens that a method reads from data count as generated; making pseudo-labels is
charged to no method."""


def write_results(
    settings: ComparisonSettings,
    methods: Sequence[Method],
    tests: Mapping[str, Mapping[str, list[dict]]],
    search: Mapping,
    failures: Mapping[Path, str],
    *,
    num_rows: Mapping[str, int],
) -> None:
    """comparison.md (printed too), comparison.csv, comparison.json, the figures, and report.html of all runs.

    tests: as `Examiner.summaries`. search: as `Grid.search`. failures: why, by directory. num_rows: by test set.
    """
    output_dir = Path(settings.compare.output_dir)
    results = {
        "settings": {type(group).__name__: vars(group) for group in vars(settings).values()},
        "baseline": settings.compare.baseline or methods[0].name,
        "tests": tests,
        "search": search,
        "failures": {str(directory): reason for directory, reason in failures.items()},
    }
    models = {"teacher": ", ".join(settings.teacher.teacher), "student": settings.student.student}
    num_samples = settings.measurement.num_samples
    counts = " and ".join(f"{count} {name}" if len(tests) > 1 else str(count) for name, count in num_rows.items())
    parts = ["# Comparison", INTRODUCTION.format(rows=counts, **models)]
    for (test, budget), rows in titled(tests).items():
        title = budget if len(tests) == 1 else f"{test}, {budget}"
        parts.append(budget_section(title, rows, baseline=results["baseline"], num_samples=num_samples))
    if results["search"]["scores"]:
        parts.append(learning_rate_section(results["search"]))
    if results["failures"]:
        parts.append(failure_section(results["failures"]))
    text = "\n\n".join(parts) + "\n"
    write_metrics(output_dir / "comparison.json", results)
    (output_dir / "comparison.csv").write_text(csv_text(tests), encoding="utf-8")
    (output_dir / "comparison.md").write_text(text, encoding="utf-8")
    print(f"\n{text}", flush=True)
    written = ["comparison.md", "comparison.csv", "comparison.json"]
    for test, budgets in tests.items():
        written += [path.name for path in write_figures(output_dir, budgets, "" if len(tests) == 1 else f"_{test}")]
    logs = {
        str(file.parent.relative_to(output_dir)): RunLog.load(file.parent)
        for file in sorted(output_dir.rglob(LOG_FILE))
    }
    if logs:
        write_report(output_dir / "report.html", logs, title=f"Comparison: {output_dir.name}")
        written.append("report.html")
    print(f"{', '.join(written)} are in {output_dir}.")
