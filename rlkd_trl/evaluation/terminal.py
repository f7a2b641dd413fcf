"""Completions in a terminal: a table of their tokens, and their text with each token coloured by its reward."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rlkd_trl.evaluation.tables import number, plain_table

_HEADS = {"reward": "reward", "q": "q", "V": "V", "teacher_logp": "log p", "student_logp": "student's log p"}
# Backgrounds of the 256-colour palette, lowest reward to highest, with black letters on them.
_BACKGROUNDS = (209, 216, 223, 230, 195, 153, 117)
_PROMPT_WIDTH = 110  # characters of a prompt that are shown


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


def shows_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal, and the user has not asked for no colours (NO_COLOR, see no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def answers_view(records: Sequence[Mapping[str, Any]], *, colours: bool) -> str:
    """Prompts with the answers to them, whose tokens are coloured by their rewards.

    records: of `token_details.completion_records`, with rewards or without. colours: else plain text.
    """
    rewards = [value for record in records for value in record.get("reward", []) if value is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    parts = []
    for record in records:
        prompt = textwrap.shorten(_visible(" ".join(record["prompt"].split())), _PROMPT_WIDTH, placeholder=" …")
        values = [math.nan if value is None else value for value in record.get("reward", [])]
        if colours and values:
            text = coloured(record["tokens"], values, low=low, high=high)
        else:
            text = "".join(_visible(token) for token in record["tokens"])
        total = f"  (reward {number(record['total'], '.4g')})" if "total" in record else ""
        parts.append(f"{prompt}\n  {text}{total}")
    return "\n".join(parts)


def _shade(value: float, low: float, high: float) -> int:
    share = 0.5 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    return _BACKGROUNDS[round(share * (len(_BACKGROUNDS) - 1))]


def _visible(token: str) -> str:
    """The token without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in token)
