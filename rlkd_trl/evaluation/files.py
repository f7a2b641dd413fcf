"""Writes files whole or not at all, and numbers as JSON knows them."""

import json
import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is a real number, Python's or numpy's; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def without_nan(value: Any) -> Any:
    """The value with plain numbers, and None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if not is_number(value):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def write_json(path: str | Path, value: Any) -> None:
    """Write nested dicts and lists as JSON, at full precision; NaN and infinity become null.

    Raises TypeError where a value is no number, string, bool, None, dict or list.
    """
    write_text(path, json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write through a temporary file beside it, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A lone surrogate, which some datasets contain, cannot be encoded; it is written as its \uXXXX escape.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
