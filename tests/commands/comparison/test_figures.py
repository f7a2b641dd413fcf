"""What is drawn where: the figures' artists, read back, against the numbers they are to show."""

import sys

import pytest
from matplotlib.colors import to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from rlkd_trl.commands.comparison.figures import write_figures


def interval(mean: float, half_width: float | None = None) -> dict:
    return {"mean": mean, "half_width": half_width, "values": [mean]}


def row(model: str, greedy: dict, sampled: dict) -> dict:
    return {"model": model, "greedy": greedy, "sampled": sampled}


# A model of several seeds, one of one seed, and one without a finished run.
SEVERAL = row(
    "several",
    {"bleu": interval(20, 3), "distinct2": interval(0.5, 0.1)},
    {"bleu": interval(12, 2), "distinct2": interval(0.8, 0.05), "self_bleu": interval(30, 4)},
)
ONE = row(
    "one",
    {"bleu": interval(25), "distinct2": interval(0.4)},
    {"bleu": interval(15), "distinct2": interval(0.7), "self_bleu": interval(40)},
)
NONE = row("none", {}, {})
LATER = row(
    "several",
    {"bleu": interval(40, 5), "distinct2": interval(0.6, 0.2)},
    {"bleu": interval(32, 6), "distinct2": interval(0.9, 0.07), "self_bleu": interval(20, 8)},
)
BUDGETS = {"max_steps_150": [SEVERAL, ONE, NONE], "max_steps_400": [LATER, ONE, NONE]}


@pytest.fixture
def figures(tmp_path, monkeypatch) -> dict[str, Figure]:
    """By file name; nothing is rendered, which would take seconds."""
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: drawn.update({path.name: figure}))
    write_figures(tmp_path, BUDGETS)
    return drawn


def bars(container: ErrorbarContainer) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The ends of each error bar that is there."""
    _, _, collections = container.lines
    segments = [segment for collection in collections for segment in collection.get_segments()]
    return [(tuple(map(float, start)), tuple(map(float, end))) for start, end in filter(len, segments)]


def points(container: ErrorbarContainer) -> list[tuple[float, float]]:
    line, _, _ = container.lines
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def is_filled(container: ErrorbarContainer) -> bool:
    return container.lines[0].get_markerfacecolor() != "none"


def colour(container: ErrorbarContainer) -> tuple[float, ...]:
    return to_rgba(container.lines[0].get_color())


def test_each_metric_has_its_means_and_intervals(figures):
    axes = {ax.get_title(): ax for ax in figures["metrics.png"].axes if ax.get_visible()}
    assert list(axes) == ["BLEU", "distinct-2"]
    assert [label.get_text() for label in axes["BLEU"].get_yticklabels()] == ["several", "one", "none"]
    at = {
        "BLEU": ([(20, 3), (25, 0)], [(40, 5), (25, 0)]),
        "distinct-2": ([(0.5, 0.1), (0.4, 0)], [(0.6, 0.2), (0.4, 0)]),
    }
    for title, of_budgets in at.items():
        containers = axes[title].containers
        assert [container.get_label() for container in containers] == list(BUDGETS)
        for container, shift, expected in zip(containers, (-0.15, 0.15), of_budgets, strict=True):
            found = points(container)
            assert found == [(mean, pytest.approx(model + shift)) for model, (mean, _) in enumerate(expected)]
            (mean, half), _ = expected
            assert bars(container) == [
                ((pytest.approx(mean - half), found[0][1]), (pytest.approx(mean + half), found[0][1]))
            ], "of several seeds only"


def test_greedy_outputs_are_filled_and_sampled_ones_hollow_at_their_own_places(figures):
    panels = figures["quality_diversity.png"].axes
    assert [ax.get_title() for ax in panels] == [budget for budget in BUDGETS for _ in range(2)]
    assert [ax.get_xlabel() for ax in panels] == ["distinct-2", "self-BLEU"] * 2
    assert {ax.get_ylabel() for ax in panels} == {"BLEU"}
    # greedy and sampled, distinct-2 and BLEU; sampled, self-BLEU and BLEU; of one model after the other
    expected = [
        [(0.5, 20, True), (0.8, 12, False), (0.4, 25, True), (0.7, 15, False)],
        [(30, 12, False), (40, 15, False)],
        [(0.6, 40, True), (0.9, 32, False), (0.4, 25, True), (0.7, 15, False)],
        [(20, 32, False), (40, 15, False)],
    ]
    for ax, at in zip(panels, expected, strict=True):
        assert [(*points(container)[0], is_filled(container)) for container in ax.containers] == at
    of_several, of_one = (panels[0].containers[:2], panels[0].containers[2:])
    assert (
        len({colour(container) for container in of_several}) == len({colour(container) for container in of_one}) == 1
    )
    assert colour(of_several[0]) != colour(of_one[0])


def test_error_bars_of_quality_and_diversity(figures):
    left, right = figures["quality_diversity.png"].axes[:2]
    greedy, sampled = left.containers[:2]
    for container, (x, dx), (y, dy) in (
        (greedy, (0.5, 0.1), (20, 3)),
        (sampled, (0.8, 0.05), (12, 2)),
        (right.containers[0], (30, 4), (12, 2)),
    ):
        across, upright = bars(container)
        assert (*across[0], *across[1]) == pytest.approx((x - dx, y, x + dx, y))
        assert (*upright[0], *upright[1]) == pytest.approx((x, y - dy, x, y + dy))
    assert not any(bars(container) for container in left.containers[2:]), "one seed has no interval"


@pytest.mark.slow
def test_files(tmp_path):
    paths = write_figures(tmp_path, BUDGETS)
    assert [path.name for path in paths] == ["metrics.png", "quality_diversity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_matplotlib_the_figures_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_figures(tmp_path, BUDGETS) == []
    assert 'pip install "rlkd_trl[figures]"' in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
