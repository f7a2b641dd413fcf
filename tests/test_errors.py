"""How a command ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from rlkd_trl import errors
from rlkd_trl.errors import CheckpointError, InputError, Interrupted, TrainingError, _is_launcher, run


def refuse():
    raise InputError("not\n  this")


@pytest.mark.parametrize(("processes", "ended"), [(1, 0), (2, 1)])
def test_success_ends_the_connection_between_processes(processes, ended, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append(1))
    run(lambda: None)
    assert len(calls) == ended


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit:
        run(refuse)
    assert exit.value.code == 2 and capsys.readouterr().err == "error: not this\n"


def test_failed_training_is_one_line_and_exit_code_1(capsys):
    def main():
        raise TrainingError("it is\nNaN")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 1 and capsys.readouterr().err == "error: it is NaN\n"


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (CheckpointError("no room"), 1, "error: no room\n"),
        (
            OSError(28, "No space left on device", "run/metrics.json"),
            1,
            "error: run/metrics.json: No space left on device: make room",
        ),
        (OSError(30, "Read-only file system"), 1, "error: Read-only file system: make room, or name another"),
        (Interrupted(15, "Stopped after step 3."), 143, "Stopped after step 3.\nTo continue: "),
        (Interrupted(2, "Stopped after step 3."), 130, "Stopped after step 3.\nTo continue: "),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C.\nTo continue: "),
    ],
)
def test_what_stops_a_command_ends_in_a_line_or_two(error, code, lines, capsys):
    def stop():
        errors.continued_by("the same command with --resume")
        raise error

    with pytest.raises(SystemExit) as exit:
        run(stop)
    said = capsys.readouterr().err
    assert exit.value.code == code and said.startswith(lines) and said.count("\n") <= 2


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("/usr/bin/python3 /venv/bin/accelerate launch recipes/ppo_kd.py", True),
        ("/usr/bin/python3 /venv/bin/torchrun --nproc_per_node 2 recipes/ppo_kd.py", True),
        ("/usr/bin/python3 /venv/bin/rlkd-trl --num_processes 2 ppo_kd", True),
        ("/usr/bin/python3 -m torch.distributed.run --nproc_per_node 2 ppo_kd.py", True),
        ("python recipes/compare.py --smoke", True),
        ("bash -c accelerate launch recipes/ppo_kd.py", False),
        ("python notebook.py --config accelerate", False),
        ("python", False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(command, is_one):
    assert _is_launcher(command.split()) is is_one


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise errors.Interrupted(15, 'Stopped.')", 143)])
def test_the_last_garbage_collection_has_nothing_to_look_at(end, code):
    """A ring of objects with a finaliser is what it alone can find. After a run it costs seconds."""
    script = f"""
from rlkd_trl import errors
class Ring:
    def __init__(self): self.itself = self
    def __del__(self): print("collected")
ring = Ring()
def main():
    {end}
errors.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == code and ended.stdout == ""
    as_usual = script.replace("errors.run(main)", "")
    assert subprocess.run([sys.executable, "-c", as_usual], capture_output=True, text=True).stdout == "collected\n"


def test_ctrl_c_that_a_shell_has_it_ignore_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)


TOKENS = ["hf_" + "a1B2" * 6, "api_org_" + "c3D4" * 6]


class Signals:
    """An attribute for whose name, while its class is made, a signal comes."""

    def __init__(self, signum: int):
        self.signum = signum

    def __set_name__(self, owner, name):
        signal.raise_signal(self.signum)


def while_a_class_is_made(signum):
    type("Settings", (), {"field": Signals(signum)})  # RuntimeError in Python 3.11, KeyboardInterrupt since 3.12


def while_a_checkpoint_is_read(signum):
    try:
        while_a_class_is_made(signum)
    except (RuntimeError, KeyboardInterrupt):
        raise InputError("config.json cannot be read") from None


def while_an_error_gets_another_cause(signum):
    try:
        signal.raise_signal(signum)
    except KeyboardInterrupt:
        raise RuntimeError("not imported") from ValueError("its cause")


def while_cleaning_up(signum):
    try:
        signal.raise_signal(signum)
    finally:
        raise OSError(2, "gone", "a_file")


@pytest.mark.parametrize(("signum", "said"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
@pytest.mark.parametrize(
    "main",
    [while_a_class_is_made, while_a_checkpoint_is_read, while_an_error_gets_another_cause, while_cleaning_up],
)
def test_a_stop_that_another_error_hides_is_a_stop(main, signum, said, monkeypatch, capsys):
    """SIGTERM is what a launcher sends when another process has ended, mostly while this one still imports."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(signum))
    assert ended.value.code == 128 + signum
    message = capsys.readouterr().err
    assert message.startswith(f"Stopped by {said}.\n") and "Traceback" not in message
    monkeypatch.setattr(sys, "argv", ["ppo_kd.py", "--debug"])
    with pytest.raises(SystemExit):
        run(lambda: while_cleaning_up(signum))
    assert "FileNotFoundError" in capsys.readouterr().err, "the other error is not lost"


def test_an_error_that_says_what_is_left_is_said_after_a_stop_too(capsys):
    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise CheckpointError("checkpoint-2 is intact")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 1 and capsys.readouterr().err == "error: checkpoint-2 is intact\n"


class EqualToNothing(ValueError):
    def __eq__(self, other):
        raise TypeError("cannot be compared")

    __hash__ = None


def test_an_error_after_other_errors_keeps_its_own_end():
    """A chain of causes without a stop in it, which goes round."""

    def main():
        first, second = EqualToNothing("first"), EqualToNothing("second")
        first.__cause__, second.__cause__ = second, first
        raise first

    with pytest.raises(EqualToNothing, match="first"):
        run(main)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    ("raised", "arguments"), [("errors.InputError", "--debug"), ("errors.InputError", ""), ("RuntimeError", "")]
)
def test_neither_message_nor_traceback_quotes_a_token(raised, arguments, token):
    script = "import sys; from rlkd_trl import errors\n"
    script += f"def main(): raise {raised}(f'hf_hub_download of {{sys.argv[1]}}')\nerrors.run(main)"
    command = [sys.executable, "-c", script, token, *arguments.split()]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    masked = f"hf_hub_download of {token[: token.rindex('_') + 1]}***"
    assert masked in said and token not in said
    assert ("Traceback" in said) == (arguments == "--debug" or raised == "RuntimeError")


def test_no_traceback_of_one_of_several_processes_quotes_a_token(monkeypatch, capsys):
    assert end_of_one_of_two(KeyError(TOKENS[0]), FakePeers(True, None), monkeypatch) == 1
    assert "KeyError: 'hf_***'" in capsys.readouterr().err


def test_other_errors_of_files_keep_their_traceback():
    with pytest.raises(FileNotFoundError):
        run(lambda: Path("nowhere").read_text())


class Ended(BaseException):
    """Stands in for the end of the process."""


class FakePeers:
    def __init__(self, is_first: bool, missing: str | None):
        self._is_first, self._missing = is_first, missing

    def is_first_to_speak(self) -> bool:
        return self._is_first

    def missing(self, error: Exception) -> str | None:
        return self._missing


def fail(error: Exception) -> None:
    raise error


def end_of_one_of_two(error: Exception, peers: FakePeers, monkeypatch, work=fail) -> int:
    """The exit code."""

    def main():
        work(error)

    def leave(code):
        raise Ended(code)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(errors, "_peers", None)
    monkeypatch.setattr(errors, "_LAUNCHER_ENDS_OTHERS", 0.0)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    errors.connected_to(peers)
    try:
        with pytest.raises(Ended) as ended:
            run(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    return ended.value.args[0]


@pytest.mark.parametrize(
    ("error", "missing", "code", "said"),
    [
        (InputError("not this"), None, 2, "error: not this\n"),
        (RuntimeError("gloo"), "process 0 has ended", 1, "error: process 0 has ended; the others cannot go on."),
        (KeyError("own"), None, 1, "Traceback (most recent call last)"),
    ],
)
def test_of_several_processes_the_first_speaks(error, missing, code, said, monkeypatch, capsys):
    assert end_of_one_of_two(error, FakePeers(True, missing), monkeypatch) == code
    assert capsys.readouterr().err.startswith(said)
    assert end_of_one_of_two(error, FakePeers(False, missing), monkeypatch) == code
    assert capsys.readouterr().err == ""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "missing", "code", "said"),
    [
        (
            KeyError("own"),
            None,
            2,
            "error: The code of a checkpoint raised KeyError: 'own' (line 2 of own.py). Correct",
        ),
        # In a layer that waited for the other's shard.
        (RuntimeError("gloo"), "process 0 has ended", 1, "error: process 0 has ended; the others cannot go on."),
        (OutOfMemoryError("28 GiB"), None, 1, "Traceback (most recent call last)"),
    ],
)
def test_whose_error_it_is_in_the_code_of_a_checkpoint(error, missing, code, said, monkeypatch, capsys):
    names = {"__name__": "transformers_modules.own"}
    exec(compile("def forward(error):\n    raise error", "own.py", "exec"), names)
    peers = FakePeers(True, missing)
    assert end_of_one_of_two(error, peers, monkeypatch, work=names["forward"]) == code
    assert capsys.readouterr().err.startswith(said)


def test_the_launcher_says_itself_which_process_was_killed(monkeypatch, capsys):
    monkeypatch.setenv(errors.LAUNCHER, "rlkd-trl")
    assert end_of_one_of_two(RuntimeError("gloo"), FakePeers(True, "process 0 (pid 7) has ended"), monkeypatch) == 1
    assert capsys.readouterr().err == ""
    assert end_of_one_of_two(RuntimeError("gloo"), FakePeers(True, "process 0 is stopped"), monkeypatch) == 1
    assert capsys.readouterr().err.startswith("error: process 0 is stopped;")
