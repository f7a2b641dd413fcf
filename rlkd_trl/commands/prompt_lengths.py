"""Cuts prompts to their caps before a model is loaded, and says once per dataset how many were cut."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import PromptArguments, StudentArguments, TeacherArguments
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.loading import student_writer, teacher_writer
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import (
    Message,
    PromptTemplate,
    PromptTemplates,
    RenderedPrompt,
    question_columns,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from rlkd_trl.data.streams import RowStream
    from rlkd_trl.models.chat import PromptWriter

BATCH_SIZE = 1000  # texts that are tokenised at a time


def fit_rows(
    rows: "Dataset",
    data_name: str,
    prompts: PromptArguments,
    templates: PromptTemplates | None,
    student: StudentArguments,
    teacher: TeacherArguments,
    *,
    max_prompt_length: int | None,
    max_completion_length: int,
) -> "Dataset":
    """The rows with student prompts of at most `max_prompt_length` tokens; the teacher's questions are only checked.

    It prints how many prompts, and how many questions, are longer than their caps. Of the checkpoints it reads
    tokenizers and configs only.

    Raises:
        InputError: A template's own words are too many tokens, or a model has too few positions for a prompt and a
            completion of `max_completion_length`; the message names the row, counted from 1.
    """
    from rlkd_trl.models.limits import check_lengths, position_limits_of_config
    from rlkd_trl.models.loading import load_config

    writer = student_writer(student)
    if max_prompt_length is not None:
        rows = fit_student_prompts(rows, data_name, prompts.student_template, writer, max_prompt_length)
    elif not writer.is_plain(rows[0]["prompt"]):
        _written(writer, rows["prompt"], data_name)
    limits = position_limits_of_config(load_config(student.student, revision=student.student_revision))
    with naming(data_name):
        check_lengths(
            "The student",
            limits,
            writer.processing_class,
            map(writer.text, rows["prompt"]),
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            prompt_flag="--max_prompt_length",
        )
    if teacher.teacher:
        check_questions(rows, data_name, templates, teacher, max_completion_length=max_completion_length)
    return rows


def student_prompt(template: str | None, row: Mapping[str, object]) -> "str | list[Message]":
    """The student's prompt of a data row: `--student_template` with its columns, or the source as it is."""
    if template is None:
        return row["prompt"]
    prompt_template = PromptTemplate("student_template", template)
    return prompt_template.render({name: value for name, value in row.items() if name != "references"})


def fit_stream(
    stream: "RowStream",
    prompts: PromptArguments,
    templates: PromptTemplates | None,
    student: StudentArguments,
    teacher: TeacherArguments,
    **lengths: int | None,
) -> "RowStream":
    """As `fit_rows`, of a stream; only its first rows are counted and checked. Raises `InputError`."""
    head = fit_rows(stream.head, "First rows of the training data", prompts, templates, student, teacher, **lengths)
    writer, max_length = student_writer(student), lengths["max_prompt_length"]
    if prompts.student_template is None or max_length is None:
        return stream

    def fit(rows: "Dataset") -> "Dataset":
        return fit_student_prompts(rows, "Training data", prompts.student_template, writer, max_length, counts=False)

    return stream.then(fit, head)


def fit_student_prompts(
    rows: "Dataset",
    data_name: str,
    template: str | None,
    writer: "PromptWriter",
    max_length: int,
    *,
    counts: bool = True,
) -> "Dataset":
    """The rows with prompts of at most `max_length` tokens, if a template makes them; `counts` as in `fit_prompts`.

    Raises:
        InputError: As `fit_rows`.
    """
    if template is None:  # bare sources stay as they are here, and lose their ends when they are tokenised
        fit_prompts(rows["prompt"], data_name, writer, max_length, counts=counts)
        return rows
    texts = [student_prompt(template, {**row, "prompt": row["source"]}) for row in rows]
    texts = fit_prompts(texts, data_name, writer, max_length, counts=counts)
    return rows.remove_columns("prompt").add_column("prompt", texts)


def fit_prompts(
    prompts: "Sequence[str | list[Message]]",
    data_name: str,
    writer: "PromptWriter",
    max_length: int,
    *,
    counts: bool = True,
) -> "list[str | list[Message]]":
    """The prompts; those from a template are cut to `max_length` tokens. counts: print how many are longer.

    The tokens are those of the prompt in its chat template, where there is one; the prompt is returned without it.

    Raises:
        InputError: As `fit_rows`.
    """
    from rlkd_trl.models.prompts import check_can_fit, shorten

    fitting, excess = [str(prompt) if isinstance(prompt, str) else prompt for prompt in prompts], []
    tokenizer, written = writer.processing_class, _written(writer, prompts, data_name)
    for i, length in enumerate(_lengths(tokenizer, written)):
        if length > max_length:
            excess.append(length - max_length)
            with naming(f"{data_name}, row {i + 1}"):
                if isinstance(prompts[i], RenderedPrompt):
                    fitting[i] = str(shorten(tokenizer, prompts[i], max_length, read_as=writer.text))
                elif isinstance(written[i], RenderedPrompt):  # a chat's, which is cut when it is tokenised
                    check_can_fit(tokenizer, written[i], max_length)
    if counts:
        how_many = f"{data_name}: {len(excess)} of {len(fitting)} prompts are"
        _say_shortened(how_many, "--max_prompt_length", max_length, excess)
    return fitting


def check_questions(
    rows: Sequence[Mapping[str, object]],
    data_name: str,
    templates: PromptTemplates | None,
    teacher: TeacherArguments,
    *,
    max_completion_length: int,
) -> None:
    """Checks the questions to the teacher, and prints for how many rows the longest one exceeds the cap.

    They are not cut here: the teacher does that.

    Raises:
        InputError: As `fit_rows`.
    """
    from rlkd_trl.models.limits import check_lengths, position_limits_of_config
    from rlkd_trl.models.loading import load_config

    max_length = teacher.teacher_max_prompt_length
    for number, name in enumerate(teacher.teacher):
        writer = teacher_writer(teacher, name)
        longest = _longest_questions(writer, templates, rows, data_name)
        if max_length is not None or not writer.is_plain(rows[0]["prompt"]):
            longest = list(longest)
        limits = position_limits_of_config(load_config(name, revision=teacher.teacher_revision))
        with naming(data_name):
            check_lengths(
                "The teacher",
                limits,
                writer.processing_class,
                longest,
                max_prompt_length=max_length,
                max_completion_length=max_completion_length,
                prompt_flag="--teacher_max_prompt_length",
            )
        if max_length is not None and number == 0:
            _say_cuts(rows, data_name, templates, writer, longest, max_length)


def _longest_questions(
    writer: "PromptWriter", templates: PromptTemplates | None, rows: Sequence[Mapping], data_name: str
) -> Iterator[str]:
    """The longest of each row's questions, as the teacher reads it. Raises `InputError` if it cannot be written."""
    for i, row in enumerate(rows):
        with naming(f"{data_name}, row {i + 1}"):
            longest = max(writer.texts(_questions(templates, row)), key=len)
        yield longest


def _say_cuts(
    rows: Sequence[Mapping],
    data_name: str,
    templates: PromptTemplates | None,
    writer: "PromptWriter",
    longest: list[str],
    max_length: int,
) -> None:
    """Says how many rows' questions are too long. Raises `InputError` if one cannot be cut."""
    from rlkd_trl.models.prompts import check_can_fit

    excess = []
    for i, length in enumerate(_lengths(writer.processing_class, longest)):
        if length > max_length:
            excess.append(length - max_length)
            with naming(f"{data_name}, row {i + 1}"):
                for question in writer.texts(_questions(templates, rows[i])):
                    if isinstance(question, RenderedPrompt):
                        check_can_fit(writer.processing_class, question, max_length)
    questions = f"{data_name}: {len(excess)} of {len(longest)} rows' questions to the teacher are"
    _say_shortened(questions, "--teacher_max_prompt_length", max_length, excess)


def _questions(templates: PromptTemplates | None, row: Mapping[str, object]) -> "list[str | list[Message]]":
    return [row["prompt"]] if templates is None else templates.render(question_columns(templates, row))


def _written(writer: "PromptWriter", prompts: "Sequence[str | list[Message]]", data_name: str) -> list[str]:
    """The prompts as the model reads them. Raises `InputError` for one that its chat template refuses."""
    written = []
    for i, prompt in enumerate(prompts):
        with naming(f"{data_name}, row {i + 1}"):
            written.append(writer.text(prompt))
    return written


def _lengths(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> Iterator[int]:
    from rlkd_trl.models.prompts import prompt_lengths

    for start in range(0, len(texts), BATCH_SIZE):
        yield from prompt_lengths(tokenizer, texts[start : start + BATCH_SIZE])


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Puts `place`, e.g. "Row 3", before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _say_shortened(how_many_are: str, flag: str, max_length: int, excess: list[int]) -> None:
    """Prints how many prompts are too long, and how many tokens each too many; nothing if there are none."""
    if excess:
        mean, most = sum(excess) / len(excess), max(excess)
        say(
            f"{how_many_are} longer than {flag} {max_length} and lose {mean:.0f} tokens on average, {most} at most: "
            "the ends of their longest texts, not a template's words."
        )
