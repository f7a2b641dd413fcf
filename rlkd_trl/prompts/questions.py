"""Which columns of a data row the teacher's templates may read."""

import contextlib
from collections.abc import Mapping

from rlkd_trl.errors import InputError
from rlkd_trl.prompts.conversations import source_text
from rlkd_trl.prompts.templates import PromptTemplates


def question_columns(templates: PromptTemplates, row: Mapping[str, object]) -> dict[str, object]:
    """The columns of a data row that templates may read: all but the references.

    If all templates read one and the same column and the row has no column of that name, the row's source text gets
    it.
    """
    columns = {name: value for name, value in row.items() if name != "references"}
    variable = variable_of_source(templates, columns)
    return columns if variable is None else {**columns, variable: row.get("source", source_text(row["prompt"]))}


def variable_of_source(templates: PromptTemplates, row: Mapping[str, object]) -> str | None:
    """The variable that gets the source text, since the row has no column of its name; None if there is none."""
    # Templates that read several columns have no `source_variable`; if one is missing, rendering will say so.
    with contextlib.suppress(InputError):
        variable = templates.source_variable
        return None if variable in row or variable in templates.renamed_variables else variable
    return None
