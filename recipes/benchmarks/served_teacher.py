r"""What asking a teacher behind a server costs a run: RLOO with the teacher in its process, and with a served one.

    PYTHONPATH=. OMP_NUM_THREADS=1 python recipes/benchmarks/served_teacher.py --e2e ../data/e2e

In a clone, from its root. Trains a decoder-only teacher from scratch on the first inputs of E2E's training data and a
smaller student's start with the same tokenizer, then runs `rloo_kd.py` with the same seed with the teacher in its
process, and with the server of `tests/teachers/loopback_server.py` over the same weights, in both dialects that
teachers are asked in. That server reads one text at a time on one thread: its own time says nothing of vLLM's, which
was not measured. What is measured is the run's side: CPU time and peak memory of its process as the system counted
them, wall seconds of a step and of its scoring as the log's medians, the requests and bytes of a step, and the
teacher's NLL per token of the first step's completions, which are the same.
"""

import argparse
import json
import multiprocessing
import statistics
from multiprocessing.connection import Connection
from pathlib import Path

from result_files import RESULTS, made_by, write_results
from teacher_cache import COLUMNS, measured

from rlkd_trl.evaluation.tables import markdown_table

DIALECTS = ("prompt_logprobs", "echo")
HEADS = ["teacher", "peak MiB", "CPU s", "s per step", "of it scoring", "requests a step", "kB a step"]
HEADS += ["NLL of the first step"]


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", type=Path, required=True, help="directory with train.csv")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/served_teacher"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--inputs", type=int, default=120, help="training inputs")
    parser.add_argument("--teacher", default="--d_model 256 --num_layers 4 --num_heads 4 --vocab_size 1000")
    parser.add_argument("--student", default="--d_model 64 --num_layers 2 --num_heads 4")
    parser.add_argument("--teacher_steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32, help="completions a step")
    parser.add_argument("--max_completion_length", type=int, default=48)
    return parser.parse_args()


def serve(teacher: Path, dialect: str, pipe: Connection) -> None:
    """Serves the teacher until it is told to end; then sends how many requests there were, and their bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.teachers.loopback_server import served

    torch.set_num_threads(1)
    model, sizes = AutoModelForCausalLM.from_pretrained(teacher).eval(), []

    def count(answer: dict) -> dict:
        sizes.append(len(json.dumps(answer)))
        return answer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    with served(model, tokenizer, dialect=dialect, change=count, max_model_len=1024) as server:
        pipe.send(server.url)
        pipe.recv()
    pipe.send({"requests": len(sizes), "bytes": sum(sizes) + sum(len(json.dumps(body)) for body in server.requests)})


def of_run(directory: Path, steps: int) -> dict[str, float]:
    """The teacher's NLL per token in the first step; median seconds of a step, and of its scoring."""
    state = json.loads((directory / f"checkpoint-{steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    logs = [entry for entry in state["log_history"] if "seconds/score" in entry]
    phases = ("seconds/sample", "seconds/score", "seconds/update")
    return {
        "teacher_nll": logs[0]["teacher_nll"],
        "step_seconds": statistics.median(sum(entry[phase] for phase in phases) for entry in logs),
        "score_seconds": statistics.median(entry["seconds/score"] for entry in logs),
    }


def line(name: str, run: dict[str, float], steps: int) -> list[str]:
    asked = (
        [f"{run['requests'] / steps:.0f}", f"{run['bytes'] / steps / 1000:.0f}"] if "requests" in run else ["–", "–"]
    )
    numbers = [f"{run['peak_mib']:.0f}", f"{run['cpu_seconds']:.1f}", f"{run['step_seconds']:.3f}"]
    return [name, *numbers, f"{run['score_seconds']:.3f}", *asked, f"{run['teacher_nll']:.5f}"]


def main() -> None:
    options = flags()
    here, teacher = options.work_dir, options.work_dir / "teacher"
    texts = f"--dataset {options.e2e / 'train.csv'} {COLUMNS} --max_rows {options.inputs}"
    training = f"--per_device_train_batch_size {options.batch_size} --lr_scheduler_type constant --disable_tqdm True"
    training += f" --max_completion_length {options.max_completion_length} --overwrite_output_dir True"
    new = "--architecture llama --save_strategy no"
    measured("sft", f"{texts} {new} {options.teacher} {training} --learning_rate 2e-3",
             f"--max_steps {options.teacher_steps} --output_dir {teacher}")  # fmt: skip
    measured("sft", f"{texts} {new} {options.student} --tokenizer {teacher} {training} --learning_rate 2e-3",
             f"--max_steps {options.teacher_steps} --output_dir {here / 'start'}")  # fmt: skip
    common = (
        f"--student {here / 'start'} {texts} {training} --num_generations 4 --learning_rate 1e-4 --max_steps "
        f"{options.steps} --save_steps {options.steps} --logging_steps 1"
    )
    results = {}
    run = measured("rloo_kd", f"--teacher {teacher} {common} --output_dir {here / 'local'}")
    results["in the process"] = run | of_run(here / "local", options.steps)
    for dialect in DIALECTS:
        pipe, of_server = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(teacher, dialect, of_server), daemon=True
        )
        server.start()
        of_server.close()  # so that a server that dies is noticed
        url = pipe.recv()
        run = measured("rloo_kd", f"--teacher_server {url} --teacher_tokenizer {teacher} {common}",
                       f"--output_dir {here / dialect}")  # fmt: skip
        pipe.send("end")
        results[f"served, {dialect}"] = run | of_run(here / dialect, options.steps) | pipe.recv()
        server.join()
    rows = [line(name, run, options.steps) for name, run in results.items()]
    text = (
        "# What a served teacher costs\n\n"
        f"{made_by()} E2E, {options.inputs} inputs; decoder-only models from scratch, the teacher "
        f"`{options.teacher}`, the student `{options.student}`; {options.steps} steps of {options.batch_size} "
        f"completions of up to {options.max_completion_length} tokens, RLOO, one thread of a CPU, one run of each. "
        "The server is the tests' own, on the same machine: its time is in the seconds of scoring, and is not vLLM's. "
        "CPU seconds and memory are of the run's process, with imports and the last evaluation; requests and bytes "
        "are those of all of it, over the steps. NLL: the teacher's per token, of the first step's completions, which "
        "are the same.\n\n"
        f"{markdown_table(HEADS, rows)}\n"
    )
    write_results(options.results_dir, "served_teacher", results, text)


if __name__ == "__main__":
    main()
