"""Datasets in: from the Hub, from local files and directories, grouped by source text."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.data.broken_files import check_encoding, problem_of, twice_in_header
from rlkd_trl.data.datasets_errors import configurations_named_in, splits_named_in
from rlkd_trl.data.directories import COMPRESSED, check_directory, check_saved, data_suffix
from rlkd_trl.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

FILE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
EXTENSIONS = ", ".join(FILE_FORMATS)
QUIET_BELOW_BYTES = 16 * 2**20  # smaller files are read too fast for a progress bar to be of use

# "name" or "owner/name"; anything else can only be a path.
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
            `datasets.save_to_disk` wrote; or the id of a dataset on the Hub. What exists locally comes first.
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


def require_dataset(dataset: str) -> None:
    """Raises `InputError` if a dataset's name can only be a path (by its ending, or as no Hub id) and is absent."""
    path = Path(dataset).expanduser()
    is_path = path.suffix.lower() in FILE_FORMATS or not HUB_ID.fullmatch(dataset) or ".." in dataset
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
    check_encoding(path)
    if twice := twice_in_header(path):
        raise InputError(f"{path} has the column `{twice}` twice: rename or remove one of them in its header.")
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
            reason = "; ".join(filter(None, (_reason(error), problem_of(path))))
            raise InputError(f"{path} could not be read: {reason}") from error
    if "__index_level_0__" in rows.column_names:  # pandas took the extra field for an index and shifted the others
        raise InputError(f"{path} has rows with more fields than its header; quote the fields that contain commas.")
    return rows


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
        raise InputError(f"{path} could not be read: {_reason(error)}. Save or copy it again.") from error
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
            if file.suffix.lower() not in COMPRESSED:
                check_encoding(file)
        _check_slice(split)
        with _quiet_if_small(files):
            return load_dataset(str(path), split=split, cache_dir=_cache_for_content(files))
    except InputError:
        raise
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise InputError(f"{path} holds no data files; it needs files of one of: {EXTENSIONS}.") from error
    except Exception as error:
        if splits := splits_named_in(error):
            raise _unknown_split(str(path), split, splits) from error
        if "corresponds to no data" in str(error):
            raise InputError(f"{path} has no rows in split {split!r}; there is nothing to work on.") from error
        raise InputError(f"{path} could not be read: {_reason(error)}") from error


def _load_from_hub(dataset: str, split: str, revision: str | None, config: str | None) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:
        if splits := splits_named_in(error):
            raise _unknown_split(dataset, split, splits) from error
        if names := configurations_named_in(error):
            raise InputError(
                f"Dataset {dataset} has several configurations; choose one with --dataset_config: {names}."
            ) from error
        at_revision = f" at revision {revision}" if revision else ""
        raise InputError(
            f"Dataset {dataset} is not a local path and could not be fetched from the Hub{at_revision}: "
            f"{_reason(error)}. Check the spelling and the network, or give a local file."
        ) from error


def _check_slice(split: str) -> None:
    """Raises `InputError` for a slice of a split that `datasets` would not understand."""
    if "[" in split and not re.fullmatch(r"[\w.+-]+(\[-?\d*%?:-?\d*%?\](\(\w+\))?[\w.+-]*)+", split):
        raise InputError(f"Split {split!r} is no slice of rows; write one as train[:100], train[50:] or train[:10%].")


def _unknown_split(dataset: str, split: str, available: str) -> InputError:
    return InputError(f"Split {split!r} is not in {dataset}; its splits are: {available}.")


def _reason(error: BaseException) -> str:
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


def require_columns(rows: Dataset, **flags: str | None) -> None:
    """Check that the columns named by flags exist: `require_columns(rows, source_column="mr")`. None is skipped.

    Raises:
        InputError: for the first flag whose column is not in the data.
    """
    for flag, column in flags.items():
        if column is not None and column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise InputError(f"`--{flag} {column}` is not in the data; its columns are: {columns}.")


def require_two_columns(source_column: str, target_column: str | None) -> None:
    """Raises `InputError` if sources and targets are one column."""
    if source_column == target_column:
        raise InputError(f"`--target_column {target_column}` is the source column too; name another or leave it out.")


def group_by_source(rows: Dataset, source_column: str, target_column: str | None = None) -> Dataset:
    """One row for each distinct source text, in the order in which they first occur.

    Columns: `prompt` (str, the source text), `references` (list[str]: the targets of all rows with that source; []
    without `target_column`), and the first value of every other column, the source column under its own name
    included. The target column, and a `references` column that is not the target, are left out, so that no reference
    reaches a prompt through them.

    Args:
        rows: the data.
        source_column: a column of non-blank strings.
        target_column: a column of non-blank strings, or of non-empty lists of them.

    Raises:
        InputError: a column is missing, its values are not as above (rows are counted from 1, headers left out), or
            `prompt` is already the name of another column.
    """
    from datasets import List, Value

    require_columns(rows, source_column=source_column, target_column=target_column)
    require_two_columns(source_column, target_column)
    if "prompt" in rows.column_names and "prompt" not in (source_column, target_column):
        raise InputError(
            f"The data has a column `prompt` besides the source column `{source_column}`, and the source text goes by "
            "that name from here on; rename that column or use it as the source column."
        )

    first_row: dict[str, int] = {}
    references: dict[str, list[str]] = {}
    require_no_blanks(rows[source_column], source_column)
    targets = rows[target_column] if target_column else [[]] * len(rows)
    require_no_blanks(targets, target_column)
    for i, (source, target) in enumerate(zip(rows[source_column], targets, strict=True)):
        require_text(source, source_column, i)
        first_row.setdefault(source, i)
        references.setdefault(source, []).extend(as_references(target, target_column, i) if target_column else [])

    grouped = rows.select(list(first_row.values()))
    replaced = {"prompt", "references", target_column} - {source_column}
    grouped = grouped.remove_columns([column for column in rows.column_names if column in replaced])
    if source_column != "prompt":
        grouped = grouped.add_column("prompt", list(first_row), feature=Value("string"))
    return grouped.add_column("references", list(references.values()), feature=List(Value("string")))


def reference_texts(*datasets: Dataset | Mapping[str, Dataset] | Iterable[Mapping] | None) -> Iterator[str]:
    """All texts in the columns `references` of datasets, dictionaries of datasets, and lists of rows; None counts as
    empty."""
    for dataset in datasets:
        if isinstance(dataset, Mapping):
            yield from reference_texts(*dataset.values())
            continue
        columns = getattr(dataset, "column_names", None)
        if columns is not None:  # a `Dataset` reads one column faster than whole rows
            column = dataset["references"] if "references" in columns else []
        else:
            column = (row.get("references") for row in dataset or [])
        for references in column:
            yield from listed_references(references)


def listed_references(references: str | Iterable[str] | None) -> list[str]:
    """A row's `references`, one text or several or none, as a list."""
    return [references] if isinstance(references, str) else list(references or [])


def as_references(target, column: str, index: int) -> list[str]:
    """A target, one text or several, as a list. Raises `InputError` if it is something else, or blank."""
    references = list(target) if isinstance(target, (list, tuple)) else [target]
    if not references:
        raise InputError(f"Row {index + 1}: column `{column}` holds an empty list; drop the row or fill it in.")
    for reference in references:
        require_text(reference, column, index)
    return references


def require_no_blanks(values: Sequence, column: str) -> None:
    """Raises `InputError` if any values are None or blank texts, with their number and the first few rows."""
    blank = [i + 1 for i, value in enumerate(values) if _is_blank(value)]
    if blank:
        rows = f"{', '.join(map(str, blank[:5]))}{', …' if blank[5:] else ''}"
        raise InputError(f"{_empty(blank[0], column)} It is empty in {len(blank)} of {len(values)} rows: {rows}.")


def _empty(row: int, column: str) -> str:
    return (
        f"Row {row}: column `{column}` is empty; drop the row or fill it in. (In CSV files NA, null and None count as "
        "empty too.)"
    )


def _is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def require_text(value, column: str, index: int) -> None:
    """Raises `InputError` unless `value`, in row `index` (from 0) of `column`, is text and not blank."""
    if _is_blank(value):
        raise InputError(_empty(index + 1, column))
    if not isinstance(value, str):
        raise InputError(
            f"Row {index + 1}: column `{column}` holds {value!r} ({type(value).__name__}), not text; "
            "name a text column or convert it."
        )


def parse_renames(pairs: list[str]) -> dict[str, str]:
    """["mr=meaning_representation"] -> {"mr": "meaning_representation"}: old column names to new ones.

    Raises:
        InputError: a pair is not of the form old=new, or a name occurs twice on the same side.
    """
    renames: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = (part.strip() for part in pair.partition("="))
        if not (old and equals and new) or "=" in new:
            raise InputError(f"Column renaming {pair!r} is not of the form old=new, e.g. mr=meaning_representation.")
        if old in renames or new in renames.values():
            raise InputError(f"Column renaming {pair!r} names a column that an earlier renaming has named already.")
        renames[old] = new
    return renames
