"""Shortens prompts that are too long: it cuts the ends of their documents, never the words of their template."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence

from rlkd_trl.errors import InputError

SHOWN_CHARACTERS = 60


class RenderedPrompt(str):
    """A prompt's text together with what it was rendered from, so that it can be rendered again from shorter values.

    variables: the values that the template read from the data row. `shortened` may cut the texts in them, also those
    in lists and mappings. When pickled it becomes plain text.
    """

    __slots__ = ("_render", "variables")

    def __new__(
        cls, text: str, variables: Mapping[str, object], render: Callable[[Mapping[str, object]], str]
    ) -> RenderedPrompt:
        prompt = super().__new__(cls, text)
        prompt.variables = dict(variables)
        prompt._render = render
        return prompt

    def render(self, replaced: Mapping[str, object]) -> str:
        """The text with some variables replaced. Raises `InputError` if the template fails on the new values."""
        return self._render(replaced)

    def __reduce__(self):
        return str, (str(self),)


class ShortenedText(str):
    """The beginning of a text, as a template's variable: it prints as the beginning, but compares as the whole text.

    So a template finds the same entry of a mapping by it. (Conditions have the outcomes that they have for the whole
    text in any case, see `sandbox.Branches`.)
    """

    __slots__ = ("_end", "_whole")

    def __new__(cls, whole: str, end: int) -> ShortenedText:
        text = super().__new__(cls, whole[:end])
        text._whole, text._end = whole, end
        return text

    def __eq__(self, other: object) -> bool:
        return self._whole == other

    def __ne__(self, other: object) -> bool:
        return self._whole != other

    def __hash__(self) -> int:
        return hash(self._whole)

    def __reduce__(self):
        return ShortenedText, (self._whole, self._end)


def shortened(
    prompt: RenderedPrompt,
    *,
    count_tokens: Callable[[str], int],
    token_ends: Callable[[str], Sequence[int]],
    max_length: int,
) -> str:
    """The longest rendering of at most `max_length` tokens, from variables whose ends are cut off.

    All variables are cut to one common number of tokens, so that the longest are cut first, and each keeps at least
    one token. Items of a list behind the cut are left out, or blank if the template fails without them. The search for
    the best cut starts from the number of tokens that are too many, and takes two or three renderings.

    Args:
        prompt: A prompt of more than `max_length` tokens.
        count_tokens: Counts a text's tokens, special tokens included.
        token_ends: Returns the places at which a text may be cut, in ascending order, the last one at its end.

    Raises:
        InputError: The template's own words and one token of each variable are too many.
    """
    cuts = _Cuts(prompt.variables, token_ends)
    excess = count_tokens(prompt) - max_length

    def fits(text: str) -> bool:
        return count_tokens(text) <= max_length

    for leaves_out in (True, False):
        text, failed = _longest_fitting(prompt, cuts, excess, leaves_out, fits)
        if text is not None:
            return text
        if not failed:
            break
    raise cannot_fit(prompt, count_tokens, token_ends, max_length)


def can_fit(
    prompt: RenderedPrompt,
    *,
    count_tokens: Callable[[str], int],
    token_ends: Callable[[str], Sequence[int]],
    max_length: int,
) -> bool:
    """Whether `shortened` can succeed: whether the prompt fits with one token of each variable."""
    cuts = _Cuts(prompt.variables, token_ends)
    for leaves_out in (True, False):
        try:
            return count_tokens(prompt.render(cuts.at(cuts.least, leaves_out))) <= max_length
        except InputError:
            continue
    return False


def cannot_fit(prompt: RenderedPrompt, count_tokens, token_ends, max_length: int) -> InputError:
    """The error for a prompt whose template alone is too long; to identify the row it shows the longest text in it."""
    cuts = _Cuts(prompt.variables, token_ends)
    try:
        least = f"{count_tokens(prompt.render(cuts.at(cuts.least, leaves_out=False)))} tokens"
    except InputError:
        least = "more"
    return InputError(
        f"A prompt of {count_tokens(prompt)} tokens cannot be cut to {max_length}: with one token of each of its "
        f"variables ({', '.join(cuts.names) or 'it has none'}) it still has {least}, its template's own words. Allow "
        f"longer prompts, or take a shorter template or that row out. The row begins: {_beginning(prompt)!r}"
    )


def _beginning(prompt: RenderedPrompt) -> str:
    texts = [text for value in prompt.variables.values() for text in _texts(value)]
    longest = str(max(texts, key=len, default=prompt))
    return longest[:SHOWN_CHARACTERS] + ("…" if len(longest) > SHOWN_CHARACTERS else "")


class _Cuts:
    """All ways to cut a prompt's V variables, numbered from `least` (one token of each) to `most` (all tokens).

    Cut number n keeps n // V tokens of each variable, and one more of the first n % V variables.
    """

    def __init__(self, variables: Mapping[str, object], token_ends: Callable[[str], Sequence[int]]):
        ends = {name: [list(token_ends(text)) for text in _texts(variables[name])] for name in sorted(variables)}
        self._tokens = {name: sum(map(len, of_texts)) for name, of_texts in ends.items()}
        self.names = [name for name, tokens in self._tokens.items() if tokens]
        self._values = {name: variables[name] for name in self.names}
        self._ends = ends
        self.least = len(self.names)
        self.most = len(self.names) * max(self._tokens.values(), default=0)

    def with_about(self, fewer: int) -> int:
        """The number of the cut that takes about `fewer` tokens away from the variables."""
        tokens_left = sum(self._tokens.values()) - fewer
        numbers = range(self.least, self.most + 1)
        return self.least - 1 + bisect.bisect_right(numbers, tokens_left, key=self._tokens_left)

    def at(self, number: int, leaves_out: bool) -> dict[str, object]:
        """The new values of the variables that cut `number` shortens. leaves_out: drop list items behind the cut."""
        limits = self._limits(number)
        return {
            name: _cut(value, iter(self._ends[name]), _Budget(limits[name]), leaves_out)
            for name, value in self._values.items()
            if limits[name] < self._tokens[name]
        }

    def _limits(self, number: int) -> dict[str, int]:
        tokens_each, remainder = divmod(number, max(1, len(self.names)))
        return {name: tokens_each + (i < remainder) for i, name in enumerate(self.names)}

    def _tokens_left(self, number: int) -> int:
        return sum(min(self._tokens[name], limit) for name, limit in self._limits(number).items())


def _longest_fitting(
    prompt: RenderedPrompt, cuts: _Cuts, excess: int, leaves_out: bool, fits: Callable[[str], bool]
) -> tuple[str | None, bool]:
    """The rendering with the largest cut number that fits, or None; and whether the template failed on some cut."""
    best, failed = None, False
    fitting, too_long = cuts.least - 1, cuts.most
    number, step = cuts.with_about(excess), 1
    while too_long - fitting > 1:
        number = min(max(number, fitting + 1), too_long - 1)
        try:
            text = prompt.render(cuts.at(number, leaves_out))
            is_fitting = fits(text)
        except InputError:
            is_fitting, failed = False, True
        if is_fitting:
            best, fitting = text, number
        else:
            too_long = number
        if fitting >= cuts.least and too_long < cuts.most:
            number = (fitting + too_long) // 2
        else:
            number += step if is_fitting else -step
            step *= 2
    return best, failed


class _Budget:
    """How many tokens of a variable may still be kept."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def take(self, tokens: int) -> int:
        """Uses up to so many tokens of the budget, and returns how many."""
        taken = min(tokens, self.tokens)
        self.tokens -= taken
        return taken


def _cut(value: object, ends: Iterator[list[int]], budget: _Budget, leaves_out: bool) -> object:
    """A copy of a value whose texts are cut to the budget, in order; `ends` gives each text's places for a cut."""
    if isinstance(value, str):
        places = next(ends)
        taken = budget.take(len(places))
        return value if taken == len(places) else ShortenedText(value, places[taken - 1] if taken else 0)
    if isinstance(value, Mapping):
        return {key: _cut(item, ends, budget, leaves_out) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    shortened_items = []
    for item in value:
        is_behind = budget.tokens == 0
        shorter = _cut(item, ends, budget, leaves_out)
        if not (leaves_out and is_behind and shortened_items):
            shortened_items.append(shorter)
    return shortened_items


def _texts(value: object) -> list[str]:
    """The texts in a value, in the order in which `_cut` cuts them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for item in value for text in _texts(item)] if isinstance(value, list | tuple) else []
