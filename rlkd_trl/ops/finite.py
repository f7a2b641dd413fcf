"""Which samples an update can use: those whose numbers are finite."""

from torch import Tensor

# A variance adds squares up: 3e8 squares of 1e15 fit into a float32 (3.4e38), which is more than a rollout has tokens.
LARGEST = 1e15


def usable_rows(numbers_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`[B]`: True where no number on a real token is NaN, infinite or beyond ±`LARGEST`."""
    return ((numbers_BT.abs() <= LARGEST) | ~mask_BT).all(dim=1)


def usable_states(states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """`[B]`: True where the hidden states of all real tokens are usable numbers, as `usable_rows` says.

    `states_BTD` may be on another device than `mask_BT`; the result is on the states' device.
    """
    lowest_BT, highest_BT = states_BTD.aminmax(dim=-1)
    mask_BT = mask_BT.to(states_BTD.device)
    return usable_rows(lowest_BT, mask_BT) & usable_rows(highest_BT, mask_BT)
