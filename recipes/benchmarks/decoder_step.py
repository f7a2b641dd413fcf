r"""CPU seconds, arithmetic and memory of one whole RLOO step of decoder-only models, and the same step in TRL.

    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/decoder_step.py --versus python
    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/decoder_step.py --prompt_tokens 256 --prompts 8 \
        --samples 8 --versus python

What `step.py` does for T5 and TRL 0.11.4: random models of Qwen2's form, `RLOOKDTrainer` with one reward for each
completion, as TRL's `RLOOTrainer` has it, and the KL penalty to the initial student. `--versus PYTHON` is an
interpreter of an environment with TRL 1.16, such as this package's own, which runs `trl_rloo_step.py`. Measures, the
last line and `--results_dir` (decoder_step.json and .md) are as in `step.py`; the floor has each prompt read once, in
the update too, and the LM head at the completions only.
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
    DECODER_STUDENT,
    DECODER_TEACHER,
    Dimensions,
    Shape,
    decoder_phase_flops,
    prompt_texts,
    random_decoder,
    resident_mib,
    word_tokenizer,
)

from rlkd_trl import RLOOKDConfig, RLOOKDTrainer, TeacherForcingReward

RIVAL = Path(__file__).resolve().parent / "trl_rloo_step.py"


def measured_trainer(
    shape: Shape,
    steps: int,
    update_batch_size: int,
    beta: float,
    output_dir: str,
    teacher: Dimensions = DECODER_TEACHER,
) -> tuple[RLOOKDTrainer, PhaseMeter]:
    """An `RLOOKDTrainer` for `steps` rollouts and the meter of its phases."""
    tokenizer, updates = word_tokenizer(shape.vocabulary), shape.completions // update_batch_size
    args = RLOOKDConfig(output_dir, **settings(shape, steps, update_batch_size, beta))
    trainer = RLOOKDTrainer(
        random_decoder(DECODER_STUDENT, shape.vocabulary, seed=1),
        TeacherForcingReward(random_decoder(teacher, shape.vocabulary, seed=2), tokenizer),
        args,
        Dataset.from_list([{"prompt": text} for step in range(steps) for text in prompt_texts(shape, step)]),
        processing_class=tokenizer,
    )
    return trainer, metered(trainer, updates)


def phase_flops(shape: Shape, *, reference: bool) -> dict[str, int]:
    """The FLOPs that each phase needs."""
    return decoder_phase_flops(shape, reference=reference)


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
    parser.add_argument("--update_batch_size", type=int, help="all completions of a step by default")
    parser.add_argument("--beta", type=float, default=0.05, help="KL coefficient; 0 does without the initial student")
    add_flags(parser, "TRL 1.16")
    args = parser.parse_args()
    shape = Shape.of(args)
    update_batch_size = args.update_batch_size or shape.completions
    if shape.completions % update_batch_size:
        parser.error(f"{shape.completions} completions are not a multiple of --update_batch_size.")
    check_flags(parser, args)
    torch.set_num_threads(1)
    if args.versus:
        flags = [*shape.flags(), "--steps", str(args.steps), "--update_batch_size", str(update_batch_size)]
        flags += ["--beta", str(args.beta)]
        ours, theirs = [sys.executable, __file__, *flags], [args.versus, str(RIVAL), *flags]
        found = compare(ours, theirs, args.rounds, "trl_1_16")
        if args.results_dir:
            others = {"completions of an update": update_batch_size, "beta": args.beta}
            title = "One RLOO step of decoder-only models, ours and TRL 1.16"
            add_result(args.results_dir, "decoder_step", title, shape, others, found, "trl_1_16")
        print(json.dumps(found))
    else:
        print(json.dumps(measure(shape, args.steps, update_batch_size, args.beta)))


if __name__ == "__main__":
    main()
