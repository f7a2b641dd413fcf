r"""What a checkpoint costs beside the writing of its files: seconds to seal it, to publish it, and to check it.

    OMP_NUM_THREADS=1 python recipes/benchmarks/checkpoints.py --millions 42

A T5 of so many million parameters is trained for a few steps by `sft`'s trainer, with a checkpoint after each: weights
and AdamW's two moments, 12 bytes a parameter. Of the parts of a save, the median by the wall's clock and in CPU
seconds: `write` (the files), `seal` (to the disk, digests, manifest), `publish` (the name), and `check` of the newest
checkpoint as a resumed run does it, in a process that has not seen it before. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from datasets import Dataset
from workload import Dimensions, random_t5, word_tokenizer

from rlkd_trl.trainers import resumable
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig

_VOCABULARY = 1024
_CHECK = """
import sys, time
from rlkd_trl.trainers.checkpoint_files import newest_whole
wall, cpu = time.perf_counter(), time.process_time()
checkpoint, defects = newest_whole(sys.argv[1])
assert checkpoint is not None and not defects
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def save_and_check(millions: float, steps: int, directory: str) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each part, once per save."""
    # 16 layers of 4 D² weights of attention and 3 · 4 D² of the feed-forward part, half of them with 4 D² more.
    width = round((millions * 1e6 / (16 * 16 + 8 * 4)) ** 0.5 / 64) * 64
    tokenizer = word_tokenizer(_VOCABULARY)
    model = random_t5(
        Dimensions(d_model=width, d_ff=4 * width, heads=width // 64, layers=8, d_kv=64), _VOCABULARY, seed=0
    )
    rows = [{"prompt": tokenizer.decode([9, 10, 11]), "target": tokenizer.decode([12, 13])}] * steps
    args = SupervisedConfig(
        output_dir=directory, max_steps=steps, per_device_train_batch_size=1, save_strategy="steps", save_steps=1,
        save_total_limit=1, logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = SupervisedTrainer(model, args, Dataset.from_list(rows), tokenizer)
    seconds = defaultdict(list)

    def timed(name, function):
        def call(*arguments, **kwargs):
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*arguments, **kwargs)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            return result

        return call

    trainer.write_checkpoint = timed("write", trainer.write_checkpoint)
    with (
        mock.patch.object(resumable, "seal", timed("seal", resumable.seal)),
        mock.patch.object(resumable, "publish", timed("publish", resumable.publish)),
    ):
        trainer.train()
    for _ in range(steps):
        checked = subprocess.run([sys.executable, "-c", _CHECK, directory], capture_output=True, text=True, check=True)
        seconds["check"].append(tuple(map(float, checked.stdout.split())))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=42.0, help="parameters")
    parser.add_argument("--steps", type=int, default=5, help="saves")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        seconds = save_and_check(args.millions, args.steps, directory)
        size = sum(file.stat().st_size for file in Path(directory).rglob("checkpoint-*/*") if file.is_file())
    results = {
        name: {"wall": median(wall for wall, _ in times), "cpu": median(cpu for _, cpu in times)}
        for name, times in seconds.items()
    }
    print(json.dumps({"megabytes": round(size / 1e6), **results}))


if __name__ == "__main__":
    main()
