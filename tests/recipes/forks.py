"""Recipes that commands start as processes of their own: forks of this process, which need not import anything.

Real processes with exit codes and signals; what a new interpreter does is left to the tests that launch one.
"""

import importlib
import os
import pkgutil
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlkd_trl import errors
from rlkd_trl.commands import apart
from rlkd_trl.commands.comparison import cells
from tests.recipes.command_lines import run

# What recipes import as late as they train and evaluate.
LATE = ("rlkd_trl.trainers.encoder", "rlkd_trl.trainers.kd", "rlkd_trl.trainers.ppo", "rouge_score.rouge_scorer")


@cache
def import_before_forking() -> None:
    """What every fork would import anew."""
    for name in LATE:
        importlib.import_module(name)


class Fork:
    """Stands in for `subprocess.Popen`: runs a recipe in a fork of this process, so that nothing is imported again."""

    def __init__(self, words: list[str], *, stdout, stderr, env: dict[str, str]):
        import_before_forking()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            errors.end_with_parent()
            os.dup2(stdout.fileno(), 1), os.dup2(stderr.fileno(), 2)
            sys.stdout, sys.stderr = stdout, stderr  # pytest's are no longer those of the file descriptors
            os.environ.update(env)
            code = run(shlex.join([Path(words[1]).stem, *words[2:]]))
        except BaseException:
            traceback.print_exc()
        finally:
            stdout.flush(), stderr.flush()
            os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        """It still can be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_in_fork(function: Callable[[], None]) -> int:
    """The exit code of a fork that calls the function as a command's `main`."""
    import_before_forking()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        errors.end_with_parent()
        errors.run(function)
        code = 0
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def fork_recipes(patch: pytest.MonkeyPatch) -> None:
    """From here on: the runs of comparisons, searches and chains, the demos' training, and benchmarks' recipes."""
    start = subprocess.run

    def started(words: list[str], **settings) -> object:
        if len(words) < 2 or Path(words[1]).parent.name != "recipes":
            return start(words, **settings)
        return SimpleNamespace(returncode=run(shlex.join([Path(words[1]).stem, *words[2:]])), stdout="", stderr="")

    def trained(train: str, request: apart.Request) -> str:
        return "done" if run_in_fork(lambda: pkgutil.resolve_name(train)(**asdict(request))) == 0 else "failed"

    patch.setattr(subprocess, "run", started)
    patch.setattr(cells, "subprocess", SimpleNamespace(Popen=Fork))
    patch.setattr(apart, "_train_apart", trained)
