"""Completion masks and masked statistics.

Everywhere in the package a `mask_BT` is True on real tokens. Masked entries never enter the arithmetic (they are
replaced, not multiplied by zero), so NaN or garbage behind a mask reaches neither a value nor a gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def completion_mask(completion_ids_BT: Tensor, eos_token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Mask of a completion's tokens up to and including its first EOS, and whether it has one.

    Derived from the EOS position alone: T5's pad id is also its decoder start, and many decoder-only tokenizers pad
    with EOS, so comparing with the pad id would be wrong for both.

    Returns `mask_BT` (bool) and `ended_B` (bool); a row without EOS is truncated and all its T positions are real.
    """
    eos_T = torch.tensor(eos_token_ids, device=completion_ids_BT.device, dtype=completion_ids_BT.dtype)
    is_eos_BT = torch.isin(completion_ids_BT, eos_T)
    eos_seen_before_BT = is_eos_BT.long().cumsum(dim=1) - is_eos_BT.long() > 0
    return ~eos_seen_before_BT, is_eos_BT.any(dim=1)


def state_mask(mask_BT: Tensor, ended_B: Tensor) -> Tensor:
    """`[B, T+1]`: True where state s_t exists, i.e. where the policy still has a token to choose.

    A completion of n tokens visits s_1 .. s_n; a truncated one also stops in s_{n+1}, from which it would go on.
    """
    mask_B1 = mask_BT.new_ones(len(mask_BT), 1)
    follows_real_token_BT1 = torch.cat([mask_B1, mask_BT], dim=1)
    return follows_real_token_BT1 & ~(after_last_token(mask_BT) & ended_B[:, None])


def after_last_token(mask_BT: Tensor) -> Tensor:
    """`[B, T+1]`: True at the one position that follows the last real token (position 1 of an empty completion)."""
    length_B1 = mask_BT.sum(dim=1, keepdim=True)
    return torch.arange(mask_BT.shape[1] + 1, device=mask_BT.device)[None, :] == length_B1


def last_token(mask_BT: Tensor) -> Tensor:
    """`[B, T]`: True at the last real token of each completion."""
    return after_last_token(mask_BT)[:, 1:]


def pad_columns(parts: list[Tensor], width: int, *, value: float = 0.0) -> Tensor:
    """Concatenates `[b, t]` tensors of different t ≤ width along the rows, padded with `value` to `width` columns."""
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value) for part in parts])


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask` is True and 0 elsewhere, in value and in gradient; what stands elsewhere may be NaN."""
    return torch.where(mask, x, 0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the entries where `mask` is True, over everything or over `dim`."""
    masked_x = masked(x, mask)
    return masked_x.sum() if dim is None else masked_x.sum(dim=dim)


def masked_moments(
    x: Tensor, mask: Tensor, *, sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and (population) variance of the entries where `mask` is True.

    `sum_over_ranks` adds a tensor up over all processes; with it, the moments are those of the global batch. Two
    passes, because E[x²] − E[x]² loses all digits when the mean is large.
    """
    x = masked(x, mask)
    total = sum_over_ranks or (lambda tensor: tensor)
    count = total(mask.sum().to(x.dtype)).clamp(min=1)
    mean = total(masked_sum(x, mask)) / count
    variance = total(masked_sum((x - mean) ** 2, mask)) / count
    return mean, variance


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(x − mean) / sqrt(variance + epsilon) over the real tokens of all ranks; 0 behind the mask.

    With `shift_mean=False` the mean is kept, as for rewards, where a shift would change the optimal policy.
    """
    x = masked(x, mask)
    mean, variance = masked_moments(x, mask, sum_over_ranks=sum_over_ranks)
    whitened = (x - mean) * torch.rsqrt(variance + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return masked(whitened, mask)
