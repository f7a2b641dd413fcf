"""Which samples an update can use: those whose numbers are finite."""

from torch import Tensor

# Variances take squares: of 1e15 there can be some hundred million before their sum overflows float32.
LARGEST = 1e15


def usable_rows(numbers_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`[B]`: True where no number on a real token is NaN, infinite or beyond ±`LARGEST`."""
    return ((numbers_BT.abs() <= LARGEST) | ~mask_BT).all(dim=1)


def usable_states(states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """`usable_rows` of a vector for each token."""
    lowest_BT, highest_BT = states_BTD.aminmax(dim=-1)
    mask_BT = mask_BT.to(states_BTD.device)
    return usable_rows(lowest_BT, mask_BT) & usable_rows(highest_BT, mask_BT)
