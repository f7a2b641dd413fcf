"""A run's curves as PNG files, for papers. They need matplotlib, the extra `figures`."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkd_trl.evaluation.curves import charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN, _COLUMNS = 9, 3  # charts in an overview


def write_curves(directory: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Writes each curve of the report into the directory, named for its metric, with the same axes.

    runs: what each run has logged, by the run's name.
    """
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in (chart for group in charts(runs)[0] for chart in group["charts"]):
        figure = Figure(figsize=(4.5, 3), layout="constrained")
        ax = figure.subplots()
        _draw(ax, chart)
        if len(runs) > 1:
            ax.legend(fontsize=8)
        files.append(directory / (re.sub(r"[^\w.-]+", "_", chart["name"]) + ".png"))
        figure.savefig(files[-1], dpi=200)
    return files


def write_overview(path: Path, history: Sequence[Mapping[str, Any]]) -> bool:
    """Writes the first curves of a run's report, in the report's order, as one PNG file; False if there are none.

    history: what the run has logged.
    """
    from matplotlib.figure import Figure

    shown = [chart for group in charts({"": history})[0] for chart in group["charts"]][:_SHOWN]
    if not shown:
        return False
    rows = math.ceil(len(shown) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for ax, chart in zip(axes, shown, strict=False):
        _draw(ax, chart)
        ax.set_title(ax.get_ylabel(), fontsize=9)
        ax.set_ylabel("")
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    figure.savefig(path, dpi=100)
    return True


def _draw(ax: "Axes", chart: Mapping[str, Any]) -> None:
    for run, points in chart["series"].items():
        values = [math.nan if value is None else value for _, value in points]
        ax.plot([step for step, _ in points], values, label=run, linewidth=1.3)
    ax.set_ylim(chart["low"], chart["high"])
    ax.set_xlabel("optimizer steps")
    ax.set_ylabel(chart["name"].replace("$", r"\$"))  # between dollars it would be a formula
    ax.grid(alpha=0.3)
