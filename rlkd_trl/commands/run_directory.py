"""What a command may write over, and the checkpoint from which it goes on."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import RunArguments
from rlkd_trl.commands.files_read import FILES_OF
from rlkd_trl.commands.launched import say
from rlkd_trl.errors import InputError, TrainingError, is_first_process
from rlkd_trl.settings.files import INHERITED, files_read, places_written

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from rlkd_trl.commands.settings import EvaluationSettings

FINISHED = "finished.json"  # written last
RESULTS = (FINISHED, "metrics.json", "cost.json", "report.html", "outputs.jsonl")
_WEIGHTS = ("model*.safetensors", "adapter_model.*", "pytorch_model*.bin")


def check_apart(groups: Sequence[object], preset: Path | None) -> None:
    """No input is the output: what a command's flags read is neither at a place that they write, nor in or around it.

    Every command is parsed through this. Links are followed. A file may lie in an output directory, unless results
    have its name.

    Args:
        groups: The command's flags, one object of a dataclass for each group.
        preset: The YAML file that some of them were read from.

    Raises:
        InputError: It is; both flags are named.
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
        is_in = written_at in place.parents and (path.is_dir() or path.name in RESULTS)
        if is_same or is_around or is_in:
            relation = "is" if is_same else "lies in" if is_around else "holds"
            raise InputError(
                f"{flag} {output} {relation} what {name} reads, which would be overwritten: name another place for "
                "the output."
            )


def _inputs(groups: Sequence[object]) -> Iterator[tuple[str, Path]]:
    """Flag with value, and path, of all that is read: directories as a whole, and single files."""
    for group in groups:
        for name, reads in files_read(type(group)).items():
            if name in INHERITED:  # a checkpoint in the run's own directory may be gone on from
                continue
            value = getattr(group, name) or []
            for text in [value] if isinstance(value, str) else value:
                path = Path(text).expanduser()
                paths = [path] if path.exists() else FILES_OF[reads](text)
                yield from ((f"--{name} {text}", path) for path in paths)


def check_free(output_dir: str, run: RunArguments, args: "TrainingArguments") -> None:
    """A new run does not begin where another one has been, unless told to; an input error leaves all as it was.

    Raises:
        InputError: There are results or checkpoints; `--output_dir` is a file, or cannot be written to; flags
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


def check_evaluation_directory(settings: "EvaluationSettings") -> None:
    """Raises `InputError` if `--output_dir` holds results that are to stay, or cannot be written."""
    output_dir, overwrite = settings.evaluation.output_dir, settings.evaluation.overwrite_output_dir
    if output_dir is None:
        return
    for name in ("metrics.json", "outputs.jsonl"):
        check_not_there("--output_dir", Path(output_dir) / name, overwrite=overwrite)


def finished_files(directory: Path) -> list[Path]:
    """The files that a finished run has left in the directory: results and the model."""
    return [path for pattern in (*RESULTS, *_WEIGHTS) for path in sorted(directory.glob(pattern))]


def check_not_there(flag: str, file: str | Path, *, overwrite: bool) -> None:
    """Raises `InputError` if the file is there and is not to be overwritten, or cannot be written."""
    if Path(file).exists() and not overwrite:
        raise InputError(f"{flag} {file} exists: name another file, or write over it with --overwrite_output_dir.")
    check_writable(flag, Path(file).parent)


def check_writable(flag: str, directory: Path) -> None:
    """Raises `InputError` if no file can be written in the directory, or where it is to be made."""
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
    """An input error that only a loaded model, or a reward's first call, brings to light leaves no directory behind.

    Trainer makes it when it is built; one that was there, or holds something, stays.
    """
    directory = Path(output_dir)
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        yield
    except (InputError, TrainingError):
        with suppress(OSError):  # it holds something, or is not there
            for place in made:
                place.rmdir()
        raise


def clear_results(output_dir: str | Path, *, goes_on: bool) -> None:
    """Removes the results of an earlier run, when training begins; its checkpoints too, unless it goes on from one."""
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
    """`--resume_from_checkpoint`, or the newest whole checkpoint in `--output_dir` if `--resume` asks for it.

    Newer ones that are not whole are named and passed over.

    Raises:
        InputError: There is none, the named one is not whole, or both are given.
    """
    from rlkd_trl.trainers.checkpoint_files import defect_of, newest_whole

    output_dir, named = args.output_dir, args.resume_from_checkpoint
    if named is not None:
        if run.resume:
            raise InputError(f"--resume and --resume_from_checkpoint {named} are two checkpoints: give one of them.")
        defect = defect_of(named)
        if defect is not None:
            raise InputError(
                f"--resume_from_checkpoint {named} is no checkpoint of a run to go on with: {defect}. --resume takes "
                "the newest whole one in --output_dir."
            )
        return named
    if not run.resume:
        return None
    newest, defects = newest_whole(output_dir)
    passed_over = [f"{path} is not whole ({defect})" for path, defect in defects.items()]
    if newest is None:
        raise InputError(
            f"--resume: there is no whole checkpoint in {output_dir}: {'; '.join(passed_over)}. Begin anew with "
            "--overwrite_output_dir."
            if passed_over
            else f"--resume: there is no checkpoint in {output_dir}; save some with --save_steps."
        )
    for defect in passed_over:
        say(f"{defect}; going on from {newest}.")
    return str(newest)


def is_finished(checkpoint: str | None, args: "TrainingArguments") -> bool:
    """Whether the run of a checkpoint has had all the steps that are asked for, and left its results; says so."""
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
    """Says in the directory that the run and its results are complete."""
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
