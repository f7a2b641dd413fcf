"""The page and the JSON of whole steps beside another library's: a part for each shape, which a later run replaces."""

import argparse
import json
import shutil
from pathlib import Path

from result_files import made_by, write_results
from workload import Shape

from rlkd_trl.evaluation.tables import markdown_table


def add_flags(parser: argparse.ArgumentParser, rival: str) -> None:
    """Adds the flags of a comparison. rival: the other library, with its version."""
    parser.add_argument("--versus", metavar="PYTHON", help=f"interpreter of an environment with {rival}")
    parser.add_argument("--rounds", type=int, default=1, help="with --versus: runs of each library, in turn")
    parser.add_argument(
        "--results_dir", type=Path, help="with --versus: where the page and the JSON are written; nowhere by default"
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with exit code 2 if a comparison could not be made, or not be written."""
    if args.results_dir and not args.versus:
        parser.error("--results_dir is for results beside another library's: give --versus too.")
    if args.results_dir and args.results_dir.exists() and not args.results_dir.is_dir():
        parser.error(f"--results_dir {args.results_dir} is a file: name a directory.")
    if args.versus and shutil.which(args.versus) is None:
        parser.error(f"--versus {args.versus} is no program: name the interpreter of that environment.")


def add_result(
    directory: Path, name: str, title: str, shape: Shape, settings: dict[str, object], found: dict, rival: str
) -> None:
    """Writes `name`.json and `name`.md with these results, and those of other shapes and settings that are there.

    settings: what else makes a step, by its name. found: see `step_phases.compare`. rival: the key of the other
    library's results in it.
    """
    file = directory / f"{name}.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    heading = f"{shape.prompt_tokens}-token prompts, {shape.prompts} prompts × {shape.samples} samples"
    others = {"completion tokens": shape.completion_tokens, "words": shape.vocabulary, **settings}
    heading += f" ({', '.join(f'{name} {value}' for name, value in others.items())})"
    results[heading] = {**found, "made_by": made_by()}
    parts = [f"## {heading}\n\n{_part(result, rival)}" for heading, result in results.items()]
    about = "CPU seconds of one thread; medians over rounds in turn, of medians over each round's counted steps."
    write_results(directory, name, results, "\n".join([f"# {title}\n\n{about}\n", *parts]))


def _part(found: dict, rival: str) -> str:
    theirs, phases = found[rival], found["phases"]
    floors = {name: phase["cpu_seconds"] / phase["floor_ratio"] for name, phase in phases.items()}
    rows = []
    for name, phase in phases.items():
        seconds = (theirs["phases"][name]["cpu_seconds"], phase["cpu_seconds"])
        rows.append([name, *seconds, found["times_faster_by_phase"][name], floors[name], phase["floor_ratio"]])
    floor, seconds = sum(floors.values()), (theirs["total_cpu_seconds"], found["total_cpu_seconds"])
    rows.append(["step", *seconds, found["times_faster"], floor, found["total_cpu_seconds"] / floor])
    cells = [[name, *(f"{value:.2f}" for value in values)] for name, *values in rows]
    library = f"TRL {theirs['versions']['trl']}"
    heads = ["phase", f"{library}, CPU s", "ours, CPU s", "times faster", "matmul floor, CPU s", "ours over it"]
    pairs = {name: (found[name], theirs[name]) for name in ("peak_mib", "extra_mib", "matmul_gflop_per_cpu_second")}
    peak, extra, rate = ([f"{value:.0f}" for value in pair] for pair in pairs.values())
    steps = [
        f"{min(run):.2f} to {max(run):.2f}" for run in (found["cpu_seconds_of_steps"], theirs["cpu_seconds_of_steps"])
    ]
    return f"""{markdown_table(heads, cells)}

- Single steps: ours {steps[0]}, theirs {steps[1]}.
- Peak memory: {peak[0]} MiB, theirs {peak[1]} (ratio {found["peak_memory_ratio"]:.3f}); above what was resident with
  the models loaded {extra[0]} and {extra[1]} ({found["extra_memory_ratio"]:.2f}).
- Large matrix products: {rate[0]} GFLOP per CPU second, {rate[1]} in their process, with transformers
  {theirs["versions"]["transformers"]}.
- {found["made_by"]}
"""
