"""Where a benchmark's results go, and how they are written."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rlkd_trl.commands.comparison.statistics import mean_interval

RESULTS = Path(__file__).resolve().parent / "results"
REMARKS = re.compile(r"^## Remarks[ \t]*$.*", re.MULTILINE | re.DOTALL)


def made_by() -> str:
    """A sentence with the command that is running, the commit that it is of where this is a clone, and versions.

    The commit ends in -dirty where files differ from it, except results, or are not in it.
    """
    commit = ""
    if shutil.which("git"):
        commit = _git("rev-parse", "--short", "HEAD")
        if commit and _git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS}"):
            commit += "-dirty"
    versions = " and ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return f"Made by `python {shlex.join(sys.argv)}`{f', commit {commit}' if commit else ''}, with {versions}."


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(RESULTS.parent), *words], capture_output=True, text=True).stdout.strip()


def write_results(directory: str | Path, name: str, results: object, text: str) -> None:
    """Writes `name`.json and `name`.md into the directory, and prints the text.

    A page that is there keeps its section `## Remarks`, the last one, which people write.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = directory / f"{name}.md"
    remarks = REMARKS.search(page.read_text(encoding="utf-8")) if page.is_file() else None
    page.write_text(f"{text}\n{remarks[0]}" if remarks else text, encoding="utf-8")
    print(text)


def over_seeds(count: int) -> str:
    """A sentence that says what `shown` shows of so many seeds."""
    if count == 1:
        return "One seed."
    return f"Mean ± half-width of the 95 % interval over {count} seeds, differences paired by seed."


def shown(values: Sequence[float], form: str) -> str:
    """Mean over seeds ± half-width of its 95 % interval, which has no sign; the mean alone of one value."""
    mean, half_width = mean_interval(values)
    return format(mean, form) + ("" if half_width is None else f" ± {half_width:{form.lstrip('+')}}")
