"""A run that was killed and resumed ends as one that was not, to the last bit.

After a change to checkpoints or to resuming, kill more often: `python -m tests.resuming.kills --kills 20`.
"""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import run_forked
from tests.resuming.runs import TRAINERS

SECONDS = 3600


def check_survival(place: Path, methods: list[str], kills: int, processes: int = 1) -> None:
    words = ["--methods", *methods, "--kills", str(kills), "--processes", str(processes)]
    said = run_forked("tests.resuming.kills", place, [{"OMP_NUM_THREADS": "1"}], *words, seconds=SECONDS)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"method"')]
    assert [line["method"] for line in lines] == methods, said[-3000:]
    for line in lines:
        assert line["failures"] == [] and line["bit_identical"] == kills, line
        assert line["kills"]["call"] and line["resumed"], f"none was killed at a call, or all began anew: {line}"
    # How much CPU time a run takes is never the same: one that is to be killed late may end before.
    assert sum(line["kills"]["CPU time"] for line in lines), lines


@pytest.mark.slow(20)
@pytest.mark.timeout(SECONDS)
def test_killed_at_random_moments(tmp_path):
    check_survival(tmp_path, [*TRAINERS, "encoder"], 2)


@pytest.mark.slow(9)
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("method", ["compare", "encoder-stages"])
def test_several_runs_in_one_command(method, tmp_path):
    """Each of these is of 2 or 3 runs, and costs as much."""
    check_survival(tmp_path, [method], 2)


@pytest.mark.slow(7)
def test_killed_on_two_ranks(tmp_path):
    check_survival(tmp_path, ["ppo", "sft"], 2, processes=2)
