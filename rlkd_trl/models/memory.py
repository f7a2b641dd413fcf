"""How much memory a model's weights take in this process."""

from collections.abc import Iterator

from torch import Tensor, nn


def held_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers that this process holds, tied ones once, scales of quantised weights included.

    Of a parameter that ZeRO-3 has cut into shards that is this process's shard, wherever it is parked, and the whole
    parameter too while it is gathered.
    """
    weights = [part for weight in [*model.parameters(), *model.buffers()] for part in _parts(weight)]
    # bitsandbytes' int8 layers take their scales over from the weight when they are first used.
    scales = [getattr(getattr(module, "state", None), "SCB", None) for module in model.modules()]
    held = {id(tensor): tensor for tensor in [*weights, *scales] if isinstance(tensor, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _parts(weight: Tensor) -> Iterator[Tensor | None]:
    """A weight's own data, its ZeRO-3 shard, and bitsandbytes' scales: all that has memory of its own."""
    yield weight
    yield getattr(weight, "ds_tensor", None)
    yield getattr(weight, "SCB", None)  # int8: one scale per row
    state = getattr(weight, "quant_state", None)  # nf4: one scale per block, themselves quantised or not
    while state is not None:
        yield from (state.absmax, state.code, state.offset)
        state = getattr(state, "state2", None)
