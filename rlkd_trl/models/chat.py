"""Prompts as a model reads them: as they are, or through its tokenizer's chat template."""

import contextlib
import copy
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.loading import load_tokenizer
from rlkd_trl.prompts import ChatFormat, ChatText, Message, RenderedPrompt, checked_messages, is_conversation
from rlkd_trl.prompts.chat import AUTO, NONE, render_chat

logger = logging.getLogger(__name__)

TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")
# What a chat template is tried out with. Letters only, so that no filter of a template changes it.
_USER, _ASSISTANT, _SYSTEM = "ThisIsTheQuestion", "ThisIsTheAnswer", "ThisIsTheSystem"


class _Turn(NamedTuple):
    """How a chat template begins turns.

    asked: the messages that it was tried with. openings: the words behind the user's in a prompt, without whitespace,
    if a special token is among them. of_user: the last special token before the user's words, and what follows it; ""
    if there is none. missing: what the template writes before the assistant's words and leaves out of prompts;
    without: how a prompt without it ends, as in openings.
    """

    asked: list[dict[str, str]]
    openings: tuple[str, ...]
    of_user: str
    missing: str
    without: tuple[str, ...]


class PromptWriter:
    """Writes the prompts of one model: texts, and conversations (lists of messages).

    Without a chat template a text is what it was before. With one, a text is the user's message, behind the system
    prompt if there is one, unless it ends with the template's own markers already; a conversation that has no system
    message gets the system prompt, too. The result is what transformers' `apply_chat_template` writes, rendered in
    the bounds of all templates, and is tokenised as that does it: without the tokenizer's own special tokens. A
    template that does not say how an answer begins when it is asked for that is one that does from here on: it gets
    what it writes between a user's message and the answer.

    Attributes:
        processing_class: the tokenizer. It is the one that was given, or a copy where that has another chat template
            than `chat` asks for, or one that does not say how an answer begins, or another EOS than the token by which
            the chat template ends a turn.
        is_chat: whether there is a chat template.

    Raises:
        InputError: A chat template is not there, fails, leaves out or refuses the system prompt, or leaves out what
            the user says; a system prompt without a chat template.
    """

    _warned_of_markers = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat | None = None):
        self.chat = ChatFormat() if chat is None else chat
        self.processing_class = _with_template(tokenizer, self.chat)
        self.is_chat = getattr(self.processing_class, "chat_template", None) is not None
        if not self.is_chat:
            self._refuse_what_needs_a_template()
            return
        self._kinds_read: set[tuple] = set()
        self._turn = self._check_template()
        if self._turn.missing:
            self.processing_class = copy.deepcopy(self.processing_class)
            self.processing_class.chat_template = _opening_answers(
                self.processing_class.chat_template, self._turn.missing
            )
        end = self._end_of_turn()
        if end not in (None, self.processing_class.eos_token):
            if self.processing_class is tokenizer:
                self.processing_class = copy.deepcopy(tokenizer)
            self.processing_class.eos_token = end

    def texts(self, prompts: Iterable[str | list[Message]]) -> list[str]:
        """The prompts as the model reads them. Raises `InputError` as `text`."""
        return [self.text(prompt) for prompt in prompts]

    def text(self, prompt: str | list[Message]) -> str:
        """The prompt as the model reads it; written once, it stays as it is.

        Raises:
            InputError: A conversation without a chat template, or one that the template refuses or leaves a message
                of out.
        """
        if isinstance(prompt, ChatText):
            return prompt
        if is_conversation(prompt):
            if not self.is_chat:
                raise InputError(
                    f"A prompt is a conversation, and {self._name} has no chat template to write it with: give one (a "
                    "file of Jinja), or texts as prompts (with a template, '{{ source }}' is what the user said last)."
                )
            return self._written_conversation(checked_messages(prompt))
        if not self.is_chat or self._ends_with(prompt, self._turn.openings):
            return prompt
        if self._ends_with(prompt, self._turn.without):
            return f"{prompt}{self._turn.missing}"
        self._warn_of_markers(prompt)
        return self._written_text(prompt)

    def is_plain(self, prompt: str | list[Message]) -> bool:
        """Whether the model reads the prompt as it is: a text, without a chat template."""
        return not self.is_chat and not is_conversation(prompt)

    def record(self) -> dict[str, object] | None:
        """What of this decides how prompts are written, in JSON's types; None without a chat template."""
        if not self.is_chat:
            return None
        kwargs = dict(self.chat.template_kwargs or {})
        return {"template": self._template, "system_prompt": self.chat.system_prompt, "template_kwargs": kwargs}

    @property
    def _template(self) -> str:
        try:
            return self.processing_class.get_chat_template()
        except ValueError as error:  # several by name, and none of them the default
            raise InputError(f"The tokenizer of {self._name}: {error}") from error

    @property
    def _name(self) -> str:
        return repr(self.processing_class.name_or_path) if self.processing_class.name_or_path else "the tokenizer"

    # Writing

    def _written_text(self, prompt: str) -> ChatText:
        if isinstance(prompt, RenderedPrompt):
            variables, said = prompt.variables, prompt.render
        else:
            variables, said = {"prompt": prompt}, lambda shorter: shorter["prompt"]

        def written(shorter: Mapping[str, object]) -> str:
            said_now = said(shorter) if shorter else prompt
            return self._render(self._after_system_prompt([{"role": "user", "content": str(said_now)}]))

        return ChatText(written({}), variables, written)

    def _written_conversation(self, messages: list[dict[str, object]]) -> ChatText:
        """Of a prompt that is too long, what the system says stays whole, as a template's words do, and so does what
        the assistant has begun to say."""
        self._check_that_all_are_read(messages)
        begun = len(messages) if messages[-1]["role"] == "assistant" else None
        names = {f"message {number}": message for number, message in enumerate(messages, start=1)}
        said = {
            name: message["content"]
            for name, message in names.items()
            if message["role"] != "system" and name != f"message {begun}" and message.get("content")
        }

        def written(shorter: Mapping[str, object]) -> str:
            cut = [
                {**message, "content": str(shorter[name])} if name in shorter else message
                for name, message in names.items()
            ]
            return self._render(self._after_system_prompt(cut))

        return ChatText(written({}), said, written)

    def _after_system_prompt(self, messages: list[dict[str, object]]) -> list[dict[str, object]]:
        if self.chat.system_prompt is None or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": self.chat.system_prompt}, *messages]

    def _render(
        self, messages: list[dict[str, object]], *, as_prompt: bool = True, with_variables: bool = True
    ) -> str:
        """with_variables: with those that the template is given (`ChatFormat`)."""
        given = self.chat.template_kwargs if with_variables else None
        variables = {**self.processing_class.special_tokens_map, **(given or {})}
        return render_chat(self._template, messages, variables, tokenizer_name=self._name, as_prompt=as_prompt)

    def _ends_with(self, prompt: str, endings: tuple[str, ...]) -> bool:
        """Whether a text ends as the template would end it, but for whitespace."""
        return "".join(prompt.split()).endswith(endings)

    def _warn_of_markers(self, prompt: str) -> None:
        """Once, of a text that has the markers by which the template opens a user's turn, and gets them again."""
        if self._warned_of_markers or not self._turn.of_user or self._turn.of_user not in prompt:
            return
        self._warned_of_markers = True
        logger.warning(
            f"A prompt holds {self._turn.of_user!r}, by which the chat template of {self._name} opens the user's "
            "turn, and does not end as that opens the assistant's: it is taken for what the user says, and gets the "
            "markers once more. If it was written for the model already, turn the chat template off ('none')."
        )

    def _check_that_all_are_read(self, messages: list[dict[str, object]]) -> None:
        """Raises `InputError` if the template leaves out what a message says, the system prompt's included.

        Each order of messages is tried once: of their roles, keys, and whether they have words. Messages with other
        keys, calls of tools for one, are not looked for: templates may well show these in place of the words.
        """
        messages = self._after_system_prompt(messages)
        kind = tuple((m["role"], frozenset(m), bool(str(m.get("content", "")).strip())) for m in messages)
        if kind in self._kinds_read:
            return
        names = [
            f"message{'of' * number}here" if has_words and keys <= {"role", "content"} else ""  # none is in another
            for number, (_, keys, has_words) in enumerate(kind)
        ]
        marked = [
            {**message, "content": name} if name else message for message, name in zip(messages, names, strict=True)
        ]
        try:
            shown = self._render(marked).lower()
        except InputError:  # a template that reads the words, and refuses these: the messages' own may be accepted
            return
        for number, (message, name) in enumerate(zip(messages, names, strict=True), start=1):
            if name not in shown:
                raise InputError(
                    f"The chat template of {self._name} leaves out message {number} of a conversation, what the "
                    f"{message['role']} says (the roles are: {', '.join(role for role, _, _ in kind)}): give another "
                    "chat template, or conversations without such a message."
                )
        self._kinds_read.add(kind)

    # What is found out about the template

    def _check_template(self) -> _Turn:
        """How turns begin. Raises `InputError`."""
        user = {"role": "user", "content": _USER}
        messages = [user]
        try:
            shown = self._render(messages)
        except InputError as error:
            # It may want a system message, which the prompt or the data give.
            messages = [{"role": "system", "content": self.chat.system_prompt or _SYSTEM}, user]
            try:
                shown = self._render(messages)
            except InputError:
                raise error from None
        before, said, behind = shown.rpartition(_USER)
        if not said:
            raise InputError(f"The chat template of {self._name} leaves out what the user says: give another one.")
        if self.chat.system_prompt is not None:
            self._check_system_prompt()
        missing = self._missing_opening(messages, behind)
        openings = {behind + missing}
        if self.chat.template_kwargs:
            with contextlib.suppress(InputError):  # it may need its variables
                openings.add(self._render(messages, with_variables=False).rpartition(_USER)[2] + missing)
        of_user = max((token for token in self._added_tokens if token in before), key=before.rfind, default=None)
        return _Turn(
            messages,
            self._endings(openings),
            "" if of_user in (None, self.processing_class.bos_token) else before[before.rfind(of_user) :].strip(),
            missing,
            self._endings({behind}) if missing else (),
        )

    def _between(self, messages: list[dict[str, object]], role: str) -> str:
        """What the template writes between the user's words and those of the next message."""
        shown = self._render([*messages, {"role": role, "content": _ASSISTANT}], as_prompt=False)
        return shown.rpartition(_ASSISTANT)[0].rpartition(_USER)[2]

    def _endings(self, texts: set[str]) -> tuple[str, ...]:
        """The texts without whitespace, of those that have a special token."""
        shown = {"".join(text.split()) for text in texts}
        return tuple(text for text in shown if any("".join(token.split()) in text for token in self._added_tokens))

    def _missing_opening(self, messages: list[dict[str, object]], behind: str) -> str:
        """What the template writes before an answer, if it does not do so for a prompt; "" where it does.

        It is none either where the same stands before what a user says: then no words of the assistant's are opened.

        behind: what it writes behind the user's words for a prompt.
        """
        try:
            if self._render(messages, as_prompt=False).rpartition(_USER)[2] != behind:
                return ""
            between = self._between(messages, "assistant")
        except InputError:  # a template of prompts alone
            return ""
        with contextlib.suppress(InputError):  # it may refuse a user who speaks twice
            if self._between(messages, "user") == between:
                return ""
        if not between.startswith(behind) or between.strip() == behind.strip():
            return ""
        return between.removeprefix(behind).rstrip(" ")  # a space belongs to the answer's first word

    def _check_system_prompt(self) -> None:
        remedy = (
            "Leave the system prompt out, or put its words before the question, in a template (as in "
            "'Answer in one sentence. {{ source }}')."
        )
        try:
            talk = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
            shown = self._render(talk)
        except InputError as error:
            raise InputError(f"{str(error).rstrip('.')}. {remedy}") from error
        if _SYSTEM not in shown:
            raise InputError(f"The chat template of {self._name} leaves out what the system says. {remedy}")

    def _end_of_turn(self) -> str | None:
        """The special token that follows the assistant's words, which is what a model writes to end its turn.

        Of templates that write none it is the one that opens the user's next turn, as GLM's; None if that is none.
        """
        talk = [*self._turn.asked, {"role": "assistant", "content": _ASSISTANT}]
        for messages in (talk, [*talk, self._turn.asked[-1]]):
            try:
                behind = self._render(messages, as_prompt=False).rpartition(_ASSISTANT)[2].lstrip()
            except InputError:  # a template of prompts alone
                return None
            for token in sorted(self._added_tokens, key=len, reverse=True):
                if behind.startswith(token) and token != self.processing_class.bos_token:
                    return token
        return None

    @property
    def _added_tokens(self) -> list[str]:
        tokens = (token.content for token in self.processing_class.added_tokens_decoder.values())
        return [token for token in tokens if token.strip()]

    def _refuse_what_needs_a_template(self) -> None:
        for name, value in (("system prompt", self.chat.system_prompt), ("variable", self.chat.template_kwargs)):
            if value:
                why = "it is turned off" if self.chat.template == NONE else f"{self._name} has none"
                raise InputError(
                    f"A {name} for a chat template was given ({value!r}), and {why}: leave it out, or give a chat "
                    "template (a file of Jinja)."
                )


def _with_template(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy of it that has the chat template asked for."""
    if chat.template == AUTO:
        return tokenizer
    template = None if chat.template == NONE else read_chat_template(chat.template)
    if template == getattr(tokenizer, "chat_template", None):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _opening_answers(template: str | dict[str, str], opening: str) -> str | dict[str, str]:
    """A chat template that writes `opening` behind a prompt, if it is asked for the words that open an answer."""
    if isinstance(template, dict):
        return {**template, "default": _opening_answers(template["default"], opening)}
    literal = json.dumps(opening, ensure_ascii=False)
    return template + "{% if add_generation_prompt %}{{ " + literal + " }}{% endif %}"


def read_chat_template(path: str) -> str | dict[str, str]:
    """A file's Jinja text, or the chat template of a checkpoint's tokenizer.

    Raises:
        InputError: There is none.
    """
    if Path(path).suffix in TEMPLATE_SUFFIXES or Path(path).is_file():
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"The chat template {path} could not be read: {error}") from error
    try:
        template = load_tokenizer(path).chat_template
    except InputError as error:
        raise InputError(
            f"The chat template {path!r} is neither {AUTO!r} nor {NONE!r} nor a file of Jinja "
            f"({TEMPLATE_SUFFIXES[0]}), and so taken for a checkpoint that has one. {error}"
        ) from error
    if template is None:
        raise InputError(f"The tokenizer of {path} has no chat template: give a file of Jinja, or another checkpoint.")
    return template
