r"""How a step's cost grows: CPU seconds and memory of each phase against one size at a time, T5 and decoder-only.

    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/growth.py

Each cell is a whole step of `step.py` (PPO, T5) or `decoder_step.py` (RLOO, Qwen2's form), in a process of its own,
with all completions in one update and without a KL penalty. Sizes are prompt tokens S, completion tokens T, samples
K, vocabulary V and the teacher's layers; the others are those of the base, 8 prompts of 64 tokens with 4 completions
of 32 each and V = 8192. Seconds are the median of `--steps` steps, in one thread, after one that does not count; extra
memory of a phase is how far the resident set rises in it, from where it was when the phase began and what earlier ones
had freed was given back. An exponent is the slope of log over log by least squares: 1 grows in proportion, 0 does not
grow. Linux with glibc only. Writes `growth.json` and `growth.md` to `--results_dir`.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import decoder_step
import step
import torch
from result_files import RESULTS, made_by, write_results
from workload import DECODER_TEACHER, TEACHER, Dimensions, Shape

from rlkd_trl.evaluation.tables import markdown_table, number

BASE = Shape(prompt_tokens=64, completion_tokens=32, prompts=8, samples=4)
SIZES = {
    "prompt_tokens": [64, 128, 256, 512],
    "completion_tokens": [16, 32, 64, 128],
    "samples": [2, 4, 8, 16],
    "vocabulary": [8192, 32768, 131072],
    "teacher_layers": [4, 8, 16],
}
FAMILIES = {"t5": (step, TEACHER), "decoder_only": (decoder_step, DECODER_TEACHER)}
PHASES = {"generate": "sampling", "score": "scoring", "update": "update"}


def of_size(family: str, base: Shape, name: str, value: int) -> tuple[Shape, Dimensions]:
    """The shape of a step and its teacher, with one size changed."""
    teacher = FAMILIES[family][1]
    if name == "teacher_layers":
        return base, replace(teacher, layers=value)
    return replace(base, **{name: value}), teacher


def measure(family: str, shape: Shape, teacher: Dimensions, steps: int) -> dict[str, dict[str, float]]:
    """Seconds and extra memory of each phase, in this process, which must not have trained before."""
    script = FAMILIES[family][0]
    with tempfile.TemporaryDirectory() as output_dir:
        trainer, meter = script.measured_trainer(shape, steps + 1, shape.completions, 0.0, output_dir, teacher)
        meter.trims = True
        trainer.train()
    return {
        phase: {
            "cpu_seconds": statistics.median(step[phase] for step in meter.steps[1:]),
            "extra_mib": meter.extra_mib[phase],
        }
        for phase in PHASES
    }


def measure_in_child(family: str, shape: Shape, teacher: Dimensions, steps: int) -> dict[str, dict[str, float]]:
    request = {"family": family, "shape": asdict(shape), "teacher": asdict(teacher), "steps": steps}
    command = [sys.executable, __file__, "--measure", json.dumps(request)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{request} failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log value over log size; NaN where a value is 0."""
    if min(values) <= 0:
        return math.nan
    x, y = ([math.log(v) for v in series] for series in (sizes, values))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def grow(family: str, base: Shape, sizes: dict[str, list[int]], steps: int) -> dict[str, list[dict]]:
    """For each size the phases at each of its values; a step that belongs to several sizes is measured once."""
    done: dict[tuple[Shape, Dimensions], dict] = {}
    found = {}
    for name, values in sizes.items():
        found[name] = []
        for value in values:
            key = of_size(family, base, name, value)
            if key not in done:
                done[key] = measure_in_child(family, *key, steps)
                print(json.dumps({"family": family, name: value, **done[key]}), flush=True)
            found[name].append({"size": value, **done[key]})
    return found


def table(grown: dict[str, list[dict]]) -> str:
    """A line for each size and phase: seconds and extra memory at each value, and their exponents."""
    rows = []
    for name, points in grown.items():
        for phase, label in PHASES.items():
            seconds, mib = ([point[phase][measure] for point in points] for measure in ("cpu_seconds", "extra_mib"))
            cells = [
                f"{point['size']}: {s:.2f} s, {m:.0f} MiB" for point, s, m in zip(points, seconds, mib, strict=True)
            ]
            sizes = [point["size"] for point in points]
            slopes = [number(exponent(sizes, values), ".2f") for values in (seconds, mib)]
            rows.append([name.replace("_", " "), label, " · ".join(cells), *slopes])
    return markdown_table(["size", "phase", "CPU seconds and extra memory at each", "exponent of s", "of MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=2, help="that count, after one that does not")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        request = json.loads(args.measure)
        shape, teacher = Shape(**request["shape"]), Dimensions(**request["teacher"])
        print(json.dumps(measure(request["family"], shape, teacher, request["steps"])))
        return
    sizes = {name: SIZES[name] for name in args.sizes}
    grown = {family: grow(family, BASE, sizes, args.steps) for family in args.families}
    parts = "".join(f"## {family}\n\n{table(of_family)}\n\n" for family, of_family in grown.items())
    text = f"# How a step's cost grows\n\n{parts}{made_by()}\n"
    write_results(args.results_dir, "growth", {"base": asdict(BASE), **grown}, text)


if __name__ == "__main__":
    main()
