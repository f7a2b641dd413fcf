"""A browser that does not work skips its tests, and neither hangs nor stays behind."""

import time
from pathlib import Path

import pytest

from tests.evaluation import browser

SCRIPTS = {
    "ends": "exit 1",
    "says nothing and ignores a signal to end": "trap '' TERM; sleep 60 & echo $! >> PIDS; wait",
    "goes on saying something else": """while :; do printf '{"method": "x"}\\0' >&4; done""",
}


@pytest.mark.slow(0.4)
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_browser_that_does_not_work_is_ended_and_its_tests_are_skipped(script, tmp_path, monkeypatch):
    program, pids = tmp_path / "chromium", tmp_path / "pids"
    program.write_text(f"#!/bin/bash\necho $$ >> PIDS\n{script}\n".replace("PIDS", str(pids)))
    program.chmod(0o755)
    monkeypatch.setattr(browser, "CHROMIUM", str(program))
    monkeypatch.setattr(browser, "_SECONDS", 1)
    begin = time.monotonic()
    with pytest.raises(pytest.skip.Exception, match="does not start here"), browser.Browser():
        pass
    assert time.monotonic() - begin < 20
    assert not [pid for pid in pids.read_text().split() if is_running(pid)]


def is_running(pid: str) -> bool:
    """Whether there is such a process, other than one that has ended and was not waited for."""
    status = Path("/proc") / pid / "stat"
    for _ in range(400):  # the kernel needs a moment to end it
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.05)
    return True
