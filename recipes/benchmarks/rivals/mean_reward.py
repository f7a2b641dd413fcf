"""R / T, the mean of a completion's shaped rewards, as one number for each completion."""

from torch import Tensor

from rlkd_trl.ops.masking import masked_sum
from rlkd_trl.rewards import RewardInputs


def mean_per_token(inputs: RewardInputs) -> Tensor:
    """Σ_t (q_t − max_v f_t[v]) / T, `[B]`; the centring of f cancels."""
    mask_BT = inputs.completion_mask_BT
    shaped_BT = inputs.scores.chosen - inputs.scores.max[:, :-1]
    return masked_sum(shaped_BT, mask_BT, dim=1) / mask_BT.sum(dim=1).clamp(min=1)
