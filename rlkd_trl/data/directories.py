"""Directories of data: no file in them may make `datasets` read a file outside of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from rlkd_trl.errors import InputError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def check_directory(path: Path, extensions: tuple[str, ...]) -> None:
    """Checks that all files that `datasets` would read for this directory are in it, and in one of the formats.

    `datasets` would follow symbolic links, and the `data_files` in the YAML of a README or `.huggingface.yaml`, to
    other directories and to the network.

    Raises:
        InputError: A file lies outside, or is in a format that is not read here (pickles, archives).
    """
    for name in _paths_in_yaml(path):
        if "://" in name or "::" in name or PurePosixPath(name).is_absolute() or _climbs(name):
            raise _outside(path, name)
    from datasets import load_dataset_builder

    for file in _resolved_files(load_dataset_builder(str(path)).config.data_files):
        _check_inside(path, Path(file))
        if data_suffix(Path(file)) not in extensions:
            raise InputError(f"{path} has data in {Path(file).name}, which is not read: use {', '.join(extensions)}.")


def data_suffix(file: Path) -> str:
    """The file's ending without that of a compression: ".csv" for a.csv and a.csv.gz; "" if there is none."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def check_saved(path: Path) -> None:
    """Checks a directory that `save_to_disk` wrote as `check_directory` does. Raises `InputError`."""
    try:
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    except FileNotFoundError:
        splits = ["."]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # loading the directory will say what is wrong
    for split in map(str, splits):
        _check_inside(path, path / split)
        try:
            state = json.loads((path / split / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # loading the directory will say what is wrong
        for name in _texts(state, set()):  # every text, under whatever key, as if it were a file's name
            _check_inside(path, path / split / name)


def _paths_in_yaml(path: Path) -> Iterator[str]:
    """Every text in the `configs` of the directory's dataset card, as each may be a path."""
    import yaml

    for name in ("README.md", ".huggingface.yaml"):
        try:
            text = (path / name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if name == "README.md":
            parts = text.lstrip("\ufeff").replace("\r\n", "\n").split("---\n", 2)
            text = parts[1] if len(parts) == 3 and not parts[0].strip() else ""
        try:
            card = yaml.safe_load(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise InputError(f"{path / name} has YAML that cannot be read: {str(error).splitlines()[0]}.") from error
        yield from _texts(card.get("configs") if isinstance(card, dict) else None, set())


def _texts(value: object, seen: set[int]) -> Iterator[str]:
    """All texts in a value. seen: ids of lists and mappings visited; YAML aliases can make one contain itself."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, seen)


def _resolved_files(data_files: object) -> list[str]:
    return [str(file) for files in (data_files or {}).values() for file in files]


def _climbs(name: str) -> bool:
    """Whether a relative path leads out of its directory, on Linux or on Windows."""
    return ".." in (*PurePosixPath(name).parts, *PureWindowsPath(name).parts) or PureWindowsPath(name).is_absolute()


def _check_inside(path: Path, file: Path) -> None:
    # A snapshot in the Hub's cache consists of links into the directory `blobs` beside `snapshots`.
    root = path.absolute().parents[1] if path.absolute().parent.name == "snapshots" else path
    if "://" in str(file) or not file.resolve().is_relative_to(root.resolve()):
        raise _outside(path, str(file))


def _outside(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} names data outside of itself, {name!r}: copy the files into the directory, or name them with their "
        "own path."
    )
