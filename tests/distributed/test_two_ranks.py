"""Two processes and one, on the same global batch: the same losses, gradient norms and weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import worker
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def launch(output_dir: Path, processes: int) -> list[dict]:
    """Results by rank, or the processes' output if there are none: files, not exit codes, tell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    finished = subprocess.run(
        [*command, "-m", "tests.distributed.worker", str(output_dir)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    files = [output_dir / f"rank{rank}.pt" for rank in range(processes)]
    if not all(file.is_file() for file in files):
        pytest.fail(f"The workers left no results.\n{finished.stdout[-4000:]}\n{finished.stderr[-8000:]}")
    return [torch.load(file) for file in files]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return launch(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return launch(tmp_path_factory.mktemp("one"), 1)[0]


@pytest.mark.parametrize("name", worker.CASES)
def test_two_ranks_train_as_one(name, two_ranks, one_rank):
    """By hand: with denominators, counts or moments of one rank alone, every case here fails."""
    first, second, single = two_ranks[0][name], two_ranks[1][name], one_rank[name]
    assert_same_weights(second["weights"], first["weights"])

    tokens = list(zip(first["tokens"], second["tokens"], strict=True))
    assert [sum(pair) for pair in tokens] == single["tokens"], "the ranks sampled something else"
    assert any(one != other for one, other in tokens), "the test needs ranks with different numbers of tokens"

    assert len(first["logs"]) == len(single["logs"]) >= 3
    for step, (two, one) in enumerate(zip(first["logs"], single["logs"], strict=True)):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), f"step {step}"
    assert_same_weights(first["weights"], single["weights"], rtol=1e-4, atol=1e-5)
    assert largest_difference(single["weights"], single["first_weights"]) > 1e-3, "nothing was learnt"
    assert max(entry["grad_norm"] for entry in single["logs"]) > worker.COMMON["max_grad_norm"], "clipping must be on"
