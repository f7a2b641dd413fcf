"""The one exception for input that the user can correct, and how a command ends on it."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

_FIRST_PROCESS_SPEAKS = 10.0  # seconds


class InputError(ValueError):
    """A flag, file or argument is wrong.

    The message says what was wrong, with the value, and what to do. Recipes print it as one line and exit with
    status 2; as a `ValueError` it can be caught by anyone who uses the package as a library.
    """


def run(main: Callable[[], None]) -> None:
    """Runs a command; input that the user can correct ends in one line on stderr and exit code 2.

    A command that has succeeded also ends its connection to other processes: torch's threads for it may otherwise
    abort the interpreter's exit.
    """
    try:
        main()
    except InputError as error:
        _refuse(error)
    distributed = sys.modules.get("torch.distributed")  # unless nothing has needed torch
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if is_connected and distributed.get_world_size() > 1:
        distributed.destroy_process_group()


def _refuse(error: InputError) -> NoReturn:
    """Says what is wrong with the input, and exits with code 2."""
    is_one_of_several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    if is_one_of_several and os.environ.get("RANK") != "0":
        # Most often all processes find the same: the first one speaks, and its launcher then ends the others.
        time.sleep(_FIRST_PROCESS_SPEAKS)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if is_one_of_several:
        sys.stdout.flush()
        os._exit(2)  # at once: the end of a connection may wait for the others
    sys.exit(2)
