"""The valid range of every number that can be set: part of its field's type, and checked before anything is loaded.

    gamma: Annotated[float, Range(0, 1)] = field(default=1.0, ...)

Parsers of dataclasses ignore the annotation and see a plain `float`.
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

    above: only numbers above `low`. below: only numbers below `high`. also: one more value that is allowed, because it
    has a special meaning.
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

# Types that several settings share. A learning rate or coefficient far beyond these destroys a model in one step.
Count = Annotated[int, Range(1, LARGEST_COUNT)]
AtLeastTwo = Annotated[int, Range(2, LARGEST_COUNT)]
CountFromZero = Annotated[int, Range(0, LARGEST_COUNT)]
Length = Annotated[int, Range(1, 2**20)]  # of texts in tokens, and the dimensions of a new model
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(1e-3, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
Temperature = Annotated[float, Range(1e-4, 1e4)]
LearningRate = Annotated[float, Range(0, 10)]
Coefficient = Annotated[float, Range(0, 1e4)]
Weight = Annotated[float, Range(-1e6, 1e6)]
Positive = Annotated[float, Range(1e-9, 1e9)]


@cache
def ranges_of(settings: type) -> dict[str, object]:
    """The types of those fields of a dataclass that hold a range, by name; a list's or union's type counts too."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings) if _range_in(hints[field.name])}


def check_ranges(settings: object, *, prefix: str = "--", inherited: Mapping[str, object] | None = None) -> None:
    """Raises `InputError` for the first number that is out of its field's range.

    Args:
        settings: An instance of a dataclass with annotated fields.
        prefix: What the message puts before a field's name; "--" for a flag.
        inherited: Annotated types for fields that another library's class declares; the class's own types win.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    ranges = {name: hint for name, hint in (inherited or {}).items() if name in values}
    check_values(values, ranges | ranges_of(type(settings)), prefix=prefix)


def check_values(values: Mapping[str, object], ranges: Mapping[str, object], *, prefix: str = "--") -> None:
    """Raises `InputError` for the first value that is out of the range in its annotated type.

    Each item of a list is checked; None is valid if the type allows it.
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
    """A flag or an argument with its value, as the user writes it."""
    if not prefix:
        return f"{name} = {value}"
    return f"{prefix}{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _range_in(hint: object) -> tuple[Range, type] | None:
    """The range and number type in a type hint: in `Annotated[int, Range(..)]` itself, or inside a list or a union."""
    if typing.get_origin(hint) is Annotated:
        kind, *notes = typing.get_args(hint)
        ranges = [note for note in notes if isinstance(note, Range)]
        return (ranges[0], kind) if ranges else None
    return next((range_and_type for inner in typing.get_args(hint) if (range_and_type := _range_in(inner))), None)
