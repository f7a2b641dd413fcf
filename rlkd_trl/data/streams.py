"""Data sets that do not fit in memory or on the disk: their rows are read while training goes on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import IterableDataset

from rlkd_trl.data.directories import check_directory
from rlkd_trl.data.loading import (
    FILE_FORMATS,
    check_columns,
    check_file,
    data_files,
    load_rows,
    reason_of,
    require_dataset,
)
from rlkd_trl.errors import InputError
from rlkd_trl.settings.hub import split_revision

if TYPE_CHECKING:
    import datasets
    from datasets import Dataset

# So many rows are prepared at a time. The first so many are those by which a stream is checked before training.
ROWS_AT_A_TIME = 1000


class RowStream(IterableDataset):
    """Rows without an end: when the last one has been read, it goes on with the first, in another order.

    What is shuffled is a buffer: each row is drawn from it at random, and the next row that is read takes its place.
    The order depends on the seed alone, so a run that is resumed finds its place by reading what it has had.

    Attributes:
        head: The first rows, prepared, in their own order. What is checked in other data of all rows is checked here
            of these.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        prepare: Callable[[Dataset], Dataset] = lambda rows: rows,
        *,
        name: str = "Training data",
        buffer_size: int = 10_000,
        seed: int = 0,
    ):
        """
        Args:
            rows: As `datasets.load_dataset(…, streaming=True)` gives them.
            prepare: Makes rows to train on of some rows as they are in the data.
            name: Of the data, for messages.
            buffer_size: Rows in the buffer; below 2 rows come in their own order.
            seed: Of the order.

        Raises:
            InputError: The rows cannot be read or prepared, or there are none.
        """
        self._rows, self._steps, self._name = rows, [prepare], name
        self._buffer_size, self._seed = buffer_size, seed
        chunk = next(self._chunks(rows.take(ROWS_AT_A_TIME)), None)
        if chunk is None:
            raise InputError(f"{name} has no rows; there is nothing to work on.")
        self.head = self._prepared(chunk, 1)

    @property
    def order(self) -> tuple[int, int]:
        """What the order of rows depends on: size of the buffer, seed."""
        return self._buffer_size, self._seed

    def then(self, step: Callable[[Dataset], Dataset], head: Dataset) -> RowStream:
        """A stream whose rows go through another step. head: its first rows, which have gone through it."""
        stream = copy.copy(self)
        stream._steps, stream.head = [*self._steps, step], head
        return stream

    def __iter__(self) -> Iterator[dict]:
        for number in itertools.count():
            rows = self._rows
            if self._buffer_size > 1:
                rows = rows.shuffle(seed=self._seed, buffer_size=self._buffer_size)
                rows.set_epoch(number)
            first = 1
            for chunk in self._chunks(rows):
                yield from self._prepared(chunk, first)
                first += len(chunk)

    def _chunks(self, rows: datasets.IterableDataset) -> Iterator[Dataset]:
        from datasets import Dataset

        iterator = iter(rows)
        while True:
            try:
                read = list(itertools.islice(iterator, ROWS_AT_A_TIME))
                if not read:
                    return
                chunk = Dataset.from_list(read, features=rows.features)
            except Exception as error:  # each format's parser has its own exceptions, and so has the network
                raise InputError(f"{self._name} could not be read: {reason_of(error)}") from error
            check_columns(self._name, chunk.column_names)
            yield chunk

    def _prepared(self, chunk: Dataset, first: int) -> Dataset:
        try:
            for step in self._steps:
                chunk = step(chunk)
        except InputError as error:
            raise InputError(
                f"{self._name}, counted from row {first} of the order in which it is read: {error}"
            ) from error
        return chunk


class RepeatedRows(IterableDataset):
    """The rows of a stream, so many at a time, and each time `repeats` times before the next ones."""

    def __init__(self, rows: RowStream, *, at_a_time: int, repeats: int):
        self._rows, self._at_a_time, self._repeats = rows, at_a_time, repeats

    def __iter__(self) -> Iterator[dict]:
        rows = iter(self._rows)
        while True:
            some = list(itertools.islice(rows, self._at_a_time))
            for _ in range(self._repeats):
                yield from some


def known_rows(dataset: Dataset | RowStream) -> Dataset:
    """The rows that can be checked: all of a data set, the first of a stream."""
    return dataset.head if isinstance(dataset, RowStream) else dataset


def stream_rows(
    dataset: str, split: str = "train", *, revision: str | None = None, config: str | None = None
) -> datasets.IterableDataset:
    """The rows of one split, to be read one after the other; arguments are those of `load_rows`.

    Raises:
        InputError: The dataset or the split is not there, the split is a slice, or a local file is not UTF-8 or names
            a column twice.
    """
    from datasets import config as of_datasets
    from datasets import load_dataset

    if "[" in split:
        raise InputError(f"Split {split!r} is a slice of rows, which a stream does not have: name a whole split.")
    require_dataset(dataset)
    path = Path(dataset).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return load_rows(dataset, split).to_iterable_dataset()
    try:
        if path.is_file():
            kind = FILE_FORMATS.get(path.suffix.lower())
            if kind is None:
                raise InputError(
                    f"Dataset {path} has an extension that is not known; use one of: {', '.join(FILE_FORMATS)}."
                )
            check_file(path)
            return load_dataset(kind, data_files={"train": str(path)}, split=split, streaming=True)
        if path.is_dir():
            check_directory(path, tuple(FILE_FORMATS))
            for file in data_files(dataset):
                check_file(file)
            return load_dataset(str(path), split=split, streaming=True)
        repository, revision = split_revision(dataset, revision)
        if revision is not None and of_datasets.HF_HUB_OFFLINE:  # it takes the last revision that is cached
            raise InputError(
                f"Dataset {repository} cannot be streamed offline at a revision ({revision}): leave --streaming out, "
                "which finds it in the cache."
            )
        return load_dataset(repository, config, split=split, revision=revision, streaming=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Dataset {dataset} could not be opened as a stream: {reason_of(error)}") from error
