"""Writes checkpoints so that each is either complete or does not exist.

A checkpoint is written into a directory of its own, `.unfinished/`. When all its files are on the disk, a manifest is
added that lists them with size and digest, and only then the directory gets its name, `checkpoint-STEP`. Whatever
stops the writing leaves older checkpoints as they are.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
# The directory, inside the run's, where checkpoints are written before they get their names.
STAGING = ".unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(_NAME.fullmatch(checkpoint.name).group(1))


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """All directories with a checkpoint's name, newest first: also broken ones, and those in `STAGING`."""
    places = [Path(output_dir), Path(output_dir) / STAGING]
    paths = [path for place in places for path in place.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in paths if path.is_dir()), key=step_of, reverse=True)


def newest_whole(output_dir: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest complete checkpoint, or None; and the defects of the newer ones, by directory."""
    defects: dict[Path, str] = {}
    for checkpoint in checkpoints_in(output_dir):
        defect = defect_of(checkpoint)
        if defect is None:
            return checkpoint, defects
        if checkpoint.parent.name != STAGING:  # one that was never finished is no defect
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
    """For the error about a checkpoint that could not be written: the free space, and the newest complete checkpoint.

    torch's own message about a full disk only says that a position in a file is not the expected one.
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
    """Flushes all files of a checkpoint to the disk, then writes their manifest."""
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
    """Gives a sealed checkpoint its final name; a directory that has that name already is replaced."""
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
    """Deletes checkpoints until `limit` are left; None deletes nothing. `newest`, written last, and `best` are kept.

    Checkpoints of later steps than `newest` go first: the run was continued from an earlier step, and has not reached
    theirs again. Then the oldest.
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
