"""A row's values as templates get them."""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class UnusableValue:
    """What stands for an object that is no value of a prompt (an image, say): in a template it raises when used."""

    reason: str

    def __reduce__(self):
        return _in_a_template, (self.reason,)


def _in_a_template(reason: str) -> object:
    """Called where a template is about to run."""
    from rlkd_trl.prompts.sandbox import unusable_value

    return unusable_value(reason)


def plain_value(column: str, value: object) -> object:
    """A copy of a row's value that a template may use and change: text, numbers, dates, None, lists and mappings.

    Arrays and tensors become lists. Any other object becomes an `UnusableValue`.
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
