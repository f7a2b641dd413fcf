"""Where a teacher's weights are kept: whole on every process, or in shards, which may lie in CPU memory or in files.

A sharded teacher has a ZeRO-3 engine of its own (Rajbhandari et al. 2020), whatever the student's parallelism is. Each
process holds its share of every weight, and gathers the weights of a layer while it computes that layer.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import PreTrainedModel

from rlkd_trl.errors import InputError
from rlkd_trl.models.memory import held_bytes
from rlkd_trl.models.precision import DTYPES, check_dtype, check_quantization
from rlkd_trl.models.private_apis import without_compiled_communication

PLACEMENTS = ("replicated", "zero3", "offload")

# The buffers through which DeepSpeed reads and writes shards in files, with its default sizes. A shard must fit into
# one: the largest weight of T0-11B, its LM head of 132 million numbers, needs two processes.
_BUFFERS = 5
_BUFFER_ELEMENTS = 10**8
_CAP_IPC_LOCK = 14  # the number of the capability to lock any amount of memory


@dataclass(frozen=True)
class Placement:
    """How a teacher is kept.

    placement: "replicated", a whole model on every process; "zero3", a shard on each; "offload", each process's shards
    in CPU memory, or with `offload_path` (a directory on an NVMe drive) those of 1 MiB or more in files there, which
    are deleted with the teacher. quantization and dtype: as for `load_model`; a sharded teacher cannot be quantised.

    Raises:
        InputError: An unknown name, quantisation or dtype "auto" with a sharded teacher, a missing library, or an
            `offload_path` that is not a directory or is given without the placement "offload".
    """

    placement: str = "replicated"
    quantization: str = "none"
    offload_path: str | None = None
    dtype: str = "float32"

    def __post_init__(self):
        if self.placement not in PLACEMENTS:
            raise InputError(f"Unknown teacher placement {self.placement!r}; choose one of: {', '.join(PLACEMENTS)}.")
        if self.offload_path is not None and self.placement != "offload":
            raise InputError(f"An offload path needs the placement 'offload'; it is {self.placement!r}.")
        check_quantization(self.quantization)
        if not self.is_sharded:
            return
        if self.quantization != "none":
            raise InputError(
                f"A teacher quantised to {self.quantization} cannot be sharded ({self.placement}): choose the "
                "placement 'replicated', or no quantisation."
            )
        if self.dtype == "auto":
            raise InputError("A sharded teacher's dtype has to be named: bfloat16, or float32.")
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(f"The placement {self.placement!r} needs DeepSpeed: pip install 'rlkd_trl[deepspeed]'.")
        if self.offload_path is not None:
            self._check_files()

    def _check_files(self) -> None:
        """Raises `InputError` if shards cannot be kept in files in `offload_path`."""
        if not Path(self.offload_path).is_dir():
            raise InputError(f"The offload path {self.offload_path} is not a directory: make one on a fast drive.")
        if not _can_offload_to_files():
            raise InputError(
                "DeepSpeed cannot write shards to files here: install libaio with its headers (Debian: libaio-dev), "
                "or offload to CPU memory."
            )
        check_dtype(self.dtype)
        size = _BUFFERS * _BUFFER_ELEMENTS * DTYPES[self.dtype].itemsize
        if not _can_lock(size):
            raise InputError(
                f"Shards in files go through {size:,} bytes of locked memory in each process, and this one may not "
                "lock as much: raise the limit (ulimit -l unlimited; in a container, --ulimit memlock=-1), or offload "
                "to CPU memory."
            )

    @property
    def is_sharded(self) -> bool:
        return self.placement != "replicated"

    @property
    def deepspeed_config(self) -> dict:
        """The engine's settings: stage 3, where shards lie, the dtype; small weights are not kept gathered either."""
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        if self.placement == "offload" and self.offload_path is None:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.accelerator.is_available()}
        elif self.placement == "offload":
            zero["offload_param"] = {
                "device": "nvme",
                "nvme_path": self._directory.name,
                "buffer_count": _BUFFERS,
                "buffer_size": _BUFFER_ELEMENTS,
            }
            # A weight occupies one of the buffers for as long as it is gathered, so it is dropped after each layer.
            zero["stage3_max_reuse_distance"] = 0
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires a number, though nothing is trained
            "zero_optimization": zero,
            "bf16": {"enabled": self.dtype == "bfloat16"},
            "fp16": {"enabled": self.dtype == "float16"},
        }

    @cached_property
    def _directory(self) -> TemporaryDirectory:
        """A new directory in `offload_path` for this teacher and process only, as DeepSpeed empties it at start."""
        return TemporaryDirectory(prefix="teacher-", dir=self.offload_path)

    def describe(self, model: PreTrainedModel) -> str:
        """One line for the log: placement, dtype, quantisation, and how many bytes of weights this process holds."""
        dtype = str(model.dtype).removeprefix("torch.")
        place = {
            "replicated": "replicated",
            "zero3": "sharded (zero3)",
            "offload": f"sharded, parked in {self.offload_path or 'CPU memory'}",
        }[self.placement]
        return f"{place}, {dtype}, {_quantization_of(model)}, {held_bytes(model):,} bytes of weights on this process"


class ShardedModel(nn.Module):
    """The ZeRO-3 engine of a frozen model whose encoder, decoder and head are called one by one."""

    def __init__(self, model: PreTrainedModel, placement: Placement):
        import deepspeed

        super().__init__()
        self.model = model
        engine, *_ = deepspeed.initialize(model=self, config=placement.deepspeed_config)
        self._offload = [engine.optimizer]  # in a list, or it would be a submodule of its own submodule

    def forward(self) -> None:
        """Does nothing: a call of the outermost module tells DeepSpeed that a new pass begins."""

    def begin_pass(self) -> None:
        """Starts a pass, in which DeepSpeed learns the order of calls so as to gather weights ahead of their use."""
        self()

    def drop_gathered(self) -> None:
        """Drops all gathered weights, also those gathered ahead of their use, so that only shards remain."""
        self._offload[0].empty_partition_cache()


def _can_offload_to_files() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible()


def _can_lock(size: int) -> bool:
    """Whether this process may lock `size` bytes in memory; where it may not, DeepSpeed would abort the process."""
    import resource  # Windows has no such module, and no DeepSpeed

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= size:
        return True
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(status["CapEff"], 16) >> _CAP_IPC_LOCK & 1)


def start_process_group() -> None:
    """Makes a process group for DeepSpeed of this process alone, unless several were launched or a group exists."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.accelerator.is_available():
        without_compiled_communication()
    launched = torch.distributed.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if torch.distributed.is_initialized() or launched:
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed takes the device's number from it


def _quantization_of(model: PreTrainedModel) -> str:
    """The model's quantisation in words; read from its config, as a checkpoint may have been saved quantised."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return "not quantised"
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("load_in_8bit"):
        return "linear layers quantised to int8"
    if settings.get("load_in_4bit"):
        return f"linear layers quantised to {settings['bnb_4bit_quant_type']}"
    return f"quantised in the checkpoint ({settings.get('quant_method')})"
