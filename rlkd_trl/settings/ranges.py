"""The valid range of every number that can be set, declared with its field and checked before anything is loaded.

    gamma: Annotated[float, Range(0, 1)] = field(default=1.0, ...)

Parsers of dataclasses, which drop annotations, see a plain `float`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated

from rlkd_trl.errors import InputError


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`; NaN and infinity are in no range.

    above, below: `low` or `high` itself is outside. also: one more value, with a meaning of its own.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    also: float | None = None

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        is_high_enough = value > self.low if self.above else value >= self.low
        is_low_enough = value < self.high if self.below else value <= self.high
        return bool((is_high_enough and is_low_enough) or (self.also is not None and value == self.also))

    def __str__(self) -> str:
        low = f"above {self.low:.15g}" if self.above else f"{self.low:.15g} or more"
        high = f"{'below' if self.below else 'up to'} {self.high:.15g}"
        return f"{low}, {high}" + ("" if self.also is None else f"; or {self.also:.15g}")


LARGEST_COUNT = 2**31 - 1

# Those that several settings share. A rate or coefficient far beyond these destroys a model in one step.
Count = Annotated[int, Range(1, LARGEST_COUNT)]
AtLeastTwo = Annotated[int, Range(2, LARGEST_COUNT)]
CountFromZero = Annotated[int, Range(0, LARGEST_COUNT)]
Length = Annotated[int, Range(1, 2**20)]  # of texts in tokens, and of a new model's sides
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
Temperature = Annotated[float, Range(1e-4, 1e4)]
LearningRate = Annotated[float, Range(0, 10)]
Coefficient = Annotated[float, Range(0, 1e4)]
Weight = Annotated[float, Range(-1e6, 1e6)]
Positive = Annotated[float, Range(1e-9, 1e9)]


@cache
def ranges_of(settings: type) -> dict[str, object]:
    """The annotated types among a dataclass's fields, by name; of a list or an option, that of its numbers."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings) if _range_in(hints[field.name])}


def check_ranges(settings: object, *, prefix: str = "--", inherited: Mapping[str, object] | None = None) -> None:
    """Raises `InputError` for the first number that is out of its field's range.

    Args:
        settings: An instance of a dataclass with annotated fields.
        prefix: Stands before a field's name in the message, where it is a flag.
        inherited: Annotated types of fields of another library's class; one of the class itself goes before.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    ranges = {name: hint for name, hint in (inherited or {}).items() if name in values}
    check_values(values, ranges | ranges_of(type(settings)), prefix=prefix)


def check_values(values: Mapping[str, object], ranges: Mapping[str, object], *, prefix: str = "--") -> None:
    """Raises `InputError` for the first value that is not in its range, an annotated type.

    Of a list each item is checked; None is valid where the type has it.
    """
    for name, hint in ranges.items():
        value = values[name]
        if value is None and type(None) in typing.get_args(hint):
            continue
        valid, kind = _range_in(hint)
        for number in value if isinstance(value, list | tuple) else [value]:
            is_fraction = kind is int and isinstance(number, Real) and not isinstance(number, Integral)
            if is_fraction or number not in valid:
                kind_wanted = "a whole number, " if is_fraction else ""
                raise InputError(f"{_as_written(prefix, name, value)} is out of range: {kind_wanted}{valid}.")


def _as_written(prefix: str, name: str, value: object) -> str:
    """A flag, or an argument of a config, with its value, as the user writes it."""
    if not prefix:
        return f"{name} = {value}"
    return f"{prefix}{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _range_in(hint: object) -> tuple[Range, type] | None:
    """Range and number type in a type hint: of `Annotated[int, Range(..)]`, or of one in a list or a union."""
    if typing.get_origin(hint) is Annotated:
        kind, *notes = typing.get_args(hint)
        ranges = [note for note in notes if isinstance(note, Range)]
        return (ranges[0], kind) if ranges else None
    return next((range_and_type for inner in typing.get_args(hint) if (range_and_type := _range_in(inner))), None)
