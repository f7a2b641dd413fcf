"""Which columns of a data row the teacher's templates may read."""

import contextlib
from collections.abc import Mapping

from rlkd_trl.errors import InputError
from rlkd_trl.prompts.templates import PromptTemplates


def question_columns(templates: PromptTemplates, row: Mapping[str, object]) -> dict[str, object]:
    """The columns of a data row that templates may read.

    All but the references; and where the templates all read one and the same column which the row lacks, the row's
    source text under that name.
    """
    columns = {name: value for name, value in row.items() if name != "references"}
    # With several input columns there is no such name; rendering then says which column is missing.
    with contextlib.suppress(InputError):
        columns.setdefault(templates.source_variable, row.get("source", row["prompt"]))
    return columns
