"""Workers on several processes: `tests.distributed.MODULE OUTPUT_DIR` leaves `rank{i}.pt` for each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def run_processes(module: str, output_dir: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, "-m", f"tests.distributed.{module}", str(output_dir), *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=550,
    )


def launch(module: str, output_dir: Path, processes: int, *arguments: str) -> list[dict]:
    """Results by rank, or the processes' output if there are none: files, not exit codes, tell."""
    finished = run_processes(module, output_dir, processes, *arguments)
    files = [output_dir / f"rank{rank}.pt" for rank in range(processes)]
    if not all(file.is_file() for file in files):
        pytest.fail(f"The workers left no results.\n{finished.stdout[-4000:]}\n{finished.stderr[-8000:]}")
    return [torch.load(file) for file in files]
