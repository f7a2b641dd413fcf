"""Kills runs at many moments, resumes them, and compares their ends with an uninterrupted run's, to the last bit.

    python -m tests.resuming.kills --methods ppo sft encoder compare --kills 20 --processes 1

A run is a process of its own (two with --processes 2), forked from this one so that nothing is imported again, and
killed by SIGKILL with the processes that it has started: after a random part of its CPU time, at a call by which a
checkpoint is written, or first so and then so. It is resumed from the newest whole checkpoint, or begun anew where
there is none. Prints one line of JSON per method.
"""

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from tqdm import tqdm

from tests.distributed.launching import free_port
from tests.resuming.runs import COMMANDS, TRAINERS, finish, make_inputs, same

METHODS = (*TRAINERS, *COMMANDS)
# The calls by which a checkpoint is written, from its first file to its name.
WRITING = ((torch, "save"), (os, "fsync"), (Path, "write_text"), (Path, "rename"), (Path, "mkdir"))
CALLS = (30, 120)  # of them: in most runs the first checkpoint is whole by then

# Large modules that a recipe imports only when it needs them.
LATE = ("matplotlib.backends.backend_agg", "rouge_score.rouge_scorer", "rlkd_trl.trainers.encoder")


def work(method: str, output_dir: Path, rank: int, killed_at: int | None) -> None:
    """In a process of its own. killed_at: number of the call in `WRITING` at which it kills itself."""

    def begin() -> None:
        (output_dir.parent / "started").touch()
        if killed_at is not None:
            die_at_call(killed_at)

    end = finish(method, output_dir, begin)
    result = output_dir.parent / f"rank{rank}.pt"
    torch.save(end, result.with_suffix(".part"))
    os.replace(result.with_suffix(".part"), result)


def die_at_call(number: int) -> None:
    """Kills this process before the `number`th call of the functions in `WRITING`."""
    left = [number]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in WRITING:
        setattr(owner, name, counted(getattr(owner, name)))


def share_with_runs() -> None:
    """Imports what runs import late, and keeps their garbage collection from copying all that is imported."""
    for module in LATE:
        importlib.import_module(module)
    extract_model_from_parallel(torch.nn.Linear(1, 1))  # DeepSpeed's
    # Its own lock is a semaphore of all forks, in which one that is killed while it holds it would stop the others.
    tqdm.set_lock(threading.RLock())
    gc.collect()
    gc.freeze()


def start(method: str, output_dir: Path, processes: int, killed_at: int | None = None) -> list[int]:
    """Process ids of a run in processes of its own."""
    port = free_port()
    ids = []
    for rank in range(processes):
        process = os.fork()
        with suppress(PermissionError):  # both do it, so that it is done for both; the child may have ended
            os.setpgid(process, process)
        if process:
            ids.append(process)
            continue
        code = 1
        try:
            silence = os.open(output_dir.parent / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(silence, 1), os.dup2(silence, 2)
            if processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "localhost"})
            torch.set_num_threads(1)
            work(method, output_dir, rank, killed_at if rank == 0 else None)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return ids


def run_to_end(ids: list[int], *, kill_after: float | None, started: Path) -> tuple[bool, float]:
    """Whether the processes have ended by themselves with success, and the CPU seconds of the first since `started`.

    It is killed after `kill_after` of these, whatever else the machine has to do, with what it has started. If one
    dies, the others are killed.
    """
    alive, codes, to_be_killed = set(ids), [], False
    before, spent = None, 0.0
    while alive:
        if ids[0] in alive and started.exists():
            now = _cpu_seconds(ids[0])
            before = now if before is None else before
            spent = max(spent, now - before)
            to_be_killed |= kill_after is not None and spent >= kill_after
        if to_be_killed:
            for process in alive:
                os.killpg(process, signal.SIGKILL)
        for process in list(alive):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                alive.discard(process)
                codes.append(status)
                to_be_killed |= status != 0
        time.sleep(0.01)  # a run takes half a second, and to look takes a millisecond
    return not any(codes), spent


def _cpu_seconds(process: int) -> float:
    """User and system time of a process and all that it has started, from Linux's tables; 0 of one that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        place = Path(f"/proc/{process}")
        fields = (place / "stat").read_text().rpartition(")")[2].split()
        own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # the last two: of children that have ended
        children = [child for task in place.glob("task/*/children") for child in task.read_text().split()]
        return own + sum(map(_cpu_seconds, map(int, children)))
    return 0.0


def differences(ends: list[dict], expected: list[dict]) -> list[str]:
    pairs_of_ends = zip(ends, expected, strict=True)
    return sorted({key for end, right in pairs_of_ends for key in right if not same(end[key], right[key])})


def survive(method: str, kills: int, processes: int, seed: int) -> dict:
    """Runs once without and `kills` times with kills; how many of these end as the first."""
    rng = random.Random(f"{seed} {method}")
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "inputs").mkdir()
        make_inputs(method, Path(root) / "inputs")
        whole = Path(root) / "whole" / "run"
        whole.parent.mkdir()
        ids = start(method, whole, processes)
        ended, seconds = run_to_end(ids, kill_after=None, started=whole.parent / "started")
        if not ended:
            raise RuntimeError((whole.parent / "log0.txt").read_text()[-3000:])
        expected = [torch.load(whole.parent / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
        survived, resumed, failures, deaths = 0, 0, [], {"CPU time": 0, "call": 0}
        for number in range(kills):
            directory = Path(root) / f"killed{number}"
            directory.mkdir()
            moments = []
            for aimed in [[False], [True, False], [True]][number % 3]:
                killed_at = rng.randint(*CALLS) if aimed else None
                kill_after = None if aimed else rng.uniform(0, 0.7 * seconds)
                (directory / "started").unlink(missing_ok=True)
                ids = start(method, directory / "run", processes, killed_at)
                ended, _ = run_to_end(ids, kill_after=kill_after, started=directory / "started")
                deaths["call" if aimed else "CPU time"] += not ended
                left = sorted(path.name for path in (directory / "run").rglob("checkpoint-*"))
                resumed += bool(left) and not ended
                moments.append(f"call {killed_at}" if aimed else f"{kill_after:.2f} CPU s, {left}")
                if ended:
                    break
            for file in directory.glob("rank*.pt"):
                file.unlink()
            ids = start(method, directory / "run", processes)
            ended, _ = run_to_end(ids, kill_after=None, started=directory / "none")
            files = [directory / f"rank{rank}.pt" for rank in range(processes)]
            if not ended or not all(file.is_file() for file in files):
                failures.append([moments, (directory / "log0.txt").read_text()[-1500:]])
                continue
            wrong = differences([torch.load(file, weights_only=False) for file in files], expected)
            if wrong:
                failures.append([moments, wrong])
            else:
                survived += 1
            shutil.rmtree(directory)
    return {
        "method": method,
        "processes": processes,
        "runs": kills,
        "kills": deaths,
        "resumed": resumed,
        "bit_identical": survived,
        "failures": failures,
    }


def main(*words: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(words or None)
    share_with_runs()
    for method in flags.methods:
        print(json.dumps(survive(method, flags.kills, flags.processes, flags.seed)), flush=True)


if __name__ == "__main__":
    main()
