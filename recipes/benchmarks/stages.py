"""The stages of a benchmark: recipes, each in a process that is forked from one with the libraries imported.

On a CPU the imports take as long as some tens of steps of a small model.
"""

import json
import multiprocessing
import os
import resource
import runpy
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent


def apart(function: Callable, *args: object, log: Path) -> None:
    """Calls the function in a process of its own, which has the libraries imported. Ends the script if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlkd_trl.trainers.encoder", "rlkd_trl.trainers.kd"])
    process = context.Process(target=_logged, args=(function, args, log))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{log.read_text(encoding='utf-8', errors='replace')[-4000:]}\n{log} ends with this.")


def _logged(function: Callable, args: Sequence[object], log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*args)


def call_recipe(recipe: str, flags: Sequence[str], seconds: Path) -> None:
    """`python recipes/RECIPE.py FLAGS` in this process; adds its CPU time, and that of its children, to a file."""
    sys.argv = [str(RECIPES / f"{recipe}.py"), *flags]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        with seconds.open("a", encoding="utf-8") as file:
            file.write(f"{time.process_time() + children.ru_utime + children.ru_stime:.1f}\n")


class Stages:
    """Runs recipes for a benchmark, each once: what is there already is not made again.

    work_dir: where the logs are kept, and what each stage took.
    """

    def __init__(self, work_dir: Path):
        self._logs = work_dir / "logs"
        self._seconds = work_dir / "cpu_seconds.txt"

    @property
    def cpu_seconds(self) -> float:
        """Of all stages, those of earlier calls and those that failed included."""
        lines = self._seconds.read_text(encoding="utf-8").split() if self._seconds.is_file() else []
        return sum(map(float, lines))

    def run(self, recipe: str, done: Path, *flags: object) -> None:
        """Runs a recipe unless its result is there.

        Raises:
            SystemExit: The recipe failed, or the result that is there was made with other flags.
        """
        if is_made(recipe, done, flags):
            return
        print(f"{time.strftime('%H:%M:%S')} {recipe} for {done}", flush=True)
        log = self._logs / f"{'_'.join(done.parts[-3:])}.txt"
        apart(call_recipe, recipe, [str(flag) for flag in flags] + begun_anew(flags), self._seconds, log=log)
        mark_made(recipe, done, flags)


def is_made(recipe: str, done: Path, flags: Sequence[object]) -> bool:
    """Whether a stage's result is there. Raises `SystemExit` if it was made with other flags."""
    if not done.exists():
        return False
    made_with, command = _record(done), _asked(recipe, flags)
    recorded = json.loads(made_with.read_text(encoding="utf-8")) if made_with.is_file() else command
    if recorded != command:
        raise SystemExit(
            f"{done} is of `{shlex.join(recorded)}`, and now `{shlex.join(command)}` is asked for: remove "
            f"{done.parent}, or choose another --work_dir."
        )
    return True


def begun_anew(flags: Sequence[object]) -> list[str]:
    """The flag with which a stage begins where another call of it was ended; none where nothing is."""
    words = [str(flag) for flag in flags]
    is_there = "--output_dir" in words and Path(words[words.index("--output_dir") + 1]).exists()
    return ["--overwrite_output_dir", "True"] if is_there else []


def mark_made(recipe: str, done: Path, flags: Sequence[object]) -> None:
    """Writes down with which flags a result was made."""
    _record(done).parent.mkdir(parents=True, exist_ok=True)
    _record(done).write_text(json.dumps(_asked(recipe, flags)) + "\n", encoding="utf-8")


def _record(done: Path) -> Path:
    return done.with_name(f"{done.name}.flags.json")


def _asked(recipe: str, flags: Sequence[object]) -> list[str]:
    return [recipe, *(str(flag).replace(str(RECIPES), "recipes") for flag in flags)]
