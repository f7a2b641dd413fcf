"""The process that runs templates, `python -m rlkd_trl.prompts.renderer KIND`; `prompts.process` starts and asks it.

KIND is "templates", or "chat" for chat templates, which are rendered as transformers renders them.

A template is a program that may come from anywhere, and the sandbox does not bound its time or memory: a single call
of C code can take hours (`9 ** 9 ** 9`). Here the kernel bounds both, whatever a template does. Too much memory makes
an allocation fail; too much CPU time ends this process.

A message is its length in 4 bytes, then its body. Requests are pickles, as they come from our own process. Answers are
JSON, as nothing that this process writes is trusted.
"""

import json
import pickle
import signal
import sys
from contextlib import suppress

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError, TemplateError

from rlkd_trl.prompts import sandbox
from rlkd_trl.prompts.bounds import MEMORY_BYTES

try:
    import resource
except ImportError:  # on Windows, where only the asking process bounds the time
    resource = None

SHOWN_CHARACTERS = 500  # of an error's message


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    if sys.argv[1:] == ["chat"]:  # which may take longer than a rendering, and may start threads
        import transformers.utils.chat_template_utils  # noqa: F401
    _bound_this_process()
    while header := requests.read(4):
        request = pickle.loads(requests.read(int.from_bytes(header, "big")))
        body = json.dumps(_answer(request)).encode()
        answers.write(len(body).to_bytes(4, "big") + body)
        answers.flush()


def _bound_this_process() -> None:
    """Limits memory, and forbids writing files and starting processes, for which the sandbox has no way either."""
    if resource is None:
        return
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is already in force
            resource.setrlimit(kind, (limit, limit))


def _answer(request: tuple) -> dict[str, object]:
    cpu_seconds, function, *arguments = request
    _set_timer(cpu_seconds)
    try:
        return {"result": {"variables": _variables, "render": _render, "chat": _chat}[function](*arguments)}
    except sandbox.MissingColumn as error:
        return {"failure": "missing column", "message": _shown(error)}
    except SecurityError as error:
        return {"failure": "security", "message": _shown(error)}
    except TemplateSyntaxError as error:
        return {"failure": "syntax", "message": _shown(error), "line": error.lineno}
    except MemoryError:
        return {"failure": "memory", "message": ""}
    except Exception as error:  # a template is a program: it can raise anything
        if type(error) is TemplateError:  # a chat template's own `raise_exception`
            return {"failure": "refused", "message": _shown(error)}
        return {"failure": "error", "message": f"{type(error).__name__}: {_shown(error)}"}
    finally:
        _set_timer(0)


def _set_timer(seconds: float) -> None:
    """Asks the kernel to end this process after so many seconds of CPU time; 0 cancels that."""
    if resource is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _shown(error: Exception) -> str:
    return str(error)[:SHOWN_CHARACTERS].encode(errors="replace").decode()


def _variables(jinja: str) -> list[list[str]]:
    compiled = sandbox.compile_jinja(jinja)
    return [sorted(compiled.variables), sorted(compiled.input_variables)]


def _render(
    jinja: str,
    answer_choices: str | None,
    values: dict[str, object],
    whole_values: dict[str, object] | None,
    seed: str,
    until_separator: bool,
) -> list[str]:
    """The rendered text, split at its `|||`; with `until_separator` only the first part, and the rest is not run.

    whole_values: if `values` are shortened ones, those they were made of, whose branches the template takes.
    """
    branches = sandbox.Branches()
    if whole_values is not None:
        _render_once(jinja, answer_choices, whole_values, seed, until_separator, branches)
        branches.repeat()
    return _render_once(jinja, answer_choices, values, seed, until_separator, branches)


def _render_once(
    jinja: str,
    answer_choices: str | None,
    values: dict[str, object],
    seed: str,
    until_separator: bool,
    branches: sandbox.Branches,
) -> list[str]:
    compiled = sandbox.compile_jinja(jinja)
    with sandbox.seeded_choice(seed), branches.in_force():
        if answer_choices is not None and "answer_choices" in compiled.variables:
            try:
                choices = sandbox.compile_jinja(answer_choices).parts(values)
            except sandbox.MissingColumn as error:  # an error only if the template uses the choices
                values["answer_choices"] = sandbox.missing_value(str(error))
            else:
                values["answer_choices"] = [choice.strip() for choice in choices]
        return [compiled.input_part(values)] if until_separator else compiled.parts(values)


def _chat(chat_template: str, messages: list[dict], variables: dict[str, object], opens: bool, continues: bool) -> str:
    """What `PreTrainedTokenizerBase.apply_chat_template` renders."""
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], _ = render_jinja_template(
        [messages],
        chat_template=chat_template,
        add_generation_prompt=opens,
        continue_final_message=continues,
        **variables,
    )
    if len(text) > sandbox.MAX_CHARACTERS:
        raise OverflowError(f"it renders more than {sandbox.MAX_CHARACTERS} characters")
    return text


if __name__ == "__main__":
    main()
