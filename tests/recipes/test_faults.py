"""Two processes of a recipe, and one of them, or the launcher, is killed, stopped or interrupted.

Each launcher once for real; the other cases in forks, which import nothing.
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.forked_launchers import ForkedLauncher
from tests.distributed.launching import ENVIRONMENT, ROOT
from tests.recipes.command_lines import COLUMNS, SAMPLING

pytestmark = pytest.mark.slow(10)

CPU_2 = ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
LAUNCHERS = {
    "rlkd-trl": "rlkd-trl --num_processes 2 rloo_kd",
    "accelerate": f"accelerate launch --config_file {CPU_2} {ROOT}/recipes/rloo_kd.py",
}
LAUNCHERS["accelerate for real"] = LAUNCHERS["accelerate"]
LAUNCHERS["rlkd-trl for real"] = LAUNCHERS["rlkd-trl"].replace("rlkd-trl", "python -m rlkd_trl")
TIMEOUT = 8  # --ddp_timeout
KILLED = r"error: process {} (was killed by signal 9|\(pid \d+\) has ended)"
FAILING_REWARD = """
import os, torch

def failing(inputs):
    if os.environ["RANK"] == "1":
        raise ValueError("no such key")
    return torch.zeros(inputs.completion_ids_BT.shape)
"""


@dataclass
class Ended:
    """code: exit code. seconds: from the fault to the launcher's end. errors: stderr."""

    code: int
    seconds: float
    errors: str
    orphans: list[int]

    @property
    def messages(self) -> list[str]:
        return re.findall(r"^(?:error: |Stopped )[^\n]*", self.errors, flags=re.MULTILINE)


class Run:
    """A recipe that would go on for hours."""

    def __init__(self, launcher: str, pair, data, directory: Path, more: str = ""):
        self.output_dir, self._errors = directory / "out", directory / "stderr"
        flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {data} {COLUMNS} {SAMPLING}"
        flags += f" --max_steps 1000000 --per_device_train_batch_size 8 --save_steps 2 --save_total_limit 2 {more}"
        flags += f" --ddp_timeout {TIMEOUT} --output_dir {self.output_dir} --disable_tqdm True"
        words = f"{LAUNCHERS[launcher]} {flags}".split()
        if "for real" in launcher:
            words[0] = str(Path(sys.executable).with_name(words[0]))
            output = {"stdout": subprocess.DEVNULL, "stderr": self._errors.open("w")}
            self._launcher = subprocess.Popen(words, cwd=directory, env=ENVIRONMENT, **output)
        else:
            output = {"stdout": directory / "stdout", "stderr": self._errors}
            self._launcher = ForkedLauncher(words, cwd=directory, env=ENVIRONMENT, **output)

    def wait_for_a_checkpoint(self) -> None:
        end = time.monotonic() + 150
        while not (self.output_dir / "checkpoint-2").is_dir():
            assert self._launcher.poll() is None and time.monotonic() < end, self._errors.read_text()[-3000:]
            time.sleep(0.2)

    def processes(self) -> dict[int, int]:
        """Rank to pid."""
        found = {}
        children = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children").read_text().split()
        for pid in children:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            variables.append(Path(f"/proc/{pid}/comm").read_text().strip().replace("rank", "RANK="))  # of a fork
            found |= {int(v.removeprefix("RANK=")): int(pid) for v in variables if v.startswith("RANK=")}
        return found

    def fault(self, signum: int, rank: int | None) -> Ended:
        """rank: who gets the signal; None is the launcher."""
        processes = self.processes()
        assert sorted(processes) == [0, 1]
        start = time.monotonic()
        os.kill(self._launcher.pid if rank is None else processes[rank], signum)
        return self.end(start, list(processes.values()))

    def end(self, start: float, pids: list[int]) -> Ended:
        code = self._launcher.wait(90)
        seconds = time.monotonic() - start
        end = time.monotonic() + 10  # the kernel needs a moment to end them
        while (orphans := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
            time.sleep(0.05)
        return Ended(code, seconds, self._errors.read_text(), orphans)

    def clean(self) -> None:
        for pid in [*self.processes().values(), self._launcher.pid] if self._launcher.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        self._launcher.wait()


@pytest.fixture
def start(checkpoints, train_csv, tmp_path):
    runs = []

    def started(launcher: str, more: str = "") -> Run:
        runs.append(Run(launcher, checkpoints["t5-tied"], train_csv, tmp_path, more))
        return runs[0]

    yield started
    for run in runs:
        run.clean()


# Of what accelerate's launcher says itself, which ends by a traceback, nothing can be kept from here.
@pytest.mark.parametrize(
    ("launcher", "tracebacks", "signum", "rank", "said"),
    [
        ("accelerate for real", 1, signal.SIGKILL, 1, KILLED.format(1)),
        ("rlkd-trl", 0, signal.SIGKILL, 0, KILLED.format(0)),
        ("rlkd-trl", 0, signal.SIGSTOP, 1, r"error: process 1 \(pid \d+\) is stopped \(SIGSTOP\)"),
    ],
)
def test_the_others_end_with_one_message_that_names_it(launcher, tracebacks, signum, rank, said, start):
    run = start(launcher)
    run.wait_for_a_checkpoint()
    ended = run.fault(signum, rank)
    assert len(ended.messages) == 1 and re.match(said, ended.messages[0]), ended.errors[-3000:]
    assert ended.errors.count("Traceback") == tracebacks
    assert ended.code == (1 if "accelerate" in launcher or signum == signal.SIGSTOP else 128 + signum)
    assert ended.orphans == []
    # The others wait for one that is stopped; the launcher kills it where it does not end when told.
    assert ended.seconds < (TIMEOUT + 20 if signum == signal.SIGSTOP else 20)


@pytest.mark.parametrize(
    ("signum", "launcher", "tracebacks"), [(signal.SIGINT, "rlkd-trl for real", 0), (signal.SIGTERM, "accelerate", 1)]
)
def test_a_signal_to_the_launcher_leaves_a_checkpoint(signum, launcher, tracebacks, start):
    run = start(launcher)
    run.wait_for_a_checkpoint()
    ended = run.fault(signum, None)
    assert len(ended.messages) == 1 and "To continue: the same command with --resume" in ended.errors
    step = int(re.match(r"Stopped after step (\d+); .* holds all of it", ended.messages[0]).group(1))
    assert (run.output_dir / f"checkpoint-{step}" / "manifest.json").is_file()
    assert ended.errors.count("Traceback") == tracebacks
    assert ended.code == (1 if "accelerate" in launcher else 128 + signum)
    assert ended.orphans == []


@pytest.mark.parametrize(("launcher", "code", "tracebacks"), [("rlkd-trl", 2, 0), ("accelerate", 1, 1)])
def test_a_reward_that_raises_in_one_process_ends_both_at_once(launcher, code, tracebacks, start, tmp_path):
    (tmp_path / "own.py").write_text(FAILING_REWARD)
    ended = start(launcher, f"--reward {tmp_path}/own.py:failing --ddp_timeout 600").end(time.monotonic(), [])
    assert len(ended.messages) == 1 and "raised ValueError: no such key" in ended.messages[0], ended.errors[-3000:]
    assert ended.errors.count("Traceback") == tracebacks
    assert ended.code == code
