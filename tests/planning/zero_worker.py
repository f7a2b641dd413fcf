"""One of two ranks: what DeepSpeed holds of a small network after a step, at a ZeRO stage, in bytes.

A process for each: what a former engine leaves behind may die while the next is measured.
"""

import gc
import os
import sys
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn

WIDTH, LAYERS = 128, 32


def live_bytes() -> int:
    """Of all tensors that this process can reach, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def held_after_a_step(stage: int, bf16: bool) -> int:
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        # A bucket of one layer: what it takes is the configuration's to say, not the model's.
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": WIDTH * WIDTH,
            "stage3_param_persistence_threshold": 0,
        },
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings)
    inputs = torch.randn(4, WIDTH, dtype=torch.bfloat16 if bf16 else torch.float32)
    engine.backward(engine(inputs).float().square().mean())
    engine.step()
    return live_bytes()


def main(output_dir: Path, stage: int, bf16: bool) -> None:
    # Not needed here, and its compiler run would take a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.save(held_after_a_step(stage, bf16), output_dir / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    # DeepSpeed with gloo sometimes aborts in its teardown.
    sys.stdout.flush()
    os._exit(0)
