"""A process without a launcher, whose teachers' shards are parked in CPU memory: `main(DIRECTORY)`."""

import os
from pathlib import Path

import torch

from rlkd_trl.teachers import Teacher
from tests.distributed.sharded_worker import TEACHERS, read_by
from tests.tiny_models import MODELS, word_tokenizer


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for family in TEACHERS:
        parked = Teacher.from_pretrained(str(directory / family), placement="offload", max_batch_tokens=20)
        whole = Teacher(MODELS[family](seed=5), word_tokenizer(), max_batch_tokens=20)
        results[family] = {"found": read_by(parked, 1), "expected": read_by(whole, 1), "said": parked.describe()}
    torch.save(results, directory / "rank0.pt")
    os._exit(0)  # DeepSpeed with gloo may abort in its teardown
