"""Writes checkpoints so that each is either complete or does not exist.

A checkpoint is written into a directory of its own, `.unfinished/`. When all its files are on the disk, a manifest is
added that lists them with size and digest, and only then the directory gets its name, `checkpoint-STEP`. Whatever
stops the writing leaves older checkpoints as they are.

The digests find torn files and flipped bits, not forgeries: XXH3, which reads several gigabytes a second.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
# The directory, inside the run's, where checkpoints are written before they get their names.
STAGING = ".unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")
_REPLACED = ".replaced"  # behind the name of a checkpoint that another one is to replace
_DIGEST = "xxh3_128"
_FILES_AT_ONCE = 4
# Of files that this process has read, by what changes when they do: a run checks a checkpoint more than once.
_known_digests: dict[tuple[int, ...], str] = {}


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
    damage, is_resumable = _damage(Path(checkpoint))
    return damage if damage or is_resumable else "it holds the model only (save_only_model)"


def _damage(checkpoint: Path) -> tuple[str | None, bool]:
    """What is missing or is not as it was written, or None; and whether a run can be continued from what there is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files, is_resumable, digest_of_files = dict(manifest["files"]), manifest["resumable"], manifest.get("digest")
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last", False
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read", False
    if digest_of_files != _DIGEST:
        return f"its {MANIFEST} is of another version (digest {digest_of_files}, not {_DIGEST})", False
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing", is_resumable
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not the {size} that were written", is_resumable
        if _digest(file) != digest:
            return f"{name} is not what was written", is_resumable
    return None, is_resumable


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
    """Flushes all files to the disk, and writes the manifest of them."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:  # digests are taken while the disk writes
        flushed = threads.map(_to_disk, files)
        listed = {str(file.relative_to(checkpoint)): [file.stat().st_size, _digest(file)] for file in files}
        list(flushed)  # raises what a flush has raised
    content = {"resumable": resumable, "digest": _DIGEST, "files": listed}
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _to_disk(manifest)
    for directory in [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint.parent]:
        _to_disk(directory)


def make_empty(staged: Path) -> None:
    """Makes the directory that a checkpoint is to be written into, and clears up after a run that was killed."""
    settle(staged.parent)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)


def settle(staging: Path) -> None:
    """Gives complete checkpoints that a killed run has left in `staging` their names, and deletes the rest of it."""
    for path in sorted(staging.glob("*")):
        final = staging.parent / path.name.removesuffix(_REPLACED)
        is_checkpoint = _NAME.fullmatch(final.name) and path.is_dir()
        # Without a suffix it comes first, and is the newer one.
        if is_checkpoint and not final.exists() and _damage(path)[0] is None:
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def publish(staged: Path, final: Path) -> None:
    """Gives a sealed checkpoint its name, in place of what has it.

    Killed between the two renames it leaves the new one sealed, where `newest_whole` finds it, and the old one.
    """
    replaced = staged.with_name(final.name + _REPLACED)
    if final.exists():
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
    state = file.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _known_digests:
        digest = xxhash.xxh3_128()
        with file.open("rb") as opened:
            while part := opened.read(1 << 22):
                digest.update(part)
        _known_digests[key] = digest.hexdigest()
    return _known_digests[key]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
