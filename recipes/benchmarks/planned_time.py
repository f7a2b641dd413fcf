r"""The planner's seconds of a step against measured ones, on this CPU.

    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/planned_time.py

The planner takes a GPU's rates from a table. Here they are measured on one CPU thread instead, before and after each
step: matrix products, copies of a large block, and what Python and dispatch take of an operation on almost nothing, in
a model of the same class. Nothing is fitted to the steps, which are those of `step.py`: PPO on random T5 models with
a penalty on the KL to the initial student, in float32. Seconds are of CPU time, medians over steps. What the planner
plans is a GPU's step: with fused attention, logits in a GPU's slices, and one optimizer step where these have several.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from result_files import RESULTS, made_by, write_results
from workload import STUDENT, TEACHER, Dimensions, MatmulRate, Shape, random_t5, t5_config

from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.planning.activations import Workload, counted
from rlkd_trl.planning.durations import StepSeconds, step_seconds
from rlkd_trl.planning.estimates import Cluster, Training, student_estimates, teacher_estimates
from rlkd_trl.planning.machines import Machine
from rlkd_trl.planning.skeletons import Checkpoint

UPDATE_BATCH = 16
SHAPES = [
    Shape(64, 32, 16, 4),
    Shape(256, 32, 8, 8),
    Shape(32, 64, 16, 4),
    Shape(128, 16, 16, 4),
    Shape(256, 64, 4, 4),
]
TINY = Dimensions(d_model=8, d_ff=8, heads=1, layers=4, d_kv=8)
BLOCK = 2**26  # bytes to copy, more than caches hold


def cpu_seconds(work: Callable[[], object], repetitions: int) -> float:
    """Of one call: the median over `repetitions`, after one that does not count."""
    work()
    found = []
    for _ in range(repetitions):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return statistics.median(found)


def this_machine() -> Machine:
    """One thread of this CPU."""
    rate = MatmulRate()
    rate.measure()
    source, target = torch.zeros(BLOCK // 4), torch.zeros(BLOCK // 4)
    copying = cpu_seconds(lambda: target.copy_(source), 9)
    model, ids = random_t5(TINY, vocabulary=16, seed=0).eval(), torch.zeros(1, 1, dtype=torch.long)
    operations = []

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, decoder_input_ids=ids)

    with counted([], False, operations):
        forward()
    return Machine(
        memory_gib=0.0,
        float32=rate.per_second,
        bfloat16=rate.per_second,
        bandwidth=2 * BLOCK / copying,
        link=1.0,
        bus=1.0,
        seconds_per_operation=cpu_seconds(forward, 29) / len(operations),
    )


def planned(shape: Shape, machine: Machine) -> StepSeconds:
    workload = Workload(
        prompt_tokens=shape.prompt_tokens,
        completion_tokens=shape.completion_tokens,
        num_generations=shape.samples,
        micro_batch=UPDATE_BATCH,
        micro_batches=shape.completions // UPDATE_BATCH,
        teacher_batch_tokens=16384,
    )
    cluster = Cluster(gpus=1, nodes=1, gpu_memory=2**40, reserve=0.0)
    of_teacher, of_student = (Checkpoint(t5_config(model, shape.vocabulary), False) for model in (TEACHER, STUDENT))
    teacher = next(t for t in teacher_estimates(of_teacher, workload, cluster) if t.precision == "float32")
    (student,) = student_estimates(of_student, workload, cluster, Training(beta=0.05))
    return step_seconds(teacher, student, workload, cluster, machine)


def measured(shape: Shape, steps: int) -> dict[str, float]:
    """CPU seconds of `step.py`'s phases, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("step.py")), *shape.flags(), "--steps", str(steps)]
    command += ["--update_batch_size", str(UPDATE_BATCH)]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if finished.returncode:
        raise SystemExit(finished.stderr[-4000:])
    phases = json.loads(finished.stdout.splitlines()[-1])["phases"]
    return {name: phase["cpu_seconds"] for name, phase in phases.items()}


def table(rows: list[dict]) -> str:
    """Measured and planned seconds of each phase, and planned over measured."""
    lines = []
    for row in rows:
        plan, measured_seconds = row["planned"], row["measured"]
        of_phase = {
            "generate": plan["sampling"],
            "score": plan["scoring"],
            "update": plan["log_probs"] + plan["update"],
        }
        cells = [f"{measured_seconds[name]:.2f} / {of_phase[name]:.2f}" for name in of_phase]
        total, expected = sum(measured_seconds[name] for name in of_phase), sum(of_phase.values())
        name = "S={prompt_tokens} T={completion_tokens} P={prompts} K={samples}".format(**row["shape"])
        lines.append([name, *cells, f"{total:.2f} / {expected:.2f}", f"{expected / total:.2f}"])
    return markdown_table(["shape", "generate", "score", "update", "step", "planned over measured"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES[: args.shapes]:
        before = this_machine()
        seconds = measured(shape, args.steps)
        after = this_machine()
        machine = Machine(**{name: (value + asdict(after)[name]) / 2 for name, value in asdict(before).items()})
        row = {"shape": asdict(shape), "measured": seconds, "planned": asdict(planned(shape, machine))}
        rows.append({**row, "machine": asdict(machine)})
        print(json.dumps(rows[-1]), flush=True)
    rates = [row["machine"] for row in rows]
    text = f"""# The planner's time against measured steps

Measured / planned CPU seconds, one thread, {args.steps} counted steps of each shape.

{table(rows)}

The machine, measured around each step: {_span(rates, "float32", 1e9)} GFLOP and {_span(rates, "bandwidth", 1e9)} GB
per second, {_span(rates, "seconds_per_operation", 1e-6)} µs an operation. {made_by()}
"""
    write_results(args.results_dir, "planned_time", rows, text)


def _span(rates: list[dict], name: str, unit: float) -> str:
    values = [rate[name] / unit for rate in rates]
    return f"{min(values):.3g} to {max(values):.3g}"


if __name__ == "__main__":
    main()
