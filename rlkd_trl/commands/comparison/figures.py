"""Figures of a comparison, from the rows of `comparison.summarise`. They need matplotlib, the extra `figures`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.comparison.tables import GREEDY, SAMPLED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Budgets = Mapping[str, Sequence[dict]]
_MARKERS = "osD^v"


def write_figures(output_dir: Path, budgets: Budgets, suffix: str = "") -> list[Path]:
    """Writes `metrics.png` and `quality_diversity.png`, with a suffix to the names; without matplotlib, says so and
    returns an empty list."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print('No figures: they need matplotlib. Run pip install "rlkd_trl[figures]", then this command again.')
        return []
    return [
        draw_metrics(output_dir / f"metrics{suffix}.png", budgets),
        draw_quality_diversity(output_dir / f"quality_diversity{suffix}.png", budgets),
    ]


def draw_metrics(path: Path, budgets: Budgets) -> Path:
    """Each metric of the greedy outputs: one line per model, one colour per budget, 95 % intervals over seeds."""
    from matplotlib.figure import Figure

    models = [row["model"] for row in next(iter(budgets.values()))]
    metrics = [
        metric for metric in GREEDY if any(metric in row["greedy"] for rows in budgets.values() for row in rows)
    ]
    columns = 4
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.4 * columns, (1.2 + 0.3 * len(models)) * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for ax in axes[len(metrics) :]:
        ax.set_visible(False)
    for ax, metric in zip(axes, metrics, strict=False):
        for number, (budget, rows) in enumerate(budgets.items()):
            shift = 0.6 * ((number + 0.5) / len(budgets) - 0.5)
            intervals = [(i, row["greedy"][metric]) for i, row in enumerate(rows) if metric in row["greedy"]]
            ax.errorbar(
                [interval["mean"] for _, interval in intervals],
                [i + shift for i, _ in intervals],
                xerr=[interval["half_width"] or math.nan for _, interval in intervals],
                fmt="o",
                capsize=2,
                label=budget,
            )
        ax.set_title(GREEDY[metric][0], fontsize=10)
        ax.set_yticks(range(len(models)), models)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(budgets))
    figure.savefig(path, dpi=150)
    return path


def draw_quality_diversity(path: Path, budgets: Budgets) -> Path:
    """Quality against diversity, one line of panels per budget: BLEU (the teacher's NLL where there are no references)
    over distinct-2 and over self-BLEU. Filled marks are greedy outputs, hollow ones sampled."""
    from matplotlib.figure import Figure

    has_bleu = any("bleu" in row["greedy"] for rows in budgets.values() for row in rows)
    quality = "bleu" if has_bleu else "teacher_nll_per_token"
    figure = Figure(figsize=(11, 4.2 * len(budgets)), layout="constrained")
    axes = figure.subplots(len(budgets), 2, squeeze=False)
    for (distinct, self_bleu), (budget, rows) in zip(axes, budgets.items(), strict=True):
        for number, row in enumerate(rows):
            colour, marker = f"C{number}", _MARKERS[number // 10 % len(_MARKERS)]  # there are ten colours
            _point(distinct, row["greedy"], "distinct2", quality, fmt=marker, color=colour, label=row["model"])
            _point(distinct, row["sampled"], "distinct2", quality, fmt=marker, color=colour, markerfacecolor="none")
            _point(self_bleu, row["sampled"], "self_bleu", quality, fmt=marker, color=colour, markerfacecolor="none")
        for ax, diversity in ((distinct, "distinct2"), (self_bleu, "self_bleu")):
            ax.set_title(budget, fontsize=10)
            ax.set_xlabel(SAMPLED[diversity][0])
            ax.set_ylabel(SAMPLED[quality][0])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="filled: greedy\nhollow: sampled")
    figure.savefig(path, dpi=150)
    return path


def _point(ax: "Axes", metrics: Mapping[str, dict], x: str, y: str, **style: str) -> None:
    """One model's mean with its intervals both ways, where it has both metrics."""
    if x not in metrics or y not in metrics:
        return
    errors = {"xerr": metrics[x]["half_width"], "yerr": metrics[y]["half_width"]}
    ax.errorbar(metrics[x]["mean"], metrics[y]["mean"], **errors, capsize=2, **style)
