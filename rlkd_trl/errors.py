"""The errors that end a command early, and how the user sees them: a line or two on stderr, and an exit code."""

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

LAUNCHER = "RLKD_TRL_LAUNCHER"  # an environment variable: set if the launcher reports killed processes itself
_FIRST_PROCESS_SPEAKS = 10.0  # seconds that the other processes leave the first one to print its message
_LAUNCHER_ENDS_OTHERS = 10.0  # seconds in which a launcher ends the others after one of its processes has ended
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
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_HOW_TO_CONTINUE = "To continue: the same command with --resume"


class InputError(ValueError):
    """A flag, file or argument is wrong.

    The message says what was wrong, with the value, and what to do. Recipes print it as one line and exit with
    status 2; as a `ValueError` it can be caught by anyone who uses the package as a library.
    """


class TrainingError(Exception):
    """Training or evaluation cannot go on, because numbers have become NaN or infinite.

    The message says which numbers, where they were seen first, and where the last good weights are.
    """


class CheckpointError(OSError):
    """A checkpoint cannot be written, on a full disk for instance. The message says which ones are intact."""


class Interrupted(KeyboardInterrupt):
    """A signal has stopped a run, after everything it had done was saved. signum: the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Peers(Protocol):
    """What a process of several needs to know when it ends: whether it prints, and whether another has died."""

    def is_first_to_speak(self) -> bool:
        """True for the first process that asks, False for all others."""

    def missing(self, error: Exception) -> str | None:
        """The processes that have died, in words, if that is the cause of `error`; else None."""


_peers: Peers | None = None


def connected_to(peers: Peers) -> None:
    """Tells this module that the process is one of several, of which only one prints an error."""
    global _peers
    _peers = peers


def is_first_process() -> bool:
    """Whether this is the launched process that prints and writes; works before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def run(main: Callable[[], None]) -> None:
    """Runs a command. An error that the user can act on ends in a line or two on stderr, without a traceback.

    With `--debug` on the command line the traceback is printed before them.

    Exit codes: 2 for input to be corrected; 1 if numbers are not finite, a checkpoint could not be written, or another
    process has died; 130 after Ctrl-C; 143 after SIGTERM. Of several processes only one prints. When a command
    succeeds, or all processes leave it at the same step, it also closes the connection between the processes, whose
    threads could otherwise abort the interpreter on its way out.
    """
    _end_with_launcher()
    # Saves 1.4 s of CPU, in which the interpreter would search half a million objects for garbage before it exits.
    atexit.register(gc.freeze)
    # On CPUs it warns when imported, of a kernel that it could not download, and in int8 at every matrix product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        main()
    except InputError as error:
        _refuse(error)
    except TrainingError as error:  # raised by all processes together
        _disconnect()
        _end(1, f"error: {' '.join(str(error).split())}")
    except CheckpointError as error:
        _end(1, f"error: {' '.join(str(error).split())}")
    except OSError as error:  # while results are written
        if error.errno not in _DISK_ERRORS:
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
    """On Linux: makes the kernel send SIGTERM to this process when the launcher or comparison that started it ends.

    Accelerate's launcher of a single process does not pass signals on, so that its process would go on without it.
    """
    try:
        if _is_launcher(Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError, UnicodeDecodeError):  # elsewhere than on Linux
        pass


def _is_launcher(words: list[str]) -> bool:
    """Whether a command line runs one of the Python scripts or modules that start processes and wait for them."""
    words = [word for word in words if word != "-m"]
    if len(words) < 2 or not Path(words[0]).name.startswith("python"):
        return False
    return Path(words[1]).name in _LAUNCHERS


def _end(code: int, message: str) -> NoReturn:
    """Ends this process with exit code `code`; only one of several processes prints the message."""
    if is_first_process() if _peers is None else _peers.is_first_to_speak():
        _say(message)
    sys.exit(code)


def _say(message: str) -> None:
    """Prints the message on stderr; with `--debug`, after the traceback of the exception being handled."""
    if "--debug" in sys.argv:
        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)


def _disconnect() -> None:
    """Closes the connection to the other processes, if there is one."""
    distributed = sys.modules.get("torch.distributed")  # None if torch was never imported
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if is_connected and distributed.get_world_size() > 1:
        distributed.destroy_process_group()


def _refuse(error: InputError) -> NoReturn:
    """Prints what is wrong with the input, and exits with code 2."""
    is_one_of_several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    if _peers is not None and not _peers.is_first_to_speak():
        _wait_for_end(2)
    if _peers is None and is_one_of_several and not is_first_process():
        # Most often all processes find the same mistake. Then the first one prints it, and the launcher ends the rest.
        time.sleep(_FIRST_PROCESS_SPEAKS)
    _say(f"error: {' '.join(str(error).split())}")
    if is_one_of_several:
        _leave(2)
    sys.exit(2)


def _end_unexpectedly(error: Exception) -> NoReturn:
    """Ends with a traceback, printed by one of several processes; with one line if another process has died."""
    if _peers is None:
        raise error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a launcher sends when one process has ended
    missing = _peers.missing(error)
    # If another process has ended by an error of its own, it has printed that; the consequences need no message.
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
    """Waits, silently, for the launcher to end this process, as another one has ended with the right exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_LAUNCHER_ENDS_OTHERS)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends this process at once, without closing the connection, which might wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
