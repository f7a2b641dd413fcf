"""The output directory of a command: what may be overwritten, and the checkpoint from which a run continues."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import EvaluationArguments, RunArguments
from rlkd_trl.commands.files_read import FILES_OF
from rlkd_trl.commands.launched import say
from rlkd_trl.errors import InputError, is_first_process
from rlkd_trl.settings.files import INHERITED, adapted_model, files_read, places_written

if TYPE_CHECKING:
    from transformers import TrainingArguments

FINISHED = "finished.json"  # written last
LOG = "completions.jsonl"  # grows while a run goes on, so that it is no result
RESULTS = (FINISHED, "metrics.json", "cost.json", "report.html", "run_log.json", "outputs.jsonl")
_SECONDS_TO_END = 10.0  # of a run that was told to end, as a killed comparison's is
_WEIGHTS = ("model*.safetensors", "adapter_model.*", "pytorch_model*.bin")


def check_apart(groups: Sequence[object], preset: Path | None) -> None:
    """Checks that what a command's flags read is not at a place that they write, nor in it, nor around it.

    Every command line goes through this check. Links are followed. An input file may lie in an output directory if no
    result has its name.

    Args:
        groups: The command's flags, one instance of a dataclass for each group.
        preset: The YAML file from which some of them were read.

    Raises:
        InputError: An output would overwrite an input; the message names both flags.
    """
    outputs = [(f"--{name}", getattr(group, name)) for group in groups for name in places_written(type(group))]
    inputs = [*_inputs(groups), *([] if preset is None else [(f"--config {preset}", preset)])]
    for flag, output in outputs:
        if output is not None:
            _check_output_apart(flag, Path(output).expanduser(), inputs)


def _check_output_apart(flag: str, output: Path, inputs: Sequence[tuple[str, Path]]) -> None:
    written_at = output.resolve()
    for name, path in inputs:
        place = path.resolve()
        is_same = written_at == place or (output.exists() and path.exists() and output.samefile(path))
        is_around = path.is_dir() and place in written_at.parents
        is_in = written_at in place.parents and (path.is_dir() or path.name in (*RESULTS, LOG))
        if is_same or is_around or is_in:
            relation = "is" if is_same else "lies in" if is_around else "holds"
            raise InputError(
                f"{flag} {output} {relation} what {name} reads, which would be overwritten: name another place for "
                "the output."
            )


def _inputs(groups: Sequence[object]) -> Iterator[tuple[str, Path]]:
    """The flag with its value, and the path, of everything that is read: whole directories, and single files."""
    for group in groups:
        for name, reads in files_read(type(group)).items():
            if name in INHERITED:  # a run may continue from a checkpoint in its own output directory
                continue
            value = getattr(group, name) or []
            for text in [value] if isinstance(value, str) else value:
                path = Path(text).expanduser()
                paths = [path] if path.exists() else FILES_OF[reads](text)
                if (model := adapted_model(path)) and Path(model).exists():
                    paths.append(Path(model))
                yield from ((f"--{name} {text}", path) for path in paths)


def check_free(output_dir: str, run: RunArguments, args: "TrainingArguments") -> None:
    """Checks that a new run does not begin in the directory of another one, unless it is told to. Changes nothing.

    Raises:
        InputError: There are results or checkpoints; `--output_dir` is a file, or cannot be written to; or flags
            contradict each other.
    """
    from rlkd_trl.trainers.checkpoint_files import checkpoints_in

    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file: name a directory.")
    continues = run.resume or args.resume_from_checkpoint is not None
    if continues and run.overwrite_output_dir:
        raise InputError(
            "--overwrite_output_dir deletes the checkpoints that --resume goes on from: give one of them."
        )
    check_writable("--output_dir", directory)
    if run.resume or run.overwrite_output_dir:
        return
    named = args.resume_from_checkpoint
    if named is not None and directory.resolve() in Path(named).resolve().parents:
        return
    finished, checkpoints = finished_files(directory), checkpoints_in(directory)
    if finished:
        to_go_on = "--resume goes on with the run, " if checkpoints else ""
        raise InputError(
            f"--output_dir {output_dir} holds the results of a run ({finished[0].name}). Name another directory; "
            f"{to_go_on}--overwrite_output_dir begins anew and deletes it."
        )
    if checkpoints:
        raise InputError(
            f"--output_dir {output_dir} holds {checkpoints[0].name} of a run that did not finish: --resume goes on "
            "with it, --overwrite_output_dir begins anew and deletes it."
        )


def check_evaluation_directory(evaluation: EvaluationArguments) -> None:
    """Raises `InputError` if `--output_dir` holds results that must not be overwritten, or cannot be written."""
    if evaluation.output_dir is None:
        return
    for name in ("metrics.json", "outputs.jsonl"):
        check_not_there("--output_dir", Path(evaluation.output_dir) / name, overwrite=evaluation.overwrite_output_dir)


def finished_files(directory: Path) -> list[Path]:
    """The files that a finished run has left in the directory: results and the model."""
    return [path for pattern in (*RESULTS, *_WEIGHTS) for path in sorted(directory.glob(pattern))]


def check_not_there(flag: str, file: str | Path, *, overwrite: bool) -> None:
    """Raises `InputError` if the file exists and must not be overwritten, or cannot be written."""
    if Path(file).exists() and not overwrite:
        raise InputError(f"{flag} {file} exists: name another file, or write over it with --overwrite_output_dir.")
    check_writable(flag, Path(file).parent)


def check_writable(flag: str, directory: Path) -> None:
    """Raises `InputError` if no file can be written in the directory, or in the place where it is to be made."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"0" * 4096)
            probe.flush()
    except OSError as error:
        raise InputError(
            f"{flag} {directory} cannot be written to ({error.strerror}): name another place, or make room."
        ) from error


@contextmanager
def leaves_no_empty_directory(output_dir: str | Path) -> Iterator[None]:
    """Within it, an error, or a stop, removes the output directory, which Trainer makes when it is built.

    Some errors appear only with a loaded model, or when the reward is first called. A directory that existed before,
    or is not empty, is kept.
    """
    directory = Path(output_dir)
    new_directories = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty, or was never made
            for place in new_directories:
                place.rmdir()
        raise


@contextmanager
def held_alone(output_dir: str | Path, *, flag: str = "--output_dir") -> Iterator[None]:
    """Within it no other command that does the same writes into the directory, which is made if it can be.

    The operating system lets go of it when the process ends, however it does. A new directory that stays empty is
    removed, as by `leaves_no_empty_directory`. Windows has no such locks, nor have some network file systems, and
    others keep them to one machine.

    Raises:
        InputError: Another command has held the directory for ten seconds.
    """
    from rlkd_trl.trainers.processes import from_first_process

    def lock() -> list[int]:
        if not is_first_process():  # of several that are not connected
            return []
        with suppress(OSError):  # which is said when the directory is checked
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        return _lock(Path(output_dir), os.O_RDONLY, f"{flag} {output_dir}") if Path(output_dir).is_dir() else []

    locks = []
    with leaves_no_empty_directory(output_dir):
        try:
            from_first_process(lambda: locks.extend(lock()))
            yield
        finally:
            for opened in locks:
                os.close(opened)


@contextmanager
def part_held_alone(output: str | Path, *, overwrite: bool) -> Iterator[None]:
    """As `held_alone` for a file that is written under the name of its `part_of`, and renamed when it is whole.

    The part is made, and removed at the end if nothing was written. A command that has waited finds what the other one
    has made, and refuses to write over it, unless it is told to.
    """
    from rlkd_trl.teachers.pseudo_labels import part_of

    if not is_first_process():
        yield
        return
    part = part_of(output)
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        locks = _lock(part, os.O_RDWR | os.O_CREAT, f"--output {output}")
        if not locks or (part.exists() and os.fstat(locks[0]).st_ino == part.stat().st_ino):
            break
        os.close(locks[0])  # of a file that has been renamed in the meantime
    try:
        check_not_there("--output", output, overwrite=overwrite)
        yield
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()
        for opened in locks:
            os.close(opened)


def _lock(place: Path, mode: int, name: str) -> list[int]:
    """The opened file or directory with a lock on it; nothing where there are no locks."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return []
    opened, end = os.open(place, mode, 0o666), time.monotonic() + _SECONDS_TO_END
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return [opened]
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(opened)
                raise InputError(
                    f"{name} is in use by another command that writes there: wait for its end, or name another place."
                ) from None
            time.sleep(0.1)
        except OSError:  # the file system has none
            return [opened]


def clear_results(output_dir: str | Path, *, goes_on: bool) -> None:
    """Removes an earlier run's results when training begins; with `goes_on` its checkpoints are kept."""
    from rlkd_trl.trainers.checkpoint_files import STAGING, checkpoints_in

    if not is_first_process():
        return
    for name in RESULTS:
        (Path(output_dir) / name).unlink(missing_ok=True)
    if goes_on:
        return
    for directory in [*checkpoints_in(output_dir), Path(output_dir) / STAGING]:
        shutil.rmtree(directory, ignore_errors=True)


def checkpoint_to_resume(run: RunArguments, args: "TrainingArguments") -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names, or with `--resume` the newest complete one; else None.

    Newer checkpoints that are incomplete are skipped, with a line for each.

    Raises:
        InputError: There is none, the one that is named is incomplete, or both flags are given.
    """
    from rlkd_trl.trainers.checkpoint_files import defect_of, newest_whole
    from rlkd_trl.trainers.processes import from_first_process

    output_dir, named = args.output_dir, args.resume_from_checkpoint
    if named is not None:
        if run.resume:
            raise InputError(f"--resume and --resume_from_checkpoint {named} are two checkpoints: give one of them.")
        defect = from_first_process(lambda: defect_of(named))
        if defect is not None:
            raise InputError(
                f"--resume_from_checkpoint {named} is no checkpoint of a run to go on with: {defect}. --resume takes "
                "the newest whole one in --output_dir."
            )
        return named
    if not run.resume:
        return None
    newest, defects = from_first_process(lambda: newest_whole(output_dir))
    passed_over = [f"{path} is not whole ({defect})" for path, defect in defects.items()]
    if newest is None:
        raise InputError(
            f"--resume: there is no whole checkpoint in {output_dir}: {'; '.join(passed_over)}. Begin anew with "
            "--overwrite_output_dir."
            if passed_over
            else f"--resume: there is no checkpoint in {output_dir} to go on from. Begin without --resume, and save "
            "some with --save_steps."
        )
    for defect in passed_over:
        say(f"{defect}; going on from {newest}.")
    return str(newest)


def is_finished(checkpoint: str | None, args: "TrainingArguments") -> bool:
    """Whether a checkpoint's run has had all the steps that it should have, and left its results; prints that."""
    if checkpoint is None or not (Path(args.output_dir) / FINISHED).is_file():
        return False
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    step = state["global_step"]
    if args.max_steps > 0:
        all_steps = step >= args.max_steps
    else:
        all_steps = step >= state["max_steps"] and args.num_train_epochs <= state["num_train_epochs"]
    if not (all_steps or _budget_is_spent(args)):
        return False
    say(f"The run in {args.output_dir} is finished, after {step} steps: nothing is left to do.")
    return True


def mark_finished(output_dir: str | Path, step: int) -> None:
    """Writes a file into the directory that marks the run and its results as complete."""
    if is_first_process():
        (Path(output_dir) / FINISHED).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def _budget_is_spent(args: "TrainingArguments") -> bool:
    cost_file = Path(args.output_dir) / "cost.json"
    if not cost_file.is_file():
        return False
    cost = json.loads(cost_file.read_text(encoding="utf-8"))
    budgets = {"generated_tokens": "max_generated_tokens", "cpu_seconds": "max_cpu_seconds"}
    limits = {spent: getattr(args, limit, None) for spent, limit in budgets.items()}
    return any(limit is not None and cost[spent] >= limit for spent, limit in limits.items())
