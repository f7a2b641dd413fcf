"""The one exception for input that the user can correct."""


class InputError(ValueError):
    """A flag, file or argument is wrong.

    The message says what was wrong, with the value, and what to do. Recipes print it as one line and exit with
    status 2; as a `ValueError` it can be caught by anyone who uses the package as a library.
    """
