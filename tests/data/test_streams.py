"""Streams of rows: endless, shuffled in a buffer, prepared a few at a time."""

from itertools import islice

import pytest
from datasets import Dataset, IterableDataset

from rlkd_trl.data import streams
from rlkd_trl.data.loading import load_rows
from rlkd_trl.data.streams import RepeatedRows, RowStream, known_rows, stream_rows
from rlkd_trl.errors import InputError
from tests.recipes.command_lines import word_rows, write_csv


def numbers(count: int):
    return Dataset.from_dict({"n": list(range(count))}).to_iterable_dataset()


def first(stream, count: int) -> list[int]:
    return [row["n"] for row in islice(stream, count)]


def test_without_a_buffer_rows_come_in_order_and_again():
    assert first(RowStream(numbers(3), buffer_size=0), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_each_pass_has_every_row_once_in_an_order_of_its_own():
    read = first(RowStream(numbers(20), buffer_size=8, seed=3), 40)
    assert sorted(read[:20]) == sorted(read[20:]) == list(range(20))
    assert read[:20] != read[20:] and read[:20] != list(range(20))
    assert read == first(RowStream(numbers(20), buffer_size=8, seed=3), 40)
    assert read != first(RowStream(numbers(20), buffer_size=8, seed=4), 40)


def test_rows_are_prepared_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(streams, "ROWS_AT_A_TIME", 3)
    sizes = []

    def prepare(rows):
        sizes.append(len(rows))
        return rows.map(lambda row: {"n": row["n"] + 100})

    stream = RowStream(numbers(7), prepare, buffer_size=0)
    assert stream.head["n"][:] == [100, 101, 102]
    assert known_rows(stream) is stream.head
    further = stream.then(lambda rows: rows.map(lambda row: {"n": -row["n"]}), stream.head)
    assert first(further, 7) == [-100, -101, -102, -103, -104, -105, -106]
    assert max(sizes) == 3


def test_a_wrong_row_is_named_by_its_place(monkeypatch):
    monkeypatch.setattr(streams, "ROWS_AT_A_TIME", 3)

    def prepare(rows):
        if 4 in rows["n"]:
            raise InputError("Row 2: it is four.")
        return rows

    stream = RowStream(numbers(7), prepare, name="data.csv", buffer_size=0)
    with pytest.raises(InputError, match=r"data\.csv, counted from row 4 of the order in which it is read: Row 2: it"):
        first(stream, 7)


def test_rows_for_each_micro_batch_of_a_rollout():
    rows = RepeatedRows(RowStream(numbers(3), buffer_size=0), at_a_time=2, repeats=2)
    assert first(rows, 10) == [0, 1, 0, 1, 2, 0, 2, 0, 1, 2]


def test_files_are_opened_as_streams(tmp_path):
    file = write_csv(tmp_path / "data.csv", word_rows(4))
    assert [row["mr"] for row in stream_rows(str(file))] == [row["mr"] for row in word_rows(4)]
    Dataset.from_list(word_rows(4)).save_to_disk(tmp_path / "saved")
    assert len(list(stream_rows(str(tmp_path / "saved")))) == 4


@pytest.mark.parametrize(
    "name, split, message",
    [
        ("data.csv", "train[:2]", "is a slice of rows, which a stream does not have"),
        ("data.csv", "test", "could not be opened as a stream"),
        ("data.txt", "train", "has an extension that is not known"),
        ("absent.csv", "train", "does not exist"),
    ],
)
def test_what_cannot_be_a_stream(name, split, message, tmp_path):
    write_csv(tmp_path / "data.csv", word_rows(2))
    (tmp_path / "data.txt").write_text("a\n")
    with pytest.raises(InputError, match=message):
        stream_rows(str(tmp_path / name), split)


def test_a_stream_without_rows_or_that_breaks(tmp_path):
    (tmp_path / "data.csv").write_text("mr,ref\n")
    with pytest.raises(InputError, match="no rows"):
        RowStream(stream_rows(str(tmp_path / "data.csv")), name="data.csv")
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(InputError, match=r"data\.jsonl could not be read"):
        RowStream(stream_rows(str(tmp_path / "data.jsonl")), name="data.jsonl")


@pytest.mark.parametrize("place", ["data.csv", "directory"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"mr,ref\nw3,w4,w5\n", "has rows with more fields than its header"),
        (b"mr,mr\nw3,w4\n", "has the column `mr` twice"),
        ("mr,ref\nw3,caf\u00e9\n".encode("latin-1"), "line 2. Save the file as UTF-8"),
    ],
)
@pytest.mark.parametrize(
    "read", [load_rows, lambda name: RowStream(stream_rows(name), name=name)], ids=["whole", "stream"]
)
def test_files_that_would_be_read_as_something_else(read, content, message, place, tmp_path):
    (tmp_path / "directory").mkdir()
    for file in (tmp_path / "data.csv", tmp_path / "directory" / "train.csv"):
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(str(tmp_path / place))


def test_a_column_whose_type_changes_in_a_later_row(monkeypatch):
    monkeypatch.setattr(streams, "ROWS_AT_A_TIME", 2)
    rows = IterableDataset.from_generator(lambda: iter([{"n": 1}, {"n": 2}, {"n": 3}, {"n": "four"}]))
    with pytest.raises(InputError, match=r"data\.jsonl could not be read: .*four"):
        first(RowStream(rows, name="data.jsonl", buffer_size=0), 4)
