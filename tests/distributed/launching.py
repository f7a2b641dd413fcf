"""Workers on several processes: `main(OUTPUT_DIR)` of a module leaves `rank{i}.pt` for each."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
SECONDS = 550

# Workers are forked from one process that has imported what they need, which takes seconds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.distributed.sharded_worker", "tests.distributed.worker"])


def launch(module: str, output_dir: Path, processes: int, *arguments: str) -> list[dict]:
    """What `module.main(output_dir, *arguments)` has left on each rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [str(rank) for rank in range(processes)]
    environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
    return _results(module, output_dir, environments, arguments)


def without_launcher(module: str, output_dir: Path) -> dict:
    """What one process has left that no launcher has started, as `rank0.pt`."""
    return _results(module, output_dir, [{}], ())[0]


def _results(module: str, output_dir: Path, environments: list[dict[str, str]], arguments: tuple) -> list[dict]:
    """`rank{i}.pt` of a process in each environment, or a failure with the processes' output."""
    logs = [output_dir / f"log{rank}.txt" for rank in range(len(environments))]
    workers = [
        _FORKS.Process(target=_work, args=(module, output_dir, environment, log, arguments), daemon=True)
        for environment, log in zip(environments, logs, strict=True)
    ]
    for worker in workers:
        worker.start()
    _wait(workers)
    files = [output_dir / f"rank{rank}.pt" for rank in range(len(workers))]
    if not all(file.is_file() for file in files):
        said = "\n".join(log.read_text()[-6000:] for log in logs if log.is_file())
        pytest.fail(f"The workers left no results.\n{said}")
    return [torch.load(file) for file in files]


def _work(module: str, output_dir: Path, environment: dict[str, str], log: Path, arguments: tuple) -> None:
    os.environ.update({**environment, "CUDA_VISIBLE_DEVICES": ""})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    importlib.import_module(module).main(output_dir, *arguments)


def _wait(workers: list[BaseProcess]) -> None:
    """Until all have ended; if one fails, or it takes too long, the others, which wait for it, are killed."""
    end = time.monotonic() + SECONDS
    while any(worker.is_alive() for worker in workers):
        if time.monotonic() > end or any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.kill()
        time.sleep(0.05)


def run_by_torchrun(module: str, output_dir: Path, processes: int) -> subprocess.CompletedProcess:
    """`python -m module OUTPUT_DIR` on several processes, each of which imports what it needs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, "-m", module, str(output_dir)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
