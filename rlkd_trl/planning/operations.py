"""What a model's passes compute: for each operation its arithmetic and the bytes it reads and writes.

Counted while the package's own code runs on fake tensors, as the bytes of `activations.py` are.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Operation:
    """flops: of matrix products and attention, a multiplication and an addition being two; nbytes: read and written.

    is_16_bit: whether it computes in bfloat16 or float16.
    """

    flops: int
    nbytes: int
    is_16_bit: bool


def operations_of(func: OpOverload, args: tuple, kwargs: dict, result: object) -> list[Operation]:
    """The operation that a call of torch's is, from its arguments and result; none if it computes and moves nothing.

    Views do neither. A gather, such as an embedding's, reads as much as it writes, not the whole table; a scatter
    writes as much as it is given; what is overwritten is not read.
    """
    inputs, outputs = _tensors((args, kwargs)), _tensors(result)
    if not outputs or func.overloadpacket in _ALLOCATIONS or _is_view(func, inputs, outputs):
        return []
    count = _FLOPS.get(func.overloadpacket)
    return [
        Operation(
            flops=0 if count is None else int(count(*args, **kwargs, out_val=result)),
            nbytes=_moved(func, inputs, outputs),
            is_16_bit=any(tensor.is_floating_point() and tensor.element_size() == 2 for tensor in outputs),
        )
    ]


def _moved(func: OpOverload, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = sum(map(_nbytes, outputs))
    if func.overloadpacket in _GATHERS:
        return 2 * written
    if func.overloadpacket in _SCATTERS:
        return 2 * sum(map(_nbytes, inputs[1:]))
    overwritten = _nbytes(inputs[0]) if func.overloadpacket in _OVERWRITES else 0
    return written + sum(map(_nbytes, inputs)) - overwritten


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _is_view(func: OpOverload, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
    """Whether the outputs are the inputs' memory, unchanged. What changes its input has a name that ends in "_"."""
    storages = [tensor.untyped_storage() for tensor in inputs]
    is_in_place = func.overloadpacket.__name__.endswith("_")
    return not is_in_place and all(any(t.untyped_storage() is each for each in storages) for t in outputs)


_aten = torch.ops.aten
# The CPU's attention has the arguments of CUDA's, whose arithmetic torch counts.
_FLOPS = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_OVERWRITES = {_aten.copy_, _aten.fill_, _aten.zero_}  # their first argument
_SCATTERS = {_aten.index_put_, _aten.index_copy_, _aten.index_add_, _aten.scatter_, _aten.scatter_add_}
_GATHERS = {
    _aten.embedding,
    _aten.gather,
    _aten.index,
    _aten.index_select,
}


def _nbytes(tensor: Tensor) -> int:
    """Of its elements in memory; those that `expand` repeats count once."""
    repeated = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        repeated *= size if stride == 0 and size else 1
    return tensor.numel() // repeated * tensor.element_size()
