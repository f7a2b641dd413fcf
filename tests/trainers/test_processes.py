"""Which process is missing, and which one says so: the other process is a `sleep` that registered itself."""

import os
import signal
import socket
import subprocess
import time

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from rlkd_trl.errors import InputError
from rlkd_trl.trainers import processes
from rlkd_trl.trainers.processes import Processes, check_hub_agrees

CLOSED = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:4")
TIMED_OUT = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 8000ms for recv to complete")
IN_BACKWARD = RuntimeError("Application timeout caused pair closure")  # as DDP's reducer passes it on
NCCL = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0.")


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def processes_of(store, rank: int, size: int = 2) -> Processes:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    return Processes({**where, "RANK": str(rank), "WORLD_SIZE": str(size)})


@pytest.fixture
def other(store, monkeypatch):
    """Process 1 of 2."""
    monkeypatch.setattr(processes, "_ROLL_CALL", 0.2)
    sleeping = subprocess.Popen(["sleep", "60"])
    PrefixStore("rlkd_trl", store).set("process/1", f"{sleeping.pid} {socket.gethostname()}")
    yield sleeping
    sleeping.kill()
    sleeping.wait()


def wait_for_state(pid: int, states: str) -> None:
    end = time.monotonic() + 5
    while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in states:  # noqa: SIM115
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("is_reaped", [False, True])
@pytest.mark.parametrize("error", [CLOSED, TIMED_OUT, IN_BACKWARD, NCCL])
def test_one_that_was_killed(error, is_reaped, store, other):
    other.kill()
    if is_reaped:
        other.wait()
    else:
        wait_for_state(other.pid, "Z")
    expected = f"process 1 (pid {other.pid}) has ended, killed or for want of memory"
    assert processes_of(store, 0).missing(error) == expected


def test_one_that_is_stopped(store, other):
    os.kill(other.pid, signal.SIGSTOP)
    wait_for_state(other.pid, "T")
    assert processes_of(store, 0).missing(TIMED_OUT) == f"process 1 (pid {other.pid}) is stopped (SIGSTOP)"


def test_one_that_runs_and_does_not_come(store, other):
    """In an endless reward, say; or on another machine, whose processes cannot be looked at."""
    assert processes_of(store, 0).missing(TIMED_OUT) == "process 1 has not come to where the others wait for it"
    PrefixStore("rlkd_trl", store).set("process/1", "1 another-machine")
    assert processes_of(store, 0).missing(TIMED_OUT) == "process 1 has not come to where the others wait for it"


def test_one_of_three_is_named(store, other):
    """Process 2 says that it waits too."""
    PrefixStore("rlkd_trl", store).set("process/2", f"{os.getpid()} {socket.gethostname()}")
    PrefixStore("rlkd_trl", store).set("failed/2", "")
    found = processes_of(store, 0, size=3).missing(TIMED_OUT)
    assert found == "process 1 has not come to where the others wait for it"


def test_all_wait_for_each_other(store, other):
    PrefixStore("rlkd_trl", store).set("failed/1", "")
    assert (
        processes_of(store, 0).missing(TIMED_OUT).startswith("the connection between the processes has failed: [gloo")
    )


@pytest.mark.parametrize("error", [ValueError("gloo"), RuntimeError("shapes differ"), KeyError("reward")])
def test_errors_of_another_kind_are_their_own_reason(error, store, other):
    other.kill()
    assert processes_of(store, 0).missing(error) is None


def test_one_speaks(store, other):
    both = [processes_of(store, 0), processes_of(store, 1)]
    assert [one.is_first_to_speak() for one in (*both, *both)] == [True, False, False, False]


@pytest.mark.parametrize("is_offline", [(False, False), (True, True), (False, True, True), (True, False)])
def test_all_reach_the_hub_or_none(is_offline, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "gather_object", lambda own: list(is_offline))
    if len(set(is_offline)) == 1:
        return check_hub_agrees()
    alone = "1, 2" if len(is_offline) == 3 else "0"
    with pytest.raises(
        InputError, match=rf"by some processes and not by others \(process {alone}\).*HF_HUB_OFFLINE=1"
    ):
        check_hub_agrees()
