"""Encoder distillation on the processes that it was started with: `encoder_worker.py OUTPUT_DIR` writes what they saw.

On one process it trains the same cases, on the same global batch, for the others to be compared with.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.distributed.sharded_worker import deepspeed_settings
from tests.models.encoders import make
from tests.trainers.test_encoder import ALL_GENERAL, ALL_TASK, build, texts
from tests.trainers.tiny_runs import snapshot

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

GLOBAL_BATCH = 8
# Name: stage, losses, the width of a student without a head (None: as the teacher, with its head), parallelism.
CASES = {
    "general": ("general", ALL_GENERAL, None, ("ddp", "accumulated", "zero2", "zero3")),
    "task": ("task", ALL_TASK, None, ("ddp", "zero3")),
    "several teachers": ("task", "hidden_mse+logits_kl+hard_ce", None, ("ddp",)),
    "trained along": ("task", "hard_ce", None, ("ddp",)),
    # Weights behind the layer that is read get no gradients, and projections some.
    "projected": ("general", "hidden_mse+value_relation_kl", 8, ("ddp", "zero2")),
}


def train(name: str, mode: str, output_dir: Path, world: int) -> dict:
    AcceleratorState._reset_state(True)  # of the last trainer's kind of parallelism
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    stage, losses, width, _ = CASES[name]
    accumulation = 2 if mode == "accumulated" else 1
    others = [make(layers=3, head="classes", num_labels=3, seed=4)]
    several = {"several teachers": {"more_teachers": others}, "trained along": {"trained_along": others}}.get(name)
    trainer = build(
        losses,
        output_dir,
        several=several,
        stage=stage,
        student=None if width is None else make(layers=2, width=width, seed=1),
        data=texts(32, seed=1),
        held_out=texts(6, seed=2).remove_columns("text_pair"),
        per_device_train_batch_size=GLOBAL_BATCH // world // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        learning_rate=0.05,
        max_grad_norm=0.5,
        mlm_probability=0.3 if stage == "general" else 0.0,
        layer_map=["single=2"] if name == "projected" else ["top"] if name == "several teachers" else ["uniform"],
        deepspeed={"zero2": deepspeed_settings(2), "zero3": deepspeed_settings(3)}.get(mode),
    )
    before = snapshot(trainer.student.model) if world == 1 else {}
    trainer.train()
    evaluation = trainer.evaluate()
    trainer.save_model()
    return {
        "kind": trainer.accelerator.distributed_type.value,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "evaluation": evaluation,
        "saved": str(output_dir),
        "before": before,
    }


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    world, results = state.num_processes, {}
    for name, (*_, modes) in CASES.items():
        for mode in modes if world > 1 else ("one",):
            results[name, mode] = train(name, mode, output_dir / f"{name}-{mode}", world)
    torch.save(results, output_dir / f"rank{state.process_index}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
