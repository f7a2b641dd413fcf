"""Reads the fields of a dataclass from its source text, without importing its module.

`transformers.TrainingArguments` takes four seconds to import, because of torch, accelerate and PEFT. For `--help`, and
to see that a flag is misspelt, its fields are enough: `declared` makes a sketch of the class, a dataclass with the
same fields. A run never uses a sketch, but the class itself. A default that the source computes is `UNKNOWN` in the
sketch. If the source cannot be understood there is no sketch, and the class has to be imported.
"""

import ast
import builtins
import dataclasses
import enum
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from rlkd_trl.settings.ranges import check_values, ranges_of

# Modules that may be imported, since they import little themselves.
_LIGHT = {*sys.stdlib_module_names, "rlkd_trl.settings.ranges", "rlkd_trl.settings.files", "rlkd_trl.errors"}
_ENUMS = {"Enum", "StrEnum", "ExplicitEnum"}


class _Unknown:
    """A default that the source computes."""

    def __repr__(self) -> str:
        return "computed"


UNKNOWN = _Unknown()


class _CannotRead(Exception):
    """The source is written in a way that this module does not understand."""


def declared(path: str) -> type | None:
    """A sketch of the dataclass at `package.module.Class`: a dataclass with the same fields in the same order.

    Its bases are sketches too. Its instances check the ranges of their numbers and do nothing else. None if the source
    cannot be read.
    """
    module, _, name = path.rpartition(".")
    try:
        return _class(module, name)
    except (_CannotRead, OSError, SyntaxError, TypeError, ValueError):
        return None


@cache
def _source(module: str) -> ast.Module:
    top, *submodules = module.split(".")
    spec = importlib.util.find_spec(top)  # for a top-level name this does not import anything
    if spec is None or not spec.submodule_search_locations:
        raise _CannotRead(module)
    base = Path(spec.submodule_search_locations[0]).joinpath(*submodules)
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _class(module: str, name: str) -> type:
    """The sketch of a dataclass, from its source and those of its bases."""
    node = _statement(module, name)
    if isinstance(node, ast.ImportFrom):
        return _class(*_imported(module, node, name))
    if not isinstance(node, ast.ClassDef):
        raise _CannotRead(name)
    bases = tuple(_class(module, base.id) for base in node.bases if isinstance(base, ast.Name))
    if len(bases) != len(node.bases):
        raise _CannotRead(name)
    body = _Names(module)
    fields = []
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields.append((statement.target.id, *_field(statement, body)))
        else:
            body.note(statement)
    namespace = {"__doc__": ast.get_docstring(node), "__post_init__": _check_ranges}
    namespace["inherited_ranges"] = _inherited_ranges(module, bases)
    # Keyword-only fields with and without defaults may stand in any order.
    return dataclasses.make_dataclass(name, fields, bases=bases, namespace=namespace, kw_only=True)


def _field(statement: ast.AnnAssign, names: "_Names") -> tuple[object, dataclasses.Field]:
    """Type and field of `name: type = field(...)` or `name: type = default`."""
    try:
        kind = names.evaluate(statement.annotation)
    except _CannotRead:
        kind = str  # accepts any text
    value = statement.value
    is_call = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field"
    if not is_call:
        return kind, dataclasses.field(default=UNKNOWN if value is None else names.evaluate_or_unknown(value))
    settings = {word.arg: names.evaluate_or_unknown(word.value) for word in value.keywords if word.arg != "metadata"}
    for metadata in [
        word.value for word in value.keywords if word.arg == "metadata" and isinstance(word.value, ast.Dict)
    ]:
        items = zip(metadata.keys, metadata.values, strict=True)
        values = {key.value: names.evaluate_or_unknown(item) for key, item in items if isinstance(key, ast.Constant)}
        settings["metadata"] = {key: item for key, item in values.items() if item is not UNKNOWN}
    if settings.get("default_factory") is UNKNOWN:
        settings["default"] = settings.pop("default_factory")
    return kind, dataclasses.field(**settings)


def _inherited_ranges(module: str, bases: tuple[type, ...]) -> Mapping[str, object]:
    """The module's `INHERITED_RANGES`, of fields that its classes inherit from another library; else its bases'."""
    try:
        return _Names(module)["INHERITED_RANGES"]
    except KeyError:
        return next((base.inherited_ranges for base in bases), {})


def _check_ranges(sketch: object) -> None:
    values = {name: value for name, value in vars(sketch).items() if value is not UNKNOWN}
    ranges = {**sketch.inherited_ranges, **ranges_of(type(sketch))}
    check_values(values, {name: hint for name, hint in ranges.items() if name in values}, prefix="")


class _Names(Mapping):
    """The values of names in a module, and in a class's body up to the current statement; looked up when needed."""

    def __init__(self, module: str):
        self.module = module
        self.local: dict[str, object] = {}

    def note(self, statement: ast.stmt) -> None:
        """Remembers what a statement of the class's body, other than a field, assigns."""
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            self.local[statement.targets[0].id] = self.evaluate_or_unknown(statement.value)
        else:
            for inner in ast.walk(statement):  # e.g. assigned under a condition
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    self.local[inner.id] = UNKNOWN

    def evaluate(self, expression: ast.expr) -> object:
        code = compile(ast.Expression(expression), self.module, "eval")
        try:
            return eval(code, {"__builtins__": {}}, self)
        except (NameError, KeyError, AttributeError, TypeError) as error:
            raise _CannotRead(ast.unparse(expression)) from error

    def evaluate_or_unknown(self, expression: ast.expr) -> object:
        try:
            return self.evaluate(expression)
        except _CannotRead:
            return UNKNOWN

    def __getitem__(self, name: str) -> object:
        if name in self.local:
            return self.local[name]
        if hasattr(builtins, name):
            return getattr(builtins, name)
        try:
            return _meaning(self.module, name)
        except _CannotRead as error:
            raise KeyError(name) from error

    def __iter__(self):
        return iter(self.local)

    def __len__(self) -> int:
        return len(self.local)


@cache
def _meaning(module: str, name: str) -> object:
    """The value of a name at the top level of a module: an import, an enumeration, or a constant."""
    node = _statement(module, name)
    if isinstance(node, ast.ImportFrom):
        source, original = _imported(module, node, name)
        if source in _LIGHT or source.partition(".")[0] in _LIGHT:
            return getattr(importlib.import_module(source), original)
        return _meaning(source, original)
    if isinstance(node, ast.Import):
        if name in _LIGHT:
            return importlib.import_module(name)
        raise _CannotRead(name)
    names = _Names(module)
    if isinstance(node, ast.ClassDef):
        if not {base.id for base in node.bases if isinstance(base, ast.Name)} & _ENUMS:
            raise _CannotRead(name)
        members = [s for s in node.body if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)]
        values = [(member.targets[0].id, names.evaluate(member.value)) for member in members]
        return enum.Enum(name, values, type=str)
    if isinstance(node.value, ast.Dict):
        try:
            return names.evaluate(node.value)
        except _CannotRead:  # a table of functions, of which help texts list the keys
            return dict.fromkeys(names.evaluate(key) for key in node.value.keys)
    return names.evaluate(node.value)


def _statement(module: str, name: str) -> ast.stmt:
    """The statement at the top level of a module that defines a name."""
    for node in _source(module).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            if any((alias.asname or alias.name) == name for alias in node.names):
                return node
        elif isinstance(node, ast.ClassDef):
            if node.name == name:
                return node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node
    raise _CannotRead(f"{module}.{name}")


def _imported(module: str, node: ast.ImportFrom, name: str) -> tuple[str, str]:
    """The module that a name comes from by `from … import …`, and its name there."""
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    parts = module.split(".")
    package = module if _is_package(module) else ".".join(parts[:-1])
    source = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
        source = ".".join([*above, *([node.module] if node.module else [])])
    return source, original


def _is_package(module: str) -> bool:
    top, *submodules = module.split(".")
    spec = importlib.util.find_spec(top)
    return (
        bool(spec and spec.submodule_search_locations)
        and Path(spec.submodule_search_locations[0]).joinpath(*submodules).is_dir()
    )
