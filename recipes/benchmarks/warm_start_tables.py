r"""One short table for each warm start of `e2e_comparison.py`, and differences from the baseline, paired by seed.

    python recipes/benchmarks/warm_start_tables.py

reads `results/warm_starts/*/comparison.json`, and writes `results/warm_starts/tables.md`. A cell has the first test
set's value and, behind the semicolon, the shifted one's. Means over seeds ± half-width of their 95 % interval by
Student's t. Differences are over the seeds that both methods have, in bold where the interval leaves out 0, not
corrected for the number of comparisons. * marks a learning rate at the edge of those that were tried.
"""

import argparse
import json
from pathlib import Path

from e2e_comparison import WARM_START_STEPS
from result_files import RESULTS, made_by

from rlkd_trl.commands.comparison.statistics import mean_interval
from rlkd_trl.commands.comparison.tables import paired_by_seed
from rlkd_trl.evaluation.tables import markdown_table

# Name, kind of output, metric, digits.
COLUMNS = [
    ("BLEU", "greedy", "bleu", 1),
    ("NLL / token", "greedy", "teacher_nll_per_token", 2),
    ("sampled BLEU", "sampled", "bleu", 1),
    ("words", "greedy", "length_words", 1),
    ("distinct outputs", "greedy", "distinct_outputs", 2),
]
DIFFERENCES = 3  # of the columns, from the left
TESTS = ("in_distribution", "official")


def with_interval(values: list[float], digits: int, *, signed: bool = False) -> str:
    mean, half_width = mean_interval(values)
    text = f"{mean:{'+' if signed else ''}z.{digits}f}"  # z: no minus before a rounded 0
    if half_width is None:
        return text
    text += f" ± {half_width:.{digits}f}"
    return f"**{text}**" if signed and abs(mean) > half_width else text


def tables_of(results: dict) -> list[str]:
    """The table of all models, the best greedy BLEU first, and that of differences."""
    (budget,) = results["tests"][TESTS[0]]
    by_model = {row["model"]: [] for row in results["tests"][TESTS[0]][budget]}
    for test in TESTS:
        for row in results["tests"][test][budget]:
            by_model[row["model"]].append(row)
    fixed = [name for name in by_model if not by_model[name][0]["seeds"]]
    methods = sorted(
        (name for name in by_model if name not in fixed), key=lambda name: -by_model[name][0]["greedy"]["bleu"]["mean"]
    )
    lines = []
    for name in [*fixed, *methods]:
        first = by_model[name][0]
        rate = "" if name in fixed else f"{first['learning_rate']:g}{'*' if first['at_the_edge'] else ''}"
        cells = [
            "; ".join(with_interval(row[kind][metric]["values"], digits) for row in by_model[name])
            for _, kind, metric, digits in COLUMNS
        ]
        lines.append([f"`{name}`", rate, str(len(first["seeds"]) or ""), *cells])
    heads = ["model", "rate", "seeds", *(name for name, *_ in COLUMNS)]
    tables = [markdown_table(heads, lines)]
    baseline, lines = results["baseline"], []
    for name in methods:
        if name == baseline:
            continue
        seeds = [seed for seed in by_model[name][0]["seeds"] if seed in by_model[baseline][0]["seeds"]]
        cells = []
        for _, kind, metric, digits in COLUMNS[:DIFFERENCES]:
            of_each = [
                with_interval(paired_by_seed(ours, theirs, kind, metric), digits, signed=True)
                for ours, theirs in zip(by_model[name], by_model[baseline], strict=True)
            ]
            cells.append("; ".join(of_each))
        lines.append([f"`{name}`", str(len(seeds)), *cells])
    heads = [f"less `{baseline}`", "seeds", *(name for name, *_ in COLUMNS[:DIFFERENCES])]
    return [*tables, markdown_table(heads, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS / "warm_starts")
    args = parser.parse_args()
    parts = []
    for warm_start in WARM_START_STEPS:
        file = args.results_dir / warm_start / "comparison.json"
        if file.is_file():
            parts += [f"# {warm_start}", *tables_of(json.loads(file.read_text(encoding="utf-8")))]
    text = "\n\n".join([*parts, made_by()]) + "\n"
    (args.results_dir / "tables.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
