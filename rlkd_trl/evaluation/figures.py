"""A run's curves as PNG files, for papers. They need matplotlib, the extra `figures`."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkd_trl.evaluation.curves import charts


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
        for run, points in chart["series"].items():
            values = [math.nan if value is None else value for _, value in points]
            ax.plot([step for step, _ in points], values, label=run, linewidth=1.3)
        ax.set_ylim(chart["low"], chart["high"])
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel(chart["name"].replace("$", r"\$"))  # between dollars it would be a formula
        ax.grid(alpha=0.3)
        if len(runs) > 1:
            ax.legend(fontsize=8)
        files.append(directory / (re.sub(r"[^\w.-]+", "_", chart["name"]) + ".png"))
        figure.savefig(files[-1], dpi=200)
    return files
