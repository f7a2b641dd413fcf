r"""What a cached teacher saves: memory, time and bytes of kd.py with a teacher, and with caches of it.

    OMP_NUM_THREADS=1 python recipes/benchmarks/teacher_cache.py --e2e ../data/e2e --work_dir runs/teacher_cache

Trains a T5 teacher from scratch on the first inputs of E2E's training data, and a small student's start with the same
tokenizer, then distils with the same seed from the teacher and from caches of its distributions along the references.
Each run is a process of its own: its peak of resident memory and its CPU time are those that the system counted, the
seconds per step those of the log's median, the divergence that of the first step (before anything differs), BLEU that
of greedy outputs on held-out inputs. With all ids a run should be the teacher's own. Linux; sizes are flags.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from result_files import RESULTS, made_by, write_results

from rlkd_trl.evaluation.tables import markdown_table

RECIPES = Path(__file__).resolve().parent.parent
COLUMNS = "--source_column mr --target_column ref"
HEADS = ["run", "cache MB", "making it, CPU s", "peak MiB", "CPU s", "s per step", "of it the teacher"]
HEADS += ["divergence", "BLEU"]


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", required=True, help="directory with train.csv")
    parser.add_argument("--work_dir", default="runs/teacher_cache")
    parser.add_argument("--results_dir", default=str(RESULTS))
    parser.add_argument("--inputs", type=int, default=300, help="training inputs")
    parser.add_argument("--teacher", default="--d_model 384 --num_layers 6 --num_heads 6 --vocab_size 1500")
    parser.add_argument("--student", default="--d_model 64 --num_layers 2 --num_heads 4")
    parser.add_argument("--teacher_steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_completion_length", type=int, default=64)
    parser.add_argument("--ids", type=int, nargs="+", default=[0, 64, 16, 4], help="ids in a cache; 0: all")
    return parser.parse_args()


def measured(*command: str) -> dict[str, float]:
    """Runs a recipe in a process of its own: peak MiB, CPU seconds and wall seconds."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, str(RECIPES / f"{command[0]}.py"), *" ".join(command[1:]).split()])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{command[0]}.py failed with code {process.returncode}.")
    return {
        "peak_mib": usage.ru_maxrss / 1024,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": time.monotonic() - began,
    }


def of_run(directory: Path, steps: int) -> dict[str, float]:
    """The first step's divergence, the median seconds of a step and of its teacher, and BLEU after training."""
    state = json.loads((directory / f"checkpoint-{steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    logs = [entry for entry in state["log_history"] if "divergence" in entry]
    phases = ("seconds/sample", "seconds/score", "seconds/update")
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    return {
        "divergence": logs[0]["divergence"],
        "step_seconds": statistics.median(sum(entry[phase] for phase in phases) for entry in logs),
        "score_seconds": statistics.median(entry["seconds/score"] for entry in logs),
        "bleu": metrics["after"]["bleu"],
    }


def line(name: str, run: dict[str, float], cache: dict[str, float] | None = None) -> list[str]:
    made = ["–", "–"] if cache is None else [f"{cache['bytes'] / 1e6:.2f}", f"{cache['cpu_seconds']:.1f}"]
    return [
        name,
        *made,
        f"{run['peak_mib']:.0f}",
        f"{run['cpu_seconds']:.1f}",
        f"{run['step_seconds']:.3f}",
        f"{run['score_seconds']:.4f}",
        f"{run['divergence']:.5f}",
        f"{run['bleu']:.1f}",
    ]


def main() -> None:
    options = flags()
    place, data = Path(options.work_dir), Path(options.e2e)
    texts = f"--dataset {data / 'train.csv'} {COLUMNS} --max_rows {options.inputs}"
    training = f"--per_device_train_batch_size {options.batch_size} --lr_scheduler_type constant --disable_tqdm True"
    cap = f"--max_completion_length {options.max_completion_length}"
    fresh = "--overwrite_output_dir True"
    measured("sft", f"{texts} {options.teacher} {training} {cap} --learning_rate 1e-3 {fresh}",
             f"--max_steps {options.teacher_steps} --output_dir {place / 'teacher'}")  # fmt: skip
    measured("sft", f"{texts} {options.student} --tokenizer {place / 'teacher'} {training} {cap} {fresh}",
             f"--learning_rate 2e-3 --max_steps {options.steps} --output_dir {place / 'start'}")  # fmt: skip
    common = (
        f"--student {place / 'start'} {texts} {training} {cap} {fresh} "
        f"--divergence forward_kl --learning_rate 2e-3 --max_steps {options.steps} --save_steps {options.steps} "
        "--logging_steps 1"
    )
    name = f"teacher_{options.teacher_steps}"
    results = {"flags": vars(options), "runs": {}, "caches": {}}
    run = measured("kd", f"--teacher {place / 'teacher'} {common} --output_dir {place / name}")
    results["runs"]["teacher"] = run | of_run(place / name, options.steps)
    lines = [line("with the teacher", results["runs"]["teacher"])]
    for k in options.ids:
        directory = place / f"cache_{k}"
        cache = measured(
            "cache_teacher", f"--teacher {place / 'teacher'} {texts} {cap} {fresh} --k {k} --output {directory}"
        )
        cache["bytes"] = sum(file.stat().st_size for file in directory.glob("shard-*"))
        run = measured("kd", f"--teacher_cache {directory} {common} --output_dir {place / f'cached_{k}'}")
        results["caches"][k], results["runs"][k] = cache, run | of_run(place / f"cached_{k}", options.steps)
        lines.append(line(f"cache, {k} ids" if k else "cache, all ids", results["runs"][k], cache))
    header = json.loads((place / f"cache_{options.ids[0]}" / "cache.json").read_text(encoding="utf-8"))
    text = (
        "# What a cached teacher saves\n\n"
        f"{made_by()} E2E, {options.inputs} inputs with {header['targets']} references, which are the targets; the "
        f"teacher `sft.py {options.teacher}`, {options.teacher_steps} steps, the student `{options.student}`; "
        f"{header['num_allowed']} ids may be written. {options.steps} steps of {options.batch_size} targets of up "
        f"to {options.max_completion_length} tokens, forward KL, one thread of a CPU, float32, one seed. What the "
        "columns are: the script's docstring. CPU seconds are of the whole command, with imports and evaluations of a "
        "tenth of the inputs, held out; there the teacher also reads the student's outputs and writes its own, which "
        "a cache cannot.\n\n"
        f"{markdown_table(HEADS, lines)}\n"
    )
    write_results(options.results_dir, "teacher_cache", results, text)


if __name__ == "__main__":
    main()
