import io
import math

import pytest

from rlkd_trl.evaluation.terminal import answers_view, coloured, shows_colours, token_table


def test_the_table_has_a_line_for_each_token_and_the_sum():
    record = {"tokens": ["a", "\n\x1b[2J"], "reward": [1.0, -0.25], "q": [2.0, math.nan], "total": 0.75}
    assert token_table(record).splitlines() == [
        "token       reward       q",
        "---------  -------  ------",
        "a           1.0000  2.0000",
        r"\n\x1b[2J  -0.2500       –",
        "sum         0.7500",
    ]


def test_colours_go_from_the_lowest_to_the_highest():
    text = coloured(["a", "b", "c", "d"], [-1.0, 1.0, 0.0, math.nan], low=-1.0, high=1.0)
    assert text == "\x1b[30;48;5;209ma\x1b[0m\x1b[30;48;5;117mb\x1b[0m\x1b[30;48;5;230mc\x1b[0md"


def test_answers_are_coloured_on_one_scale_and_plain_without_colours():
    records = [
        {"prompt": "p\n q", "tokens": ["a", "\x1b"], "reward": [-1.0, None], "total": -1.0},
        {"prompt": "r", "tokens": ["b"], "reward": [1.0], "total": 1.0},
    ]
    assert answers_view(records, colours=True).splitlines() == [
        "p q",
        "  \x1b[30;48;5;209ma\x1b[0m\\x1b  (reward -1)",
        "r",
        "  \x1b[30;48;5;117mb\x1b[0m  (reward 1)",
    ]
    plain = answers_view([*records, {"prompt": "s " * 100, "tokens": ["c"]}], colours=True).splitlines()
    assert len(plain[-2]) <= 110 and plain[-2].endswith(" …") and plain[-1] == "  c"
    assert "\x1b" not in answers_view(records, colours=False)


@pytest.mark.parametrize("no_color, is_terminal, expected", [("", True, True), ("1", True, False), ("", False, False)])
def test_colours_in_a_terminal_only_and_unless_refused(no_color, is_terminal, expected, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setenv("NO_COLOR", no_color)
    assert shows_colours(stream) is expected
