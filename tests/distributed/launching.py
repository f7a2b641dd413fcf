"""Processes of tests, forked from one that has imported everything."""

import functools
import gc
import importlib
import inspect
import multiprocessing
import os
import random
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
SECONDS = 550

# What a process imports takes it six seconds: processes are forked from one that has done so.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.conftest",  # no fsync
        "tests.distributed.sharded_worker",
        "tests.distributed.worker",
        # What recipes import only when they need it.
        "rlkd_trl.trainers.encoder",
        "rouge_score.rouge_scorer",
        "matplotlib.backends.backend_agg",
    ]
)
# There is one such process, of benchmarks that tests run too: they do not choose anew what it imports.
FORKS.set_forkserver_preload = lambda modules: None


def free_port() -> int:
    """A port on which nobody listens.

    None of those that Linux chooses by itself: until the first rank listens, another connection could be given it.
    """
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise OSError("No port was free.")


def environments_of_ranks(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each process of one machine."""
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
    shared["MASTER_PORT"] = free_port()
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def run_forked(
    module: str, directory: Path, environments: list[dict[str, str]], *arguments: object, seconds: float = SECONDS
) -> str:
    """Runs `module.main(*arguments)` in `directory`, in one process for each environment; returns what they print.

    If one fails, or it takes too long, the others, which wait for it, are killed.
    """
    logs = [directory / f"log{number}.txt" for number in range(len(environments))]
    workers = [
        FORKS.Process(target=_work, args=(module, directory, environment, log, arguments), daemon=True)
        for environment, log in zip(environments, logs, strict=True)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + seconds
    while any(worker.is_alive() for worker in workers):
        if time.monotonic() > end or any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.kill()
        time.sleep(0.05)
    return "\n".join(log.read_text() for log in logs if log.is_file())


def _work(module: str, directory: Path, environment: dict[str, str], log: Path, arguments: tuple) -> None:
    os.environ.update({**environment, "CUDA_VISIBLE_DEVICES": ""})
    os.chdir(directory)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    # Each trainer and each engine of DeepSpeed collects garbage, which takes longer than its steps: here they do not.
    gc.freeze()
    for collector in ("accelerate.utils.memory", "deepspeed.runtime.zero.utils"):
        importlib.import_module(collector).gc = SimpleNamespace(collect=lambda: 0)
    # For every call of its functions torch reads their parameters; ZeRO-3 has some around each module.
    torch.autograd.function.inspect = SimpleNamespace(signature=functools.cache(inspect.signature))
    importlib.import_module(module).main(*arguments)


def launch(module: str, output_dir: Path, processes: int, *arguments: object) -> list[dict]:
    """What `module.main(output_dir, *arguments)` has left on each rank, as `rank{i}.pt`."""
    return _results(module, output_dir, environments_of_ranks(processes), arguments)


def without_launcher(module: str, output_dir: Path) -> dict:
    """What a process that no launcher has started has left, as `rank0.pt`."""
    return _results(module, output_dir, [{}], ())[0]


def _results(module: str, output_dir: Path, environments: list[dict[str, str]], arguments: tuple) -> list[dict]:
    said = run_forked(module, output_dir, environments, output_dir, *arguments)
    files = [output_dir / f"rank{rank}.pt" for rank in range(len(environments))]
    if not all(file.is_file() for file in files):
        pytest.fail(f"The workers left no results.\n{said[-12000:]}")
    return [torch.load(file) for file in files]
