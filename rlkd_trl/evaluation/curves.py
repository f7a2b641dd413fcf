"""What the report draws of the logged numbers: which curves, under which question, on which axes."""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from rlkd_trl.evaluation.files import is_number
from rlkd_trl.evaluation.metric_guide import QUESTIONS, note_on

Points = list[tuple[float, float]]  # step and value

_NOT_CHARTED = ("step", "epoch", "total_flos")
_LEAST_RELATIVE_SPAN = 0.01  # of an axis: differences far below one percent of the values are not to look like a trend
_LEAST_SPAN = 1e-7  # float32's rounding at 1
_RESOLUTIONS_SHOWN = 10  # an axis spans this many of a metric's smallest meaningful differences


def charts(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, in_table: Container[str] = ()
) -> tuple[list[dict], list[dict]]:
    """The curves of the runs' histories, by question; and what is no curve.

    runs: what each run has logged, by the run's name. in_table: metrics that a table shows before and after training;
    their evaluations get a curve only if there are others in between.

    Returns:
        For each of `QUESTIONS` that has any, `{"question", "charts"}`; a chart is `{"name", "meaning", "worry", "low",
        "high", "ticks", "series"}`, and its series map a run's name to points `[step, value]`, in order of steps,
        where a value that is not finite is None. And `{"name", "meaning", "run", "text"}` of each metric with one
        value, or always the same one.
    """
    series: dict[str, dict[str, Points]] = {}
    for run, history in runs.items():
        for name, points in _series(history).items():
            series.setdefault(name, {})[run] = points
    of_question: dict[str, list[dict]] = {question: [] for question in QUESTIONS}
    steady = []
    for name, by_run in series.items():
        is_in_table = name.startswith("eval_") and name.removeprefix("eval_") in in_table
        if is_in_table and all(len(points) <= 2 for points in by_run.values()):
            continue
        note = note_on(name)
        values = {value for points in by_run.values() for _, value in points if math.isfinite(value)}
        if len(values) < 2 or all(len(points) < 2 for points in by_run.values()):
            steady += [
                {"name": name, "meaning": note.meaning, "run": run, "text": _in_words(points)}
                for run, points in by_run.items()
            ]
            continue
        low, high, ticks = axis(min(values), max(values), resolution=note.resolution)
        of_question[note.question].append(
            {
                "name": name,
                "meaning": note.meaning,
                "worry": note.worry,
                "low": low,
                "high": high,
                "ticks": ticks,
                "series": {
                    run: [[step, value if math.isfinite(value) else None] for step, value in points]
                    for run, points in by_run.items()
                },
            }
        )
    groups = [{"question": question, "charts": found} for question, found in of_question.items() if found]
    return groups, steady


def axis(least: float, greatest: float, *, resolution: float = 0.0) -> tuple[float, float, list[float]]:
    """Where an axis begins and ends, and its round numbers.

    The axis is wider than the values where they differ by less than `_RESOLUTIONS_SHOWN` resolutions, or hardly at all
    for their size: then the curve is drawn as the flat line that it is.
    """
    size = max(abs(least), abs(greatest))
    needed = max(_RESOLUTIONS_SHOWN * resolution, _LEAST_RELATIVE_SPAN * size, _LEAST_SPAN)
    missing = max(0.0, needed - (greatest - least))
    low, high = least - missing / 2, greatest + missing / 2
    if least >= 0 > low:  # a number that is never negative does not get an axis that is
        low, high = 0.0, high - low
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is at least as large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Each logged number's points, in order of steps. Entries without a step are left out."""
    series: dict[str, Points] = {}
    with_step = [entry for entry in history if is_number(entry.get("step"))]
    for entry in sorted(with_step, key=lambda entry: entry["step"]):
        for name, value in entry.items():
            # JSON has no NaN: it comes back as null.
            number = math.nan if value is None else value
            if is_number(number) and name not in _NOT_CHARTED:
                series.setdefault(name, []).append((entry["step"], float(number)))
    return series


def _in_words(points: Points) -> str:
    """A metric with one value: where it was logged, once or always the same; or where it was not finite any more."""
    values = [value for _, value in points if math.isfinite(value)]
    said = f"{values[0]:.5g}" if values else "never finite"
    if len(points) == 1:
        return f"{said} (once, at step {points[0][0]:g})"
    if not values:
        return f"{said} ({len(points)} steps)"
    if len(values) == len(points):
        return f"{said} (always)"
    first = next(step for step, value in points if not math.isfinite(value))
    return f"{said} (at {len(values)} of {len(points)} steps; not finite at the others, first at step {first:g})"
