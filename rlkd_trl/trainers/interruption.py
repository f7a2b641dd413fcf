"""Signals that ask a run to stop: noted when they come, obeyed after the step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """The first signal to stop that this process has got, if any.

    A second Ctrl-C in a run of one's own ends it at once. A launcher passes signals on that its processes have already
    got from the terminal, or ends, which is a SIGTERM for them, and ends by itself those that take too long: such
    repetitions count for nothing.
    """

    def __init__(self):
        self.signum = 0

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT and "LOCAL_RANK" not in os.environ:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, SIGINT and SIGTERM are noted and nothing else; elsewhere than in the main thread, as always."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signum = 0
        before = {signum: signal.signal(signum, self._note) for signum in _SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def on_any_process(self, accelerator: Accelerator) -> int:
        """The number of a signal that any process has got, or 0; every process gets the same answer."""
        if accelerator.num_processes == 1:
            return self.signum
        signum = torch.tensor(self.signum, device=accelerator.device)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        return int(signum)
