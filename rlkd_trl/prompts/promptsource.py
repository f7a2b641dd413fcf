"""Reads template files: promptsource's YAML, or a short form, which is a mapping of names to Jinja texts or a list."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import yaml

from rlkd_trl.errors import InputError, one_line
from rlkd_trl.settings.hub import file_on_hub

FILE_NAME = "templates.yaml"
SHORT_FORM = """The shortest file is a line for each template, name: "text", e.g. short: "Summarise: {{ source }}"."""

_SHORT = reprlib.Repr()  # for messages: a value with many YAML aliases, written out in full, could fill the memory
_SHORT.maxlevel = 2


class TemplateEntry(TypedDict):
    """One entry of a file; the keys are fields of `PromptTemplate`."""

    name: str
    jinja: str
    answer_choices: str | None
    original_task: bool


class _PromptsourceLoader(yaml.SafeLoader):
    """A safe loader that also reads promptsource's two tags, as plain mappings. Any other tag is an error."""


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is there twice", problem_mark=node.start_mark)
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata", yaml.SafeLoader.DEFAULT_MAPPING_TAG):
    _PromptsourceLoader.add_constructor(_tag, _construct_mapping)

_PROMPTSOURCE_KEYS = {"templates", "dataset", "subset"}


def resolve_file(path: str | Path) -> Path:
    """The YAML file meant by `path`: itself, or the `templates.yaml` in the directory `path`, or one on the Hub.

    On the Hub (see `file_on_hub`) are "hf://datasets/owner/name@revision/file.yaml", and "owner/name@revision", whose
    file is `templates.yaml`.

    Raises:
        InputError: there is no such file.
    """
    name, path = str(path), Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir():
        raise InputError(f"The directory {path} has no {FILE_NAME}; give the path of a promptsource YAML file.")
    is_file_name = path.suffix in (".yaml", ".yml") and not name.startswith("hf://")
    if not is_file_name and (fetched := file_on_hub("--templates", name, FILE_NAME)):
        return fetched
    raise InputError(f"There is no prompt template file {path}; give a {FILE_NAME}, its directory, or builtin:TASK.")


def read_entries(file: Path) -> list[TemplateEntry]:
    """All templates of a YAML file, in the file's order. Their jinja text is not looked at.

    The short form is a mapping of names to jinja texts, or a list of texts, which are named template_1 and so on.

    Raises:
        InputError: the file cannot be read, is not YAML, has another tag, a key twice, or an entry lacks a name or
            jinja text.
    """
    try:
        document = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_PromptsourceLoader)
    except RecursionError as error:
        raise InputError(f"{file} cannot be read: its brackets are nested too deeply. {SHORT_FORM}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, impossible dates
        raise InputError(f"{file} cannot be read as promptsource YAML: {one_line(error)}. {SHORT_FORM}") from error
    if isinstance(document, list) and document:
        document = {f"template_{number}": text for number, text in enumerate(document, start=1)}
    if isinstance(document, dict) and document and not _PROMPTSOURCE_KEYS.intersection(map(str, document)):
        return [_short_entry(file, name, text) for name, text in document.items()]
    templates = document.get("templates") if isinstance(document, dict) else None
    if not isinstance(templates, dict) or not templates:
        raise InputError(
            f"{file} is not a promptsource file: it has no mapping 'templates:' of id to template. {SHORT_FORM}"
        )
    return [_entry(file, key, fields) for key, fields in templates.items()]


def select_entries(entries: list[TemplateEntry], names: str | Sequence[str], file: Path) -> list[TemplateEntry]:
    """The chosen entries, in the order of `names`, which is a list or a comma-separated text.

    "all" chooses every template of the original task, in the file's order.

    Raises:
        InputError: a name is unknown, ambiguous or repeated, or nothing is chosen.
    """
    available = [entry["name"] for entry in entries]
    if names in ("all", ["all"]):
        chosen = [entry for entry in entries if entry["original_task"]]
        if not chosen:
            raise InputError(f"{file} has no template of the original task; choose by name: {', '.join(available)}.")
        return chosen
    if isinstance(names, str):  # a name may itself contain commas
        names = [names] if names in available else [name.strip() for name in names.split(",") if name.strip()]
    if not names:
        raise InputError(f"No template names were given; {file} has: {', '.join(available)}.")
    for name in names:
        if name not in available:
            close = difflib.get_close_matches(name, available)
            not_close = [other_name for other_name in available if other_name not in close]
            raise InputError(f"{file} has no template '{name}'; it has: {', '.join(close + not_close)}.")
        if available.count(name) > 1:
            raise InputError(f"{file} has {available.count(name)} templates named '{name}'; rename them in the file.")
        if list(names).count(name) > 1:
            raise InputError(f"Template '{name}' was named twice.")
    return [entries[available.index(name)] for name in names]


def _short_entry(file: Path, name: object, text: object) -> TemplateEntry:
    if not isinstance(name, str) or not isinstance(text, str):
        raise InputError(
            f"{file}: the template {_SHORT.repr(name)} must have a name and a text, found {_SHORT.repr(text)}; put "
            f"both in quotes. {SHORT_FORM}"
        )
    return TemplateEntry(name=name, jinja=text, answer_choices=None, original_task=True)


def _entry(file: Path, key: object, fields: object) -> TemplateEntry:
    place = f"{file}, template id {key}"
    if not isinstance(fields, dict):
        raise InputError(f"{place}: expected a mapping with 'name' and 'jinja', found {type(fields).__name__}.")
    for field in ("name", "jinja"):
        if not isinstance(fields.get(field), str):
            raise InputError(
                f"{place}: '{field}' must be text, found {_SHORT.repr(fields.get(field))}; put it in quotes."
            )
    answer_choices = fields.get("answer_choices")
    if not isinstance(answer_choices, str | None):
        raise InputError(f"{place}: 'answer_choices' must be text or null, found {_SHORT.repr(answer_choices)}.")
    metadata = fields.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{place}: 'metadata' must be a mapping, found {_SHORT.repr(metadata)}.")
    original_task = metadata.get("original_task")
    if not isinstance(original_task, bool | None):
        raise InputError(f"{place}: 'original_task' must be true or false, found {_SHORT.repr(original_task)}.")
    return TemplateEntry(
        name=fields["name"],
        jinja=fields["jinja"],
        answer_choices=answer_choices,
        original_task=original_task is not False,
    )
