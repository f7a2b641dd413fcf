"""What stands in a dataset's columns: sources, grouped, and their references."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import Message, checked_messages, is_conversation

if TYPE_CHECKING:
    from datasets import Dataset


def require_columns(rows: Dataset, **flags: str | None) -> None:
    """Check that the columns named by flags exist: `require_columns(rows, source_column="mr")`. None is skipped.

    Raises:
        InputError: for the first flag whose column is not in the data.
    """
    for flag, column in flags.items():
        if column is not None and column not in rows.column_names:
            message = f"`--{flag} {column}` is not in the data; its columns are: {', '.join(rows.column_names)}."
            if len(rows.column_names) == 1 and any(separator in rows.column_names[0] for separator in ";\t|"):
                message += " That is one column: are the cells separated by something else than commas?"
            raise InputError(message)


def answers_apart(
    rows: Dataset, source_column: str, target_column: str | None, *, flag: str = "target_column"
) -> tuple[Dataset, str | None]:
    """The rows and their target column, which is a new one where one column of conversations is source and target.

    There, as in TRL's column `messages`, the last message is the target and those before it are the prompt.

    flag: the one that names the targets.

    Raises:
        InputError: The one column holds texts, or a conversation that is no prompt and an answer of the assistant's.
    """
    if source_column != target_column:
        return rows, target_column
    require_no_blanks(rows[source_column], source_column)
    prompts, answers = [], []
    for i, messages in enumerate(rows[source_column]):
        if not is_conversation(messages):
            raise InputError(f"`--{flag} {target_column}` is the source column too; name another or leave it out.")
        require_prompt(messages, source_column, i)
        roles = [message["role"] for message in messages]
        if len(roles) < 2 or roles[-1] != "assistant":
            raise InputError(
                f"Row {i + 1}: column `{source_column}` is the source and the target, so that each conversation has "
                f"to end with the assistant's answer; the roles in this one are: {', '.join(roles)}."
            )
        prompts.append(messages[:-1])
        answers.append(messages[-1:])
    feature, answer = rows.features[source_column], f"answer in {source_column}"
    rows = rows.add_column(answer, answers, feature=feature)  # first: without columns a table has no rows
    return rows.remove_columns(source_column).add_column(source_column, prompts, feature=feature), answer


def group_by_source(rows: Dataset, source_column: str, target_column: str | None = None) -> Dataset:
    """One row for each distinct source, in the order in which they first occur.

    Columns: `prompt` (the source: a text, or a conversation, which is a list of messages), `references` (list[str]:
    the targets of all rows with that source; [] without `target_column`), and the first value of every other column,
    the source column under its own name included. The target column, and a `references` column that is not the
    target, are left out, so that no reference reaches a prompt through them.

    Args:
        rows: the data.
        source_column: a column of non-blank strings, or of conversations.
        target_column: a column of non-blank strings, or of non-empty lists of them; or of the assistant's messages; or
            the source column, if its conversations end with these.

    Raises:
        InputError: a column is missing, its values are not as above (rows are counted from 1, headers left out), or
            `prompt` is already the name of another column.
    """
    from datasets import List, Value

    require_columns(rows, source_column=source_column, target_column=target_column)
    rows, target_column = answers_apart(rows, source_column, target_column)
    if "prompt" in rows.column_names and "prompt" not in (source_column, target_column):
        raise InputError(
            f"The data has a column `prompt` besides the source column `{source_column}`, and the source text goes by "
            "that name from here on; rename that column or use it as the source column."
        )

    first_row: dict[str, int] = {}
    references: dict[str, list[str]] = {}
    require_no_blanks(rows[source_column], source_column)
    targets = rows[target_column] if target_column else [[]] * len(rows)
    require_no_blanks(targets, target_column)
    for i, (source, target) in enumerate(zip(rows[source_column], targets, strict=True)):
        require_prompt(source, source_column, i)
        key = input_key(source)
        first_row.setdefault(key, i)
        references.setdefault(key, []).extend(as_references(target, target_column, i) if target_column else [])

    grouped = rows.select(list(first_row.values()))
    prompts = grouped[source_column][:]
    replaced = {"prompt", "references", target_column} - {source_column}
    grouped = grouped.remove_columns([column for column in rows.column_names if column in replaced])
    if source_column != "prompt":
        grouped = grouped.add_column("prompt", prompts, feature=rows.features[source_column])
    return grouped.add_column("references", list(references.values()), feature=List(Value("string")))


def input_key(prompt: str | list[Message]) -> str:
    """What tells inputs apart: a text itself, a conversation's messages."""
    return json.dumps(checked_messages(prompt), sort_keys=True) if is_conversation(prompt) else prompt


def reference_texts(*datasets: Dataset | Mapping[str, Dataset] | Iterable[Mapping] | None) -> Iterator[str]:
    """All texts in the columns `references` of datasets, dictionaries of datasets, and lists of rows; None counts as
    empty."""
    for dataset in datasets:
        if isinstance(dataset, Mapping):
            yield from reference_texts(*dataset.values())
            continue
        columns = getattr(dataset, "column_names", None)
        if columns is not None:  # a `Dataset` reads one column faster than whole rows
            column = dataset["references"] if "references" in columns else []
        else:
            column = (row.get("references") for row in dataset or [])
        for references in column:
            yield from listed_references(references)


def listed_references(references: str | Iterable[str] | None) -> list[str]:
    """A row's `references`, one text or several or none, as a list."""
    return [references] if isinstance(references, str) else list(references or [])


def as_references(target, column: str, index: int) -> list[str]:
    """A target, one text or several, as a list. Raises `InputError` if it is something else, or blank.

    A list of messages, as TRL's column `completion`, is one text: what the assistant says.
    """
    if is_conversation(target):
        return [answer_in(target, column, index)]
    references = list(target) if isinstance(target, (list, tuple)) else [target]
    if not references:
        raise InputError(f"Row {index + 1}: column `{column}` holds an empty list; drop the row or fill it in.")
    for reference in references:
        require_text(reference, column, index)
    return references


def answer_in(messages: list[Message], column: str, index: int) -> str:
    """The text of a completion that is a list of one message. Raises `InputError` if it is another, or blank."""
    try:
        said = checked_messages(messages)
    except InputError as error:
        raise InputError(f"Row {index + 1}, column `{column}`: {error}") from error
    if [message["role"] for message in said] != ["assistant"]:
        raise InputError(
            f"Row {index + 1}: column `{column}` is to hold one message of the assistant, and its roles are: "
            f"{', '.join(message['role'] for message in said)}."
        )
    require_text(said[0].get("content"), column, index)
    return said[0]["content"]


def require_no_blanks(values: Sequence, column: str) -> None:
    """Raises `InputError` if any values are None or blank texts, with their number and the first few rows."""
    blank = [i + 1 for i, value in enumerate(values) if _is_blank(value)]
    if blank:
        rows = f"{', '.join(map(str, blank[:5]))}{', …' if blank[5:] else ''}"
        raise InputError(f"{_empty(blank[0], column)} It is empty in {len(blank)} of {len(values)} rows: {rows}.")


def _empty(row: int, column: str) -> str:
    return (
        f"Row {row}: column `{column}` is empty; drop the row or fill it in. (In CSV files NA, N/A, NaN, null and "
        "None count as empty too.)"
    )


def _is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def require_text(value, column: str, index: int) -> None:
    """Raises `InputError` unless `value`, in row `index` (from 0) of `column`, is text and not blank."""
    if _is_blank(value):
        raise InputError(_empty(index + 1, column))
    if not isinstance(value, str):
        raise InputError(
            f"Row {index + 1}: column `{column}` holds {value!r} ({type(value).__name__}), not text; "
            "name a text column or convert it."
        )


def require_prompt(value, column: str, index: int) -> None:
    """As `require_text`, of a value that may be a conversation; raises `InputError` if a message is none."""
    if not is_conversation(value):
        require_text(value, column, index)
        return
    try:
        checked_messages(value)
    except InputError as error:
        raise InputError(f"Row {index + 1}, column `{column}`: {error}") from error


def parse_renames(pairs: list[str]) -> dict[str, str]:
    """["mr=meaning_representation"] -> {"mr": "meaning_representation"}: old column names to new ones.

    Raises:
        InputError: a pair is not of the form old=new, or a name occurs twice on the same side.
    """
    renames: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = (part.strip() for part in pair.partition("="))
        if not (old and equals and new) or "=" in new:
            raise InputError(f"Column renaming {pair!r} is not of the form old=new, e.g. mr=meaning_representation.")
        if old in renames or new in renames.values():
            raise InputError(f"Column renaming {pair!r} names a column that an earlier renaming has named already.")
        renames[old] = new
    return renames
