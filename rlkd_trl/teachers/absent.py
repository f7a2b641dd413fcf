"""Teachers whose model is not in this process: what they know is in files, or behind a server."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.models.limits import PositionLimits
from rlkd_trl.prompts import ChatFormat


class AbsentTeacher:
    """What all of them share with `Teacher`: a tokenizer, and how their prompts are written. They hold no weights.

    Attributes:
        model: None, in place of a model.
        can_score: Whether it can say something about any completion, as `Teacher.score` does.
        can_answer: Whether it can write completions.
        limits: How many tokens it has positions for.
        content_tokens: The special tokens that it may write, for the student to write them too.
    """

    model = None
    can_score = False
    can_answer = False
    max_prompt_length: int | None = None

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase,
        *,
        chat: ChatFormat | None = None,
        limits: PositionLimits | None = None,
        content_tokens: Sequence[str] = (),
    ):
        self.writer = PromptWriter(processing_class, chat)
        self.processing_class = self.writer.processing_class
        self.limits = limits or PositionLimits(None, None, is_shared=True)
        self.content_tokens = list(content_tokens)

    def to(self, device: torch.device) -> None:
        """Does nothing: there is nothing to move."""

    def aligner(self, student: PreTrainedTokenizerBase) -> None:
        """None: teacher and student have one tokenizer."""

    def describe(self) -> str:
        """Where the teacher is, in one line."""
        raise NotImplementedError

    def record(self) -> dict[str, object]:
        """What must be the same in a resumed run, in JSON's types."""
        raise NotImplementedError
