"""How much memory a model's weights take in this process, and that no more is kept."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from rlkd_trl.models.private_apis import own_shard, quantisation_scales, scales_of_layers

# Of glibc's mallopt(3): their numbers, and the largest sizes that glibc comes to by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM_THRESHOLD, _LARGEST_MMAP_THRESHOLD = 64 * 2**20, 32 * 2**20
_SET_BY_THE_ENVIRONMENT = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def giving_back_what_is_freed() -> Iterator[None]:
    """Within it tensors of 1 MiB and more that are freed leave the process at once.

    glibc puts those of up to 32 MiB into its heap, where what is kept between them holds the place of what was freed:
    while weights are quantised, more than the weights took before. Nothing is changed without glibc, or where the
    environment sets its thresholds. Afterwards they are the largest that glibc sets by itself, as they are after a
    while in any process with large tensors.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name in os.environ for name in _SET_BY_THE_ENVIRONMENT):
        yield
        return
    mallopt(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that this process holds, with the scales of quantised weights.

    Tied weights count once. Of a parameter that ZeRO-3 has cut into shards this process's shard counts, on whatever
    device it is, and the whole parameter as well while it is gathered.
    """
    weights = [part for weight in [*model.parameters(), *model.buffers()] for part in _parts(weight)]
    held = {id(tensor): tensor for tensor in [*weights, *scales_of_layers(model)]}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """Everything of a weight that takes memory: its data, its ZeRO-3 shard, and bitsandbytes' scales."""
    yield weight
    shard = own_shard(weight)
    if shard is not None:
        yield shard
    yield from quantisation_scales(weight)
