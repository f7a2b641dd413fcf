"""Many steps leave nothing behind in the process. `recipes/benchmarks/long_run.py` measures thousands of them."""

import gc
import sys
import threading
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.trainers.tiny_runs import build, pairs

FIRST, LAST = 40, 60
# Python's caches fill: 3 to 7 a step at this age of the process. Of each metric one number is a block.
BLOCKS_PER_STEP = 12


class Watch(TrainerCallback):
    """Open files and threads after each step, and blocks of Python's memory in use after `FIRST` and `LAST`."""

    def __init__(self):
        self.handles: list[int] = []
        self.threads: list[int] = []
        self.blocks: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.handles.append(len(list(Path("/proc/self/fd").iterdir())))
        self.threads.append(threading.active_count())
        if state.global_step in (FIRST, LAST):
            gc.collect()
            self.blocks.append(sys.getallocatedblocks())


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("rloo-token", "reinforce", "kd", "all-actions")]


@pytest.mark.slow(5)
@pytest.mark.parametrize("method", ["ppo", *SLOW])
def test_nothing_grows_with_the_steps(method, tmp_path):
    """Without logs in between: Trainer keeps all of them, as a checkpoint's trainer_state.json does."""
    watch = Watch()
    settings = {"max_steps": LAST, "logging_steps": 1000, "max_completion_length": 3, "num_generations": 2}
    trainer = build(method, tmp_path, data=pairs(16), per_device_train_batch_size=2, **settings)
    trainer.add_callback(watch)
    trainer.train()
    assert max(watch.handles[FIRST:]) == watch.handles[FIRST]
    assert max(watch.threads[FIRST:]) == watch.threads[FIRST]
    before, after = watch.blocks
    assert after - before < BLOCKS_PER_STEP * (LAST - FIRST)
