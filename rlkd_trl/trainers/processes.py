"""How training processes find each other, how long they wait, and which of them is missing when the others fail."""

import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env, str_to_bool
from huggingface_hub import constants
from transformers import TrainingArguments

from rlkd_trl import errors
from rlkd_trl.errors import InputError

Result = TypeVar("Result")

_STORE_PATIENCE = timedelta(seconds=10)
_ROLL_CALL = 5.0  # seconds; processes that wait for a missing one give up at about the same time
_ABSENT = "has not come to where the others wait for it"
_CONNECTION_ERRORS = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "pair closure",  # gloo's "Application timeout caused pair closure", in a backward pass
    "timed out waiting",
    "socket closed",
    "broken pipe",
    "socket timeout",
)

# The environment variables by which accelerate counts processes on a CPU.
_NUMBERS_OF_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def connect_processes(args: TrainingArguments) -> None:
    """Connects launched processes on a CPU with `ddp_timeout`; a command calls this before it makes its settings.

    `TrainingArguments` would connect them when it is made, but uses the timeout with accelerators only: on a CPU all
    processes would wait half an hour for one that hangs. It keeps an existing connection.

    args: the settings, or a sketch of them (see `settings.declared`).
    """
    if uses_deepspeed(args):
        # DeepSpeed uses deprecated names whenever it gathers weights, which prints twenty lines in a step of ZeRO-3.
        deprecated = r"`torch\.distributed\.\w+` is deprecated"
        warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    # transformers 5.24's, of the name that 5.23 knows alone.
    warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing` is depr", category=FutureWarning)
    if args.use_cpu or not torch.accelerator.is_available():
        PartialState(cpu=True, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))
        register_process()


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether the run is one of DeepSpeed, by a setting or by how it was launched. args: may be a sketch."""
    return bool(args.deepspeed) or str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))


def check_timeout(args: TrainingArguments) -> None:
    """Raises `InputError` if `ddp_timeout` would have no effect: several processes on a CPU, not yet connected."""
    several = get_int_from_env(_NUMBERS_OF_PROCESSES, 1) > 1
    is_set = args.ddp_timeout != type(args).__dataclass_fields__["ddp_timeout"].default
    if args.use_cpu and several and is_set and not torch.distributed.is_initialized():
        raise InputError(
            f"ddp_timeout = {args.ddp_timeout} would have no effect: on a CPU transformers connects processes without "
            "it. Connect them before the config is made: "
            f"accelerate.PartialState(cpu=True, timeout=datetime.timedelta(seconds={args.ddp_timeout}))."
        )


def wait_for_all() -> None:
    """Waits until every launched process has called this; a single process goes on at once."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def from_first_process(work: Callable[[], Result]) -> Result:
    """What `work` returns on the first process, on all of them; the others do not call it.

    Raises:
        InputError: On all processes, if `work` has raised it.
    """
    if not torch.distributed.is_initialized():
        return work()
    outcome: list[Result | InputError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [work()]
        except InputError as error:
            outcome = [error]
    (result,) = broadcast_object_list(outcome)
    if isinstance(result, InputError):
        raise result
    return result


def check_hub_agrees() -> None:
    """Raises `InputError`, on all processes, if some are in offline mode for the Hub and others are not.

    Each asks it before they are connected, and where one gets no answer it has taken data and templates from its
    cache, which may be older than what the others were sent.
    """
    if not torch.distributed.is_initialized():
        return
    is_offline = gather_object([constants.is_offline_mode()])
    if any(is_offline) and not all(is_offline):
        alone = ", ".join(str(rank) for rank, offline in enumerate(is_offline) if offline)
        raise InputError(
            f"The Hub ({constants.ENDPOINT}) was reached by some processes and not by others (process {alone}), which "
            "took older things from the cache perhaps: run the command again; or with HF_HUB_OFFLINE=1, with which "
            "all take the cache."
        )


def register_process() -> None:
    """Tells `errors` that this process is one of several, once they are connected, so that only one prints errors."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # Some launchers keep the store elsewhere; then several processes may print, and everything else works.
        with suppress(torch.distributed.DistError, KeyError):
            _register()


@cache
def _register() -> None:
    errors.connected_to(Processes(os.environ))


class Processes:
    """The processes of a run, which know of each other through the key-value store that connected them.

    torchrun and accelerate keep the store in the launcher, where it outlives the processes.

    Raises:
        torch.distributed.DistError: The store is not where the environment says.
    """

    def __init__(self, environment: Mapping[str, str]):
        self.rank, self.size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self._store = torch.distributed.PrefixStore(
            "rlkd_trl",
            torch.distributed.TCPStore(
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=_STORE_PATIENCE,
            ),
        )
        self._host = socket.gethostname()
        self._store.set(f"process/{self.rank}", f"{os.getpid()} {self._host}")

    def is_first_to_speak(self) -> bool:
        """True for the first process that asks, False for all others."""
        try:
            return self._store.add("spoken", 1) == 1
        except torch.distributed.DistError:
            return self.rank == 0

    def missing(self, error: Exception) -> str | None:
        """The processes that have died or hang, in words, if that is the cause of `error`; else None."""
        is_of_connection = isinstance(error, torch.distributed.DistError) or (
            isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _CONNECTION_ERRORS)
        )
        if not is_of_connection:
            return None
        try:
            states = {rank: state for rank in self._others() if (state := self._state_of(rank)) is not None}
            # Looked at again after the wait: a process that is being killed closes its connections before it is gone.
            states = states or {rank: self._state_of(rank) or _ABSENT for rank in self._absent()}
        except torch.distributed.DistError:
            return f"the process that keeps the connection of all, process 0 as a rule, does not answer ({error})"
        if not states:
            return f"the connection between the processes has failed: {error}"
        return "; ".join(f"process {rank} {state}" for rank, state in states.items())

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _state_of(self, rank: int) -> str | None:
        """Why a process of this machine cannot work, in words; None if it runs, or is on another machine."""
        if not self._store.check([f"process/{rank}"]):
            return None
        pid, host = self._store.get(f"process/{rank}").decode().split(maxsplit=1)
        if host != self._host or not Path("/proc/self/stat").is_file():
            return None
        try:
            state = (
                Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            )
        except OSError:
            state = "X"
        if state in "XZ":
            return f"(pid {pid}) has ended, killed or for want of memory"
        return f"(pid {pid}) is stopped (SIGSTOP)" if state in "Tt" else None

    def _absent(self) -> list[int]:
        """The processes that do not report, within a few seconds, that they have met the same failure."""
        self._store.set(f"failed/{self.rank}", "")
        end = time.monotonic() + _ROLL_CALL
        absent = self._others()
        while absent and time.monotonic() < end:
            absent = [rank for rank in absent if not self._store.check([f"failed/{rank}"])]
            time.sleep(0.1)
        return absent
