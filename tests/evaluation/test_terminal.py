import math

from rlkd_trl.evaluation.terminal import coloured, token_table


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
