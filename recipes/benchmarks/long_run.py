r"""What a long run leaves behind in its process: memory, open files, threads, and the time of a step, per 2,000 steps.

    OMP_NUM_THREADS=1 python recipes/benchmarks/long_run.py --steps 2000
    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node 2 recipes/benchmarks/long_run.py
    OMP_NUM_THREADS=1 python recipes/benchmarks/long_run.py --steps 600 --trace

`PPOKDTrainer` on random T5 models so small that a step is mostly the trainer's own work, with prompts, a teacher, a
critic and a KL penalty, as the demo has. It logs every `--logging_steps` steps and saves a checkpoint every 250.

Slopes are of least-squares lines over the steps after the first quarter, in which libraries fill their caches. `rss`
is the resident set, which also grows by unused holes in the memory of glibc's allocator. `heap` is the memory that the
allocator has given out (mallinfo2): a leak shows in it, holes do not. Python allocates objects below 512 bytes
elsewhere; these are counted as `blocks`. By design Trainer's list of all logs grows, which `trainer_state.json` holds
too: by one dictionary of about 30 numbers per log. `drift` is the median CPU time of a step in the last quarter over
that in the second quarter. `--trace` counts Python's allocations by line (with tracemalloc, several times slower) and
names the lines that grow most. With several processes each reports its own figures. Linux with glibc only. The last
line is one JSON object.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
import tracemalloc
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback
from workload import Dimensions, Shape, prompt_texts, random_t5, resident_mib, word_tokenizer

from rlkd_trl import PPOKDConfig, PPOKDTrainer, TeacherForcingReward
from rlkd_trl.evaluation.tables import markdown_table

MODEL = Dimensions(d_model=16, d_ff=32, heads=2, layers=1, d_kv=8)
SHAPE = Shape(prompt_tokens=8, completion_tokens=6, prompts=4, samples=2, vocabulary=64)
SAVE_STEPS = 250
LINES_SHOWN = 12


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def heap_in_use() -> int:
    """Bytes that this process has allocated and not freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


@dataclass
class Meter(TrainerCallback):
    """Takes readings of the process every `interval` steps. With `trace`, tracemalloc runs after the first quarter."""

    steps: int
    interval: int = 10
    trace: bool = False
    readings: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    before: tracemalloc.Snapshot | None = None
    _began: float = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self._began)
        if self.trace and state.global_step == self.steps // 4:
            tracemalloc.start()
        if self.trace and state.global_step == self.steps // 2:
            gc.collect()
            self.before = tracemalloc.take_snapshot()
        if state.global_step % self.interval == 0:
            self.readings.append(
                {
                    "step": state.global_step,
                    "rss": resident_mib() * 1024,
                    "heap": heap_in_use() / 1024,
                    "blocks": sys.getallocatedblocks(),
                    "handles": len(list(Path("/proc/self/fd").iterdir())),
                    "threads": threading.active_count(),
                }
            )

    def growth(self) -> list[dict]:
        """Lines of Python whose allocations have grown most in the second half, largest first."""
        gc.collect()
        after = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
        tracemalloc.stop()
        differences = after.compare_to(self.before, "lineno")
        return [
            {
                "line": f"{Path(line.traceback[0].filename).as_posix()}:{line.traceback[0].lineno}",
                "bytes_per_step": line.size_diff / (self.steps - self.steps // 2),
            }
            for line in sorted(differences, key=lambda line: -line.size_diff)[:LINES_SHOWN]
        ]


def slope(readings: list[dict[str, float]], name: str) -> float:
    """The growth of a reading per step, by least squares."""
    steps, values = [r["step"] for r in readings], [r[name] for r in readings]
    return statistics.linear_regression(steps, values).slope


def summary(meter: Meter) -> dict[str, object]:
    """The figures of one process."""
    settled = [reading for reading in meter.readings if reading["step"] > meter.steps // 4]
    quarter = meter.steps // 4
    figures = {f"{name}_kib_per_step": round(slope(settled, name), 3) for name in ("rss", "heap")}
    figures["blocks_per_step"] = round(slope(settled, "blocks"), 2)
    for name in ("handles", "threads"):
        counts = [reading[name] for reading in settled]
        figures[name] = [counts[0], min(counts), max(counts), counts[-1]]
    early, late = meter.seconds[quarter : 2 * quarter], meter.seconds[-quarter:]
    figures["step_cpu_ms"] = round(1000 * statistics.median(early), 2)
    figures["drift"] = round(statistics.median(late) / statistics.median(early), 3)
    return figures


def run(flags: argparse.Namespace, output_dir: str) -> tuple[Meter, PPOKDTrainer]:
    """Trains for `--steps` steps under a `Meter`."""
    tokenizer = word_tokenizer(SHAPE.vocabulary)
    args = PPOKDConfig(
        output_dir=output_dir,
        max_steps=flags.steps,
        per_device_train_batch_size=SHAPE.completions,
        num_generations=SHAPE.samples,
        max_completion_length=SHAPE.completion_tokens,
        max_prompt_length=SHAPE.prompt_tokens,
        beta=0.05,
        learning_rate=1e-4,
        logging_steps=flags.logging_steps,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        disable_tqdm=True,
        seed=0,
    )
    texts = [text for step in range(16) for text in prompt_texts(SHAPE, step)]
    teacher = TeacherForcingReward(random_t5(MODEL, SHAPE.vocabulary, seed=1), tokenizer)
    trainer = PPOKDTrainer(
        random_t5(MODEL, SHAPE.vocabulary, seed=0),
        teacher,
        args,
        Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer,
    )
    meter = Meter(steps=flags.steps, trace=flags.trace)
    trainer.add_callback(meter)
    trainer.train()
    return meter, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--logging_steps", type=int, default=25, help="25 is the demo's; of each log, all is kept")
    parser.add_argument("--trace", action="store_true", help="also name the lines of Python that allocate")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as output_dir:
        meter, trainer = run(flags, output_dir)
        grown = meter.growth() if flags.trace else []
        of_processes = gather_object([summary(meter)])
        trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        names = list(of_processes[0])
        rows = [[str(rank), *(str(figures[name]) for name in names)] for rank, figures in enumerate(of_processes)]
        print(f"\n{markdown_table(['process', *names], rows)}")
        for line in grown:
            print(f"{line['bytes_per_step']:8.1f} bytes per step  {line['line']}")
        versions = {name: version(name) for name in ("torch", "transformers")}
        print(json.dumps({**vars(flags), "processes": of_processes, "grown": grown, "versions": versions}))
    trainer.accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
