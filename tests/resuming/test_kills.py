"""A run that was killed and resumed ends as one that was not, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resuming.runs import TRAINERS

ROOT = Path(__file__).parents[2]


def check_survival(methods: list[str], kills: int, processes: int = 1) -> None:
    command = [sys.executable, "-m", "tests.resuming.kills", "--methods", *methods, "--kills", str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [*command, "--processes", str(processes)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert [line["method"] for line in lines] == methods
    for line in lines:
        assert line["failures"] == [] and line["bit_identical"] == kills, line
        assert line["kills"] >= kills // 4, f"few were killed: {line}"


@pytest.mark.slow(120)
@pytest.mark.timeout(3600)
def test_killed_at_random_moments():
    """In one process, which imports everything once."""
    check_survival([*TRAINERS, "encoder"], 20)


@pytest.mark.slow(40)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("method", "kills"), [("compare", 20), ("encoder-stages", 8)])
def test_several_runs_in_one_command(method, kills):
    """Each of these is of 2 or 3 runs, and costs as much."""
    check_survival([method], kills)


@pytest.mark.slow(20)
def test_killed_on_two_ranks():
    check_survival(["ppo", "sft"], 4, processes=2)
