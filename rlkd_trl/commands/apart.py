"""Trains the models of a demo in a separate process that knows nothing of how the run was launched.

Otherwise DeepSpeed's engine would train them, of which a process can have only one, and several processes would train
them differently than one.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from rlkd_trl.errors import is_first_process

# Beginnings of the environment variables that launchers (torchrun, accelerate, MPI) set for their processes.
_LAUNCHERS_PREFIXES = (
    *("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_", "PMI_", "OMPI_", "MASTER_", "GROUP_", "ROLE_"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK"),
)
_WAIT_SECONDS = 3600.0  # for which the other processes wait for the first one
_TRAIN = """
import json, pkgutil, sys
request = json.load(sys.stdin)
sys.path[:] = request["path"]
from rlkd_trl.errors import end_with_parent, run
end_with_parent()
run(lambda: pkgutil.resolve_name(request["train"])(**request["of"]))
"""


class Request(Protocol):
    """Which models to train: a dataclass of values that JSON has."""

    output_dir: str


def make_apart(train: str, request: Request) -> None:
    """Trains models in a new process, which the first of the launched processes starts; the others wait for them.

    train: a function, as "package.module:function", that is called with the request's fields.

    Raises:
        RuntimeError: Training failed; or the first process did not finish within an hour.
    """
    from rlkd_trl.trainers.processes import wait_for_all

    outcome = Path(request.output_dir) / "outcome.txt"
    if is_first_process():
        outcome.unlink(missing_ok=True)
    wait_for_all()  # so that nobody reads the outcome of an earlier run
    if is_first_process():
        result = _train_apart(train, request)
        outcome.parent.mkdir(parents=True, exist_ok=True)
        written = outcome.with_suffix(".new")
        written.write_text(result, encoding="utf-8")
        written.replace(outcome)
    # They wait for the file: a connection may have a shorter timeout than the training takes.
    deadline = time.monotonic() + _WAIT_SECONDS
    while not outcome.is_file():
        if time.monotonic() > deadline:
            raise RuntimeError(f"The first process left no {outcome} in {_WAIT_SECONDS:.0f} seconds.")
        time.sleep(0.2)
    if (result := outcome.read_text(encoding="utf-8")) != "done":
        raise RuntimeError(result)


def _train_apart(train: str, request: Request) -> str:
    """Trains in a process without a launcher, on one device; returns "done", or what went wrong."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS_PREFIXES)}
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # Models of this size train more slowly with several threads, above all if other programs use the cores too.
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", _TRAIN]
    request_json = json.dumps({"path": sys.path, "train": train, "of": asdict(request)})
    # In a session of its own: Ctrl-C comes to this process, which then ends the other.
    finished = subprocess.run(command, input=request_json, text=True, env=environment, start_new_session=True)
    code = finished.returncode
    return "done" if code == 0 else f"The demo's models could not be trained: their process ended with code {code}."
