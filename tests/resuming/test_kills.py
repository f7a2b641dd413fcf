"""A run that was killed and resumed ends as one that was not, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = ("ppo", "rloo", "reinforce", "kd", "all-actions", "sft")


def survive(method: str, kills: int, processes: int = 1) -> dict:
    command = [sys.executable, "-m", "tests.resuming.kills", "--methods", method, "--kills", str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [*command, "--processes", str(processes)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


@pytest.mark.parametrize(
    ("method", "kills"),
    [("ppo", 3), *(pytest.param(method, 20, marks=pytest.mark.slow) for method in METHODS)],
)
def test_killed_at_random_moments(method, kills):
    found = survive(method, kills)
    assert found["failures"] == [] and found["bit_identical"] == kills
    assert found["kills"] >= kills // 2, "few were killed"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "sft"])
def test_killed_on_two_ranks(method):
    found = survive(method, 4, processes=2)
    assert found["failures"] == [] and found["bit_identical"] == 4 and found["kills"] >= 1
