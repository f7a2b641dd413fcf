"""Datasets in: from the Hub, from local files and directories."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.data.broken_files import check_encoding, problem_of, twice_in_header
from rlkd_trl.data.datasets_errors import configurations_named_in, splits_named_in
from rlkd_trl.data.directories import COMPRESSED, check_directory, check_saved, data_suffix
from rlkd_trl.errors import InputError
from rlkd_trl.settings.hub import HUB_ID, commit_of, split_revision

if TYPE_CHECKING:
    from datasets import Dataset

FILE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
EXTENSIONS = ", ".join(FILE_FORMATS)
QUIET_BELOW_BYTES = 16 * 2**20  # smaller files are read too fast for a progress bar to be of use

# "name" or "owner/name"; anything else can only be a path.


def load_rows(
    dataset: str,
    split: str = "train",
    *,
    revision: str | None = None,
    config: str | None = None,
) -> Dataset:
    """The rows of one split of a dataset.

    Args:
        dataset: a local .csv, .json, .jsonl or .parquet file; a directory of such files, or one that
            `datasets.save_to_disk` wrote; or the id of a dataset on the Hub, also as "id@revision". What exists
            locally comes first.
        split: a split's name. A slice such as "train[:100]" works too, except for `save_to_disk`.
            A single file has the one split "train".
        revision: branch, tag or commit; for Hub datasets only.
        config: a Hub dataset's configuration, e.g. "3.0.0" of cnn_dailymail.

    Raises:
        InputError: the dataset, the split or the file's content is not there or cannot be read.
    """
    path = Path(dataset).expanduser()
    require_dataset(dataset)
    if path.is_file():
        rows = _load_file(path, split)
    elif _is_saved_to_disk(path):
        rows = _load_saved(path, split)
    elif path.is_dir():
        rows = _load_directory(path, split)
    elif path.exists():
        raise InputError(f"Dataset {dataset} is neither a file nor a directory.")
    else:
        rows = _load_from_hub(dataset, split, revision, config)
    if len(rows) == 0:
        raise InputError(f"Dataset {dataset} has no rows in split {split!r}; there is nothing to work on.")
    return rows


TEACHER_GENERATED = "teacher-generated"  # what one might call data that a teacher writes


def require_dataset(dataset: str) -> None:
    """Raises `InputError` if a dataset's name can only be a path (by its ending, or as no Hub id) and is absent."""
    path = Path(dataset).expanduser()
    if dataset == TEACHER_GENERATED and not path.exists():
        raise InputError(
            f"Dataset {dataset}: write it first, with generate_data (recipes/generate_data.py), and give its file."
        )
    repository, _ = split_revision(dataset)
    is_path = path.suffix.lower() in FILE_FORMATS or not HUB_ID.fullmatch(repository) or ".." in repository
    if is_path and not path.exists():
        raise InputError(f"Dataset {dataset} does not exist; check the path (looked for {path.absolute()}).")


def _load_file(path: Path, split: str) -> Dataset:
    from datasets import load_dataset

    if path.suffix.lower() not in FILE_FORMATS:
        raise InputError(f"Dataset {path} has an extension that is not known; use one of: {EXTENSIONS}.")
    _check_slice(split)
    if split.split("[")[0] != "train":
        raise InputError(
            f"Split {split!r} is not in {path}: a single file has the one split 'train'. Give the file of "
            "that split, or a directory with one file for each split."
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; it needs a header and rows.")
    check_file(path)
    with _quiet_if_small([path]):
        try:
            rows = load_dataset(
                FILE_FORMATS[path.suffix.lower()],
                data_files={"train": str(path)},
                split=split,
                cache_dir=_cache_for_content([path]),
            )
        except Exception as error:  # each format's parser has its own exceptions, StopIteration among them
            if "corresponds to no data" in str(error) or isinstance(error, StopIteration):
                raise InputError(f"{path} has no rows in split {split!r}; there is nothing to work on.") from error
            reason = "; ".join(filter(None, (reason_of(error), problem_of(path))))
            raise InputError(f"{path} could not be read: {reason}") from error
    check_columns(str(path), rows.column_names)
    return rows


def check_file(path: Path) -> None:
    """Raises `InputError` if a local file is not UTF-8, or a CSV's header names a column twice."""
    if path.suffix.lower() in COMPRESSED:
        return
    check_encoding(path)
    if twice := twice_in_header(path):
        raise InputError(f"{path} has the column `{twice}` twice: rename or remove one of them in its header.")


def check_columns(name: str, columns: Sequence[str]) -> None:
    """Raises `InputError` if pandas took the extra field of a CSV's row for an index, and shifted the others."""
    if "__index_level_0__" in columns:
        raise InputError(f"{name} has rows with more fields than its header; quote the fields that contain commas.")


def _cache_for_content(files: list[Path]) -> str:
    """A cache directory for the files' present content; `datasets` itself goes by their modification times only."""
    from datasets import config

    return str(Path(config.HF_DATASETS_CACHE) / f"content-{content_digest(files)[:16]}")


def content_digest(files: Sequence[Path]) -> str:
    """SHA-256 of the files' contents, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def data_files(dataset: str) -> list[Path]:
    """The local files from which `load_rows` reads this dataset, sorted; an empty list for a dataset on the Hub."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return [path]
    if _is_saved_to_disk(path):  # beside the rows `datasets` keeps what it computed from them, as cache-….arrow
        files = [file for file in path.rglob("*") if not file.name.startswith("cache-")]
    else:
        files = [file for file in path.rglob("*") if data_suffix(file) in FILE_FORMATS]
    return sorted(file for file in files if file.is_file())


def _is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(path: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    check_saved(path)
    try:
        saved = load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"{path} could not be read: {reason_of(error)}. Save or copy it again.") from error
    splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise _unknown_split(str(path), split, ", ".join(splits))
    return splits[split]


def _load_directory(path: Path, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    try:
        check_directory(path, tuple(FILE_FORMATS))
        files = data_files(str(path))
        for file in files:
            check_file(file)
        _check_slice(split)
        with _quiet_if_small(files):
            rows = load_dataset(str(path), split=split, cache_dir=_cache_for_content(files))
        check_columns(str(path), rows.column_names)
        return rows
    except InputError:
        raise
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise InputError(f"{path} holds no data files; it needs files of one of: {EXTENSIONS}.") from error
    except Exception as error:
        if splits := splits_named_in(error):
            raise _unknown_split(str(path), split, splits) from error
        if "corresponds to no data" in str(error):
            raise InputError(f"{path} has no rows in split {split!r}; there is nothing to work on.") from error
        raise InputError(f"{path} could not be read: {reason_of(error)}") from error


def _load_from_hub(dataset: str, split: str, revision: str | None, config: str | None) -> Dataset:
    from datasets import load_dataset

    repository, revision = split_revision(dataset, revision)
    try:
        rows = load_dataset(repository, config, split=split, revision=revision)
    except Exception as error:
        if splits := splits_named_in(error):
            raise _unknown_split(dataset, split, splits) from error
        if names := configurations_named_in(error):
            raise InputError(
                f"Dataset {dataset} has several configurations; choose one with --dataset_config: {names}."
            ) from error
        at_revision = f" at revision {revision}" if revision else ""
        raise InputError(
            f"Dataset {repository} is not a local path and could not be fetched from the Hub{at_revision}: "
            f"{reason_of(error)}. Check the spelling and the network, or give a local file."
        ) from error
    if revision is not None:
        _check_commit(rows, repository, revision)
    return rows


def _check_commit(rows: Dataset, repository: str, revision: str) -> None:
    """Raises `InputError` if the rows are of another revision: without the Hub `datasets` takes the last cached one.

    It keeps the rows of each commit in a directory of that name.
    """
    commit = commit_of(repository, revision, "dataset")
    others = [file["filename"] for file in rows.cache_files if commit not in Path(file["filename"]).parts]
    if others:
        raise InputError(
            f"Dataset {repository} is in the cache, but not, or not as far as is known, at revision {revision} (there "
            f"is {Path(others[0]).parent}): fetch it with a network, or leave the revision out."
        )


def _check_slice(split: str) -> None:
    """Raises `InputError` for a slice of a split that `datasets` would not understand."""
    if "[" in split and not re.fullmatch(r"[\w.+-]+(\[-?\d*%?:-?\d*%?\](\(\w+\))?[\w.+-]*)+", split):
        raise InputError(f"Split {split!r} is no slice of rows; write one as train[:100], train[50:] or train[:10%].")


def _unknown_split(dataset: str, split: str, available: str) -> InputError:
    return InputError(f"Split {split!r} is not in {dataset}; its splits are: {available}.")


def reason_of(error: BaseException) -> str:
    """The first line of the error, or of its cause, where `datasets` puts the message of a format's parser."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _quiet_if_small(files: Sequence[Path]) -> Iterator[None]:
    """Within it `datasets` logs nothing, since it also raises what it logs; large files get a bar on a terminal."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    is_large = sum(file.stat().st_size for file in files) >= QUIET_BELOW_BYTES
    level = logging.get_verbosity()
    hides_bars = not are_progress_bars_disabled() and not (is_large and sys.stderr.isatty())
    logging.set_verbosity(logging.CRITICAL)
    if hides_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hides_bars:
            enable_progress_bars()
