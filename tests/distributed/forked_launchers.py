"""Launchers, and the processes that they start, as forks of a process that has imported everything.

Launched for real, each of three processes imports for five CPU seconds, and the test takes one. Signals, sessions and
the exit codes of `SystemExit` are as they are there. Not so, and for the tests that launch `accelerate launch` and
`rlkd-trl` for real: the interpreter's start; its end, with what `atexit` runs and threads that it waits for; death by
an uncaught Ctrl-C, which is exit code 1 here; that a rank finds out by its command line that it has a launcher; and
the 30 seconds that torch's launcher gives its processes after SIGTERM, which are 3.
"""

import ctypes
import gc
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets

from rlkd_trl import errors
from tests.distributed.launching import FORKS, SECONDS

_PR_SET_NAME = 15  # of Linux's prctl
_PATIENCE = 3  # seconds that a process has to obey SIGTERM before it is killed; torch's launcher gives it 30
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


class ForkedLauncher:
    """Like `subprocess.Popen`, of a command line that begins with `rlkd-trl`, `accelerate` or `torchrun`.

    Its processes have their ranks for names, `rank0` and so on, in /proc/PID/comm.
    """

    def __init__(self, words: list[str], *, cwd: Path, env: dict[str, str], stdout: Path, stderr: Path):
        self._process: BaseProcess = FORKS.Process(target=_launch, args=(words, cwd, env, stdout, stderr), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the launcher", timeout)
        return self._process.exitcode


def launched(*command_lines: str, directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """As many launchers at a time as there are command lines; the first exit code that is not 0, and what they print.

    It is 0 if all are.
    """
    output = {"stdout": directory / "stdout", "stderr": directory / "stderr"}
    launchers = [ForkedLauncher(line.split(), cwd=directory, env=environment, **output) for line in command_lines]
    codes = [launcher.wait(SECONDS) for launcher in launchers]
    return subprocess.CompletedProcess(
        command_lines, next(filter(None, codes), 0), *(file.read_text() for file in output.values())
    )


def _launch(words: list[str], directory: Path, environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing import PContext
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.run import main as torchrun

    from rlkd_trl.commands import console

    _be_new(words, environment)
    os.chdir(directory)
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    subprocess_handler.Popen = _Rank
    PContext.close.__defaults__ = (None, _PATIENCE)
    if "HF_DATASETS_CACHE" in environment:  # which datasets has read already
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    {"rlkd-trl": console.main, "accelerate": accelerate, "torchrun": torchrun}[words[0]]()


def _be_new(argv: list[str], environment: dict[str, str]) -> None:
    """What a fork would have of its parent, and a new interpreter has not."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(argv)
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # what is imported


def _exit_code(run: Callable[[], object]) -> int:
    """That of an interpreter, with what it prints."""
    try:
        run()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
    return 0


class _Rank:
    """What torch's launcher needs of `subprocess.Popen`: runs `python -u SCRIPT FLAGS` in a fork of the launcher."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], *, stdout, stderr, start_new_session: bool):
        self.args, self.returncode = args, None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            if start_new_session:
                os.setsid()
            _be_new(list(args[2:]), env)
            ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank{env['RANK']}".encode())
            errors._is_launcher = lambda words: True  # its own command line is that of what it was forked from
            code = _exit_code(lambda: runpy.run_path(args[2], run_name="__main__"))
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode
