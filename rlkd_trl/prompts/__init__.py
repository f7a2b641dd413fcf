"""Natural-language prompts that a teacher is asked through: templates in promptsource's YAML format."""

from rlkd_trl.prompts.chat import ChatFormat, ChatText
from rlkd_trl.prompts.conversations import Message, checked_messages, is_conversation, source_text
from rlkd_trl.prompts.questions import question_columns, variable_of_source
from rlkd_trl.prompts.shortening import RenderedPrompt, can_fit, cannot_fit, shortened
from rlkd_trl.prompts.templates import PromptTemplate, PromptTemplates

__all__ = [
    "ChatFormat",
    "ChatText",
    "Message",
    "PromptTemplate",
    "PromptTemplates",
    "RenderedPrompt",
    "can_fit",
    "cannot_fit",
    "checked_messages",
    "is_conversation",
    "question_columns",
    "shortened",
    "source_text",
    "variable_of_source",
]
