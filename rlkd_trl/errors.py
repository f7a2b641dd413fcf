"""The errors that end a command early, and how the user sees them: a line or two on stderr, and an exit code."""

import atexit
import ctypes
import errno
import gc
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
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
_CHECKPOINTS_CODE = "transformers_modules."  # the package into which transformers copies it
# Of an account or organisation on the Hub: a message may quote a flag's value.
_TOKEN = re.compile(r"\b(?:(hf_)[A-Za-z0-9]{20,}|(api_org_)\w+)")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


class InputError(ValueError):
    """A flag, file or argument is wrong.

    The message says what was wrong, with the value, and what to do. Recipes print it as one line and exit with
    status 2; as a `ValueError` it can be caught by anyone who uses the package as a library.
    """


class TrainingError(Exception):
    """Training or evaluation cannot go on, because numbers have become NaN or infinite.

    The message says which numbers, where they were seen first, and where the last good weights are.
    """


class ServerError(Exception):
    """The server of a teacher fails or refuses. The message says what it answered, without any key."""


class PushError(Exception):
    """A student cannot be sent to the Hub. The message says where it is, and how to send it."""


class CheckpointError(OSError):
    """A checkpoint cannot be written, on a full disk for instance. The message says which ones are intact."""


class Interrupted(KeyboardInterrupt):
    """A signal has stopped a run, after everything it had done was saved.

    signum: the signal's number. is_saved: False if there was nothing to save yet.
    """

    def __init__(self, signum: int, message: str, *, is_saved: bool = True):
        global _is_interrupted
        super().__init__(message)
        self.signum, self.is_saved = signum, is_saved
        _is_interrupted = True


class Peers(Protocol):
    """What a process of several needs to know when it ends: whether it prints, and whether another has died."""

    def is_first_to_speak(self) -> bool:
        """True for the first process that asks, False for all others."""

    def missing(self, error: Exception) -> str | None:
        """The processes that have died, in words, if that is the cause of `error`; else None."""


class _Stopped(KeyboardInterrupt):
    """A signal to stop, where nothing is to be saved first."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


_peers: Peers | None = None
_continued_by = ""
_is_command = False
_is_interrupted = False  # what was to be saved is saved, and the command is on its way out


def continued_by(what: str) -> None:
    """Tells this module what a user does to go on with the command, once it has been stopped; "" if nothing helps."""
    global _continued_by
    _continued_by = what


def connected_to(peers: Peers) -> None:
    """Tells this module that the process is one of several, of which only one prints an error."""
    global _peers
    _peers = peers


def is_first_process() -> bool:
    """Whether this is the launched process that prints and writes; works before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def is_command() -> bool:
    """Whether this process runs a command (see `run`), not a program that uses the package."""
    return _is_command


def run(main: Callable[[], None]) -> None:
    """Runs a command. An error that the user can act on ends in a line or two on stderr, without a traceback.

    With `--debug` on the command line the traceback is printed before them.

    SIGINT and SIGTERM end it at once, unless it saves something first (see `trainers.interruption`). Exit codes: 2 for
    input to be corrected, which the code of a user's rewards and checkpoints is too; 1 if numbers are not finite, a
    checkpoint could not be written, or a student not sent to the Hub, a teacher's server has failed, or another
    process has died; 130 after Ctrl-C; 143 after SIGTERM. Of several processes only one prints. When a command
    succeeds, or all processes leave it at the same step, it also closes the connection between the processes, whose
    threads could otherwise abort the interpreter on its way out.
    """
    global _is_command
    _is_command = True
    _end_with_launcher()
    # Saves 1.4 s of CPU, in which the interpreter would search half a million objects for garbage before it exits.
    atexit.register(gc.freeze)
    atexit.register(lambda: _handle_signals(signal.SIG_IGN))  # all is done by then
    # On CPUs it warns when imported, of a kernel that it could not download, and in int8 at every matrix product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with _stopping_at_signals():
            main()
    except InputError as error:
        _refuse(error)
    except TrainingError as error:  # raised by all processes together
        _disconnect()
        _end(1, f"error: {one_line(error)}")
    except (CheckpointError, PushError) as error:
        _end(1, f"error: {one_line(error)}")
    except ServerError as error:
        _end(1, f"error: {one_line(error)}{_hint(' ')}")
    except OSError as error:  # while results are written
        if error.errno not in _DISK_ERRORS:
            _end_unexpectedly(error)
        place = f"{error.filename}: " if error.filename else ""
        _end(1, f"error: {place}{error.strerror}: make room, or name another place.{_hint(' ')}")
    except Interrupted as interruption:
        with _signals(signal.SIG_IGN):
            _disconnect()
            _end(128 + interruption.signum, f"{interruption}{_hint(is_saved=interruption.is_saved)}")
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        by = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        with _signals(signal.SIG_IGN):
            _end(128 + signum, f"Stopped by {by}.{_hint()}")
    except Exception as error:
        _end_unexpectedly(error)
    with _signals(signal.SIG_IGN):
        _disconnect()


def one_line(error: Exception, *, at_most: int | None = None) -> str:
    """The error's message on one line; with `at_most`, that many characters of it, to go on after.

    >>> one_line(ValueError("not\\n  this."), at_most=9)
    'not this'
    """
    line = " ".join(str(error).split())
    return line if at_most is None else line[:at_most].rstrip(".")


def _hint(before: str = "\n", *, is_saved: bool = False) -> str:
    """The last line of a message about a command that was stopped."""
    if not _continued_by:
        return ""
    where_saved = "" if is_saved or "--resume" not in _continued_by else ", if a checkpoint was saved before"
    return f"{before}To continue: {_continued_by}{where_saved}."


@contextmanager
def _signals(handler: Handler, *, but_not: Handler | None = None) -> Iterator[None]:
    """Within it SIGINT and SIGTERM have this handler, except where they had `but_not`."""
    before = _handle_signals(handler, but_not=but_not)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def _handle_signals(handler: Handler, *, but_not: Handler | None = None) -> dict[int, Handler]:
    """Sets the handler; the ones before, none where signals cannot be set: elsewhere than in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    signums = [s for s in (signal.SIGINT, signal.SIGTERM) if but_not is None or signal.getsignal(s) != but_not]
    return {signum: signal.signal(signum, handler) for signum in signums}


@contextmanager
def _stopping_at_signals() -> Iterator[None]:
    """Within it SIGINT and SIGTERM end the command, also where Python or a library makes another error of the stop."""
    global _is_interrupted
    process, _is_interrupted = os.getpid(), False

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a fork, which is to end as if nothing were installed
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if _is_interrupted and signum == signal.SIGTERM:  # launchers repeat what a terminal has sent already
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped(signum)

    # One that a shell has it ignore, as Ctrl-C where it is started in the background, stays so.
    with _signals(stop, but_not=signal.SIG_IGN):
        try:
            yield
        except (CheckpointError, PushError, TrainingError):  # which say what is left of the work
            raise
        except Exception as error:
            stopped = _stop_behind(error)
            if stopped is None:
                raise
            raise stopped from error


def _stop_behind(error: Exception) -> KeyboardInterrupt | None:
    """What stopped the command, if `error` was raised for it or while it was handled.

    While a class is made, as in an import, Python 3.11 turns whatever `__set_name__` raises into a `RuntimeError`.
    """
    seen, unseen = set(), [error]
    while unseen:
        cause = unseen.pop()
        if isinstance(cause, KeyboardInterrupt):
            return cause
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            unseen += [cause.__cause__, cause.__context__]
    return None


def _end_with_launcher() -> None:
    """Calls `end_with_parent` if that is a launcher or a comparison.

    Accelerate's launcher of a single process does not pass signals on, so that its process would go on without it.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, AttributeError, UnicodeDecodeError):  # elsewhere than on Linux
        return
    if _is_launcher(words):
        end_with_parent()


def end_with_parent() -> None:
    """On Linux: makes the kernel send SIGTERM to this process when the one that started it ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


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
    if _is_connected():  # whose threads may abort the interpreter on its way out
        _leave(code)
    sys.exit(code)


def _say(message: str) -> None:
    """Prints the message on stderr; with `--debug`, after the traceback of the exception being handled."""
    if "--debug" in sys.argv:
        print(_without_tokens(traceback.format_exc()), end="", file=sys.stderr)
    print(_without_tokens(message), file=sys.stderr, flush=True)


def _without_tokens(text: str) -> str:
    return _TOKEN.sub(r"\1\2***", text)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As `sys.excepthook`, without tokens."""
    lines = traceback.format_exception(kind, error, trace)
    print(_without_tokens("".join(lines)), end="", file=sys.stderr, flush=True)


def _is_connected() -> bool:
    """Whether this process is connected to others."""
    distributed = sys.modules.get("torch.distributed")  # None if torch was never imported
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return is_connected and distributed.get_world_size() > 1


def _disconnect() -> None:
    """Closes the connection to the other processes, if there is one."""
    if _is_connected():
        sys.modules["torch.distributed"].destroy_process_group()


def _refuse(error: InputError) -> NoReturn:
    """Prints what is wrong with the input, and exits with code 2."""
    is_one_of_several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    if _peers is not None and not _peers.is_first_to_speak():
        _wait_for_end(2)
    if _peers is None and is_one_of_several and not is_first_process():
        # Most often all processes find the same mistake. Then the first one prints it, and the launcher ends the rest.
        time.sleep(_FIRST_PROCESS_SPEAKS)
    _say(f"error: {one_line(error)}")
    if is_one_of_several:
        _leave(2)
    sys.exit(2)


def _end_unexpectedly(error: Exception) -> NoReturn:
    """Ends with a traceback, printed by one of several processes; with one line if another process has died.

    An error in the Python code that a checkpoint brings along is one of the input, unless another process has died,
    for which layers wait that gather their shards, or memory has run out.
    """
    missing = None
    if _peers is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a launcher sends when one process has ended
        missing = _peers.missing(error)
    place = _place_in_checkpoints_code(error)
    if place is not None and missing is None and not _is_out_of_memory(error):
        raised = f"The code of a checkpoint raised {type(error).__name__}: {error} ({place})."
        _refuse(InputError(f"{raised} Correct it there, or give another checkpoint."))
    if _peers is None:
        sys.excepthook = _print_traceback
        raise error
    # If another process has ended by an error of its own, it has printed that; the consequences need no message.
    is_said_by_launcher = missing is not None and "has ended" in missing and LAUNCHER in os.environ
    if is_said_by_launcher or not _peers.is_first_to_speak():
        _wait_for_end(1)
    if missing is None:
        _print_traceback(type(error), error, error.__traceback__)
    else:
        why = " ".join(missing.split())
        print(f"error: {why}; the others cannot go on.{_hint(' ')}", file=sys.stderr, flush=True)
    _leave(1)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's


def _place_in_checkpoints_code(error: Exception) -> str | None:
    """The innermost line of such code that led to the error, in words; None if none did."""
    places = [
        f"line {line} of {frame.f_code.co_filename}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(_CHECKPOINTS_CODE)
    ]
    return places[-1] if places else None


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
