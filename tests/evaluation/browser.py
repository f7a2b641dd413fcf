"""A headless Chromium, driven over its debugging pipe (https://chromedevtools.github.io/devtools-protocol)."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS = 60


class Browser:
    """One page. `problems` collects what the page wrote to its console, and its uncaught errors."""

    def __init__(self, *, width: int = 1280, height: int = 900, dark: bool = False):
        self.problems: list[str] = []
        self._width, self._height, self._dark = width, height, dark

    def __enter__(self) -> "Browser":
        """Skips the test, or all that share a fixture, where the browser does not start."""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._start_process()
        try:
            self._open_page()
        except (OSError, RuntimeError) as error:
            self.__exit__()
            pytest.skip(f"{CHROMIUM} does not start here: {error}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._kill()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def _start_process(self) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions"
        # The browser reads commands from descriptor 3 and answers on 4.
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe"]
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that its own processes can be ended with it
        )
        os.close(to_browser)
        os.close(from_browser)

    def _open_page(self) -> None:
        self._number, self._session, self._buffer = 0, None, b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self.resize(self._width, self._height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def _kill(self) -> None:
        if self._process.returncode is None:  # not waited for yet: the process group is still its own
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_SECONDS)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def open(self, path: Path) -> None:
        self._call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            if self.run("document.readyState") == "complete" and self.run("location.protocol") == "file:":
                return
            time.sleep(0.05)
        raise TimeoutError(f"{path} was not loaded in {_SECONDS} s")

    def run(self, script: str):
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def hover(self, selector: str, *, number: int = 0, across: float = 0.5) -> None:
        """Moves the mouse over the element: `across` is 0 at its left edge, 1 at its right one."""
        box = self.run(
            f"(() => {{ const e = document.querySelectorAll({selector!r})[{number}];"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]; })()"
        )
        x, y = box[0] + across * box[2], box[1] + box[3] / 2
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        picture = self._call("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(picture["data"]))

    def _clip(self, whole: bool) -> dict:
        if not whole:
            return {}
        height = self.run("document.documentElement.scrollHeight")
        return {"clip": {"x": 0, "y": 0, "width": self.run("innerWidth"), "height": height, "scale": 1}}

    def _call(self, method: str, **parameters) -> dict:
        """The answer. A browser that gives none in time is killed, so that no later call waits for it again."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while True:
            answer = self._next_message(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._collect(answer)

    def _collect(self, event: dict) -> None:
        if event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.problems.append(json.dumps(event["params"]))

    def _next_message(self, deadline: float) -> dict:
        while (seconds := deadline - time.monotonic()) > 0:
            message, end, rest = self._buffer.partition(b"\0")
            if end:
                self._buffer = rest
                return json.loads(message)
            if select.select([self._read], [], [], seconds)[0]:
                part = os.read(self._read, 1 << 20)
                if not part:
                    raise RuntimeError(f"{CHROMIUM} has ended")
                self._buffer += part
        self._kill()
        raise TimeoutError(f"no answer from {CHROMIUM} in {_SECONDS} s")
