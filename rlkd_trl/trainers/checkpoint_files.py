"""Checkpoints that are there whole or not at all.

A checkpoint is written into a directory of its own beside the others. When all its files are there and on the disk, a
manifest is added that names them with size and digest, and only then the directory gets its name, `checkpoint-STEP`.
Whatever stops the writing leaves the older checkpoints as they are.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
# Where checkpoints are written before they get their names, below the run's directory.
STAGING = ".unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(_NAME.fullmatch(checkpoint.name).group(1))


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """All directories named as checkpoints, the newest first, also broken ones and whole ones not yet published."""
    places = [Path(output_dir), Path(output_dir) / STAGING]
    found = [path for place in places for path in place.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def newest_whole(output_dir: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, if there is one, and what is wrong with each that is newer."""
    defects: dict[Path, str] = {}
    for checkpoint in checkpoints_in(output_dir):
        defect = defect_of(checkpoint)
        if defect is None:
            return checkpoint, defects
        if checkpoint.parent.name != STAGING:  # what is still being written was never promised to anyone
            defects[checkpoint] = defect
    return None, defects


def defect_of(checkpoint: str | Path) -> str | None:
    """Why a run cannot be continued from this directory, in words; None if it is a whole checkpoint."""
    checkpoint = Path(checkpoint)
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files, is_resumable = dict(manifest["files"]), manifest["resumable"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if not is_resumable:
        return "it holds the model only (save_only_model)"
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not the {size} that were written"
        if _digest(file) != digest:
            return f"{name} is not what was written"
    return None


def state_of(output_dir: str | Path) -> str:
    """For a user whose checkpoint could not be written: the room that is left, and what is there to continue from.

    Of a full disk torch says only that a position in a file is not what it should be.
    """
    directory = Path(output_dir).absolute()
    while not directory.exists():
        directory = directory.parent
    room = f"There, {shutil.disk_usage(directory).free / 2**20:.1f} MiB are free"
    whole, _ = newest_whole(output_dir)
    if whole is None:
        return f"{room}, and no checkpoint was saved before."
    return f"{room}, and {whole.name} is intact: make room, and continue with --resume."


def seal(checkpoint: Path, *, resumable: bool) -> None:
    """Brings all files to the disk, and writes the manifest of them."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    for file in files:
        _to_disk(file)
    listed = {str(file.relative_to(checkpoint)): [file.stat().st_size, _digest(file)] for file in files}
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps({"resumable": resumable, "files": listed}, indent=1) + "\n", encoding="utf-8")
    _to_disk(manifest)
    for directory in [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]:
        _to_disk(directory)


def publish(staged: Path, final: Path) -> None:
    """Gives a sealed checkpoint its name, in place of what has it."""
    if final.exists():
        replaced = staged.parent / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        try:
            staged.rename(final)
        except OSError:
            replaced.rename(final)
            raise
    else:
        staged.rename(final)
    _to_disk(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def keep_newest(newest: Path, limit: int | None, *, best: str | None) -> None:
    """Deletes checkpoints beside `newest`, which was written last, until `limit` are left (None: all stay).

    Those of later steps first: they were left by a run that was continued from before them. `best` stays.
    """
    if limit is None:
        return
    kept = {newest} if best is None else {newest, Path(best)}
    others = [path for path in checkpoints_in(newest.parent) if path not in kept]
    others.sort(key=lambda path: (step_of(path) <= step_of(newest), step_of(path)))
    for path in others[: max(0, len(others) + len(kept) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
