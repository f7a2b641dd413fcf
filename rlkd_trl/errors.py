"""The one exception for input that the user can correct, and how a command ends on it."""

import sys
from collections.abc import Callable


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
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    distributed = sys.modules.get("torch.distributed")  # unless nothing has needed torch
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if is_connected and distributed.get_world_size() > 1:
        distributed.destroy_process_group()
