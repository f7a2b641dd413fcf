"""Finds out why a data file cannot be read: in which line, and what to do about it."""

from __future__ import annotations

import codecs
import csv
import json
from collections import Counter
from pathlib import Path

from rlkd_trl.errors import InputError

# The first bytes of files that are not text, and what to do with them.
_NO_TEXT = {
    b"\x1f\x8b": "is compressed with gzip: unpack it",
    b"PK\x03\x04": "is a ZIP archive: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it",
    b"BZh": "is compressed with bzip2: unpack it",
    b"\xfd7zXZ": "is compressed with xz: unpack it",
    b"PAR1": "is a Parquet file: give it the ending .parquet",
}


def check_encoding(path: Path) -> None:
    """Raises `InputError` if a CSV, JSON or JSONL file is not UTF-8; otherwise JSON rows would fail in mid-run."""
    if path.suffix.lower() == ".parquet":
        return
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with path.open("rb") as file:
        block = file.read(2**20)
        if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{path} is UTF-16: save it as UTF-8, e.g. `iconv -f utf-16 -t utf-8`.")
        for beginning, problem in _NO_TEXT.items():
            if block.startswith(beginning):
                raise InputError(f"{path} {problem}.")
        if b"\0" in block:
            raise InputError(f"{path} holds zero bytes, so it is no text: give a file of UTF-8.")
        while block:
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise InputError(
                    f"{path} could not be read: 'utf-8' codec can't decode byte 0x{error.object[error.start]:02x} in "
                    f"line {line}. Save the file as UTF-8, e.g. `iconv -f latin1 -t utf-8`."
                ) from error
            line += block.count(b"\n")
            block = file.read(2**20)


def problem_of(path: Path) -> str | None:
    """The first problem of a JSON or JSONL file that could not be read, or None if none is found."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        return None
    text = path.read_text(encoding="utf-8-sig")
    return (
        _problem_of_json(text) if path.suffix == ".json" and text.lstrip().startswith("[") else _problem_of_lines(text)
    )


def twice_in_header(path: Path) -> str | None:
    """The first column that a CSV file's header names twice, or None."""
    if path.suffix.lower() != ".csv":
        return None
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            header = next(csv.reader(file), [])
        except csv.Error:  # a field of more than 128 KiB; the error is raised when the rows are read
            return None
    return next((name for name, count in Counter(header).items() if count > 1), None)


def _problem_of_json(text: str) -> str | None:
    try:
        json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return f"line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


def _problem_of_lines(text: str) -> str | None:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            return f"line {number}: {reason} (one JSON object in each line)"
        if not isinstance(row, dict):
            return f"line {number}: a {type(row).__name__}, not an object (one JSON object in each line)"
    return None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = Counter(name for name, _ in pairs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"the key {twice[0]!r} is there twice in one object")
    return dict(pairs)
