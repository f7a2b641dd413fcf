"""Completions in a terminal: a table of their tokens, and their text with each token coloured by its reward."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlkd_trl.evaluation.tables import number, plain_table

_HEADS = {"reward": "reward", "q": "q", "V": "V", "teacher_logp": "log p", "student_logp": "student's log p"}
# Backgrounds of the 256-colour palette, lowest reward to highest, with black letters on them.
_BACKGROUNDS = (209, 216, 223, 230, 195, 153, 117)


def token_table(record: Mapping[str, Any]) -> str:
    """A line for each token of a record of `token_details.completion_records`, and the sum of the rewards."""
    fields = [name for name in _HEADS if name in record]
    rows = [
        [_visible(token), *(number(record[name][t], ".4f") for name in fields)]
        for t, token in enumerate(record["tokens"])
    ]
    total = ["sum", number(record["total"], ".4f"), *[""] * (len(fields) - 1)]
    return plain_table(["token", *(_HEADS[name] for name in fields)], [*rows, total])


def coloured(tokens: Sequence[str], values: Sequence[float], *, low: float, high: float) -> str:
    """The text with ANSI colours: orange for values near `low`, blue near `high`. Without a number: no colour."""
    parts = []
    for token, value in zip(tokens, values, strict=True):
        text = _visible(token)
        parts.append(f"\x1b[30;48;5;{_shade(value, low, high)}m{text}\x1b[0m" if math.isfinite(value) else text)
    return "".join(parts)


def _shade(value: float, low: float, high: float) -> int:
    share = 0.5 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    return _BACKGROUNDS[round(share * (len(_BACKGROUNDS) - 1))]


def _visible(token: str) -> str:
    """The token without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in token)
