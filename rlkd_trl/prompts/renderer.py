"""The process that runs templates: `python -m rlkd_trl.prompts.renderer`, spoken to by `prompts.process`.

A template is a program that may come from anywhere, and the sandbox does not bound its time or memory: one C call can
take hours (`9 ** 9 ** 9`). Here the kernel bounds both, whatever a template does: too much memory is an allocation
that fails, too much time the end of this process.

Each message is its length in 4 bytes and a body. Requests are pickles, from our own process; answers are JSON, since
nothing that comes out of here is trusted.
"""

import json
import pickle
import signal
import sys
from contextlib import suppress

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from rlkd_trl.prompts import sandbox
from rlkd_trl.prompts.bounds import MEMORY_BYTES

try:
    import resource
except ImportError:  # Windows: time is bounded by the other process alone
    resource = None

SHOWN_CHARACTERS = 500  # of an error's message


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _bound_this_process()
    while header := requests.read(4):
        request = pickle.loads(requests.read(int.from_bytes(header, "big")))
        body = json.dumps(_answer(request)).encode()
        answers.write(len(body).to_bytes(4, "big") + body)
        answers.flush()


def _bound_this_process() -> None:
    """Limits memory, and forbids files and processes, which templates have no way to make anyhow."""
    if resource is None:
        return
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is in force
            resource.setrlimit(kind, (limit, limit))


def _answer(request: tuple) -> dict[str, object]:
    cpu_seconds, function, *arguments = request
    _set_timer(cpu_seconds)
    try:
        return {"result": {"variables": _variables, "render": _render}[function](*arguments)}
    except sandbox.MissingColumn as error:
        return {"failure": "missing column", "message": _shown(error)}
    except SecurityError as error:
        return {"failure": "security", "message": _shown(error)}
    except TemplateSyntaxError as error:
        return {"failure": "syntax", "message": _shown(error), "line": error.lineno}
    except MemoryError:
        return {"failure": "memory", "message": ""}
    except Exception as error:  # a template is a program: it can raise anything
        return {"failure": "error", "message": f"{type(error).__name__}: {_shown(error)}"}
    finally:
        _set_timer(0)


def _set_timer(seconds: float) -> None:
    """Has the kernel end this process after so many seconds of CPU time; 0 takes that back."""
    if resource is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _shown(error: Exception) -> str:
    return str(error)[:SHOWN_CHARACTERS].encode(errors="replace").decode()


def _variables(jinja: str) -> list[list[str]]:
    compiled = sandbox.compile_jinja(jinja)
    return [sorted(compiled.variables), sorted(compiled.input_variables)]


def _render(
    jinja: str, answer_choices: str | None, values: dict[str, object], seed: str, until_separator: bool
) -> list[str]:
    """The parts of the text between its `|||`; with `until_separator` only the first, and nothing behind it is run."""
    compiled = sandbox.compile_jinja(jinja)
    with sandbox.seeded_choice(seed):
        if answer_choices is not None and "answer_choices" in compiled.variables:
            try:
                choices = sandbox.compile_jinja(answer_choices).parts(values)
            except sandbox.MissingColumn as error:  # matters only if the template comes to use the choices
                values["answer_choices"] = sandbox.missing_value(str(error))
            else:
                values["answer_choices"] = [choice.strip() for choice in choices]
        return [compiled.input_part(values)] if until_separator else compiled.parts(values)


if __name__ == "__main__":
    main()
