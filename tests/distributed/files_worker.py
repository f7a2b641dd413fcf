"""A teacher whose shards are in files: `main(OUTPUT_DIR, FAMILY)` writes what each process read and held."""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState

from rlkd_trl.models.memory import held_bytes
from rlkd_trl.teachers import Teacher
from tests.distributed.sharded_worker import read_by
from tests.tiny_models import tiny_llama, tiny_t5, word_tokenizer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Wide enough for shards of 1 MiB, more of them than DeepSpeed has buffers; smaller ones have no file.
WIDE = {
    "t5-tied": lambda: tiny_t5(tied=True, seed=5, d_model=2**15),
    "t5-untied": lambda: tiny_t5(tied=False, seed=5, d_model=2**15),
    "llama": lambda: tiny_llama(seed=5, hidden_size=2**10),
}


def bytes_of_files(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def main(output_dir: Path, family: str) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    model, files = WIDE[family](), output_dir / "files"
    if state.is_main_process:
        model.save_pretrained(output_dir / "teacher")
        word_tokenizer().save_pretrained(output_dir / "teacher")
        files.mkdir()
    state.wait_for_everyone()
    parked = Teacher.from_pretrained(
        str(output_dir / "teacher"), placement="offload", offload_path=str(files), max_batch_tokens=20
    )
    held = [held_bytes(parked.model)]
    state.wait_for_everyone()
    in_files = bytes_of_files(files)
    found = read_by(parked, state.process_index)
    held.append(held_bytes(parked.model))
    whole = Teacher(model, word_tokenizer(), max_batch_tokens=20)
    results = {
        "found": found,
        "expected": read_by(whole, state.process_index),
        "held": held,
        "in files": in_files,
        "whole": held_bytes(model),
        "said": parked.describe(),
    }
    torch.save(results, output_dir / f"rank{state.process_index}.pt")
    state.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed with gloo may abort in its teardown
