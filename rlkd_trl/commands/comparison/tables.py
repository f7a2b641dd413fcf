"""A comparison for people and spreadsheets: Markdown and CSV from the rows of `comparison.summarise`."""

import csv
import io
import math
from collections.abc import Mapping, Sequence

from rlkd_trl.commands.comparison.statistics import mean_interval, student_t_critical
from rlkd_trl.evaluation.tables import MISSING, markdown_table, number

# Metric -> heading and the format of its numbers.
GREEDY = {
    "bleu": ("BLEU", ".1f"),
    "rougeL": ("ROUGE-L", ".1f"),
    "teacher_nll_per_sequence": ("teacher NLL / sequence", ".2f"),
    "teacher_nll_per_token": ("teacher NLL / token", ".3f"),
    "reward": ("reward", ".2f"),
    "length_words": ("words", ".1f"),
    "nll_of_teacher_samples_per_token": ("coverage", ".3f"),
    "distinct2": ("distinct-2", ".3f"),
    "distinct_outputs": ("distinct outputs", ".3f"),
    "eos_rate": ("EOS rate", ".3f"),
}
SAMPLED = {
    "bleu": ("BLEU", ".1f"),
    "distinct2": ("distinct-2", ".3f"),
    "distinct_outputs": ("distinct outputs", ".3f"),
    "self_bleu": ("self-BLEU", ".1f"),
    "teacher_nll_per_sequence": ("teacher NLL / sequence", ".2f"),
    "teacher_nll_per_token": ("teacher NLL / token", ".3f"),
}
RETENTION = {"bleu": ("BLEU, % of the teacher's", ".1f"), "rougeL": ("ROUGE-L, % of the teacher's", ".1f")}
COST = {
    "optimizer_steps": ("optimizer steps", ",.0f"),
    "generated_tokens": ("generated tokens", ",.0f"),
    "cpu_seconds": ("CPU seconds", ",.0f"),
    "wall_seconds": ("wall seconds", ",.0f"),
}
_MOST_SEEDS = 100  # beyond which a number of seeds is no advice
Headings = Mapping[str, tuple[str, str]]


def budget_section(title: str, rows: Sequence[dict], *, baseline: str, num_samples: int) -> str:
    """All tables of one test set and budget, in Markdown."""
    methods = [row for row in rows if row["cost"] or row["failed_seeds"]]
    parts = [
        f"## {title}",
        "### Greedy outputs",
        _interval_table(rows, [("greedy", GREEDY), ("retention", RETENTION)], with_learning_rate=True),
        *more_seeds(rows, baseline=baseline),
        f"### Difference from {baseline}",
        "In brackets the 95 % interval of a paired bootstrap over test inputs, given these runs: seeds are not "
        "resampled. Bold where it leaves out 0. Not corrected for the number of comparisons.",
        _difference_table([row for row in rows if row["model"] != baseline]),
        f"### Sampled outputs, {num_samples} of each input at temperature 1",
        _interval_table(rows, [("sampled", SAMPLED)]),
        "### Cost of training, per seed",
        _interval_table(methods, [("cost", COST)]),
    ]
    return "\n\n".join(parts)


def more_seeds(rows: Sequence[dict], *, baseline: str) -> list[str]:
    """Advice, if the intervals over seeds are wider than what the models differ by: which, in what, how many seeds.

    Differences are paired by seed, as two methods have the order of the data and their samples' seeds in common: d ± h
    over the n seeds that both have. It takes as many seeds N as make h t(N − 1) √n / (t(n − 1) √N) less than |d|, with
    Student's t (see `mean_interval`).
    """
    of_baseline = next(row for row in rows if row["model"] == baseline)
    unclear = []
    for row in rows:
        if row["model"] == baseline or not row["seeds"]:  # the teacher and the warm start have none
            continue
        for metric in ("bleu", "teacher_nll_per_token", "reward"):
            if metric not in row["greedy"] or metric not in of_baseline["greedy"]:
                continue
            differences = paired_by_seed(row, of_baseline, "greedy", metric)
            if len(differences) < 2:
                continue
            mean, half_width = mean_interval(differences)
            if not 0 < abs(mean) < half_width:
                continue
            heading, number_format = GREEDY[metric]
            n = len(differences)
            of_one = half_width * math.sqrt(n) / student_t_critical(n - 1)
            numbers = range(n + 1, _MOST_SEEDS + 1)
            widths = ((seeds, of_one * student_t_critical(seeds - 1) / math.sqrt(seeds)) for seeds in numbers)
            seeds = next((seeds for seeds, width in widths if width <= abs(mean)), None)
            needed = f"more than {_MOST_SEEDS} seeds" if seeds is None else f"about {seeds} seeds"
            said = f"{mean:+{number_format}} ± {half_width:{number_format}}"
            unclear.append(f"- {row['model']}, {heading}: {said}; {needed} would tell.")
    if not unclear:
        return []
    return [
        f"Not told apart from {baseline} by these seeds, paired by seed (`--seeds` takes more):\n\n"
        + "\n".join(unclear)
    ]


def paired_by_seed(row: Mapping, baseline: Mapping, kind: str, metric: str) -> list[float]:
    """A metric's differences over the seeds that both rows of `summarise` have, or from a baseline that has none.

    The teacher and the warm start have one value and no seed. kind: "greedy" or "sampled".
    """
    ours, theirs = row[kind][metric]["values"], baseline[kind][metric]["values"]
    if not baseline["seeds"]:
        return [value - theirs[0] for value in ours]
    of_seed = dict(zip(baseline["seeds"], theirs, strict=True))
    return [value - of_seed[seed] for seed, value in zip(row["seeds"], ours, strict=True) if seed in of_seed]


def learning_rate_section(search: Mapping) -> str:
    """The grid's scores, one method per line, the chosen rate in bold, in Markdown."""
    rates = sorted({rate for scores in search["scores"].values() for rate in scores})
    lines = []
    for method, scores in search["scores"].items():
        chosen = search["chosen"][method]
        cells = [number(scores.get(rate), ".4g") for rate in rates]
        lines.append([method, *(f"**{c}**" if rate == chosen else c for rate, c in zip(rates, cells, strict=True))])
    better = "lower" if search["lower_is_better"] else "higher"
    introduction = (
        f"{search['select_on']} on the validation inputs ({better} is better), seed {search['seed']}, "
        f"{search['budget']}. The chosen rate, in bold, serves every budget and seed, this one included. "
        f"{_at_the_edge(search['chosen'], rates)}{_untried(search['scores'])}"
    )
    return (
        f"## Learning rates\n\n{introduction}\n\n{markdown_table(['method', *(f'{rate:g}' for rate in rates)], lines)}"
    )


def _at_the_edge(chosen: Mapping[str, float | None], rates: Sequence[float]) -> str:
    """A sentence that names the learning rates chosen at an edge of the grid, which does not bracket them."""
    sentences = []
    for edge, rate in (("lowest", rates[0]), ("highest", rates[-1])):
        names = [method for method, choice in chosen.items() if choice == rate]
        if names:
            sentences.append(f"{', '.join(names)} at the {edge}")
    return (
        f"Not bracketed by the grid: {'; '.join(sentences)} rate." if sentences else "The grid brackets every choice."
    )


def _untried(scores: Mapping[str, Mapping[float, float | None]]) -> str:
    """A sentence that names the methods with fewer tries than others: rates without a finished run."""
    counts = {name: sum(score is not None for score in of_rates.values()) for name, of_rates in scores.items()}
    fewer = [f"{name} ({count} of {len(scores[name])})" for name, count in counts.items() if count < len(scores[name])]
    return f" Not all rates have a finished run: {', '.join(fewer)}." if fewer else ""


def failure_section(failures: Mapping[str, str]) -> str:
    """Why each failed run did, by directory, in Markdown."""
    # In a fence longer than any run of backticks that a program prints.
    parts = [f"{directory}:\n\n``````text\n{reason}\n``````" for directory, reason in failures.items()]
    return "\n\n".join(["## Failed runs", *parts])


def csv_text(tests: Mapping[str, Mapping[str, Sequence[dict]]]) -> str:
    """One line for each test set, budget, model, kind of number and metric; of `difference`, mean is that itself."""
    names = ["test", "budget", "model", "learning_rate", "kind", "metric", "mean", "low", "high", "values"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for (test, budget), rows in titled(tests).items():
        for row in rows:
            same = {"test": test, "budget": budget, "model": row["model"], "learning_rate": row["learning_rate"]}
            for kind in ("greedy", "sampled", "retention", "cost"):
                for metric, numbers in row[kind].items():
                    mean, half = numbers["mean"], numbers["half_width"]
                    ends = {} if half is None else {"low": mean - half, "high": mean + half}
                    values = " ".join(map(str, numbers["values"]))
                    writer.writerow({**same, "kind": kind, "metric": metric, "mean": mean, **ends, "values": values})
            for metric, numbers in row["difference"].items():
                ends = {"mean": numbers["difference"], "low": numbers["low"], "high": numbers["high"]}
                writer.writerow({**same, "kind": "difference", "metric": metric, **ends})
    return text.getvalue()


def titled(tests: Mapping[str, Mapping[str, Sequence[dict]]]) -> dict[tuple[str, str], Sequence[dict]]:
    """The rows of each test set and budget."""
    return {(test, budget): rows for test, budgets in tests.items() for budget, rows in budgets.items()}


def _interval_table(
    rows: Sequence[dict], parts: Sequence[tuple[str, Headings]], *, with_learning_rate: bool = False
) -> str:
    """A table of mean ± half-width; metrics that no row has are left out."""
    shown = [
        (kind, metric, heading, number_format)
        for kind, headings in parts
        for metric, (heading, number_format) in headings.items()
        if any(metric in row[kind] for row in rows)
    ]
    header = ["model", *(["learning rate"] if with_learning_rate else []), *(heading for _, _, heading, _ in shown)]
    lines = []
    for row in rows:
        line = [_label(row), *([_rate(row)] if with_learning_rate else [])]
        for kind, metric, _, number_format in shown:
            interval = row[kind].get(metric, {})
            cell = number(interval.get("mean"), number_format)
            if interval.get("half_width") is not None:
                cell += f" ± {interval['half_width']:{number_format}}"
            line.append(cell)
        lines.append(line)
    return markdown_table(header, lines)


def _difference_table(rows: Sequence[dict]) -> str:
    shown = {metric: GREEDY[metric] for metric in GREEDY if any(metric in row["difference"] for row in rows)}
    lines = []
    for row in rows:
        line = [_label(row)]
        for metric, (_, number_format) in shown.items():
            difference = row["difference"].get(metric)
            if difference is None:
                line.append(MISSING)
                continue
            sign = f"+{number_format}"
            cell = f"{difference['difference']:{sign}} [{difference['low']:{sign}}, {difference['high']:{sign}}]"
            line.append(f"**{cell}**" if difference["low"] > 0 or difference["high"] < 0 else cell)
        lines.append(line)
    return markdown_table(["model", *(heading for heading, _ in shown.values())], lines)


def _label(row: Mapping) -> str:
    notes = [("FAILED", row["failed_seeds"]), ("not run yet", row["missing_seeds"])]
    notes = [f"{what}: seed {', '.join(map(str, seeds))}" for what, seeds in notes if seeds]
    return f"{row['model']} ({'; '.join(notes)})" if notes else row["model"]


def _rate(row: Mapping) -> str:
    """The learning rate, marked where the grid does not bracket it."""
    return number(row["learning_rate"], "g") + (" (edge)" if row["at_the_edge"] else "")
