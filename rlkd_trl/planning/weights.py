"""The bytes of weights: whole, quantised as bitsandbytes does it, and split over ranks by DDP and ZeRO."""

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from rlkd_trl.models.private_apis import modules_kept_in_float32
from rlkd_trl.planning.skeletons import Skeleton

SHARDINGS = ("ddp", "zero1", "zero2", "zero3")

# DeepSpeed's defaults for `stage3_max_live_parameters` and `reduce_bucket_size`, in elements.
MAX_LIVE_PARAMETERS = 10**9
REDUCE_BUCKET_ELEMENTS = 5 * 10**8

_FLOAT32 = 4
_NF4_BLOCK = 64  # weights that share one scale
_NF4_CODES = 16  # each quantised matrix has its own table of them, in float32


def weight_bytes(skeleton: Skeleton, quantization: str = "none") -> int:
    """Bytes of weights and buffers in the skeleton's dtype; tied ones count once.

    Matrices that bitsandbytes converts count as it stores them. int8: one byte per weight, and a float32 scale per
    output. nf4: half a byte per weight, a float32 scale per block of 64, and a table of 16 codes per matrix.
    """
    total = sum(tensor.nbytes for tensor in skeleton.tensors())
    for module in _quantised(skeleton) if quantization != "none" else []:
        weights = module.weight.numel()
        outputs = module.nf if isinstance(module, Conv1D) else module.out_features
        if quantization == "int8":
            stored = weights + _FLOAT32 * outputs
        else:
            stored = -(-weights // 2) + _FLOAT32 * (-(-weights // _NF4_BLOCK) + _NF4_CODES)
        total += stored - module.weight.nbytes
    return total


def quantisation_workspace_bytes(skeleton: Skeleton) -> int:
    """Bytes of the largest quantised matrix as it was, which a product with it may need besides the stored one."""
    return max((module.weight.nbytes for module in _quantised(skeleton)), default=0)


def _quantised(skeleton: Skeleton) -> list[nn.Module]:
    """The layers that bitsandbytes converts: linear ones, except the LM head and those kept in float32."""
    model = skeleton.model
    not_converted = HfQuantizer.get_modules_to_not_convert(model, None, list(modules_kept_in_float32(model)))
    return [
        module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, not_converted)
    ]


@dataclass(frozen=True)
class Shares:
    """What a rank holds of a model in training, in bytes.

    elsewhere: the weights that only other ranks hold. gathered: the part of those that is on this rank while it
    learns.
    """

    weights: int
    gathered: int
    elsewhere: int
    gradients: int
    optimizer: int


def live_bytes(num_parameters: int, nbytes: int) -> int:
    """Bytes of weights that ZeRO-3 has on a GPU at a time while it computes. nbytes: of all of them."""
    return nbytes * min(num_parameters, MAX_LIVE_PARAMETERS) // num_parameters


def gathered_bytes(num_parameters: int, nbytes: int, ranks: int) -> int:
    """The part of `live_bytes` that comes from other ranks."""
    live = live_bytes(num_parameters, nbytes)
    return live - live // ranks


def training_shares(
    sharding: str,
    *,
    trained: int,
    frozen: int,
    itemsize: int,
    ranks: int,
    bf16: bool = False,
    frozen_bytes: int | None = None,
) -> Shares:
    """A rank's shares of a model with `trained` and `frozen` parameters under AdamW, the trained of `itemsize` bytes.

    bf16: mixed precision. DDP keeps the weights as they are and computes under autocast; DeepSpeed has its weights in
    bfloat16, but for quantised ones. frozen_bytes: of all frozen parameters; by default they are of `itemsize` too.
    """
    frozen_bytes = frozen * itemsize if frozen_bytes is None else frozen_bytes
    if sharding == "ddp":
        of_trained = trained * itemsize
        buckets = of_trained if ranks > 1 else 0
        return Shares(of_trained + frozen_bytes, 0, 0, of_trained + buckets, 2 * of_trained)
    if bf16:
        itemsize, frozen_bytes = 2, min(frozen_bytes, 2 * frozen)
    stage = int(sharding.removeprefix("zero"))
    weights = trained * itemsize + frozen_bytes
    gradients = trained * itemsize // (ranks if stage >= 2 else 1) + trained * _FLOAT32 // ranks
    held = weights // ranks if stage == 3 else weights
    return Shares(
        weights=held,
        gathered=gathered_bytes(trained + frozen, weights, ranks) if stage == 3 else 0,
        elsewhere=weights - held,
        gradients=gradients + REDUCE_BUCKET_ELEMENTS * itemsize,
        optimizer=3 * trained * _FLOAT32 // ranks,
    )
