"""How training processes find each other and how long they wait for each other."""

import os
import warnings
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env, str_to_bool
from transformers import TrainingArguments

from rlkd_trl.errors import InputError

# As accelerate counts processes on a CPU.
_NUMBERS_OF_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def connect_processes(args: TrainingArguments) -> None:
    """Connects launched processes on a CPU with `ddp_timeout`; a command does it before it makes its settings.

    `TrainingArguments` connects processes when it is made, and passes the timeout on for accelerators only: on a CPU
    all would wait half an hour for one that hangs. It keeps a connection that it finds.

    args: The settings themselves, or a sketch of them.
    """
    if args.deepspeed or str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
        # DeepSpeed calls them by deprecated names, at every gathering of weights: twice ten lines in a ZeRO-3 step.
        deprecated = r"`torch\.distributed\.\w+` is deprecated"
        warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    if args.use_cpu or not torch.accelerator.is_available():
        PartialState(cpu=True, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))


def check_timeout(args: TrainingArguments) -> None:
    """Raises `InputError` if `ddp_timeout` would have no effect: several processes on a CPU, not yet connected."""
    several = get_int_from_env(_NUMBERS_OF_PROCESSES, 1) > 1
    is_set = args.ddp_timeout != type(args).__dataclass_fields__["ddp_timeout"].default
    if args.use_cpu and several and is_set and not torch.distributed.is_initialized():
        raise InputError(
            f"ddp_timeout = {args.ddp_timeout} would have no effect: on a CPU transformers connects processes without "
            "it. Connect them before the config is made: "
            f"accelerate.PartialState(cpu=True, timeout=datetime.timedelta(seconds={args.ddp_timeout}))."
        )


def wait_for_all() -> None:
    """Until every launched process is here; at once where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
