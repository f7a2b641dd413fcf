"""Flags for chat templates, which teacher and student both have, each with a prefix of its own."""

import json

from rlkd_trl.errors import InputError
from rlkd_trl.prompts.chat import ChatFormat

TEMPLATE_HELP = "auto: the tokenizer's, if it has one; none; or a .jinja file, or a checkpoint with a tokenizer's."
SYSTEM_PROMPT_HELP = "What the system says first, in its chat template."
VARIABLES_HELP = """Variables of its chat template, in JSON: '{"enable_thinking": false}'."""


def chat_format_of(arguments: object, role: str) -> ChatFormat:
    """The format by the flags that begin with `role`, "teacher" or "student". Raises `InputError` for bad JSON."""
    kwargs = getattr(arguments, f"{role}_chat_template_kwargs")
    try:
        variables = None if kwargs is None else json.loads(kwargs)
    except ValueError as error:
        raise InputError(f"--{role}_chat_template_kwargs {kwargs!r} is not JSON: {error}") from error
    if not isinstance(variables, dict | None):
        raise InputError(f"--{role}_chat_template_kwargs {kwargs} is to be a mapping: '{{\"name\": value}}'.")
    return ChatFormat(
        getattr(arguments, f"{role}_chat_template"), getattr(arguments, f"{role}_system_prompt"), variables
    )
