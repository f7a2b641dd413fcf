"""Runs templates in a separate process, whose time and memory the kernel bounds (see `prompts.renderer`)."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import rlkd_trl
from rlkd_trl.prompts import bounds


class RenderingError(Exception):
    """A template did not render.

    kind: "missing column" (the message is the column's name), "security" or "syntax", "error" (the message is what the
    template raised), "refused" (what a chat template says of a conversation that it does not take), or "bounds" (it
    took more time or memory than a prompt may). line: of a syntax error.
    """

    def __init__(self, kind: str, message: str, line: int | None = None):
        super().__init__(message)
        self.kind, self.line = kind, line


def ask_renderer(*request: object) -> object:
    """The renderer's answer to a request; the first request starts the renderer. Raises `RenderingError`.

    Chat templates have a renderer of their own, which has imported what transformers renders them with.
    """
    kind = "chat" if request[0] == "chat" else "templates"
    with _lock:
        if kind not in _renderers or not _renderers[kind].belongs_here:
            _renderers[kind] = _Renderer(kind)
        try:
            answer = _renderers[kind].ask(request)
        except _Ended as error:
            del _renderers[kind]
            raise RenderingError("bounds", str(error)) from error
    if "failure" in answer:
        raise RenderingError(answer["failure"], answer["message"], answer.get("line"))
    return answer["result"]


class _Ended(Exception):
    """The renderer's process has ended; the message gives the reason."""


class _Renderer:
    """The renderer's process and the pipes to it."""

    def __init__(self, kind: str):
        self._owner = os.getpid()
        # It imports from the same places as this process, but not from whatever its working directory holds.
        root = str(Path(rlkd_trl.__file__).parents[1])
        path = [*(os.path.abspath(entry) for entry in sys.path if entry), root]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlkd_trl.prompts.renderer", kind],
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C does not reach it; it ends when its input is closed
        )
        atexit.register(self.end)

    @property
    def belongs_here(self) -> bool:
        """Whether this process started the renderer; False in a fork, which shares the pipes with its parent."""
        return self._owner == os.getpid()

    def ask(self, request: tuple) -> dict[str, object]:
        """Sends a request and waits for the answer. Raises `_Ended`."""
        body = pickle.dumps((bounds.CPU_SECONDS, *request), protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self._process.stdin.write(len(body).to_bytes(4, "big") + body)
            self._process.stdin.flush()
            answers, wait = self._process.stdout, threading.Timer(bounds.WALL_SECONDS, self._process.kill)
            if os.name != "posix":  # on Windows `select` takes sockets only
                wait.start()
            elif not select.select([answers], [], [], bounds.WALL_SECONDS)[0]:
                self._process.kill()
            header = answers.read(4)
            answer = answers.read(int.from_bytes(header, "big"))
            wait.cancel()
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise _Ended(self._reason())
        answer = json.loads(answer)
        if answer.get("failure") == "memory":
            self.end()
            raise _Ended(f"takes more than {bounds.MEMORY_BYTES >> 20} MiB of memory")
        return answer

    def _reason(self) -> str:
        """Why the process has ended, in words, from its exit code."""
        code = self._process.wait()
        atexit.unregister(self.end)
        if code in (-getattr(signal, "SIGKILL", -1), -getattr(signal, "SIGPROF", -1)):  # Windows has neither
            return f"takes more than {bounds.CPU_SECONDS:g} s of CPU time"
        return f"ends the process that runs it (exit code {code})"

    def end(self) -> None:
        """Ends the process, if this process started it."""
        if not self.belongs_here:
            return
        atexit.unregister(self.end)
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


_renderers: dict[str, _Renderer] = {}
_lock = threading.Lock()
