"""What ends a command early, input that the user can correct before all, and how each end looks from outside."""

import atexit
import ctypes
import errno
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

LAUNCHER = "RLKD_TRL_LAUNCHER"  # in the environment of processes whose launcher says itself which one was killed
_FIRST_PROCESS_SPEAKS = 10.0  # seconds
_LAUNCHER_ENDS_OTHERS = 10.0  # seconds
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LAUNCHERS = (
    "accelerate",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
    "compare.py",
    "rlkd-trl",
    "rlkd_trl",
)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_HOW_TO_CONTINUE = "To continue: the same command with --resume"


class InputError(ValueError):
    """A flag, file or argument is wrong.

    The message says what was wrong, with the value, and what to do. Recipes print it as one line and exit with
    status 2; as a `ValueError` it can be caught by anyone who uses the package as a library.
    """


class TrainingError(Exception):
    """Training or evaluation has come upon numbers that are not finite and cannot go on.

    The message says what was not finite, where it was seen first, and where the last good weights are.
    """


class CheckpointError(OSError):
    """A checkpoint cannot be written, on a full disk for instance. The message says which ones are intact."""


class Interrupted(KeyboardInterrupt):
    """A signal has stopped a run, and all that it had done is saved. signum: the signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Peers(Protocol):
    """All processes of a run, as far as their end is concerned."""

    def is_first_to_speak(self) -> bool:
        """True in one process only, the first that asks."""

    def missing(self, error: Exception) -> str | None:
        """Which processes the others cannot go on without, in words; None if `error` did not come of that."""


_peers: Peers | None = None


def connected_to(peers: Peers) -> None:
    """From here on this process is one of several, and one of them speaks when they end."""
    global _peers
    _peers = peers


def run(main: Callable[[], None]) -> None:
    """Runs a command. What the user can do something about ends in a line or two on stderr, without a traceback.

    With `--debug` on the command line the traceback stands before them.

    Exit codes: 2 for input to be corrected, 1 for training that numbers have spoilt or a checkpoint that
    could not be written, or another process that is missing, 130 after Ctrl-C and 143 after SIGTERM. Of several
    processes one speaks. A command that has succeeded, or that all processes have left at the same step, also ends its
    connection to other processes: torch's threads for it may otherwise abort the interpreter's exit.
    """
    _end_with_launcher()
    # Else the interpreter's last act is to look for garbage among half a million objects: 1.4 seconds of CPU.
    atexit.register(gc.freeze)
    # On CPUs it warns on import of a kernel that it could not download, and in int8 at every product of matrices.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        main()
    except InputError as error:
        _refuse(error)
    except TrainingError as error:  # which all processes raise together
        _disconnect()
        _end(1, f"error: {' '.join(str(error).split())}")
    except CheckpointError as error:
        _end(1, f"error: {' '.join(str(error).split())}")
    except OSError as error:  # while results are written
        if error.errno not in _OF_THE_DISK:
            _end_unexpectedly(error)
        place = f"{error.filename}: " if error.filename else ""
        why = f"{place}{error.strerror}: make room, or name another place."
        _end(1, f"error: {why} {_HOW_TO_CONTINUE}, if a checkpoint was saved before.")
    except Interrupted as interruption:
        _disconnect()
        _end(128 + interruption.signum, f"{interruption}\n{_HOW_TO_CONTINUE}.")
    except KeyboardInterrupt:
        _end(130, f"Stopped by Ctrl-C.\n{_HOW_TO_CONTINUE}, if a checkpoint was saved before.")
    except Exception as error:
        _end_unexpectedly(error)
    _disconnect()


def _end_with_launcher() -> None:
    """On Linux: SIGTERM for this process when the launcher, or the comparison, that has started it is gone.

    Accelerate's launcher of a single process passes no signal on, and leaves its process behind.
    """
    try:
        if _is_launcher(Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError, UnicodeDecodeError):  # elsewhere than on Linux
        pass


def _is_launcher(words: list[str]) -> bool:
    """Whether a command line is Python with a script, or a module, that starts processes and waits for them."""
    words = [word for word in words if word != "-m"]
    if len(words) < 2 or not Path(words[0]).name.startswith("python"):
        return False
    return Path(words[1]).name in _LAUNCHERS


def _end(code: int, message: str) -> NoReturn:
    """Ends this process with `code`; of several processes one prints the message."""
    if os.environ.get("RANK", "0") == "0" if _peers is None else _peers.is_first_to_speak():
        _say(message)
    sys.exit(code)


def _say(message: str) -> None:
    """On stderr; with `--debug`, after the traceback of the exception that is being handled."""
    if "--debug" in sys.argv:
        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)


def _disconnect() -> None:
    distributed = sys.modules.get("torch.distributed")  # unless nothing has needed torch
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if is_connected and distributed.get_world_size() > 1:
        distributed.destroy_process_group()


def _refuse(error: InputError) -> NoReturn:
    """Says what is wrong with the input, and exits with code 2."""
    is_one_of_several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    if _peers is not None and not _peers.is_first_to_speak():
        _wait_for_end(2)
    if _peers is None and is_one_of_several and os.environ.get("RANK") != "0":
        # Most often all processes find the same: the first one speaks, and its launcher then ends the others.
        time.sleep(_FIRST_PROCESS_SPEAKS)
    _say(f"error: {' '.join(str(error).split())}")
    if is_one_of_several:
        _leave(2)
    sys.exit(2)


def _end_unexpectedly(error: Exception) -> NoReturn:
    """With a traceback; of several processes, one speaks, and of one that is missing a line."""
    if _peers is None:
        raise error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that ends those who are left
    missing = _peers.missing(error)
    # A process that ends for a reason says it; what the others then meet is not worth a word.
    is_said_by_launcher = missing is not None and "has ended" in missing and LAUNCHER in os.environ
    if is_said_by_launcher or not _peers.is_first_to_speak():
        _wait_for_end(1)
    if missing is None:
        traceback.print_exception(error)
    else:
        why = f"{missing}; the others cannot go on. {_HOW_TO_CONTINUE}, if a checkpoint was saved before."
        print(f"error: {' '.join(why.split())}", file=sys.stderr, flush=True)
    _leave(1)


def _wait_for_end(code: int) -> NoReturn:
    """Says nothing: the launcher has met the end of another process, with its code, and now ends this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_LAUNCHER_ENDS_OTHERS)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """At once: the end of a connection may wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
