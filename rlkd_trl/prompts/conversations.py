"""Prompts that are conversations: lists of messages, as TRL's conversational data sets have them.

[{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": "What is distillation?"}]
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

from rlkd_trl.errors import InputError

Message = Mapping[str, object]


def is_conversation(prompt: object) -> bool:
    """Whether a prompt is a list of messages, and not a text. What is in the messages is not looked at."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(item, Mapping) for item in prompt)


def checked_messages(prompt: list[Message]) -> list[dict[str, object]]:
    """The messages, without the keys that have no value (a data set fills in None where others have one).

    A content in blocks, [{"type": "text", "text": "…"}, …], becomes the text of these, one behind the other.

    Raises:
        InputError: A message has no role, or its content is not text.
    """
    messages = [
        {key: _text_of(value) if key == "content" else value for key, value in message.items() if value is not None}
        for message in prompt
    ]
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("role"), str):
            raise InputError(
                f"Message {number} of a conversation has no role: {reprlib.repr(message)}; a message is "
                '{"role": "user", "content": "a text"}.'
            )
        if not isinstance(message.get("content", ""), str) or ("content" not in message and len(message) == 1):
            raise InputError(
                f"Message {number} of a conversation, of role {message['role']!r}, has the content "
                f"{reprlib.repr(message.get('content'))}, not a text: models here read texts only."
            )
    return messages


def _text_of(content: object) -> object:
    """The text of a content that is in blocks of text; any other content as it is."""
    blocks = content if isinstance(content, list | tuple) and content else [None]
    texts = [block.get("text") if isinstance(block, Mapping) else None for block in blocks]
    is_text = all(
        isinstance(text, str) and block.get("type", "text") == "text"
        for text, block in zip(texts, blocks, strict=True)
    )
    return "".join(texts) if is_text else content


def source_text(prompt: str | list[Message]) -> str:
    """What of a prompt is the source text: all of a text, of a conversation what the user has said last."""
    if not is_conversation(prompt):
        return str(prompt)
    said = [message for message in prompt if message.get("role") == "user"] or prompt
    return str(_text_of(said[-1].get("content")) or "")
