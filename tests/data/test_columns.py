"""Checking and renaming columns, and grouping rows by source."""

import datasets
import pytest
from datasets import Dataset

from rlkd_trl.data import group_by_source, load_rows, parse_renames, require_columns
from rlkd_trl.errors import InputError

ROWS = [{"mr": "name[A]", "ref": "This is A."}, {"mr": "name[B]", "ref": "This is B, not A."}]


def test_require_columns():
    rows = Dataset.from_list(ROWS)
    require_columns(rows, source_column="mr", target_column=None)
    with pytest.raises(InputError) as caught:
        require_columns(rows, source_column="text")
    assert str(caught.value) == "`--source_column text` is not in the data; its columns are: mr, ref."


def test_parse_renames():
    assert parse_renames([]) == {}
    assert parse_renames(["mr=meaning_representation", " ref = human "]) == {
        "mr": "meaning_representation",
        "ref": "human",
    }


@pytest.mark.parametrize("pair", ["mr", "mr=", "=x", "", "a=b=c"])
def test_bad_rename(pair):
    with pytest.raises(InputError, match=r"is not of the form old=new, e\.g\. mr=meaning_representation"):
        parse_renames([pair])


@pytest.mark.parametrize("pairs", [["a=b", "a=c"], ["a=c", "b=c"]])
def test_rename_of_the_same_name_twice(pairs):
    with pytest.raises(InputError, match="has named already"):
        parse_renames(pairs)


def test_grouping_keeps_first_seen_order_and_first_values_and_drops_the_target():
    rows = Dataset.from_dict(
        {"mr": ["b", "a", "b", "a", "c"], "ref": ["B1", "A1", "B2", "A2", "C1"], "id": [1, 2, 3, 4, 5]}
    )
    assert group_by_source(rows, "mr", "ref").to_list() == [
        {"mr": "b", "id": 1, "prompt": "b", "references": ["B1", "B2"]},
        {"mr": "a", "id": 2, "prompt": "a", "references": ["A1", "A2"]},
        {"mr": "c", "id": 5, "prompt": "c", "references": ["C1"]},
    ]
    assert rows.column_names == ["mr", "ref", "id"]  # the argument is left alone


def test_without_target_column_references_are_empty_lists_of_strings():
    grouped = group_by_source(Dataset.from_dict({"mr": ["a", "a"]}), "mr")
    assert grouped.to_list() == [{"mr": "a", "prompt": "a", "references": []}]
    assert grouped.features["references"] == datasets.List(datasets.Value("string"))


@pytest.mark.parametrize("target_column", ["references", "human"])
def test_target_may_hold_lists(target_column):
    rows = Dataset.from_dict({"source": ["a", "b", "a"], target_column: [["1", "2"], ["3"], ["4"]]})
    assert group_by_source(rows, "source", target_column).to_list() == [
        {"source": "a", "prompt": "a", "references": ["1", "2", "4"]},
        {"source": "b", "prompt": "b", "references": ["3"]},
    ]


def test_a_references_column_that_is_not_the_target_does_not_leak():
    rows = Dataset.from_dict({"source": ["a"], "references": [["secret"]]})
    assert group_by_source(rows, "source").to_list() == [{"source": "a", "prompt": "a", "references": []}]


def test_the_source_column_may_be_called_prompt():
    rows = Dataset.from_dict({"prompt": ["a", "a"], "ref": ["1", "2"]})
    assert group_by_source(rows, "prompt", "ref").to_list() == [{"prompt": "a", "references": ["1", "2"]}]
    with pytest.raises(InputError, match="has a column `prompt` besides the source column `ref`"):
        group_by_source(rows, "ref")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], r"Row 2: column `mr` is empty; drop the row"),
        (["  ", "a"], r"Row 1: column `mr` is empty"),
        ([7, 8], r"Row 1: column `mr` holds 7 \(int\), not text"),
        ([["a"], ["b"]], r"Row 1: column `mr` holds \['a'\] \(list\), not text"),
    ],
)
def test_bad_sources(values, message):
    with pytest.raises(InputError, match=message):
        group_by_source(Dataset.from_dict({"mr": values}), "mr")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["x", None], r"Row 2: column `ref` is empty"),
        ([["x"], []], r"Row 2: column `ref` holds an empty list"),
        ([["x"], ["y", None]], r"Row 2: column `ref` is empty"),
        ([1.5, 2.5], r"Row 1: column `ref` holds 1\.5 \(float\), not text"),
    ],
)
def test_bad_targets(values, message):
    with pytest.raises(InputError, match=message):
        group_by_source(Dataset.from_dict({"mr": ["a", "b"], "ref": values}), "mr", "ref")


def test_columns_that_are_missing_or_the_same():
    rows = Dataset.from_list(ROWS)
    with pytest.raises(InputError, match=r"`--target_column target` is not in the data; its columns are: mr, ref"):
        group_by_source(rows, "mr", "target")
    with pytest.raises(InputError, match="is the source column too"):
        group_by_source(rows, "mr", "mr")


def dialogue(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]


def test_conversations_with_their_answers_are_source_and_target():
    """TRL's column `messages`: the last message is the answer to the others, which may have several."""
    talks = [dialogue("a", "b"), dialogue("a", "c"), dialogue("a", "b", "d", "e")]
    grouped = group_by_source(Dataset.from_dict({"messages": talks, "id": [1, 2, 3]}), "messages", "messages")
    assert grouped.to_list() == [
        {"messages": dialogue("a"), "id": 1, "prompt": dialogue("a"), "references": ["b", "c"]},
        {"messages": dialogue("a", "b", "d"), "id": 3, "prompt": dialogue("a", "b", "d"), "references": ["e"]},
    ]


@pytest.mark.parametrize("talk", [dialogue("a"), dialogue("a", "b", "c"), dialogue("a", "b")[1:]])
def test_conversations_without_an_answer_are_no_targets(talk):
    rows = Dataset.from_dict({"messages": [dialogue("a", "b"), talk]})
    roles = ", ".join(message["role"] for message in talk)
    with pytest.raises(InputError, match=f"Row 2: .* end with the assistant's answer; .* are: {roles}"):
        group_by_source(rows, "messages", "messages")


def test_na_in_a_csv_counts_as_empty_and_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "a.csv"
    file.write_text("mr,ref\na,b\nNA,c\n")
    rows = load_rows(str(file))
    with pytest.raises(InputError, match=r"Row 2: .*NA, N/A, NaN, null and None count as empty"):
        group_by_source(rows, "mr")


@pytest.mark.parametrize(
    "column, rows",
    [("mr", "3 of 12 rows: 2, 5, 12."), ("ref", "7 of 12 rows: 1, 2, 3, 4, 5, …")],
)
def test_how_many_are_empty_and_which_are_the_first(column, rows):
    blank = {"mr": (2, 5, 12), "ref": range(1, 8)}[column]
    values = {"mr": [f"a{i}" for i in range(12)], "ref": [f"b{i}" for i in range(12)]}
    for i in blank:
        values[column][i - 1] = [None, "", " "][i % 3]
    with pytest.raises(InputError, match=rf"Row {min(blank)}: column `{column}` is empty; .* in {rows}"):
        group_by_source(Dataset.from_dict(values), "mr", "ref")
