"""Tables as people see them, and the one place that lays them out."""

import re
from pathlib import Path

import pytest

from rlkd_trl.evaluation.tables import markdown_table, number, plain_table

ROOT = Path(__file__).parents[2]


def test_a_plain_table_is_no_wider_than_its_cells():
    assert plain_table(["model", "BLEU", "n"], [["a b", "7", "1,024"], ["größer als", "–", ""]]).splitlines() == [
        "model       BLEU      n",
        "----------  ----  -----",
        "a b            7  1,024",
        "größer als     –",
    ]


def test_spaces_at_a_cells_end_keep_numbers_below_each_other():
    rows = [["zero3", "int8", "1.5 x"], ["offload", "nf4", "10  "]]
    assert plain_table(["placement", "precision", "ddp  "], rows, labels=2, rule=False).splitlines() == [
        "placement  precision  ddp",
        "zero3      int8       1.5 x",
        "offload    nf4         10",
    ]


def test_numbers_in_text_are_not_changed():
    assert plain_table(["a", "b"], [["1e3", "0.10"], ["007", "1_0"]], rule=False).splitlines()[1:] == [
        "1e3  0.10",
        "007   1_0",
    ]


def test_a_table_in_markdown():
    assert markdown_table(
        ["model", "BLEU", "1"], [["x|y\nz", "**7.10**", ""], ["b", "1.0 ± 0.5", "–"]]
    ).splitlines() == [
        "| model | BLEU | 1 |",
        "| :-- | --: | --: |",
        "| x\\|y z | **7.10** |  |",
        "| b | 1.0 ± 0.5 | – |",
    ]


def test_tables_of_nothing_have_their_heads():
    assert plain_table(["model", "BLEU"], []) == "model  BLEU\n-----  ----"
    assert markdown_table(["model", "BLEU"], []) == "| model | BLEU |\n| :-- | --: |"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234.56, "1,234.6"),
        (0, "0.0"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "inf"),
        (True, "–"),
        ("1", "–"),
    ],
)
def test_a_number_in_a_cell(value, shown):
    assert number(value, ",.1f") == shown


def test_no_other_module_lays_out_a_table():
    files = [path for folder in ("rlkd_trl", "recipes") for path in (ROOT / folder).rglob("*.py")]
    by_hand = r"-{2,}:? ?\||\.[lr]just\(|import tabulate|from tabulate"
    found = [path for path in files if re.search(by_hand, path.read_text())]
    assert found == [ROOT / "rlkd_trl/evaluation/tables.py"]
