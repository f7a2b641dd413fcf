"""Natural-language prompts that a teacher is asked through: templates in promptsource's YAML format."""

from rlkd_trl.prompts.questions import question_columns
from rlkd_trl.prompts.shortening import RenderedPrompt, can_fit, cannot_fit, shortened
from rlkd_trl.prompts.templates import PromptTemplate, PromptTemplates

__all__ = [
    "PromptTemplate",
    "PromptTemplates",
    "RenderedPrompt",
    "can_fit",
    "cannot_fit",
    "question_columns",
    "shortened",
]
