r"""What the recipes import before their first line of output, and what CPU time has passed by then.

    python recipes/benchmarks/startup.py

Each command runs once as it is, for its CPU seconds, and once under `python -X importtime`, for its imports; it is
stopped at its first line, of stdout or stderr. A package's seconds are those of its own modules, without what these
import. Writes startup.json and startup.md.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from result_files import RESULTS, made_by, write_results

RECIPES = Path(__file__).resolve().parents[1]
# What is started -> its command; the demos say something before they train anything.
COMMANDS = {
    "help": "ppo_kd --help",
    "all flags": "ppo_kd --help_all",
    "an input error": "ppo_kd --dataset nowhere.csv --teacher t --student s",
    "PPO": "ppo_kd --output_dir out",
    "KD": "kd --output_dir out",
    "encoders": "encoder_kd --output_dir out",
    "a comparison": "compare --smoke --output_dir out",
}
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
_SMALL = 0.05  # seconds; packages below are summed up


def until_first_line(words: list[str], *options: str) -> tuple[str, float, list[str]]:
    """The first line that is no import's, the CPU seconds until then, and the lines on imports before it."""
    command = [sys.executable, "-u", *options, str(RECIPES / f"{words[0]}.py"), *words[1:]]
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        imports = []
        for line in process.stdout:
            if not line.startswith("import time:"):
                break
            imports.append(line)
        seconds = _cpu_seconds(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return line.strip(), seconds, imports


def _cpu_seconds(process: int) -> float:
    """Of a process that has not been waited for, from Linux's tables."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds_by_package(lines: Iterable[str]) -> dict[str, float]:
    """Of modules' own seconds, the largest first; the standard library and small packages in a sum each."""
    seconds = Counter()
    for line in lines:
        if found := _IMPORT.match(line):
            package = found.group(2).partition(".")[0]
            seconds["the standard library" if package in sys.stdlib_module_names else package] += int(found.group(1))
    large = {name: value / 1e6 for name, value in seconds.most_common() if value / 1e6 >= _SMALL}
    return {**large, "others": sum(seconds.values()) / 1e6 - sum(large.values())}


def text_of(results: dict[str, dict]) -> str:
    lines = ["# Start-up", "", made_by(), ""]
    lines += [
        "| | command | first line | CPU s | modules | imports by package, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        packages = ", ".join(f"{package} {value:.2f}" for package, value in found["packages"].items())
        line = f"| {name} | `{COMMANDS[name]}` | {found['first_line'][:60]} | {found['cpu_seconds']:.2f} "
        lines.append(f"{line}| {found['modules']} | {packages} |")
    return "\n".join(lines) + "\n"


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
            "packages": seconds_by_package(imports),
        }
    write_results(args.results_dir, "startup", results, text_of(results))


if __name__ == "__main__":
    main()
