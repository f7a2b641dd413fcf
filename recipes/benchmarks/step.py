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

With it, `--results_dir DIRECTORY` writes step.json and step.md there, in which other shapes' results stay.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from metered_trainer import metered, settings
from step_phases import PhaseMeter, compare
from step_results import add_flags, add_result, check_flags
from workload import (
    STUDENT,
    TEACHER,
    Dimensions,
    Shape,
    forward_flops,
    prompt_texts,
    random_t5,
    resident_mib,
    word_tokenizer,
)

from rlkd_trl import PPOKDConfig, PPOKDTrainer, TeacherForcingReward

RIVAL = Path(__file__).resolve().parent / "trl_0_11_step.py"


def measured_trainer(
    shape: Shape, steps: int, update_batch_size: int, beta: float, output_dir: str, teacher: Dimensions = TEACHER
) -> tuple[PPOKDTrainer, PhaseMeter]:
    """A `PPOKDTrainer` for `steps` rollouts and the meter of its phases."""
    tokenizer = word_tokenizer(shape.vocabulary)
    updates = shape.completions // update_batch_size
    args = PPOKDConfig(output_dir, **settings(shape, steps, update_batch_size, beta))
    trainer = PPOKDTrainer(
        random_t5(STUDENT, shape.vocabulary, seed=1),
        TeacherForcingReward(random_t5(teacher, shape.vocabulary, seed=2), tokenizer),
        args,
        Dataset.from_list([{"prompt": text} for step in range(steps) for text in prompt_texts(shape, step)]),
        processing_class=tokenizer,
    )
    return trainer, metered(trainer, updates)


def phase_flops(shape: Shape, *, reference: bool) -> dict[str, int]:
    """The FLOPs that each phase needs.

    In the update, the backward pass counts as two forward passes, and the reference's log-probabilities need one.
    Those of the student that samples need none.
    """
    student = forward_flops(STUDENT, shape)
    return {
        "generate": forward_flops(STUDENT, shape, cached=True),
        "score": forward_flops(TEACHER, shape),
        "update": (3 + reference) * student,
    }


def measure(shape: Shape, steps: int, update_batch_size: int, beta: float) -> dict[str, object]:
    """Our step, in this process."""
    with tempfile.TemporaryDirectory() as output_dir:
        trainer, meter = measured_trainer(shape, steps + 1, update_batch_size, beta, output_dir)
        loaded_mib = resident_mib()
        trainer.train()
    flops = phase_flops(shape, reference=beta > 0)
    return meter.results(flops, loaded_mib)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Shape.add_flags(parser)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--update_batch_size", type=int, default=16)
    parser.add_argument("--beta", type=float, default=0.05, help="KL coefficient; 0 does without the initial student")
    add_flags(parser, "TRL 0.11.4")
    args = parser.parse_args()
    shape = Shape.of(args)
    if shape.completions % args.update_batch_size:
        parser.error(f"{shape.completions} completions are not a multiple of --update_batch_size.")
    check_flags(parser, args)
    torch.set_num_threads(1)
    if args.versus:
        flags = [*shape.flags(), "--steps", str(args.steps), "--update_batch_size", str(args.update_batch_size)]
        ours = [sys.executable, __file__, *flags, "--beta", str(args.beta)]
        found = compare(ours, [args.versus, str(RIVAL), *flags], args.rounds, "trl_0_11_4")
        if args.results_dir:
            others = {"completions of an update": args.update_batch_size, "beta": args.beta}
            title = "One PPO step of T5, ours and TRL 0.11.4"
            add_result(args.results_dir, "step", title, shape, others, found, "trl_0_11_4")
        print(json.dumps(found))
    else:
        print(json.dumps(measure(shape, args.steps, args.update_batch_size, args.beta)))


if __name__ == "__main__":
    main()
