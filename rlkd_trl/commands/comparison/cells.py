"""The training runs of a comparison: which methods there are, one directory for each run, run once, in parallel."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from rlkd_trl.commands.files_read import FileDigests
from rlkd_trl.commands.presets import read_preset
from rlkd_trl.commands.run_directory import FINISHED
from rlkd_trl.errors import InputError
from rlkd_trl.trainers.checkpoint_files import newest_whole

_RESULTS = ("metrics.json", "cost.json", FINISHED)
_STDERR_LINES = 15  # of a failed run, shown


THEN = "+"  # between methods of which each goes on from what the one before has made


@dataclass(frozen=True)
class Method:
    """A preset of a recipe: `recipe` is the script, `preset` the YAML file.

    before: the method whose student this one begins with; without one it is the warm start.
    """

    name: str
    recipe: Path
    preset: Path
    before: "Method | None" = None

    @property
    def parts(self) -> list["Method"]:
        """The methods that follow one another, this one the last."""
        return [*(self.before.parts if self.before is not None else []), self]

    def settings(self) -> dict:
        """What the preset holds for the recipe. Raises `InputError` as `read_preset`."""
        return read_preset(self.preset).values_for(self.recipe.stem)


@dataclass(frozen=True)
class Cell:
    """One training run: a method with these flags, in its own directory. A finished one is not run again.

    `digests` are shared by the cells of a comparison, so that each file is read once. before: the run whose student
    this one begins with, which `flags` do not name then.
    """

    method: Method
    directory: Path
    flags: tuple[str, ...]
    digests: FileDigests
    before: "Cell | None" = None

    @property
    def is_done(self) -> bool:
        """It has all its results, and so have those before it."""
        return all(part.has_results for part in self.parts)

    @property
    def has_results(self) -> bool:
        """It has left all its results, and found them sound: the last of these files says so."""
        return all((self.directory / name).is_file() for name in _RESULTS)

    @property
    def parts(self) -> list["Cell"]:
        """The runs that follow one another, this one the last."""
        return [*(self.before.parts if self.before is not None else []), self]

    def read(self, name: str) -> dict:
        """The content of one of the JSON files that the run left."""
        return json.loads((self.directory / name).read_text(encoding="utf-8"))

    def cost(self) -> dict[str, float]:
        """What the run, and those before it, have cost."""
        cost = self.read("cost.json")
        if self.before is None:
            return cost
        cost_before = self.before.cost()
        return {name: cost_before[name] + value for name, value in cost.items()}

    def record(self) -> dict:
        """What makes the run what it is, all but its place, in JSON's types: its command and digests of its inputs.

        Of a student that a run before has made, that run's record.
        """
        preset, flags = self.method.settings(), _by_name(self.flags)
        of_preset = {f"--{name}": value if isinstance(value, list) else [value] for name, value in preset.items()}
        record = {
            "recipe": self.method.recipe.name,
            "preset": preset,
            "flags": {name: " ".join(words) for name, words in flags.items()},
            "files": self.digests.of_flags({**of_preset, **flags}),
        }
        if self.before is not None:
            record["before"] = self.before.record()
        return json.loads(json.dumps(record, default=str))

    def words(self, *, goes_on: bool) -> list[str]:
        """The recipe's command line. goes_on: from the run's own checkpoint."""
        begin = "--resume" if goes_on else "--overwrite_output_dir"
        student = [] if self.before is None else ["--student", str(self.before.directory)]
        return ["--config", str(self.method.preset), *self.flags, *student, begin, "--output_dir", str(self.directory)]

    def check(self) -> None:
        """Raises `InputError` if the directory holds the results of another command, or of other files."""
        record = self.record()  # of every cell: the digests are taken here, before anything runs
        if not self.has_results:
            return
        recorded = self.read("command.json") if (self.directory / "command.json").is_file() else {}
        recorded.setdefault("files", {})
        if recorded != record:
            raise InputError(
                f"{self.directory} holds the results of {_first_difference(recorded, record)}. "
                "Give another --output_dir, undo the change, or delete the directory."
            )

    def run(self, environment: dict[str, str], running: "RunningProcesses") -> str | None:
        """Runs the recipe in a process of its own; None, or the end of its stderr if it failed.

        The run before it, if there is one, must be done.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        # A run that breaks off must not look finished by what an earlier one left.
        for name in _RESULTS:
            (self.directory / name).unlink(missing_ok=True)
        command, record = self.directory / "command.json", json.dumps(self.record(), indent=2) + "\n"
        # What an earlier attempt at the same run has saved is its beginning.
        was_begun = command.is_file() and command.read_text(encoding="utf-8") == record
        goes_on = was_begun and newest_whole(self.directory)[0] is not None
        command.write_text(record, encoding="utf-8")
        words = [sys.executable, str(self.method.recipe), *self.words(goes_on=goes_on)]
        stderr = self.directory / "stderr.txt"
        with (self.directory / "stdout.txt").open("w") as out, stderr.open("w") as err:
            code = running.run(words, stdout=out, stderr=err, env=environment)
        if code == 0 and self.has_results:
            return None
        tail = "\n".join(stderr.read_text(encoding="utf-8", errors="replace").splitlines()[-_STDERR_LINES:])
        missing = "" if code else " without leaving all its results"
        return f"{self.method.recipe.name} ended with exit code {code}{missing}:\n{tail}"


class RunningProcesses:
    """Processes that several threads wait for, and that are told to end together."""

    def __init__(self):
        self._lock, self._processes, self._is_ending = threading.Lock(), [], False

    def run(self, words: Sequence[str], **kwargs) -> int:
        """Runs a command and returns its exit code; one that comes too late is not begun, as if it had been ended."""
        with self._lock:
            if self._is_ending:
                return -signal.SIGTERM
            process = subprocess.Popen(words, **kwargs)
            self._processes.append(process)
        return process.wait()

    def end(self) -> None:
        """SIGTERM to all, and waits until they have ended.

        Not through their threads: of one that was just being started when a signal came, its pool does not know.
        """
        with self._lock:
            self._is_ending = True
            for process in self._processes:
                process.terminate()
        for process in self._processes:
            process.wait()


def run_cells(cells: Sequence[Cell], jobs: int, *, until: float = math.inf) -> dict[Path, str]:
    """Runs those that are not done, `jobs` at a time; why each failed one did, by directory.

    Several at a time get one thread each (OMP_NUM_THREADS=1): with more they would wait for each other. None is begun
    after `until`, a reading of `time.monotonic`; those are neither done nor failed. A signal to stop is passed on.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if jobs > 1 else dict(os.environ)
    failures, running = {}, RunningProcesses()
    executor = ThreadPoolExecutor(jobs)

    def run_in_time(cell: Cell) -> tuple[bool, str | None]:
        """Whether there was time for it and what comes before it, and why it failed, if it did."""
        for part in cell.parts:
            if part.is_done:
                continue
            if time.monotonic() >= until:
                return False, None
            failure = part.run(environment, running)
            if failure is not None:
                return True, failure if part is cell else f"{part.directory}: {failure}"
        return True, None

    try:
        waiting = {executor.submit(run_in_time, cell): cell for cell in cells if not cell.is_done}
        for number, future in enumerate(as_completed(waiting), start=1):
            cell, (was_in_time, failure) = waiting[future], future.result()
            if not was_in_time:
                continue
            state = "done" if failure is None else f"FAILED: {failure}"
            print(f"[{number}/{len(waiting)}] {cell.directory}: {state}", flush=True)
            if failure is not None:
                failures[cell.directory] = failure
    except BaseException:  # after an interruption none is begun; those that run save what they have
        executor.shutdown(wait=False, cancel_futures=True)
        running.end()
        raise
    finally:
        executor.shutdown()
    return failures


def find_method(name: str, recipes: Path) -> Method:
    """A method by its name among `recipes/configs/methods/<recipe>/`, or by a path to a YAML file in such a directory.

    Several with `THEN` between them follow one another: the last one is returned, the others stand before it.

    Raises:
        InputError: There is no such preset, or several, or its directory is not named for a recipe.
    """
    names = [name] if Path(name).is_file() else name.split(THEN)
    parts = [_find_preset(part, recipes) for part in names]
    method = parts[0]
    for part in parts[1:]:
        method = replace(part, name=f"{method.name}{THEN}{part.name}", before=method)
    return method


def _find_preset(name: str, recipes: Path) -> Method:
    if Path(name).suffix in (".yaml", ".yml"):
        preset = Path(name)
        if not preset.is_file():
            raise InputError(f"--methods {name}: there is no such file.")
    else:
        presets = shipped_presets(recipes)
        presets_of_name = [preset for preset in presets if preset.stem == name]
        if not presets_of_name:
            names = ", ".join(preset.stem for preset in presets)
            raise InputError(f"--methods {name}: no such method; give one of {names}, or the path of a YAML file.")
        if len(presets_of_name) > 1:
            raise InputError(
                f"--methods {name}: there are several; give a path: {', '.join(map(str, presets_of_name))}."
            )
        (preset,) = presets_of_name
    recipe = recipes / f"{preset.resolve().parent.name}.py"
    if not recipe.is_file():
        raise InputError(f"{preset}: its directory is to be named for a recipe, and there is no {recipe}.")
    return Method(preset.stem, recipe, preset)


def shipped_presets(recipes: Path) -> list[Path]:
    """The method presets beside the recipes."""
    return sorted((recipes / "configs" / "methods").glob("*/*.yaml"))


def _first_difference(recorded: dict, record: dict) -> str:
    """The first difference of two runs' records in words: "another command: it had --seed 1, now --seed 2"."""
    for key in ("recipe", "preset"):
        if recorded.get(key) != record[key]:
            return f"another command: its {key} was {recorded.get(key)}, now {record[key]}"
    if (of_before := recorded.get("before")) != record.get("before"):
        if of_before is None or "before" not in record:
            return "another command: one of the two begins with what another run has made"
        return _first_difference(of_before, record["before"])
    old, new = recorded["flags"], record["flags"]
    if old != new:
        name = next(name for name in {**old, **new} if old.get(name) != new.get(name))
        was, now = (f"{name} {flags[name]}" if name in flags else f"no {name}" for flags in (old, new))
        return f"another command: it had {was}, now {now}"
    old, new = recorded.get("files", {}), record["files"]
    name = next(name for name in {**old, **new} if old.get(name) != new.get(name))
    return f"other files, {name}: " + (
        "its files have changed since" if name in old else "its record has none of them"
    )


def _by_name(flags: Sequence[str]) -> dict[str, list[str]]:
    """["--seed=1", "--teacher", "a", "b"] -> {"--seed": ["1"], "--teacher": ["a", "b"]}; the last of a name counts."""
    values: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            values[name] = [value] if value else []
        else:
            values[name].append(word)
    return values
