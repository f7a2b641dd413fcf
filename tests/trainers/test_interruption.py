"""Which signals are noted, and which end a run at once."""

import signal

import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.trainers.interruption import StopRequest


def test_the_end_of_a_launcher_after_ctrl_c_is_no_second_ctrl_c(monkeypatch):
    """Accelerate's launcher of a single process ends at once on Ctrl-C, and its end is a SIGTERM for the process."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    request = StopRequest()
    with request.listening(is_last=True):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert request.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_of_several_repeats_signals(signum, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    request = StopRequest()
    with request.listening(is_last=True):
        signal.raise_signal(signum)
        signal.raise_signal(signum)
    assert request.signum == signum


@pytest.fixture
def handled():
    """Signals, as they come to the handlers that were there before."""
    found = []
    before = {s: signal.signal(s, lambda signum, frame: found.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    yield found
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_that_nobody_has_obeyed_acts_at_the_end(signum, handled):
    request = StopRequest()
    with request.listening():
        signal.raise_signal(signum)
        assert handled == []
    assert handled == [signum]
    with request.listening(is_last=True):
        signal.raise_signal(signum)
    with request.listening():
        pass
    assert handled == [signum], "of an earlier time it does not"


def test_one_that_has_ended_the_block_has_acted(handled):
    request = StopRequest()
    with pytest.raises(InputError), request.listening():
        signal.raise_signal(signal.SIGTERM)
        raise InputError("stopped")
    assert handled == []


def test_one_that_a_shell_has_it_ignore_stays_ignored(handled):
    """As Ctrl-C where a script has started it in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = StopRequest()
    try:
        with request.listening():
            signal.raise_signal(signal.SIGINT)
        assert request.signum == 0 and handled == []
    finally:
        signal.signal(signal.SIGINT, before)
