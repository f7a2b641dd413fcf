"""How much memory a model's weights take in this process."""

from collections.abc import Iterator

from torch import Tensor, nn

from rlkd_trl.models.private_apis import own_shard, quantisation_scales, scales_of_layers


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
