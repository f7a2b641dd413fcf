"""Signals to stop while a teacher's server is waited for."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

from rlkd_trl.errors import Interrupted

_SECONDS_AFTER_SIGNAL = 5.0  # without any answer; while some come the step may end, after which the trainer saves


class SignalsHeard:
    """The signal to stop that has come, and since when nothing has been answered after it.

    signum: of one that came earlier, or 0.
    """

    def __init__(self, signum: int = 0):
        self.signum, self._since = signum, monotonic()

    def note(self, signum: int) -> None:
        if not self.signum:
            self.signum, self._since = signum, monotonic()

    def answered(self) -> None:
        self._since = monotonic()

    def obey(self, url: str) -> None:
        """Raises `Interrupted` if one has come, and the server has not answered for long enough."""
        if self.signum and monotonic() - self._since > _SECONDS_AFTER_SIGNAL:
            by = "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name
            message = f"Stopped by {by} while the teacher's server {url} did not answer: the step is not saved."
            raise Interrupted(self.signum, message, is_saved=False)


@contextmanager
def signals_heard() -> Iterator[SignalsHeard]:
    """Within it SIGINT and SIGTERM are noted in the main thread, beside what else is done when they come.

    A signal that came earlier in the step is known to a trainer's `StopRequest`, whose method handles signals then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield SignalsHeard()
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    before = {signum: handler for signum, handler in before.items() if callable(handler)}
    owners = [getattr(handler, "__self__", None) for handler in before.values()]
    heard = SignalsHeard(max((getattr(owner, "signum", 0) for owner in owners), default=0))

    def note(signum: int, frame: FrameType | None) -> None:
        heard.note(signum)
        before[signum](signum, frame)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield heard
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is note:
                signal.signal(signum, handler)
