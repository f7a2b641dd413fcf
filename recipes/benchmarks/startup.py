r"""What the recipes import before their first line of output, and what CPU time has passed by then.

    python recipes/benchmarks/startup.py

Each command runs once as it is, for its CPU seconds, those of the processes that it has started among them, and once
under `python -X importtime`, for its own imports; it is stopped at its first line, of stdout or stderr. A package's
share is that of its own modules, without what these import, in the time of all imports. Writes startup.json and
startup.md.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
from result_files import RESULTS, made_by, write_results

from rlkd_trl.evaluation.tables import markdown_table

RECIPES = Path(__file__).resolve().parents[1]
# What is started -> its command; the demos say something before they train anything.
COMMANDS = {
    "help": "ppo_kd --help",
    "all flags": "ppo_kd --help_all",
    "an input error": "ppo_kd --dataset nowhere.csv --teacher t --student s",
    "PPO": "ppo_kd --output_dir out",
    "encoders": "encoder_kd --output_dir out",
    "a comparison": "compare --smoke --output_dir out",
}
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
_SMALL = 0.02  # of all; packages below are summed up


def until_first_line(words: list[str], *options: str) -> tuple[str, float, list[str]]:
    """The first line that is no import's, the CPU seconds until then, and the lines on imports before it.

    Paths in the directory where the command runs are relative.
    """
    command = [sys.executable, "-u", *options, str(RECIPES / f"{words[0]}.py"), *words[1:]]
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        imports = []
        for line in process.stdout:
            if not line.startswith("import time:"):
                break
            imports.append(line)
        seconds = 0.0
        for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
                seconds += sum(member.cpu_times()[:2])
                member.kill()
        process.wait()
    return line.strip().replace(f"{directory}/", ""), seconds, imports


def shares_by_package(lines: Iterable[str]) -> dict[str, float]:
    """Of modules' own times, the largest first; the standard library and small packages in a sum each."""
    times = Counter()
    for line in lines:
        if imported := _IMPORT.match(line):
            package = imported.group(2).partition(".")[0]
            times["the standard library" if package in sys.stdlib_module_names else package] += int(imported.group(1))
    large = {name: time / times.total() for name, time in times.most_common() if time / times.total() >= _SMALL}
    return {**large, "others": 1 - sum(large.values())}


def text_of(results: dict[str, dict]) -> str:
    rows = []
    for name, measures in results.items():
        packages = ", ".join(f"{package} {value:.0%}" for package, value in measures["packages"].items())
        seconds = f"{measures['cpu_seconds']:.2f}"
        rows.append(
            [name, f"`{COMMANDS[name]}`", measures["first_line"][:60], seconds, str(measures["modules"]), packages]
        )
    heads = ["", "command", "first line", "CPU s", "modules", "imports by package"]
    return f"# Start-up\n\n{made_by()}\n\n{markdown_table(heads, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="of the commands")
    parser.add_argument("--results_dir", default=RESULTS)
    args = parser.parse_args()
    results = {}
    for name in args.only:
        first_line, seconds, _ = until_first_line(COMMANDS[name].split())
        _, _, imports = until_first_line(COMMANDS[name].split(), "-X", "importtime")
        results[name] = {
            "command": COMMANDS[name],
            "first_line": first_line,
            "cpu_seconds": seconds,
            "modules": len(imports),
            "packages": shares_by_package(imports),
        }
    write_results(args.results_dir, "startup", results, text_of(results))


if __name__ == "__main__":
    main()
