"""Prompts within their caps, before a model is loaded: what is cut of a data set, said once, and what cannot be."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import PromptArguments
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates, question_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 1000  # texts that are tokenised at a time


def student_prompt(template: str | None, row: Mapping[str, object]) -> str:
    """What the student reads of a data row: `--student_template` with its columns, or the bare source."""
    if template is None:
        return row["prompt"]
    own = PromptTemplate("student_template", template)
    return own.render({name: value for name, value in row.items() if name != "references"})


def fit_student_prompts(
    rows: "Dataset",
    data_name: str,
    prompts: PromptArguments,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
) -> "Dataset":
    """The rows with prompts of at most `max_length` tokens: `--student_template`'s words stay, its documents are cut.

    Bare sources stay as they are: whoever tokenises them cuts their ends. One line says how many rows are concerned.

    Raises:
        InputError: The template's own words are too many tokens; the row is named, counted from 1.
    """
    if max_length is None:
        return rows
    if prompts.student_template is None:
        fit_prompts(rows["prompt"], data_name, tokenizer, max_length)
        return rows
    texts = [student_prompt(prompts.student_template, {**row, "prompt": row["source"]}) for row in rows]
    texts = fit_prompts(texts, data_name, tokenizer, max_length)
    return rows.remove_columns("prompt").add_column("prompt", texts)


def fit_prompts(
    prompts: Sequence[str], data_name: str, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[str]:
    """The prompts, those that a template rendered cut to `max_length` tokens, and a line about how many were longer.

    Raises:
        InputError: As `fit_student_prompts`.
    """
    from rlkd_trl.models.prompts import shorten

    fitting, excess = list(map(str, prompts)), []
    for i, length in enumerate(_lengths(tokenizer, prompts)):
        if length > max_length:
            excess.append(length - max_length)
            with _naming_the_row(data_name, i):
                fitting[i] = str(shorten(tokenizer, prompts[i], max_length))
    _say(f"{data_name}: {len(excess)} of {len(fitting)} prompts are", "--max_prompt_length", max_length, excess)
    return fitting


def check_questions(
    rows: Sequence[Mapping[str, object]],
    data_name: str,
    templates: PromptTemplates | None,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
) -> None:
    """Finds the rows whose questions to a teacher have more than `max_length` tokens, and says how many they are.

    Each row counts with its longest question. The teacher cuts the documents when it is asked.

    Raises:
        InputError: A template's own words are too many tokens; the row is named, counted from 1.
    """
    from rlkd_trl.models.prompts import check_can_fit

    if max_length is None:
        return
    if templates is None:
        longest = [row["prompt"] for row in rows]
    else:
        longest = [max(templates.render(question_columns(templates, row)), key=len) for row in rows]
    excess = []
    for i, length in enumerate(_lengths(tokenizer, longest)):
        if length > max_length:
            excess.append(length - max_length)
            with _naming_the_row(data_name, i):
                for question in templates.render(question_columns(templates, rows[i])) if templates else []:
                    check_can_fit(tokenizer, question, max_length)
    _say(
        f"{data_name}: {len(excess)} of {len(longest)} rows' questions to the teacher are",
        "--teacher_max_prompt_length",
        max_length,
        excess,
    )
