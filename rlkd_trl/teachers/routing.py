"""Which teacher, asked through which template, an example belongs to, so that several experts become one student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkd_trl.errors import InputError


@dataclass(frozen=True)
class Routing:
    """The columns of the data that name an example's teacher and its template; None: all of them are asked.

    teachers: the teachers' names in the panel's order. A value of `teacher_column` is one of them, or the last part of
    one (a directory's own name) that no other has. A value of `template_column` is a template's name.

    Raises:
        InputError: Neither column is given.
    """

    teacher_column: str | None = None
    template_column: str | None = None
    teachers: Sequence[str] = ()

    def __post_init__(self):
        if self.teacher_column is None and self.template_column is None:
            raise InputError("Routing needs teacher_column, template_column or both.")

    def owners(self, row: Mapping[str, object], templates: Sequence[str]) -> tuple[int | None, int | None]:
        """Indices of the row's teacher and template; None where any will do. Raises `InputError`; see `check`."""
        teacher = template = None
        if self.teacher_column is not None:
            names = [str(Path(name)) for name in self.teachers]
            value = str(Path(str(_value(row, self.teacher_column))))
            places = [i for i, name in enumerate(names) if name == value]
            places = places or [i for i, name in enumerate(names) if Path(name).name == value]
            if len(places) != 1:
                how = "no teacher" if not places else f"{len(places)} teachers"
                raise InputError(
                    f"`{self.teacher_column}` is {row[self.teacher_column]!r}, which names {how} of: "
                    f"{', '.join(self.teachers)}."
                )
            teacher = places[0]
        if self.template_column is not None:
            value = str(_value(row, self.template_column))
            if value not in templates:
                known = ", ".join(templates) or "none"
                raise InputError(f"`{self.template_column}` is {value!r}, which is no template of: {known}.")
            template = list(templates).index(value)
        return teacher, template

    def check(self, rows: Sequence[Mapping[str, object]], templates: Sequence[str], what: str) -> None:
        """Raises `InputError`, which names the row, for one whose teacher or template is not known.

        what: "Training data", for instance.
        """
        for i, row in enumerate(rows):
            try:
                self.owners(row, templates)
            except InputError as error:
                raise InputError(f"{what}, row {i + 1}: {error}") from error


def _value(row: Mapping[str, object], column: str) -> object:
    if row.get(column) is None:
        raise InputError(f"there is no `{column}`; its columns are: {', '.join(row)}.")
    return row[column]
