"""How training processes find each other and how long they wait, before `TrainingArguments` sets them up."""

import os
import warnings

import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool
from transformers import TrainingArguments


def start_processes(args: TrainingArguments) -> None:
    """Sets `use_cpu` where there is no accelerator, and connects processes on a CPU with `ddp_timeout`.

    Without `use_cpu` several such processes would not synchronise. TrainingArguments, which keeps a connection that it
    finds, passes its timeout on for accelerators only: on a CPU all would wait half an hour for a process that hangs.
    """
    if args.deepspeed or str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
        # DeepSpeed calls them by deprecated names, at every gathering of weights: twice ten lines in a ZeRO-3 step.
        deprecated = r"`torch\.distributed\.\w+` is deprecated"
        warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.use_cpu:
        PartialState(cpu=True, backend=args.ddp_backend, timeout=args.ddp_timeout_delta)


def wait_for_all() -> None:
    """Until every launched process is here; at once where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
