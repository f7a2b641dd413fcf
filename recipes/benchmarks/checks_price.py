r"""What the checks of numbers cost: CPU time of PPO's training steps with and without them.

    OMP_NUM_THREADS=1 python recipes/benchmarks/checks_price.py --steps 100

The checks are those of losses and gradients (`FiniteTrainer.training_step`), those of each sample's numbers in a
rollout (`_usable` and `_dropping`), and the guards. One process trains, and in every other step they are switched off,
so that both kinds of steps run on the same machine with the same models and weights. Completions never end early, so
that all steps are alike. Everything runs in one thread and is measured in CPU time; the first steps do not count. The
ratio is the median, over pairs of neighbouring steps, of the seconds with checks over those without; the interval
holds 95 % of 2,000 bootstrap resamples of the pairs. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from unittest import mock

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from workload import EOS, UNK, Dimensions, Shape, random_t5, word_tokenizer

from rlkd_trl import PPOKDConfig, PPOKDTrainer, TeacherForcingReward
from rlkd_trl.trainers import on_policy
from rlkd_trl.trainers.finite import FiniteTrainer
from rlkd_trl.trainers.rollout_trainer import RolloutTrainer

STUDENT = Dimensions(d_model=128, d_ff=512, heads=4, layers=4, d_kv=32)
TEACHER = Dimensions(d_model=256, d_ff=1024, heads=4, layers=4, d_kv=32)
SHAPE = Shape(prompt_tokens=16, completion_tokens=24, prompts=8, samples=4, vocabulary=1024)
_WARM_UP = 4  # steps


@contextmanager
def without_checks() -> Iterator[None]:
    """Within it training checks no numbers."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(FiniteTrainer, "training_step", Trainer.training_step))
        stack.enter_context(mock.patch.object(RolloutTrainer, "_dropping", lambda self, rollout, *_, **__: rollout))
        stack.enter_context(mock.patch.object(RolloutTrainer, "_guard", lambda self, *args: None))
        stack.enter_context(mock.patch.object(on_policy, "_usable", lambda *args: {}))
        yield


class InTurns(TrainerCallback):
    """Switches the checks off in every second step; `seconds` has each step's CPU time, with and without them."""

    def __init__(self):
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._has_checks, self._switched_off = False, ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        self._has_checks = not self._has_checks
        if not self._has_checks:
            self._switched_off.enter_context(without_checks())
        self._start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds[self._has_checks].append(time.process_time() - self._start)
        self._switched_off.close()


def step_seconds(steps: int) -> InTurns:
    """Trains for so many steps, one rollout and one update each."""
    tokenizer = word_tokenizer(SHAPE.vocabulary)
    ids_PS = torch.randint(UNK + 1, SHAPE.vocabulary, (64 * SHAPE.prompts, SHAPE.prompt_tokens - 1))
    data = Dataset.from_list([{"prompt": tokenizer.decode(ids)} for ids in ids_PS])
    with tempfile.TemporaryDirectory() as directory:
        args = PPOKDConfig(
            output_dir=directory,
            per_device_train_batch_size=SHAPE.completions,
            num_generations=SHAPE.samples,
            max_completion_length=SHAPE.completion_tokens,
            max_steps=steps,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = PPOKDTrainer(
            random_t5(STUDENT, SHAPE.vocabulary, seed=1),
            TeacherForcingReward(random_t5(TEACHER, SHAPE.vocabulary, seed=2), tokenizer),
            args,
            data,
            processing_class=tokenizer,
        )
        trainer.model.forbidden_V[[EOS, UNK]] = True
        in_turns = InTurns()
        trainer.add_callback(in_turns)
        trainer.train()
    return in_turns


def summary(seconds: dict[bool, list[float]], num_resamples: int = 2000) -> dict[str, object]:
    """Medians, and the median ratio of a step with checks to the one without that follows it, with its interval."""
    skipped = _WARM_UP // 2
    on, off = (torch.tensor(seconds[has_checks][skipped:], dtype=torch.float64) for has_checks in (True, False))
    ratios = on / off
    drawn = torch.randint(len(ratios), (num_resamples, len(ratios)), generator=torch.Generator().manual_seed(0))
    low, high = ratios[drawn].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "ratio": median(ratios.tolist()),
        "interval": [low, high],
        "cpu_ms_with": 1e3 * median(on.tolist()),
        "cpu_ms_without": 1e3 * median(off.tolist()),
        "pairs": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps, half of them with checks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps(summary(step_seconds(args.steps // 2 * 2).seconds)))


if __name__ == "__main__":
    main()
