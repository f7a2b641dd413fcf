"""The benchmark of the planner's time: which phases it compares, and its table."""

import json
import sys
from types import SimpleNamespace

import pytest

from tests.recipes.command_lines import ROOT, main_of


@pytest.fixture
def names(monkeypatch) -> SimpleNamespace:
    """The script's global names, with models of one layer; it imports its neighbours, as a script does."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    scope = main_of("benchmarks/planned_time").__globals__
    for model in ("TEACHER", "STUDENT"):
        monkeypatch.setitem(scope, model, scope["Dimensions"](d_model=32, d_ff=32, heads=2, layers=1))
    return SimpleNamespace(**scope)


def test_log_probabilities_are_part_of_the_measured_update(names):
    """Planned over measured, by hand: 1 + 2 + (0.5 + 2.5) of 2 + 2 + 4."""
    planned = {"sampling": 1.0, "log_probs": 0.5, "scoring": 2.0, "fetching": 0.0, "update": 2.5, "exchange": 0.0}
    row = {
        "shape": {"prompt_tokens": 8, "completion_tokens": 4, "prompts": 2, "samples": 3, "vocabulary": 40},
        "measured": {"generate": 2.0, "score": 2.0, "update": 4.0},
        "planned": planned,
    }
    cells = [cell.strip() for cell in names.table([row]).splitlines()[2].strip("|").split("|")]
    assert cells == ["S=8 T=4 P=2 K=3", "2.00 / 1.00", "2.00 / 2.00", "4.00 / 3.00", "8.00 / 6.00", "0.75"]


@pytest.mark.slow(4)
def test_a_machine_twice_as_fast_is_planned_half_the_time(names):
    shape = names.Shape(8, 4, 4, 4, 40)
    slow = names.Machine(0.0, 1e9, 1e9, 1e9, 1.0, 1.0, 1e-6)
    fast = names.Machine(0.0, 2e9, 2e9, 2e9, 1.0, 1.0, 0.5e-6)
    assert names.planned(shape, slow).total == pytest.approx(2 * names.planned(shape, fast).total)


@pytest.mark.slow
def test_a_shape_is_measured_and_planned(names, tmp_path, monkeypatch):
    """With the machine's rates from before and after it, whose means are used."""
    scope, rates = names.main.__globals__, iter([1e9, 3e9])
    monkeypatch.setitem(scope, "SHAPES", [names.Shape(8, 4, 4, 4, 40)])
    monkeypatch.setitem(scope, "this_machine", lambda: names.Machine(0.0, next(rates), 1e9, 1e9, 1.0, 1.0, 1e-6))
    monkeypatch.setitem(scope, "measured", lambda shape, steps: {"generate": 2.0, "score": 2.0, "update": 4.0})
    monkeypatch.setattr(sys, "argv", ["planned_time.py", "--results_dir", str(tmp_path)])
    names.main()
    (row,) = json.loads((tmp_path / "planned_time.json").read_text())
    assert row["machine"]["float32"] == 2e9 and row["planned"]["scoring"] > 0
    assert "| S=8 T=4 P=4 K=4 | 2.00 / " in (tmp_path / "planned_time.md").read_text()
