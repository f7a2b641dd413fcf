"""A process that is killed at any call to the file system leaves a whole checkpoint, the old one or the new one."""

import os
from pathlib import Path

import pytest

from rlkd_trl.trainers import checkpoint_files
from rlkd_trl.trainers.checkpoint_files import (
    STAGING,
    defect_of,
    keep_newest,
    make_empty,
    newest_whole,
    publish,
    seal,
    settle,
)

# All by which names and contents come to the disk, and leave it; `open` and `write` are of single files.
CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """The process does not live to see what comes after."""


def save(output_dir: Path, step: int, text: str, *, limit: int | None = None) -> None:
    """What `ResumableTrainer` does to save a checkpoint, in the same order."""
    final = output_dir / f"checkpoint-{step}"
    staged = output_dir / STAGING / final.name
    make_empty(staged)
    for name in ("model", "optimizer"):
        descriptor = os.open(staged / name, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, f"{name} {text}".encode())
        os.close(descriptor)
    seal(staged, resumable=True)
    publish(staged, final)
    keep_newest(final, limit, best=None)


def killed_at(number: int, work) -> bool:
    """Whether the work came to that many calls, and was killed before the last of them."""
    left = [number]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        # Threads are no part of what is tested, and would make the order of calls another one each time.
        patch.setattr(checkpoint_files, "ThreadPoolExecutor", InTurn)
        try:
            work()
        except Killed:
            return True
    return False


def test_what_has_a_name_is_on_the_disk(tmp_path, monkeypatch):
    """Every file of a checkpoint, and its directory, before it is renamed; its parent afterwards."""
    synced, at_the_rename = [], []
    rename = os.rename

    def recorded_rename(source, target):
        if Path(target).name == "checkpoint-7":
            at_the_rename.append(set(synced))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(tmp_path, 7, "text")
    (before,) = at_the_rename
    staged = tmp_path / STAGING / "checkpoint-7"
    names = {path.name for path in (tmp_path / "checkpoint-7").iterdir()}
    assert {"model", "optimizer"} < names
    assert {str(staged), *(str(staged / name) for name in names)} <= before
    assert str(tmp_path) in synced[len(before) :]


class InTurn:
    def __init__(self, count: int):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def map(self, function, items) -> list:
        return [function(item) for item in items]


def content(checkpoint: Path) -> str:
    model, optimizer = ((checkpoint / name).read_text() for name in ("model", "optimizer"))
    assert model.removeprefix("model ") == optimizer.removeprefix("optimizer ")
    return model.removeprefix("model ")


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("step", [4, 8], ids=["in place of another", "beside another"])
def test_killed_at_each_call(step, limit, tmp_path):
    for number in range(1, 1000):
        run = tmp_path / str(number)
        save(run, 4, "old")
        was_killed = killed_at(number, lambda run=run: save(run, step, "new", limit=limit))
        checkpoint, defects = newest_whole(run)
        assert checkpoint is not None and defects == {}, number
        assert content(checkpoint) in ("old", "new")
        if not was_killed:
            assert content(checkpoint) == "new" and number > 15
            break
        # The run goes on from there, or from an older one that was named, and may be killed again in this.
        kept = content(checkpoint)
        for again in range(1, 1000):
            if not killed_at(again, lambda run=run: make_empty(run / STAGING / "checkpoint-12")):
                break
            still = newest_whole(run)[0]
            assert still is not None and content(still) == kept, (number, again)
        assert content(newest_whole(run)[0]) == kept
        assert newest_whole(run)[0].parent == run, "it has its name"
        save(run, 12, "newer", limit=limit)
        assert content(run / "checkpoint-12") == "newer" and not (run / STAGING).exists()


def test_what_was_replaced_comes_back_where_the_new_one_is_torn(tmp_path):
    """A power failure may leave the names of before and after, and not the contents."""
    save(tmp_path, 4, "old")
    staged = tmp_path / STAGING / "checkpoint-4"
    make_empty(staged)
    (staged / "model").write_text("model ne")
    (tmp_path / "checkpoint-4").rename(staged.with_name("checkpoint-4.replaced"))
    settle(staged.parent)
    assert content(tmp_path / "checkpoint-4") == "old" and not staged.exists()


def test_a_replacement_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    save(tmp_path, 4, "old")
    staged = tmp_path / STAGING / "checkpoint-4"
    make_empty(staged)
    for name in ("model", "optimizer"):
        (staged / name).write_text(f"{name} new")
    seal(staged, resumable=True)
    rename = Path.rename

    def refused(path, target):
        if path == staged:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="Input/output"):
        publish(staged, tmp_path / "checkpoint-4")
    assert content(tmp_path / "checkpoint-4") == "old" and newest_whole(tmp_path)[1] == {}


def test_a_flush_that_fails_is_no_seal(tmp_path, monkeypatch):
    make_empty(tmp_path / STAGING / "checkpoint-4")
    (tmp_path / STAGING / "checkpoint-4" / "model").write_text("model new")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        seal(tmp_path / STAGING / "checkpoint-4", resumable=True)
    assert newest_whole(tmp_path) == (None, {})


def test_one_bit_in_a_large_file_is_found(tmp_path):
    save(tmp_path, 4, "old")
    file = tmp_path / "checkpoint-4" / "model"
    with file.open("wb") as opened:
        opened.truncate(50_000_000)
    seal(tmp_path / "checkpoint-4", resumable=True)
    assert defect_of(tmp_path / "checkpoint-4") is None
    with file.open("r+b") as opened:
        opened.seek(49_999_999)
        opened.write(b"\x01")
    assert defect_of(tmp_path / "checkpoint-4") == "model is not what was written"


def test_a_manifest_of_another_version_is_named(tmp_path):
    save(tmp_path, 4, "old")
    manifest = tmp_path / "checkpoint-4" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("xxh3_128", "sha256"))
    assert "is of another version (digest sha256" in defect_of(tmp_path / "checkpoint-4")
