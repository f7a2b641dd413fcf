"""Kills training at many moments, resumes it, and compares the end with an uninterrupted run's, to the last bit.

    python -m tests.resuming.kills --methods ppo rloo reinforce kd all-actions sft --kills 20 --processes 1

A run is a process of its own (two with --processes 2), forked from this one so that nothing is imported again, and
killed by SIGKILL: after a random part of its CPU time, and, every third time, at a call by which a checkpoint is
written. It is resumed from the newest whole checkpoint, or begun anew where there is none, and may be killed again.
Prints one line of JSON per method.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import torch

from rlkd_trl.trainers.checkpoint_files import newest_whole
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.conftest import tiny_t5, word_tokenizer
from tests.trainers.tiny_runs import build, pairs, prompts

# Rollouts of several optimizer steps with accumulation, so that most checkpoints lie inside of one; logs and saves at
# other intervals than these.
INSIDE_ROLLOUTS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 3,
    "lr_scheduler_type": "linear",
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_data": prompts(4, seed=3),
    "data": prompts(24),
}
ADAPTIVE_KL = {"beta": 0.2, "kl_target": 1.0, "kl_horizon": 100.0}
RUNS = {
    "ppo": ("ppo", {**ADAPTIVE_KL, "early_stop_kl": 0.05}),
    "rloo": ("rloo-token", ADAPTIVE_KL),
    "reinforce": ("reinforce", {"behaviour_sync_steps": 8, "baseline": "min_variance"}),
    "kd": ("kd", {"lmbda": 0.5, "sequences": "data", "data": pairs(24)}),
    "all-actions": ("all-actions", {"teacher_mix": 0.3}),
    "sft": ("sft", {}),
}
# Seconds and what is computed from them differ between any two runs.
TIMES = ("seconds", "runtime", "per_second", "flos")
# The calls by which a checkpoint is written, from its first file to its name.
WRITING = ((torch, "save"), (os, "fsync"), (Path, "write_text"), (Path, "rename"), (Path, "mkdir"))


def make_trainer(method: str, output_dir: Path):
    name, settings = RUNS[method]
    if name != "sft":
        return build(name, output_dir, **{**INSIDE_ROLLOUTS, **settings})
    ignored = ("steps_per_generation", "num_iterations", "eval_data", "data", "eval_strategy", "eval_steps")
    settings = {k: v for k, v in INSIDE_ROLLOUTS.items() if k not in ignored}
    data = prompts(30).map(lambda row: {"target": row["prompt"]})
    args = SupervisedConfig(str(output_dir), learning_rate=1e-2, disable_tqdm=True, **settings)
    return SupervisedTrainer(tiny_t5(tied=True, dropout=0.1), args, data, word_tokenizer())


def train(method: str, output_dir: Path, killed_at: int | None) -> None:
    """In a process of its own. killed_at: number of the call in `WRITING` at which it kills itself."""
    trainer = make_trainer(method, output_dir)
    checkpoint, _ = newest_whole(output_dir) if output_dir.is_dir() else (None, {})
    (output_dir.parent / "started").touch()
    if killed_at is not None:
        die_at_call(killed_at)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    logs = [
        {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
        for entry in trainer.state.log_history
    ]
    end = {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "logs": logs,
        "generated_tokens": getattr(getattr(trainer, "rollout_state", None), "generated_tokens", 0),
        "beta": getattr(getattr(trainer, "rollout_state", None), "beta", 0),
    }
    result = output_dir.parent / f"rank{trainer.args.process_index}.pt"
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


def start(method: str, output_dir: Path, processes: int, killed_at: int | None = None) -> list[int]:
    """Process ids of a run in processes of its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ids = []
    for rank in range(processes):
        process = os.fork()
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
            train(method, output_dir, killed_at if rank == 0 else None)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return ids


def run_to_end(ids: list[int], *, kill_after: float | None, started: Path) -> tuple[bool, float]:
    """Whether the processes have ended by themselves with success, and the CPU seconds of training of the first.

    It is killed after `kill_after` of these, whatever else the machine has to do. If one dies, the others are killed.
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
                os.kill(process, signal.SIGKILL)
        for process in list(alive):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                alive.discard(process)
                codes.append(status)
                to_be_killed |= status != 0
        time.sleep(0.003)
    return not any(codes), spent


def _cpu_seconds(process: int) -> float:
    """User and system time, from Linux's table of processes; 0 of one that has ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def same(one, other) -> bool:
    """Equal to the last bit, in tensors and in plain values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def differences(ends: list[dict], expected: list[dict]) -> list[str]:
    pairs_of_ends = zip(ends, expected, strict=True)
    return sorted({key for end, right in pairs_of_ends for key in right if not same(end[key], right[key])})


def survive(method: str, kills: int, processes: int, seed: int) -> dict:
    """Runs once without and `kills` times with kills; how many of these end as the first."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole" / "run"
        whole.parent.mkdir()
        ids = start(method, whole, processes)
        ended, seconds = run_to_end(ids, kill_after=None, started=whole.parent / "started")
        if not ended:
            raise RuntimeError((whole.parent / "log0.txt").read_text()[-3000:])
        expected = [torch.load(whole.parent / f"rank{rank}.pt") for rank in range(processes)]
        survived, failures, deaths = 0, [], 0
        for number in range(kills):
            directory = Path(root) / f"killed{number}"
            directory.mkdir()
            moments = []
            for _ in range(rng.choice([1, 1, 2])):
                aimed = number % 3 == 2
                killed_at = rng.randint(1, 120) if aimed else None
                kill_after = None if aimed else rng.uniform(0, 0.9 * seconds)
                (directory / "started").unlink(missing_ok=True)
                ids = start(method, directory / "run", processes, killed_at)
                ended, _ = run_to_end(ids, kill_after=kill_after, started=directory / "started")
                deaths += not ended
                left = sorted(path.name for path in (directory / "run").glob("checkpoint-*"))
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
            wrong = differences([torch.load(file) for file in files], expected)
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
        "bit_identical": survived,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    for method in flags.methods:
        print(json.dumps(survive(method, flags.kills, flags.processes, flags.seed)), flush=True)


if __name__ == "__main__":
    main()
