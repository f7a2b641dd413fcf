"""Prompt templates: one (`PromptTemplate`), and the set through which a teacher is asked (`PromptTemplates`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rlkd_trl.errors import InputError
from rlkd_trl.prompts.process import RenderingError, ask_renderer
from rlkd_trl.prompts.promptsource import read_entries, resolve_file, select_entries
from rlkd_trl.prompts.shortening import RenderedPrompt
from rlkd_trl.prompts.values import plain_value

BUILTIN_DIRECTORY = Path(__file__).parent / "builtin"
BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class PromptTemplate:
    """A Jinja text `input ||| target`, rendered in a sandbox with the columns of a row as its variables.

    As in promptsource there are the global `zip`, the filters `most_frequent` and `choice`, and `answer_choices` as a
    list. `choice` is not random here: it depends on the template and on what its input reads from the row, so that a
    prompt is the same every time. A "|||" or Jinja syntax in the row's values is plain text.

    name, jinja: the template's name and text. answer_choices: the Jinja text of the possible answers, separated by
    `|||`; the template sees them as a list. original_task: False for promptsource's templates that turn the task
    around, e.g. from the summary to the article. origin: the file that it came from, for error messages.

    Raises:
        InputError: the Jinja text is not valid.
    """

    name: str
    jinja: str
    answer_choices: str | None = None
    original_task: bool = True
    origin: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for text in (self.jinja, self.answer_choices or ""):
            try:
                _variables_of(text)
            except RenderingError as error:  # from Jinja, or from Python about the code that Jinja generates
                if error.kind == "bounds":
                    raise InputError(f"{self._described} {error} to be read.") from error
                line = "" if error.line is None else f", line {error.line}"
                raise InputError(f"{self._described} is not valid jinja{line}: {error}") from error

    @property
    def variables(self) -> frozenset[str]:
        """The columns that the whole template reads, target included."""
        return self._with_choices(_variables_of(self.jinja).anywhere)

    @property
    def input_variables(self) -> frozenset[str]:
        """The columns that the text before `|||` may read; the target's are among them if `|||` is in a loop."""
        return self._with_choices(_variables_of(self.jinja).in_input)

    def render(self, row: Mapping[str, object]) -> RenderedPrompt:
        """The prompt: the text before `|||`, stripped.

        The target part is not run, so its columns may be missing. Remove the human reference from the row, so that no
        template can show it to the teacher. If the prompt is shortened later, its draws of `choice` stay the same.

        Raises:
            InputError: the input uses a column that the row lacks, the template fails or does something that the
                sandbox forbids, or the prompt is empty.
        """
        read = {column: plain_value(column, row[column]) for column in self.input_variables if column in row}

        def render(shorter: Mapping[str, object]) -> str:
            return self._input({**row, **shorter}, whole_row=row)

        return RenderedPrompt(self._input(row), read, render)

    def _input(self, row: Mapping[str, object], whole_row: Mapping[str, object] | None = None) -> str:
        """The prompt. whole_row: what a shortened row was made of. Raises `InputError`."""
        hint = ", or leave this template out if that is the human reference: a prompt must not show it"
        with self._explained(row, hint):
            [prompt] = self._parts(row, whole_row, until_separator=True)
        prompt = prompt.strip()
        if not prompt:
            raise InputError(
                f"{self._described} renders an empty prompt. promptsource templates often wrap their text in "
                "{% if … %}: leave out either this template or the rows for which the condition is false."
            )
        return prompt

    def render_example(self, row: Mapping[str, object]) -> tuple[RenderedPrompt, str]:
        """The input and the target, both stripped.

        Raises:
            InputError: as `render`, or there is not exactly one `|||`.
        """
        prompt = self.render(row)
        with self._explained(row):
            parts = self._parts(row, None, until_separator=False)
        if len(parts) != 2:
            raise InputError(f"{self._described} renders {len(parts)} parts; an example is one input ||| one target.")
        return prompt, parts[1].strip()

    @property
    def _described(self) -> str:
        return f"Template '{self.name}'" + (f" of {self.origin}" if self.origin else "")

    def _with_choices(self, variables: frozenset[str]) -> frozenset[str]:
        if self.answer_choices is None or "answer_choices" not in variables:
            return variables
        return variables - {"answer_choices"} | _variables_of(self.answer_choices).anywhere

    def _parts(
        self, row: Mapping[str, object], whole_row: Mapping[str, object] | None, until_separator: bool
    ) -> list[str]:
        """The rendered text, split at its `|||`; or only the part before it. Raises `RenderingError`.

        whole_row: if `row` is a shortened one, the row that fixes the draws of `choice` and the branches taken.
        """
        values, whole_values = self._values(row), None if whole_row is None else self._values(whole_row)
        chosen_for = row if whole_row is None else whole_row
        read = [(column, chosen_for[column]) for column in sorted(self.input_variables) if column in chosen_for]
        seed = repr((self.name, self.jinja, read))
        return ask_renderer("render", self.jinja, self.answer_choices, values, whole_values, seed, until_separator)

    def _values(self, row: Mapping[str, object]) -> dict[str, object]:
        return {column: plain_value(column, value) for column, value in row.items() if column in self.variables}

    @contextmanager
    def _explained(self, row: Mapping[str, object], hint: str = "") -> Iterator[None]:
        """Turns whatever a template raises into an InputError."""
        try:
            yield
        except RenderingError as error:
            raise InputError(f"{self._described} {self._explanation(error, row, hint)}") from error

    def _explanation(self, error: RenderingError, row: Mapping[str, object], hint: str) -> str:
        if error.kind == "missing column":
            candidate = next((column for column in row if column not in self.variables), "COLUMN")
            return (
                f"asks for column '{error}'; the row has: {', '.join(map(str, row)) or 'none'}. "
                f"Rename columns with --rename_columns {candidate}={error}{hint}."
            )
        if error.kind == "security":
            return f"does what the sandbox forbids: {error}"
        if error.kind == "bounds":
            return f"{error} for one prompt: it may never end. Shorten its loops, or leave it out."
        return f"fails on a row: {error}"


class _Variables(NamedTuple):
    """The columns that a Jinja text reads: anywhere in it, and before its `|||`."""

    anywhere: frozenset[str]
    in_input: frozenset[str]


@lru_cache(maxsize=4096)
def _variables_of(jinja: str) -> _Variables:
    """The columns of a Jinja text, which is parsed and compiled but not run. Raises `RenderingError`."""
    return _Variables(*map(frozenset, ask_renderer("variables", jinja)))


class PromptTemplates(Sequence[PromptTemplate]):
    """The templates through which a teacher is asked, and how columns are renamed for them.

    `rename` maps columns to template variables, e.g. `{"mr": "meaning_representation"}`: the row gets the new names in
    addition to its own. It does not apply to a single template taken from the set (`templates[0]`).

    A plain text in `templates` is taken as a template's Jinja text; its name is its place, e.g. "template_1".

    Raises:
        InputError: there are no templates, or one is not valid Jinja.
    """

    def __init__(self, templates: Iterable[PromptTemplate | str], rename: Mapping[str, str] | None = None):
        if isinstance(templates, str):
            raise InputError("One text is no list of templates: write PromptTemplates.inline(text), or [text].")
        self._templates = tuple(
            PromptTemplate(f"template_{number}", template) if isinstance(template, str) else template
            for number, template in enumerate(templates, start=1)
        )
        self._rename = dict(rename or {})
        if not self._templates:
            raise InputError("No prompt templates were given; at least one is needed.")

    @classmethod
    def load(
        cls, spec: str, names: str | Sequence[str] = "all", rename: Mapping[str, str] | None = None
    ) -> PromptTemplates:
        """What `--templates` takes: the path of a YAML file (see `from_yaml`) or its directory, or `builtin:TASK`.

        Raises:
            InputError: as `from_yaml` and `builtin`.
        """
        if spec.startswith(BUILTIN_PREFIX):
            return cls.builtin(spec.removeprefix(BUILTIN_PREFIX), names, rename)
        if spec in builtin_tasks() and not Path(spec).exists():
            raise InputError(
                f"There is no prompt template file {spec}; for the set of that name, give builtin:{spec}."
            )
        return cls.from_yaml(spec, names, rename)

    @classmethod
    def inline(cls, jinja: str, rename: Mapping[str, str] | None = None) -> PromptTemplates:
        """What `--template` takes: the Jinja text of one template, e.g. "Summarise: {{ source }}".

        Raises:
            InputError: it is not valid Jinja, or `rename` names a variable that it does not have.
        """
        templates = cls([PromptTemplate("template", jinja)], rename)
        templates._check_rename("--template")
        return templates

    @classmethod
    def builtin(
        cls, task: str, names: str | Sequence[str] = "all", rename: Mapping[str, str] | None = None
    ) -> PromptTemplates:
        """The package's own prompts for `task`. Their input variable is `source`, their target variable `target`.

        Raises:
            InputError: there is no such task, or as `from_yaml`.
        """
        if task not in builtin_tasks():
            raise InputError(f"There are no built-in templates for '{task}'; tasks: {', '.join(builtin_tasks())}.")
        return cls.from_yaml(BUILTIN_DIRECTORY / f"{task}.yaml", names, rename)

    @classmethod
    def from_yaml(
        cls, path: str | Path, names: str | Sequence[str] = "all", rename: Mapping[str, str] | None = None
    ) -> PromptTemplates:
        """Templates of a YAML file, or of the `templates.yaml` in a directory.

        The file is promptsource's, or just names and Jinja texts, or a list of such texts:

            short: "Summarise: {{ source }}"
            tldr: "{{ source }} TL;DR:"

        Args:
            path: the file or directory.
            names: "all" for every template of the original task, in the file's order; or names, as a list or
                separated by commas, in the order in which they are named.
            rename: columns to template variables.

        Raises:
            InputError: the file or a chosen template is not valid, a name is unknown, ambiguous or repeated, nothing
                is left, or `rename` names a variable that no chosen template has.
        """
        file = resolve_file(path)
        entries = select_entries(read_entries(file), names, file)
        templates = cls([PromptTemplate(**entry, origin=str(file)) for entry in entries], rename)
        templates._check_rename(f"the chosen templates of {file}")
        return templates

    def _check_rename(self, whose: str) -> None:
        variables = frozenset().union(*(template.variables for template in self))
        for column, variable in self._rename.items():
            if variable not in variables:
                raise InputError(
                    f"--rename_columns {column}={variable}: {whose} have no variable '{variable}'; theirs are: "
                    f"{', '.join(sorted(variables))}."
                )

    @property
    def names(self) -> list[str]:
        return [template.name for template in self]

    @property
    def renamed_variables(self) -> set[str]:
        """The variables that get a column of another name."""
        return set(self._rename.values())

    @property
    def source_variable(self) -> str:
        """The one column that the inputs of all templates read.

        Raises:
            InputError: an input reads none or several, or the templates differ.
        """
        variables = {template.input_variables for template in self}
        if len(variables) == 1 and len(common := next(iter(variables))) == 1:
            return next(iter(common))
        uses = "; ".join(f"{t.name}: {', '.join(sorted(t.input_variables)) or 'none'}" for t in self)
        raise InputError(
            "A source text alone fits only templates whose inputs all read the same one column. "
            f"These read: {uses}. Choose templates by name."
        )

    def render(self, row: Mapping[str, object]) -> list[RenderedPrompt]:
        """One prompt per template, in order.

        Raises:
            InputError: the row lacks a column of `rename`, or as `PromptTemplate.render`.
        """
        row = self._renamed(row)
        return [template.render(row) for template in self]

    def render_source(self, text: str) -> list[RenderedPrompt]:
        """One prompt per template, with `text` as the one column that their inputs read; `rename` is not used.

        Raises:
            InputError: as `source_variable` and `PromptTemplate.render`.
        """
        variable = self.source_variable
        return [template.render({variable: text}) for template in self]

    def validate(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Renders every row, so that errors are found early.

        Raises:
            InputError: a row cannot be rendered; the message names it (counting from 1) and the template.
        """
        for index, row in enumerate(rows, start=1):
            try:
                self.render(row)
            except InputError as error:
                raise InputError(f"Row {index}: {error}") from error

    def _renamed(self, row: Mapping[str, object]) -> dict[str, object]:
        for column, variable in self._rename.items():
            if column not in row:
                raise InputError(
                    f"--rename_columns {column}={variable}: the row has no column '{column}'; "
                    f"it has: {', '.join(map(str, row)) or 'none'}."
                )
        return {**row, **{variable: row[column] for column, variable in self._rename.items()}}

    def __len__(self) -> int:
        return len(self._templates)

    def __getitem__(self, index):
        """One template, or with a slice a smaller set with the same `rename`."""
        if isinstance(index, slice):
            return PromptTemplates(self._templates[index], self._rename)
        return self._templates[index]

    def __repr__(self) -> str:
        return f"PromptTemplates({self.names})"


def builtin_tasks() -> list[str]:
    return sorted(file.stem for file in BUILTIN_DIRECTORY.glob("*.yaml"))
