"""Random batches of completions of every kind, and the check that padding is ignored."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SEEDS = [0, 1, 2]
POISONS = [float("nan"), float("inf"), float("-inf"), 1e30]

# float64 against a float64 loop differs by the order of a few additions (2e-16 each); float32 by its 6e-8 rounding
# of numbers up to about 10, a few of them added.
TOLERANCES = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 5e-6}}
DTYPES = list(TOLERANCES)


class RaggedBatch(NamedTuple):
    """`lengths` and `ended` for the loops; the same as tensors; `has_value_BT1`, True where a state has a value."""

    lengths: list[int]
    ended: list[bool]
    mask_BT: Tensor
    ended_B: Tensor
    has_value_BT1: Tensor

    @property
    def rows(self):
        return list(zip(range(len(self.lengths)), self.lengths, self.ended, strict=True))


def ragged_batch(seed: int, T: int = 6) -> RaggedBatch:
    """Eight completions in random order: one token, full length and in between, ended and truncated, and a masked one.

    A truncated completion may be shorter than T: batches are padded to the longest over all ranks.
    """
    shuffler = random.Random(seed)
    rows = [(1, True), (1, False), (T, True), (T, False), (0, False)]
    rows += [(shuffler.randint(2, T - 1), ended) for ended in (True, True, False)]
    shuffler.shuffle(rows)
    lengths = [length for length, _ in rows]
    ended = [ended for _, ended in rows]
    mask_BT = torch.tensor([[t < length for t in range(T)] for length in lengths])
    has_value_BT1 = torch.tensor(
        [[t < length or (t == length and not ended) for t in range(T + 1)] for length, ended in rows]
    )
    return RaggedBatch(lengths, ended, mask_BT, torch.tensor(ended), has_value_BT1)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_matches(actual: Tensor, expected: float | list, dtype: torch.dtype | None = None) -> None:
    """`actual` against a nested list of Python floats, at the tolerance of its dtype."""
    dtype = dtype or actual.dtype
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), **TOLERANCES[dtype])


def assert_padding_is_ignored(function: Callable, *inputs: tuple[Tensor, Tensor], poison: float) -> None:
    """`function(*tensors)` gives bitwise the same values and gradients whatever stands behind the masks.

    Each of `inputs` is a tensor and the mask of its real entries. `function` returns one tensor, a tuple of them, or
    `(loss, metrics)`.
    """
    outputs, gradients = [], []
    for filler in (0.5, poison):
        tensors = [torch.where(real, x, torch.full_like(x, filler)).requires_grad_() for x, real in inputs]
        result = _flatten(function(*tensors))
        outputs.append([output.detach() for output in result])
        # Different weights for different entries: a plain sum would hide gradients that cancel.
        objective = sum(
            (output * torch.linspace(0.5, 2.5, max(1, output.numel()), dtype=output.dtype).view_as(output)).sum()
            for output in result
            if output.requires_grad
        )
        found = torch.autograd.grad(objective, tensors, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for x, g in zip(tensors, found, strict=True)])

    for clean, poisoned in zip(*outputs, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
    for (_, real), clean, poisoned in zip(inputs, *gradients, strict=True):
        assert poisoned.isfinite().all(), "the poison reached a gradient"
        torch.testing.assert_close(poisoned[real], clean[real], rtol=0, atol=0)
        assert (poisoned[~real] == 0).all() and (clean[~real] == 0).all(), "padding gets a gradient"


def _flatten(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    parts = [list(part.values()) if isinstance(part, dict) else [part] for part in result]
    return [tensor for part in parts for tensor in part]
