"""Converts a row's values into those that templates work with."""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class UnusableValue:
    """Stands for an object that no prompt can hold, e.g. an image: a template that uses it raises `reason`."""

    reason: str

    def __reduce__(self):
        return _in_a_template, (self.reason,)


def _in_a_template(reason: str) -> object:
    """Called when the value is unpickled in the process that runs templates."""
    from rlkd_trl.prompts.sandbox import unusable_value

    return unusable_value(reason)


def plain_value(column: str, value: object) -> object:
    """A copy of a row's value that a template may use and change: text, numbers, dates, None, lists and mappings.

    Arrays and tensors become lists; any other object becomes an `UnusableValue`. column: for its message.
    """
    if hasattr(value, "tolist"):  # numpy, torch
        value = value.tolist()
    if value is None or isinstance(value, str | numbers.Number | datetime.date | datetime.time | datetime.timedelta):
        return value
    if isinstance(value, Mapping):
        return {key: plain_value(column, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(column, item) for item in value]
    return UnusableValue(f"column '{column}' holds a {type(value).__name__}; prompts take text, numbers, lists")
