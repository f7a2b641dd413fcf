"""How a chat model is spoken to: the settings, and texts that its chat template wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlkd_trl.errors import InputError
from rlkd_trl.prompts.conversations import Message
from rlkd_trl.prompts.process import RenderingError, ask_renderer
from rlkd_trl.prompts.shortening import RenderedPrompt

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class ChatFormat:
    """Whether a model's prompts go through a chat template, and with what.

    A prompt that is a text is then what the user says; one that is a list of messages (see `prompts.conversations`)
    is the conversation so far. A text that has the template's own markers at its end already is left as it is.
    """

    template: str = AUTO
    """"auto": the chat template of the model's tokenizer, where it has one; "none": none, prompts are read as they
    are; or the path of a file of Jinja, or a checkpoint whose tokenizer's chat template is taken."""
    system_prompt: str | None = None
    """What the system says first, in conversations that have no system message of their own."""
    template_kwargs: Mapping[str, object] | None = None
    """Variables of the chat template, as TRL's `chat_template_kwargs`, e.g. {"enable_thinking": False}."""


class ChatText(RenderedPrompt):
    """A prompt as a chat template wrote it, with all special tokens in it; shortened as other rendered prompts are."""

    __slots__ = ()

    def __new__(
        cls,
        text: str,
        variables: Mapping[str, object] | None = None,
        render: Callable[[Mapping[str, object]], str] | None = None,
    ) -> ChatText:
        return super().__new__(cls, text, variables or {}, render or (lambda _: text))

    def render(self, replaced: Mapping[str, object]) -> ChatText:
        return ChatText(self._render(replaced))

    def __reduce__(self):
        return ChatText, (str(self),)


def render_chat(
    chat_template: str,
    messages: list[Message],
    variables: Mapping[str, object],
    *,
    tokenizer_name: str,
    as_prompt: bool = True,
) -> str:
    """What transformers' `apply_chat_template` makes of the messages, in the bounds of all templates.

    A prompt has the words that open the assistant's turn at its end; where the assistant has spoken last, it ends
    there, in the middle of that turn.

    Raises:
        InputError: The template refuses the messages, fails, or takes too much time or memory.
    """
    continues = as_prompt and messages[-1]["role"] == "assistant"
    opens = as_prompt and not continues
    try:
        return ask_renderer("chat", chat_template, list(messages), dict(variables), opens, continues)
    except RenderingError as error:
        raise InputError(f"The chat template of {tokenizer_name} {_explanation(error)}") from error


def _explanation(error: RenderingError) -> str:
    if error.kind == "refused":
        return f"refuses a conversation: {error}"
    if error.kind == "security":
        return f"does what the sandbox forbids: {error}"
    if error.kind == "syntax":
        line = "" if error.line is None else f", line {error.line}"
        return f"is not valid jinja{line}: {error}"
    if error.kind == "bounds":
        return f"{error} for one prompt: it may never end. Ask without it, or give another one."
    return f"fails on a conversation: {error}"
