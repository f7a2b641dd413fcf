"""`completions.jsonl`: a line is what ends with a line feed, and records are never lost."""

import os

import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation import run_log
from rlkd_trl.evaluation.run_log import append_completions, keep_completions_until, read_completions

# What Python's `splitlines` takes for the end of a line, and JSON does not escape.
ENDS = ["\u2028", "\u2029", "\x85", "\r\n", "\ud800"]
RECORDS = [{"step": step, "text": f"a{end}b"} for step, end in enumerate(ENDS)]


@pytest.fixture
def path(tmp_path):
    append_completions(tmp_path / "completions.jsonl", RECORDS)
    return tmp_path / "completions.jsonl"


def test_every_text_comes_back(path):
    assert read_completions(path) == RECORDS
    keep_completions_until(path, 2)
    assert read_completions(path) == RECORDS[:3]
    append_completions(path, RECORDS[3:])
    assert read_completions(path) == RECORDS


@pytest.mark.parametrize("end", ['{"step": 9, "te', '{"step": 9, "text": "ß'], ids=["in a word", "in a character"])
def test_a_last_line_that_was_cut_off_is_left_out(path, end):
    with path.open("ab") as file:
        file.write(end.encode()[:-1])
    assert read_completions(path) == RECORDS


def test_a_broken_line_before_the_last_one_is_named(path):
    path.write_bytes(b'{"step": 0\n' + path.read_bytes())
    with pytest.raises(InputError, match=r"completions\.jsonl, line 1, is not JSON"):
        read_completions(path)


@pytest.mark.parametrize(("module", "call"), [(run_log, "without_nan"), (os, "replace")])
def test_a_kill_while_records_are_taken_out_loses_none(module, call, path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, call, killed)
    with pytest.raises(KeyboardInterrupt):
        keep_completions_until(path, 2)
    assert read_completions(path) == RECORDS
