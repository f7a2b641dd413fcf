"""Whether weights and gradients are numbers at all: one NaN spreads over a whole model within one step."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rlkd_trl.errors import InputError
from rlkd_trl.models.private_apis import own_shard, quantisation_scales

_SHOWN = 3


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity, from the tensor's extremes: without `isfinite`'s temporary tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:  # meta: offloaded, not readable
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that hold NaN or infinity."""
    return [name for name, tensor in tensors if not is_finite(tensor)]


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter with its name: with its scales if it is quantised, as this process's shard if ZeRO-3 has cut it.

    Buffers are left out, as some architectures keep masks with −inf in them.
    """
    for name, parameter in model.named_parameters():
        shard = own_shard(parameter)
        yield name, (parameter if shard is None else shard).detach()
        yield from ((name, scale) for scale in quantisation_scales(parameter))


def check_weights(model: nn.Module, model_name: str) -> None:
    """Raises `InputError` if a weight is NaN or infinite."""
    bad = not_finite(weights_of(model))
    if bad:
        raise InputError(
            f"{model_name} has weights that are NaN or infinite, in {listed(bad)}: it was destroyed in training or in "
            "saving; use an older checkpoint."
        )


def refuse_float16_weights(model: nn.Module) -> None:
    """Raises `InputError` for trainable weights in float16: there AdamW's epsilon of 1e-8 is 0, and 0 / 0 is NaN."""
    if any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters()):
        raise InputError(
            "Weights in float16 cannot be trained, their updates underflow: load the student in float32 (with --fp16 "
            "for mixed precision) or bfloat16."
        )


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
