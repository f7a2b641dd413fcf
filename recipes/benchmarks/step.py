r"""CPU seconds, arithmetic and memory of one whole PPO step, and the same step in TRL 0.11.4, on random T5 models.

    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/step.py
    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/step.py --prompt_tokens 256 --prompts 8 --samples 8 \
        --versus trl_0_11/bin/python

A step samples `--samples` completions for each of `--prompts` prompts, has the teacher score them, and passes over
them once, with one optimizer step for every `--update_batch_size` completions. There is a penalty on the KL to the
initial student, because TRL 0.11.4's PPOTrainer always has one, so that both do the same work. `PPOKDTrainer` runs as
a user would run it; the benchmark only times its phases: generate, score, and update, which is everything else.

FLOPs are those of the matrix multiplications that a phase needs if each prompt is read once, also in the update (see
`workload.py`). `floor_ratio` is the CPU seconds of the phase over the seconds that these FLOPs would take at the rate
of large matrix multiplications in the same run. Memory is the process's peak resident set, libraries included;
`extra_mib` is the part of it above what was resident when the models had been loaded. Everything runs in one thread,
and is measured in CPU time, which other load on the machine affects less than wall time; figures are medians over
steps, of which the first does not count. Linux only. The last line is one JSON object.

`--versus PYTHON` is an interpreter of an environment with TRL 0.11.4, which runs `trl_0_11_step.py`:

    python3.11 -m venv trl_0_11
    trl_0_11/bin/pip install trl==0.11.4 transformers==4.46.3 torch==2.13.0 numpy==2.4.6 accelerate==1.15.0 \
        datasets==5.0.1 rich
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from transformers import TrainerCallback
from workload import (
    EOS,
    STUDENT,
    TEACHER,
    UNK,
    MatmulRate,
    Shape,
    forward_flops,
    peak_resident_mib,
    prompt_texts,
    random_t5,
    reset_peak,
    resident_mib,
    word_tokenizer,
)

from rlkd_trl import PPOKDConfig, PPOKDTrainer, TeacherForcingReward
from rlkd_trl.trainers.rollout_metrics import PhaseTimer

RIVAL = Path(__file__).resolve().parent / "trl_0_11_step.py"
PHASES = {"sample": "generate", "score": "score"}  # the trainer's names of the phases that are not the update


def measured_trainer(shape: Shape, steps: int, update_batch_size: int, beta: float, output_dir: str):
    """A `PPOKDTrainer` for `steps` rollouts whose timer is a `PhaseMeter`; completions never end early."""
    tokenizer = word_tokenizer(shape.vocabulary)
    updates = shape.completions // update_batch_size
    args = PPOKDConfig(
        output_dir=output_dir,
        num_generations=shape.samples,
        max_completion_length=shape.completion_tokens,
        per_device_train_batch_size=update_batch_size,
        steps_per_generation=updates,
        beta=beta,
        learning_rate=1e-5,
        max_steps=steps * updates,
        save_strategy="no",
        logging_steps=steps * updates,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = PPOKDTrainer(
        random_t5(STUDENT, shape.vocabulary, seed=1),
        TeacherForcingReward(random_t5(TEACHER, shape.vocabulary, seed=2), tokenizer),
        args,
        Dataset.from_list([{"prompt": text} for step in range(steps) for text in prompt_texts(shape, step)]),
        processing_class=tokenizer,
    )
    for policy in (trainer.policy, trainer.reference):
        if policy is not None:
            policy.forbidden_V[[EOS, UNK]] = True
    trainer._timer = meter = PhaseMeter()
    trainer.add_callback(_StepEnd(meter, updates))
    return trainer, meter


class PhaseMeter(PhaseTimer):
    """CPU seconds and peak memory of the trainer's phases; whatever is outside of those in `PHASES` is the update."""

    def __init__(self):
        super().__init__()
        self.rate = MatmulRate()
        self.steps: list[dict[str, float]] = []
        self.peak_mib: dict[str, float] = defaultdict(float)
        self._cpu_seconds: dict[str, float] = defaultdict(float)
        self._current = "update"

    def begin(self) -> None:
        """Starts counting, after a measurement of the matrix rate."""
        self.rate.measure()
        reset_peak()
        self._since = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name):
            self._switch(PHASES.get(name, "update"))
            yield
            self._switch("update")

    def finish_step(self) -> None:
        self._switch("update")
        self.steps.append({**self._cpu_seconds, "total": sum(self._cpu_seconds.values())})
        self._cpu_seconds.clear()
        self.begin()

    def _switch(self, phase: str) -> None:
        self._cpu_seconds[self._current] += time.process_time() - self._since
        self.peak_mib[self._current] = max(self.peak_mib[self._current], peak_resident_mib())
        reset_peak()
        self._current, self._since = phase, time.process_time()


class _StepEnd(TrainerCallback):
    def __init__(self, meter: PhaseMeter, updates: int):
        self._meter, self._updates = meter, updates

    def on_train_begin(self, *args, **kwargs):
        self._meter.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._updates == 0:
            self._meter.finish_step()


def phase_flops(shape: Shape, *, several_updates: bool, reference: bool) -> dict[str, int]:
    """The FLOPs that each phase needs.

    In the update, the backward pass counts as two forward passes; old and reference log-probabilities need one each.
    """
    student = forward_flops(STUDENT, shape)
    return {
        "generate": forward_flops(STUDENT, shape, cached=True),
        "score": forward_flops(TEACHER, shape),
        "update": (3 + several_updates + reference) * student,
    }


def measure(shape: Shape, steps: int, update_batch_size: int, beta: float) -> dict[str, object]:
    """Our step, in this process."""
    with tempfile.TemporaryDirectory() as output_dir:
        trainer, meter = measured_trainer(shape, steps + 1, update_batch_size, beta, output_dir)
        loaded_mib = resident_mib()
        trainer.train()
    counted = meter.steps[1:]
    flops = phase_flops(shape, several_updates=update_batch_size < shape.completions, reference=beta > 0)
    seconds = {name: median(step[name] for step in counted) for name in (*flops, "total")}
    return {
        "total_cpu_seconds": seconds["total"],
        "cpu_seconds_of_steps": [step["total"] for step in counted],
        "peak_mib": max(meter.peak_mib.values()),
        "extra_mib": max(meter.peak_mib.values()) - loaded_mib,
        "phases": {
            name: {
                "cpu_seconds": seconds[name],
                "gflop": flops[name] / 1e9,
                "floor_ratio": seconds[name] * meter.rate.per_second / flops[name],
                "peak_mib": meter.peak_mib[name],
            }
            for name in flops
        },
        "matmul_gflop_per_cpu_second": meter.rate.per_second / 1e9,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def _in_turn(commands: dict[str, list[str]], rounds: int) -> dict[str, list[dict]]:
    """The JSON in each command's last line, in every round; the commands alternate."""
    results: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{finished.stderr[-2000:]}")
            results[name].append(json.loads(finished.stdout.splitlines()[-1]))
    return results


def _medians(runs: list[dict[str, float]], names: Iterable[str] | None = None) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in names or runs[0]}


def compare(rival_python: str, shape: Shape, steps: int, update_batch_size: int, beta: float, rounds: int) -> dict:
    """Runs both libraries in fresh processes; ratios are TRL's over ours, of medians over all rounds."""
    flags = [word for name, value in asdict(shape).items() for word in (f"--{name}", str(value))]
    flags += ["--steps", str(steps), "--update_batch_size", str(update_batch_size)]
    commands = {
        "ours": [sys.executable, __file__, *flags, "--beta", str(beta)],
        "trl": [rival_python, str(RIVAL), *flags],
    }
    results = _in_turn(commands, rounds)
    totals = {name: [s for run in runs for s in run["cpu_seconds_of_steps"]] for name, runs in results.items()}
    ours, trl = (
        {
            **runs[0],
            "total_cpu_seconds": median(totals[name]),
            **_medians(runs, ("peak_mib", "extra_mib")),
            "phases": {name: _medians([run["phases"][name] for run in runs]) for name in runs[0]["phases"]},
        }
        for name, runs in results.items()
    )
    for name, result in (("ours", ours), ("trl", trl)):
        result["cpu_seconds_of_steps"] = totals[name]
    return {
        **ours,
        "trl_0_11_4": trl,
        "times_faster": trl["total_cpu_seconds"] / ours["total_cpu_seconds"],
        "times_faster_by_phase": {
            name: trl["phases"][name]["cpu_seconds"] / ours["phases"][name]["cpu_seconds"] for name in ours["phases"]
        },
        "peak_memory_ratio": ours["peak_mib"] / trl["peak_mib"],
        "extra_memory_ratio": ours["extra_mib"] / trl["extra_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Shape.add_flags(parser)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--update_batch_size", type=int, default=16)
    parser.add_argument("--beta", type=float, default=0.05, help="KL coefficient; 0 does without the initial student")
    parser.add_argument("--versus", metavar="PYTHON", help="interpreter of an environment with TRL 0.11.4")
    parser.add_argument("--rounds", type=int, default=1, help="with --versus: runs of each library, in turn")
    args = parser.parse_args()
    shape = Shape.of(args)
    if shape.completions % args.update_batch_size:
        parser.error(f"{shape.completions} completions are not a multiple of --update_batch_size.")
    torch.set_num_threads(1)
    settings = (shape, args.steps, args.update_batch_size, args.beta)
    print(json.dumps(compare(args.versus, *settings, args.rounds) if args.versus else measure(*settings)))


if __name__ == "__main__":
    main()
