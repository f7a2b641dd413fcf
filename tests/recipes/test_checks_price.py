"""recipes/benchmarks/checks_price.py: its summary by hand, and that its steps have checks in turns."""

import importlib.util
import sys

import pytest

from rlkd_trl.trainers import on_policy
from rlkd_trl.trainers.finite import FiniteTrainer
from tests.recipes.command_lines import ROOT


@pytest.fixture
def benchmark(monkeypatch):
    directory = ROOT / "recipes" / "benchmarks"
    monkeypatch.syspath_prepend(str(directory))
    spec = importlib.util.spec_from_file_location("checks_price", directory / "checks_price.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("workload", None)


def test_the_summary(benchmark):
    # The first two pairs are not counted; of the others the ratios are 1.1, 1.5 and 1.2.
    found = benchmark.summary({True: [9.0, 9.0, 1.1, 3.0, 2.4], False: [1.0, 1.0, 1.0, 2.0, 2.0]})
    assert found["ratio"] == pytest.approx(1.2) and found["pairs"] == 3
    assert (found["cpu_ms_with"], found["cpu_ms_without"]) == pytest.approx((2400, 2000))
    assert found["interval"] == pytest.approx([1.1, 1.5])


def test_checks_are_switched_off_in_every_second_step(benchmark):
    on, calls = (FiniteTrainer.training_step, on_policy._usable), []
    in_turns = benchmark.InTurns()
    for _ in range(4):
        in_turns.on_step_begin(None, None, None)
        calls.append((FiniteTrainer.training_step, on_policy._usable) == on)
        in_turns.on_step_end(None, None, None)
    assert calls == [True, False, True, False]
    assert [len(in_turns.seconds[has_checks]) for has_checks in (True, False)] == [2, 2]
    assert (FiniteTrainer.training_step, on_policy._usable) == on
