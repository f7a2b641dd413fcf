"""Signals that ask a run to stop: remembered when they arrive, obeyed after the step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAsked(Exception):
    """An evaluation is broken off for a signal to stop, on all processes. signum: the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class StopRequest:
    """The first signal to stop that this process has received, if any.

    In a run that was started without a launcher, a second Ctrl-C ends it at once. With a launcher, repeated signals
    are ignored: it passes on a Ctrl-C that its processes have already received from the terminal, sends SIGTERM when
    it ends itself, and kills processes that take too long.
    """

    def __init__(self):
        self.signum = 0
        self.is_listening = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT and "LOCAL_RANK" not in os.environ:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    @contextmanager
    def listening(self, *, is_last: bool = False) -> Iterator[None]:
        """Within it, SIGINT and SIGTERM are only remembered; outside the main thread they act as always.

        One that has not ended the block acts at its end, unless `is_last`: everything is done by then.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signum = 0
        # One that a shell has this process ignore stays so.
        heard = [signum for signum in _SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
        before = {signum: signal.signal(signum, self._note) for signum in heard}
        self.is_listening = True
        try:
            yield
        finally:
            self.is_listening = False
            for signum, handler in before.items():
                signal.signal(signum, handler)
        if self.signum and not is_last:
            signal.raise_signal(self.signum)

    def on_any_process(self, accelerator: Accelerator) -> int:
        """The number of a signal that any process has received, or 0; every process gets the same answer."""
        if accelerator.num_processes == 1:
            return self.signum
        signum = torch.tensor(self.signum, device=accelerator.device)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        return int(signum)
