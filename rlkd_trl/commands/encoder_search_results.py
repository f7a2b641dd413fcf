"""What a search for the best combination of losses has come to: scores over seeds, differences, tables."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkd_trl.commands.comparison.statistics import Interval, mean_interval
from rlkd_trl.commands.encoder_search import BASE, METRICS, Combination, Search, questions
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.report import write_metrics
from rlkd_trl.evaluation.tables import MISSING, markdown_table, number


@dataclass(frozen=True)
class Outcome:
    """What the finished runs of a combination came to.

    scores: by seed. cost: mean CPU seconds of all stages. failed: seeds without a sound result. undefined: those of
    them whose run is finished, and whose metric is no number, as a correlation with predictions that are all equal.
    """

    combination: Combination
    scores: Mapping[int, float]
    cost: float
    failed: Sequence[int] = ()
    undefined: Sequence[int] = ()

    @property
    def interval(self) -> Interval:
        """Over seeds."""
        return mean_interval(list(self.scores.values())) if self.scores else Interval(math.nan, None)

    def difference(self, other: "Outcome") -> Interval | None:
        """This less another, paired by seed; None where they have no seed in common."""
        seeds = [seed for seed in self.scores if seed in other.scores]
        return mean_interval([self.scores[seed] - other.scores[seed] for seed in seeds]) if seeds else None


def outcomes(search: Search) -> list[Outcome]:
    """Of all combinations, in order, from what their runs have left. Raises `InputError` for a metric they lack."""
    outcomes_in_order = []
    for combination in search.combinations:
        cells = {seed: search.cell(combination, seed) for seed in search.search.seeds}
        done = {seed: cell for seed, cell in cells.items() if cell.is_done}
        metrics = {seed: cell.read("metrics.json")["after"] for seed, cell in done.items()}
        for of_run in metrics.values():
            if search.search.metric not in of_run:
                known = ", ".join(name for name in METRICS if name in of_run)
                raise InputError(f"--metric {search.search.metric} is not measured here; the runs have: {known}.")
        scores = {seed: of_run[search.search.metric] for seed, of_run in metrics.items()}
        scores = {seed: score for seed, score in scores.items() if score is not None}  # as JSON has NaN
        costs = [_cpu_seconds(cell.directory) for cell in done.values()]
        outcomes_in_order.append(
            Outcome(
                combination,
                scores,
                sum(costs) / len(costs) if costs else math.nan,
                [seed for seed in cells if seed not in scores],
                [seed for seed in done if seed not in scores],
            )
        )
    return outcomes_in_order


def _cpu_seconds(directory: Path) -> float:
    """The CPU seconds of all stages of a run."""
    files = [directory / "cost.json", *directory.glob("stage*/cost.json")]
    return sum(json.loads(file.read_text(encoding="utf-8"))["cpu_seconds"] for file in files)


def report(search: Search, all_outcomes: Sequence[Outcome]) -> str:
    """The tables, in Markdown: all combinations, the best first; and what the questions come to.

    A combination with a failed run is behind all others: those of its seeds that are left may be its better ones.
    """
    arguments = search.search
    base = all_outcomes[0]
    ranked = sorted(all_outcomes, key=lambda outcome: (not outcome.failed, _rank(outcome.interval.mean)), reverse=True)
    lines = [
        [
            outcome.combination.name,
            outcome.combination.text,
            _shown(outcome.interval),
            MISSING if outcome is base else _shown(outcome.difference(base), signed=True),
            number(outcome.cost, ".1f"),
        ]
        for outcome in ranked
    ]
    heads = ["set", "losses", arguments.metric, f"less {BASE}", "CPU s"]
    parts = [
        "# Search for the best combination of losses",
        f"The losses of the {arguments.stage} stages of {search.preset.stem}, {arguments.max_steps} steps a stage, "
        f"learning rate {arguments.learning_rate:g}, seeds {' '.join(map(str, arguments.seeds))}. "
        f"{arguments.metric} on held-out rows: mean over seeds ± half-width of its 95 % interval (Student's t); the "
        "difference is paired by seed. Not corrected for the number of sets; the best of many is too good by chance.",
        markdown_table(heads, lines),
    ]
    if answers := _answers(all_outcomes):
        parts += ["## Questions", "\n".join(f"- {line}" for line in answers)]
    if failed := [_failures(outcome, arguments.metric) for outcome in all_outcomes if outcome.failed]:
        parts += ["## Failed runs", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _failures(outcome: Outcome, metric: str) -> str:
    undefined = f"; of {_listed(outcome.undefined)} {metric} is no number" if outcome.undefined else ""
    return f"- {outcome.combination.name}: {_listed(outcome.failed)}{undefined}"


def _listed(seeds: Sequence[int]) -> str:
    return f"seeds {' '.join(map(str, seeds))}"


def _answers(all_outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each question to which the sets have an answer, under whichever names they were tried."""
    by_losses = {frozenset(outcome.combination.losses): outcome for outcome in all_outcomes}
    of_base = all_outcomes[0].combination
    by_name = {one.name: by_losses.get(frozenset(one.losses)) for one in (of_base, *questions(of_base.losses))}
    pairs = [
        ("Attention losses", BASE, "without attention"),
        ("Hard labels beside all other losses", BASE, "without hard labels"),
        ("Hard labels beside soft targets alone", "soft and hard", "soft alone"),
        ("All losses of the base over soft targets alone", BASE, "soft alone"),
    ]
    lines = []
    for what, name, other_name in pairs:
        one, other = by_name.get(name), by_name.get(other_name)
        if one is None or other is None or one is other:
            continue
        if (difference := one.difference(other)) is not None:
            lines.append(f"{what}: {_shown(difference, signed=True)}")
    return lines


def _rank(mean: float) -> float:
    return -math.inf if math.isnan(mean) else mean


def _shown(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None or math.isnan(interval.mean):
        return MISSING
    sign = "+" if signed else ""
    half = "" if interval.half_width is None else f" ± {interval.half_width:.3g}"
    return f"{interval.mean:{sign}.4g}{half}"


def write_results(search: Search) -> bool:
    """search.md (printed too) and search.json, of what the runs have left; whether all runs have a sound result.

    Raises:
        InputError: As `outcomes`.
    """
    all_outcomes = outcomes(search)
    text, output_dir = report(search, all_outcomes), Path(search.search.output_dir)
    results = [
        {
            "set": outcome.combination.name,
            "losses": outcome.combination.losses,
            "scores": outcome.scores,
            "failed": outcome.failed,
            "cpu_seconds": outcome.cost,
        }
        for outcome in all_outcomes
    ]
    write_metrics(output_dir / "search.json", {"metric": search.search.metric, "sets": results})
    (output_dir / "search.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nsearch.md and search.json are in {output_dir}.", flush=True)
    return not any(outcome.failed for outcome in all_outcomes)
